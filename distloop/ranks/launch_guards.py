"""Guards against runs that are not what was started, and what an Accelerate launcher says that the config decides.

torch and Accelerate are imported where they are needed: the environment has to be in order before that.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

from distloop.errors import UsageError

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class Launch(NamedTuple):
    """What an `accelerate launch` parent was asked for."""

    processes: int
    multi_gpu: bool
    script: str


def launcher_uses_cpu(environ: Mapping[str, str]) -> bool:
    """Whether an Accelerate launcher, or its user, asks for the CPU."""
    return environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1", "yes")


def override_launcher(environ: MutableMapping[str, str], precision: str) -> list[str]:
    """Take what belongs to the config out of an Accelerate launcher's environment; one warning where
    they differ.

    Raises UsageError for what this program does not do.
    """
    for name in ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise UsageError(
                f"The launcher asks for {name} (ACCELERATE_USE_{name}); distloop trains with DDP only: "
                "launch without it."
            )
    ours = {
        "ACCELERATE_MIXED_PRECISION": ("precision", precision),
        "ACCELERATE_DYNAMO_BACKEND": ("compile", "no"),
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("batch.micro_size", "1"),
    }
    refused = []
    for variable, (key, value) in ours.items():
        asked = environ.pop(variable, value).lower()
        # "no" and "1" are what a launcher exports when nobody asked for anything.
        if asked not in ("no", "1", value):
            refused.append(f"{variable}={asked} ({key})")
    environ.pop("ACCELERATE_USE_CPU", None)  # the device has been chosen; Accelerate is told by an argument
    for variable in [name for name in environ if name.startswith("ACCELERATE_DYNAMO_")]:
        environ.pop(variable)
    if not refused:
        return []
    return [f"the launcher's {', '.join(refused)} has no effect: the config decides, with the setting in brackets"]


def launched_by() -> Launch | None:
    """The `accelerate launch` that is this process's parent, read by Accelerate's own parser; else None."""
    try:
        with open(f"/proc/{os.getppid()}/cmdline") as file:
            words = file.read().split("\0")[:-1]
        position = _launcher_end(words)
        if position is None:
            return None
        from accelerate.commands.launch import _validate_launch_command, launch_command_parser

        parser = launch_command_parser()
        silence = io.StringIO()
        with contextlib.redirect_stderr(silence), contextlib.redirect_stdout(silence):
            arguments = parser.parse_args(words[position:])
            arguments, _, _ = _validate_launch_command(arguments)
        return Launch(int(arguments.num_processes), bool(arguments.multi_gpu), str(arguments.training_script))
    except (Exception, SystemExit):  # another operating system, another launcher, another Accelerate: no opinion
        return None


def _launcher_end(words: Sequence[str]) -> int | None:
    """Where the launcher's own arguments start in a command line, None if it is not `accelerate launch`."""
    for position, word in enumerate(words[:4]):
        name = os.path.basename(word)
        if name == "accelerate" and words[position + 1 : position + 2] == ["launch"]:
            return position + 2
        if name == "accelerate-launch" or word.endswith(
            ("accelerate/commands/launch.py", "accelerate.commands.launch")
        ):
            return position + 1
    return None


def check_launch(environ: Mapping[str, str], launch: Launch | None, device: str, use_cpu: bool) -> None:
    """Before the process group exists: refuse launches that cannot become the world they ask for.

    `device` is the config's; `use_cpu`: whether the run will compute on the CPU.
    """
    world = int(environ.get("WORLD_SIZE", 1))
    missing = [name for name in RANK_VARIABLES if name not in environ]
    if missing and (world > 1 or int(environ.get("RANK", 0)) > 0):
        raise UsageError(
            f"The environment says that this is one of several processes, but {', '.join(missing)} is not set.\n"
            f"{right_commands(None, world)}"
        )
    explicit = device == "cpu" or launcher_uses_cpu(environ)
    if launch and launch.processes != world and int(environ.get("LOCAL_WORLD_SIZE", world)) < world:
        raise UsageError(
            f"accelerate launch was asked here for {launch.processes} processes on all machines, which have started "
            f"{world}: give the same numbers on each machine (PROCESSES and MACHINES, or --num_processes)."
        )
    if launch and launch.processes > 1 and world != launch.processes:
        raise UsageError(
            f"accelerate launch was asked for {launch.processes} processes, but this is one process of "
            f"{world}: the run would silently not be distributed.\n{right_commands(launch)}"
        )
    if world > 1 and use_cpu and not explicit and (launch is not None or "ACCELERATE_MIXED_PRECISION" in environ):
        raise UsageError(
            f"accelerate launch started {world} processes for GPUs, but no GPU is visible here.\n"
            f"{right_commands(launch, world)}"
        )


def check_world(world_size: int, environ: Mapping[str, str], expected: int | None, launch: Launch | None) -> None:
    """Once Accelerate says how many processes there are: refuse a world that is not what was started."""
    claims = {"--expect-world": expected, "WORLD_SIZE": int(environ["WORLD_SIZE"]) if "WORLD_SIZE" in environ else None}
    for source, claim in claims.items():
        if claim is not None and claim != world_size:
            raise UsageError(
                f"{source} says {claim} processes, but the run has {world_size}.\n{right_commands(launch, claim)}"
            )
    tasks = int(environ.get("SLURM_STEP_NUM_TASKS", 1))
    if tasks > 1 and world_size % tasks:  # a launcher per node makes a multiple of the tasks
        raise UsageError(
            f"srun started {tasks} tasks, but the run has {world_size} processes: each would train on its own.\n"
            f"Start it with nothing else in between: srun --ntasks={tasks} python -m distloop.train …"
        )


def right_commands(launch: Launch | None, processes: int | None = None) -> str:
    """The forms that do start `processes` ranks."""
    count = processes or (launch.processes if launch else 1)
    script = launch.script if launch else "distloop/train.py"
    if count == 1:
        return f"One process: python {script} …"
    common = f"--multi_gpu --num_machines 1 --num_processes {count} --main_process_port 0"
    quiet = "--mixed_precision no --dynamo_backend no"
    return (
        f"{count} processes on the CPU: ACCELERATE_USE_CPU=true accelerate launch {common} {quiet} {script} …\n"
        f"{count} GPUs of this machine: accelerate launch {common} {quiet} {script} …"
    )


def check_devices(device: Any, world_size: int) -> None:
    """Refuse two ranks on one physical GPU. One visible device per task is fine."""
    import torch
    import torch.distributed as dist

    if device.type != "cuda" or world_size == 1:
        return
    here = (os.uname().nodename, str(torch.cuda.get_device_properties(device).uuid))
    places: list[Any] = [None] * world_size
    dist.all_gather_object(places, here)
    for place in set(places):
        ranks = [rank for rank, other in enumerate(places) if other == place]
        if len(ranks) > 1:
            raise UsageError(
                f"Ranks {', '.join(map(str, ranks))} are on one GPU ({place[1]} of {place[0]}): start at most one "
                "process per GPU, and see that CUDA_VISIBLE_DEVICES differs between tasks that see one each."
            )
