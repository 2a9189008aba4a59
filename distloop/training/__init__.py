"""What a step computes: models, tasks, optimizers, gradients, losses, validation."""

from typing import TYPE_CHECKING

from distloop import hand_on

if TYPE_CHECKING:
    from distloop.training.due import due_after
    from distloop.training.gradients import divide_by_weight, norm_and_clip, trial_batches
    from distloop.training.losses import LossSums
    from distloop.training.models import build_model
    from distloop.training.nonfinite import FiniteCheck
    from distloop.training.optim import Average, LearningRate, build_optimizer, parameter_groups, set_lr
    from distloop.training.tasks import Task, build_task
    from distloop.training.validation import Validation, broadcast_buffers
else:
    __getattr__ = hand_on(__name__, __file__)
