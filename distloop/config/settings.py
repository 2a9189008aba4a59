"""Every setting of a run, in frozen dataclasses: its name, type and default.

The string below a field is its text in --help. The defaults are those of configs/digits.yaml. load.py reads YAML files
and the command line; this module reads nothing.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Lt

from distloop.config.fields import (
    Arguments,
    Int,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Text,
    no_arguments,
    section,
)
from distloop.config.optim_settings import Optim as Optim
from distloop.config.optim_settings import Schedule as Schedule
from distloop.config.places import absolute


@section
class Data:
    name: str = "digits"
    """diabetes | digits | fashion_mnist | cifar10 | image_folder | packed | tokens, or module:callable of your own."""
    root: Text = "data"
    """Folder of data sets that live in files."""
    workers: NonNegativeInt | Literal["auto"] = "auto"
    """Loader processes per rank. auto: none for data in memory, else the CPUs this process may use, shared
    by the ranks of the machine."""
    timeout_seconds: PositiveInt = 600
    """How long loader processes may take for a batch before the run fails instead of waiting for them."""
    on_bad_sample: Literal["stop", "skip"] = "stop"
    """When a training sample cannot be loaded: stop: the run ends and names it. skip: its place in the step stays
    empty; the run fails if more than 1 % of the samples are bad."""
    collate: str | None = None
    """module:callable that makes a batch of a list of samples (default: PyTorch's)."""
    args: Arguments = no_arguments()
    """Arguments of the data set."""


@section
class Model:
    name: str = "cnn"
    """linear | mlp | cnn | resnet18_small | gpt, any torchvision classifier by name, or module:callable."""
    pretrained: bool = False
    """Start from torchvision's weights; layers whose shape differs (the head) start fresh."""
    channels_last: bool = False
    """Keep the weights of convolutions in the memory format channels_last, in which they then compute."""
    checkpointing: bool = False
    """Keep few activations of the model's nn.Sequential parts, and compute the others again in the backward pass: less
    memory, a longer step, the same bits."""
    args: Arguments = no_arguments()
    """Arguments of the model."""


@section
class Task:
    name: str = "classification"
    """classification | regression | segmentation | language_modelling, or module:class of your own (a subclass
    of distloop.tasks.Task)."""
    args: Arguments = no_arguments()
    """Arguments of the task, such as label_smoothing (docs/own-code.md, Built-in tasks)."""


@section
class Batch:
    global_size: PositiveInt = 64
    """Samples of one optimizer step, over all ranks and micro-batches."""
    micro_size: PositiveInt | Literal["auto"] | None = None
    """Largest batch that one rank passes forward at once (memory). The least accumulation that fits is
    chosen from the world size. null: no limit. auto: the largest that fits into memory, found before the first step and
    recorded, so that later starts have the same."""
    remainder: Literal["drop", "train"] = "drop"
    """Samples of an epoch beyond the last whole global batch: dropped, or trained as a smaller step."""


@section
class EarlyStop:
    patience: PositiveInt
    """After how many validations without improvement the run is finished."""
    metric: Text | None = None
    """As checkpoint.best; null: what the best is chosen by."""
    min_delta: NonNegativeFloat = 0.0
    """A value is an improvement if it is better by more than this."""


@section
class Train:
    epochs: PositiveInt | None = 20
    """Passes over the training data. Give this or steps."""
    steps: PositiveInt | None = None
    """Optimizer steps. Give this or epochs."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """When a step's gradient is not a number or infinite: stop: the run fails and names step, rank and
    samples. skip: the step leaves parameters, moments and buffers as they were."""
    detect_anomaly: bool = False
    """Let autograd name the forward operation behind a NaN, which makes steps several times slower."""
    early_stop: EarlyStop | None = None
    """Finish the run after so many validations without improvement: {patience: 5, metric: min loss, min_delta: 0}.
    metric: as checkpoint.best, null: that one or the task's own; min_delta: what a value must be better by."""


@section
class Validate:
    every_epochs: PositiveInt | None = 1
    """Validate after every so many epochs, and at the end. Give this or every_steps."""
    every_steps: PositiveInt | None = None
    """Validate after every so many steps, and at the end."""
    at_start: bool = False
    """Validate before the first step of the run, too: a row at step 0, which is never the best, since no checkpoint
    has that step."""
    at_end: Literal["also", "only"] = "also"
    """only: no validation but the one at the end of the run (and at its start, with at_start)."""
    batch_size: PositiveInt = 256
    """Samples per validation batch. Their contents are fixed; whole batches are dealt to the ranks."""


@section
class Checkpoint:
    every_steps: PositiveInt | None = None
    """Save after every so many steps, and at the end. null: at the end of each epoch. A new best is saved
    at once, and so is what is stopped."""
    keep_last: Annotated[Int, Ge(2)] = 2
    """How many of the latest checkpoints are kept."""
    keep_every_steps: PositiveInt | None = None
    """Save after every so many steps, and keep these for good."""
    best: Text | None = None
    """The validation metric of the checkpoint that is kept as the best, such as "max accuracy" or "min loss".
    null: the task's own."""
    on_failure: Literal["continue", "stop"] = "continue"
    """When a checkpoint cannot be written: say so and go on until the next one, or stop the run. It fails in
    any case when its last one cannot be written."""


@section
class Stop:
    after_minutes: PositiveFloat | None = None
    """Save and stop in time to have ended so many minutes after the start of the attempt. Slurm's time limit
    is such a deadline by itself."""
    reserve_seconds: NonNegativeFloat = 20.0
    """Time to spare before a deadline, beyond what steps, validations and saves were measured to take."""
    max_requeues: NonNegativeInt = 100
    """How often a Slurm job of the scripts in slurm/ goes back to the queue when its time is over."""


@section
class Log:
    every_steps: PositiveInt = 20
    """Log training after every so many steps; between them nothing waits for the device."""


@section
class Tracking:
    wandb: Literal["off", "offline", "online"] = "off"
    """Weights & Biases. offline: into the run directory, without an account; `distloop sync RUN` uploads it.
    WANDB_MODE=offline in the environment makes online offline."""
    project: Text = "distloop"
    """Project there."""
    entity: Text | None = None
    """User or team there; null: the account's own."""
    group: Text | None = None
    """Runs with the same group stand together."""
    tags: tuple[Text, ...] = ()
    """Tags of the run."""
    notes: Text | None = None
    """What is special about the run."""
    start_seconds: PositiveFloat = 15.0
    """How long training waits for W&B at the start, before it goes on offline."""
    end_seconds: PositiveFloat = 60.0
    """How long it waits at the end for what is left to be uploaded."""
    report: bool = True
    """Write report.html into the run directory when the run is finished."""


@section
class Ddp:
    join_seconds: PositiveInt = 300
    """How long the ranks wait for each other at the start; the missing are named then."""
    timeout_seconds: PositiveInt = 600
    """How long ranks wait for one that is suspended, hangs or takes much longer; it is named then."""
    find_unused_parameters: bool = False
    """For models that leave parameters out of some forward passes."""
    gradient_as_bucket_view: bool = False
    """Keep gradients in the buffers in which they are exchanged: saves their size in memory, and a copy."""
    bucket_cap_mb: PositiveInt = 25
    """MiB of gradients that are exchanged at once, while others are still computed."""


@section
class Compile:
    mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = "default"
    """That of torch.compile."""
    dynamic: bool | None = None
    """True: compiled once for all shapes; false: for each shape; null: as torch.compile finds best."""


@section
class Config:
    config: Text | None = None
    """YAML file with any of these settings; the command line wins over it."""
    name: Text | None = None
    """Name of the run and of its directory (default: the config file's stem)."""
    runs_dir: Text = "runs"
    """Folder of run directories."""
    seed: Annotated[NonNegativeInt, Lt(2**64)] = 0
    """Fixes the order of samples, and random numbers: splits, augmentations, your own, initial weights and dropout."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: CUDA, else MPS, else the CPU."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Mixed precision of the forward pass (autocast)."""
    dtype: Literal["float32", "float64"] = "float32"
    """Type of parameters and inputs."""
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """torch.set_float32_matmul_precision; high allows TF32 on NVIDIA GPUs. Convolutions keep PyTorch's default."""
    compile: bool | Compile = False
    """Use torch.compile: true, or its {mode: …, dynamic: …}."""
    resume: Literal["auto", "never", "extend"] = "auto"
    """auto: continue the run of this name. never: move it aside and start anew. extend: continue it although
    the config now trains differently."""
    init_from: Text | None = None
    """Weights to start from: a run directory, a checkpoint, or a .safetensors, .pt or .pth file."""
    init_fit: bool = False
    """Take what fits of init_from; tensors of another shape, and those that are not there, start fresh."""
    expect_world: PositiveInt | None = None
    """Refuse to train unless there are exactly so many processes."""

    data: Data = Data()
    model: Model = Model()
    task: Task = Task()
    optim: Optim = Optim()
    schedule: Schedule = Schedule()
    batch: Batch = Batch()
    train: Train = Train()
    validate: Validate = Validate()
    checkpoint: Checkpoint = Checkpoint()
    stop: Stop = Stop()
    log: Log = Log()
    tracking: Tracking = Tracking()
    ddp: Ddp = Ddp()
    own: Arguments = no_arguments()
    """Settings that a loop of your own declares (docs/own-loop.md): --own.alpha 0.2."""


def path_of(config: Config) -> Path:
    """The run's directory, as an absolute path."""
    return absolute(config.runs_dir) / str(config.name)


# The sections' classes by their names.
SECTIONS: dict[str, Any] = {
    field.name: field.type for field in dataclasses.fields(Config) if dataclasses.is_dataclass(field.type)
}


@functools.cache
def types_of_settings() -> dict[str, Any]:
    """The type of each setting by its dotted name, those of no section first."""
    found = {field.name: field.type for field in dataclasses.fields(Config) if field.name not in SECTIONS}
    for name, cls in SECTIONS.items():
        found |= {f"{name}.{field.name}": field.type for field in dataclasses.fields(cls)}
    return found
