"""Accelerate's Accelerator for a config: device, mixed precision, DDP, and the guards around its start."""

from __future__ import annotations

import os
import warnings

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs

from distloop.config.settings import Config
from distloop.errors import UsageError
from distloop.ranks import launch_guards
from distloop.ranks import meeting as rendezvous
from distloop.ranks.roll_call import RollCall


def build_accelerator(config: Config, roll_call: RollCall) -> tuple[Accelerator, list[str]]:
    """The Accelerator for this config, and warnings. Raises UsageError for a launch that is not what it says."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = config.device
    if kind == "auto" and launch_guards.launcher_uses_cpu(os.environ):
        kind = "cpu"
    if kind == "auto":
        kind = "cuda" if available["cuda"] else "mps" if available["mps"] else "cpu"
    if not available[kind]:
        raise UsageError(f"device = {config.device!r}: PyTorch sees no such device here; use --device auto or cpu.")
    if config.precision == "fp16" and kind == "cpu":
        raise UsageError("precision = 'fp16' needs a GPU: on the CPU it would silently train in float32. Use bf16.")
    if config.dtype == "float64" and kind == "mps":
        raise UsageError("dtype = 'float64' does not exist on MPS; use --device cpu.")
    launch = launch_guards.launched_by()
    launch_guards.check_launch(os.environ, launch, config.device, kind == "cpu")
    messages = launch_guards.override_launcher(os.environ, config.precision)
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    launch_guards.check_world(world_size, os.environ, config.expect_world, launch)
    local_device = None
    if kind == "cuda" and "LOCAL_RANK" in os.environ:
        # A task that sees one device only has it as number 0, whatever its local rank.
        local_device = int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count()
        os.environ["LOCAL_RANK"] = str(local_device)
        torch.cuda.set_device(local_device)  # before the process group exists, or it guesses
    if world_size > 1:
        rendezvous.start_group(os.environ, config.ddp, local_device, roll_call)
    # torch 2.14 renames the argument below, Accelerate has not followed yet.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
    accelerator = Accelerator(
        cpu=kind == "cpu",
        mixed_precision=config.precision,
        kwargs_handlers=[
            DistributedDataParallelKwargs(
                find_unused_parameters=config.ddp.find_unused_parameters,
                broadcast_buffers=False,  # we do so before validating and saving, not in each forward pass
            )
        ],
    )
    launch_guards.check_world(accelerator.num_processes, os.environ, config.expect_world, launch)
    launch_guards.check_devices(accelerator.device, accelerator.num_processes)
    return accelerator, messages
