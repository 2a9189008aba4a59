"""Refuse a launch with other processes than its user asked for. Functions import torch: it reads the environment."""

import contextlib
import io
import os
import shlex
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

from distloop.errors import UsageError

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class Launch(NamedTuple):
    """What the command line of an `accelerate launch` asks for."""

    processes: int
    multi_gpu: bool
    script: str
    is_module: bool = False
    """The script is a module's name: -m distloop.train."""


def launcher_uses_cpu(environ: Mapping[str, str]) -> bool:
    """True if an Accelerate launcher, or its user, asks for the CPU."""
    return environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1", "yes")


def override_launcher(environ: MutableMapping[str, str], precision: str) -> list[str]:
    """Remove an Accelerate launcher's variables for what the config decides; returns a warning if they differ from it.
    Raises UsageError for a kind of training that distloop does not do."""
    for name in ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise UsageError(
                f"The launcher asks for {name} (ACCELERATE_USE_{name}); distloop trains with DDP only: "
                "launch without it."
            )
    decided = {
        "ACCELERATE_MIXED_PRECISION": ("precision", precision),
        "ACCELERATE_DYNAMO_BACKEND": ("compile", "no"),
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("batch.micro_size", "1"),
    }
    ignored = []
    for variable, (key, value) in decided.items():
        asked = environ.pop(variable, value).lower()
        if asked not in ("no", "1", value):  # the launcher's defaults are "no" and "1"
            ignored.append(f"{variable}={asked} ({key})")
    environ.pop("ACCELERATE_USE_CPU", None)  # the device has been chosen; Accelerate gets it as an argument
    for variable in [name for name in environ if name.startswith("ACCELERATE_DYNAMO_")]:
        environ.pop(variable)
    if not ignored:
        return []
    return [f"the launcher's {', '.join(ignored)} has no effect: the config decides, with the setting in brackets"]


def launched_by() -> Launch | None:
    """The parent's command line, read by Accelerate's own parser; None if it is no `accelerate launch`."""
    import psutil

    try:
        words = psutil.Process(os.getppid()).cmdline()
        if (first_argument := _first_argument(words)) is None:
            return None
        from accelerate.commands.launch import _validate_launch_command, launch_command_parser

        output = io.StringIO()  # not for the user
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words[first_argument:]))
        script, is_module = str(arguments.training_script), bool(arguments.module)
        return Launch(int(arguments.num_processes), bool(arguments.multi_gpu), script, is_module)
    except (Exception, SystemExit):  # a parent that may not be read; another launcher or version of Accelerate
        return None


def _first_argument(words: Sequence[str]) -> int | None:
    """The index of the launcher's first argument in a command line; None if it is no `accelerate launch`."""
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
    """Raise UsageError if the launch started other processes than its user asked for. `device`: the config's."""
    world = int(environ.get("WORLD_SIZE", 1))
    missing = [name for name in RANK_VARIABLES if name not in environ]
    if missing and (world > 1 or int(environ.get("RANK", 0)) > 0):
        raise UsageError(
            f"The environment says that this is one of several processes, but {', '.join(missing)} is not set.\n"
            f"{right_commands(None, world)}"
        )
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
    by_accelerate = launch is not None or "ACCELERATE_MIXED_PRECISION" in environ
    if world > 1 and use_cpu and by_accelerate and not (device == "cpu" or launcher_uses_cpu(environ)):
        raise UsageError(
            f"accelerate launch started {world} processes for GPUs, but no GPU is visible here.\n"
            f"{right_commands(launch, world)}"
        )


def check_world(world_size: int, environ: Mapping[str, str], expected: int | None, launch: Launch | None) -> None:
    """Raise UsageError if the run has another number of processes than were started. `expected`: --expect-world."""
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
            f"Start it with nothing else in between: srun --ntasks={tasks} python {own_file() or '-m distloop.train'} …"
        )


def right_commands(launch: Launch | None, processes: int | None = None) -> str:
    """The command lines that start `processes` ranks, for a message; by default as many as were asked for."""
    count = processes or (launch.processes if launch else 1)
    script = own_file() or "-m distloop.train"
    if launch:
        script = f"{'-m ' * launch.is_module}{shlex.quote(launch.script)}"
    if count == 1:
        return f"One process: python {script} …"
    common = (
        f"accelerate launch --multi_gpu --num_machines 1 --num_processes {count} --main_process_port 0 "
        f"--mixed_precision no --dynamo_backend no {script} …"
    )
    return f"{count} processes on the CPU: ACCELERATE_USE_CPU=true {common}\n{count} GPUs of this machine: {common}"


def own_file() -> str | None:
    """The file of the user's own that Python runs, as it was typed, quoted for a shell; None for one of distloop's."""
    file = sys.argv[0]
    package = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    is_own = file.endswith(".py") and not os.path.realpath(file).startswith(f"{package}{os.sep}")
    return shlex.quote(file) if is_own else None


def gpu_of(number: int | None) -> str | None:
    """The UUID of the GPU that this process knows as `number`, while other tasks may know theirs by the same number.
    None on the CPU."""
    import torch

    return None if number is None else str(torch.cuda.get_device_properties(number).uuid)


def check_devices(store: Any, rank: int, world_size: int, gpu: str | None) -> None:
    """Raise UsageError on all ranks if two of them use one physical GPU, or only some use one. `store`: a torch store
    of all ranks. `gpu`: gpu_of() this rank. Collective. It needs no process group: making one, NCCL would fail."""
    keys = [f"gpu/{number}" for number in range(world_size)]
    store.set(keys[rank], "" if gpu is None else f"{gpu} of {os.uname().nodename}")
    store.wait(keys)
    ranks_on: dict[str, list[str]] = {}
    for number, where in enumerate(store.multi_get(keys)):
        ranks_on.setdefault(where.decode(), []).append(str(number))
    on_cpu = ranks_on.pop("", [])
    if on_cpu and ranks_on:
        raise UsageError(
            f"No GPU for rank {', '.join(on_cpu)}, while other ranks use one: see that each task is given a GPU "
            "(CUDA_VISIBLE_DEVICES, Slurm's --gpus-per-node), or use --device cpu."
        )
    for where, ranks in ranks_on.items():
        if len(ranks) > 1:
            raise UsageError(
                f"Ranks {', '.join(ranks)} are on one GPU ({where}): start at most one process per GPU, and see that "
                "CUDA_VISIBLE_DEVICES differs between tasks that see one each."
            )
