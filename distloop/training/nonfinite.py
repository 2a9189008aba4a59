"""Find steps whose gradient is not finite. The device finds them; the host hears of it when something is due."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distloop.data.order import Plan
from distloop.errors import RunFailed, UsageError
from distloop.ranks.talking import say
from distloop.training.groups import frozen_at
from distloop.training.optimizers import optimizers_of
from distloop.training.untrained import refuse_unused_parameters, say_unused, unused_parameters

MOST_UNREAD = 1000  # steps: a bound on what is kept where logging is rare


class Step(NamedTuple):
    """A step that check() has not read yet."""

    number: int
    norm: Tensor
    losses: list[Tensor]


def not_frozen(
    parameters: list[nn.Parameter], optimizers: Sequence[torch.optim.Optimizer], step: int
) -> list[nn.Parameter]:
    """The parameters without those that are frozen in this step. Raises UsageError if these have gradients, in a loop
    that does not leave them out."""
    frozen = [p for optimizer in optimizers for group in frozen_at(optimizer, step) for p in group["params"]]
    if not frozen:
        return parameters
    if any(parameter.grad is not None for parameter in frozen):
        raise UsageError(
            "optim.groups has a group with until_step, and this loop would train it from the first step on. Before "
            "norm_and_clip(), call leave_out_frozen(optimizer, step) of distloop.training."
        )
    ids = set(map(id, frozen))
    return [parameter for parameter in parameters if id(parameter) not in ids]


class FiniteCheck:
    """Checks the norm of each step's gradient. All ranks have the same norm and so decide alike.

    No step waits for the device: the norms stay there until check(). With the policy "skip", a flag on the device
    makes the optimizer leave a bad step out (as a GradScaler does), and buffers that the forward pass has changed,
    such as BatchNorm's statistics, are restored.
    """

    def __init__(
        self,
        policy: Literal["stop", "skip"],
        model: nn.Module,
        optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        scaler: Any,
        plan: Plan,
        skipped_steps: int = 0,
        task: Any = None,
    ) -> None:
        """`model` and, where it is a module, `task`: hold all that is trained; give DDP's model, so that gradients that
        it lacks are named. `optimizers`: all that update it. `skipped_steps`: those of earlier attempts."""
        self.policy, self.scaler, self.plan = policy, scaler, plan
        given = [optimizers] if isinstance(optimizers, torch.optim.Optimizer) else list(optimizers)
        self.optimizers = [inner for optimizer in given for inner in optimizers_of(optimizer)]
        if scaler is not None and len(given) > 1:
            raise UsageError(
                "precision = 'fp16': its gradient scaler serves one optimizer, and this loop has several. Use bf16."
            )
        self.skipped_steps = skipped_steps
        self.unread: list[Step] = []
        self.task = task if isinstance(task, nn.Module) else nn.Module()
        self.model, self.parameters, self.is_first = model, list(model.parameters()), True
        self.skips = policy == "skip" and scaler is None  # a GradScaler skips by itself
        self.buffers_before: list[Tensor] = []
        for optimizer in self.optimizers if self.skips else ():
            if (
                isinstance(optimizer, torch.optim.SGD)
                and optimizer.defaults["fused"]
                and optimizer.defaults["momentum"]
            ):
                # Fused SGD takes its first step's moments from uninitialised memory when it leaves that step out.
                for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                    if parameter not in optimizer.state:
                        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    def begin_step(self) -> None:
        """Before a step's first forward pass."""
        if self.policy == "skip":
            buffers = self._buffers()
            if len(self.buffers_before) != len(buffers):
                self.buffers_before = [buffer.clone() for buffer in buffers]
            elif buffers:
                torch._foreach_copy_(self.buffers_before, buffers)

    def _buffers(self) -> list[Tensor]:
        return [*self.model.buffers(), *self.task.buffers()]

    def before_update(self, step: int, norm: Tensor, losses: list[Tensor]) -> Tensor | None:
        """Before the update. `norm`: of the whole gradient. `losses`: of this rank's micro-batches.

        Returns the flag (a bool on the device) that says whether the step is left out; None if no step ever is. Raises
        UsageError if DDP's model has parameters without a gradient.
        """
        parameters = not_frozen(self.parameters, self.optimizers, step)
        refuse_unused_parameters(self.model, parameters, "in step", step + 1)
        if self.is_first and self.plan.world_size == 1 and (names := unused_parameters(self.model, parameters)):
            say(f"distloop: {say_unused(names)}")
        self.is_first = False
        self.unread.append(Step(step, norm, losses))
        if self.policy == "stop":
            return None
        bad = ~torch.isfinite(norm)
        for buffer, before in zip(self._buffers(), self.buffers_before, strict=True):
            torch.where(bad, before, buffer, out=buffer)
        for optimizer in self.optimizers if self.skips else ():
            if optimizer.defaults.get("fused"):
                optimizer.grad_scale, optimizer.found_inf = None, bad.to(torch.float32)  # type: ignore[attr-defined]
            elif bool(bad):  # without a fused optimizer (MPS) the host has to look
                optimizer.zero_grad()
        return bad

    def after_update(self, optimizer: Any) -> None:
        """Count a step that fp16's GradScaler has skipped. `optimizer` is Accelerate's wrapper there."""
        if self.scaler is not None:
            self.skipped_steps += optimizer.step_was_skipped

    @property
    def is_full(self) -> bool:
        """Whether check() is due although nothing else is."""
        return len(self.unread) >= MOST_UNREAD

    def check(self) -> list[str]:
        """A line for each step since the last call that was left out. Collective; waits for the device.

        Raises RunFailed, on all ranks, for the first bad step if the policy is "stop".
        """
        steps, self.unread = self.unread, []
        if not steps:
            return []
        if self.scaler is None:
            finite = torch.stack([step.norm for step in steps]).isfinite()
        else:  # gradients may overflow there, which the scaler mends; losses may not
            finite = torch.stack([torch.stack(step.losses).isfinite().all() for step in steps])
            if self.plan.world_size > 1:
                votes = finite.int()
                dist.all_reduce(votes, dist.ReduceOp.MIN)
                finite = votes.bool()
        bad = [step for step, good in zip(steps, finite.tolist(), strict=True) if not good]
        if bad and self.policy == "stop":
            raise RunFailed(
                f"{self._describe(bad[0])}\nThe run ends here; its checkpoints hold none of it. Look at these samples, "
                "lower optim.lr, set optim.clip_norm, or go on without such steps: --train.on-nonfinite skip"
            )
        if self.skips:
            self.skipped_steps += len(bad)
        return [f"distloop: WARNING: {self._describe(step)} It was left out." for step in bad]

    def check_parameters(self, step: int, parameters: Sequence[Tensor]) -> None:
        """Before a checkpoint: an update may overflow although its gradient is finite. Waits for the device.

        Raises RunFailed, on all ranks.
        """
        if not bool(torch.nn.utils.get_total_norm(parameters, float("inf")).isfinite()):
            raise RunFailed(
                f"The parameters are not finite after step {step}, while its gradient was: optim.lr is far too high. "
                "The checkpoints hold none of it."
            )

    def _describe(self, step: Step) -> str:
        """A sentence about a bad step, with the first micro-batch whose loss is not finite. Collective."""
        own = [index for index, loss in enumerate(step.losses) if not bool(torch.isfinite(loss))]
        bad_ones = [own]  # by rank
        if self.plan.world_size > 1:
            bad_ones = [[] for _ in range(self.plan.world_size)]
            dist.all_gather_object(bad_ones, own)
        epoch, start, stop = self.plan.span(step.number)
        what = f"The gradient of step {step.number + 1} is not finite ({float(step.norm)})"
        for rank, indices in enumerate(bad_ones):
            if indices:
                part = self.plan.window(step.number, rank)[indices[0]]
                samples = self._samples(epoch, part.start, part.stop)
                micro = f"micro-batch {indices[0] + 1} of {len(step.losses)}, " if len(step.losses) > 1 else ""
                return f"{what}: the loss of rank {rank} is not either ({micro}{samples})."
        return f"{what}, while the losses of all ranks are ({self._samples(epoch, start, stop)})."

    def _samples(self, epoch: int, start: int, stop: int) -> str:
        samples = self.plan.order(epoch, start, stop).tolist()
        listed = ", ".join(map(str, samples[:8])) + (", …" if len(samples) > 8 else "")
        return f"{len(samples)} samples: {listed}; epoch {epoch + 1}"
