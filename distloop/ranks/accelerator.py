"""Accelerate's Accelerator for a config: device, mixed precision, DDP, and the guards around its start."""

import os
import warnings

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs

from distloop.config.settings import Config
from distloop.errors import UsageError
from distloop.ranks import launch_guards
from distloop.ranks.meeting import start_group
from distloop.ranks.ranks import Ranks


def build_accelerator(config: Config, ranks: Ranks) -> Accelerator:
    """The Accelerator for this config. Collective: all ranks connect here. Also sets the process's matmul_precision and
    detect_anomaly. Raises UsageError if the launch does not fit the config, RunFailed if ranks are missing."""
    device = choose_device(config)
    launch = launch_guards.launched_by()
    launch_guards.check_launch(os.environ, launch, config.device, device == "cpu")
    ranks.messages += launch_guards.override_launcher(os.environ, config.precision)
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    launch_guards.check_world(world_size, os.environ, config.expect_world, launch)
    gpu, local_rank = None, os.environ.get("LOCAL_RANK")
    if device == "cuda" and local_rank is not None:
        # A Slurm task may see one device only, which is then number 0 for each local rank.
        gpu = int(local_rank) % torch.cuda.device_count()
        torch.cuda.set_device(gpu)  # before the process group exists, which would guess
    if world_size > 1:
        start_group(os.environ, config.ddp, gpu, ranks.roll_call)
    if gpu is not None:
        os.environ["LOCAL_RANK"] = str(gpu)  # Accelerate takes it for the number of the device
    # torch 2.14 renames the argument below; Accelerate still uses the old name.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
    accelerator = Accelerator(
        cpu=device == "cpu",
        mixed_precision=config.precision,
        kwargs_handlers=[
            DistributedDataParallelKwargs(
                find_unused_parameters=config.ddp.find_unused_parameters,
                gradient_as_bucket_view=config.ddp.gradient_as_bucket_view,
                bucket_cap_mb=config.ddp.bucket_cap_mb,
                broadcast_buffers=False,  # train() does so before it validates and saves, not in each forward pass
            )
        ],
    )
    if local_rank is not None:
        os.environ["LOCAL_RANK"] = local_rank  # of the ranks of a machine, the one with 0 speaks
    launch_guards.check_world(accelerator.num_processes, os.environ, config.expect_world, launch)
    torch.set_float32_matmul_precision(config.matmul_precision)
    torch.autograd.set_detect_anomaly(config.train.detect_anomaly)
    return accelerator


def choose_device(config: Config) -> str:
    """cpu, cuda or mps. Raises UsageError if it does not exist here, or cannot do what the config says."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    device: str = config.device
    if device == "auto" and launch_guards.launcher_uses_cpu(os.environ):
        device = "cpu"
    if device == "auto":
        device = next(kind for kind in available if available[kind])
    if not available[device]:
        raise UsageError(f"device = {config.device!r}: PyTorch sees no such device here; use --device auto or cpu.")
    if config.precision == "fp16" and device == "cpu":
        raise UsageError("precision = 'fp16' needs a GPU: on the CPU it would silently train in float32. Use bf16.")
    if config.dtype == "float64" and device == "mps":
        raise UsageError("dtype = 'float64' does not exist on MPS; use --device cpu.")
    return device
