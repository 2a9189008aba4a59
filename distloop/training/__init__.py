"""What a step computes: models, tasks, optimizers, gradients, losses, validation."""

from typing import TYPE_CHECKING

from distloop import hand_on

if TYPE_CHECKING:
    from distloop.training.averaging import Average as Average
    from distloop.training.buffers import broadcast_buffers as broadcast_buffers
    from distloop.training.due import due_after as due_after
    from distloop.training.gradients import divide_by_weight as divide_by_weight
    from distloop.training.gradients import norm_and_clip as norm_and_clip
    from distloop.training.gradients import trial_batches as trial_batches
    from distloop.training.groups import parameter_groups as parameter_groups
    from distloop.training.groups import set_lr as set_lr
    from distloop.training.losses import LossSums as LossSums
    from distloop.training.models import build_model as build_model
    from distloop.training.nonfinite import FiniteCheck as FiniteCheck
    from distloop.training.optimizers import build_optimizer as build_optimizer
    from distloop.training.rehearsal import rehearse as rehearse
    from distloop.training.schedules import LearningRate as LearningRate
    from distloop.training.task_model import offered_to_task as offered_to_task
    from distloop.training.tasks import Task as Task
    from distloop.training.tasks import build_task as build_task
    from distloop.training.validation import Validation as Validation
else:
    __getattr__ = hand_on(__name__, __file__)
