"""What a process trains, and with what: facts that must be the same on all ranks; a checkpoint keeps some of them."""

import functools
import hashlib
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import distloop
from distloop.config.comparison import flatten, is_one_of, training_hash
from distloop.config.registry import named_modules
from distloop.config.secrets import clean_mapping
from distloop.config.settings import Config
from distloop.data.datasets import DataSource
from distloop.data.fingerprint import fingerprint_of, without_errors
from distloop.data.halves import halves, word_of
from distloop.run.provenance import LoopSource

Facts = dict[str, dict[str, Any]]  # kind -> name -> value

# Where files lie on a machine, and its loader processes: settings that may be others on each machine.
OF_THE_MACHINE = ("config", "runs_dir", "data.root", "data.workers", "data.timeout_seconds")
VARIABLES = ("PYTHONHASHSEED", "CUBLAS_WORKSPACE_CONFIG")
# What decides which precision a sum or a product has, beyond the config: code and the environment may change it.
PRECISION = (
    "backends.cuda.matmul.allow_fp16_reduced_precision_reduction",
    "backends.cuda.matmul.allow_bf16_reduced_precision_reduction",
    "backends.cuda.matmul.fp32_precision",
    "backends.cudnn.conv.fp32_precision",
    "backends.cudnn.rnn.fp32_precision",
    "backends.cudnn.allow_tf32",
    "backends.mkldnn.matmul.fp32_precision",
    "backends.mkldnn.conv.fp32_precision",
)
SAMPLED_VALUES = 64  # of a parameter; beside them its sum is compared
OF_TASK = "task: "  # before the names of the parameters and buffers of a task


def identity_of(config: Config, source: DataSource, device: torch.device) -> dict[str, Any]:
    """What a checkpoint keeps, for the next start of the run to compare: the config's hash, the data's fingerprint, the
    versions, and the SHA-256 of the modules that the config names."""
    return {
        "config_sha256": training_hash(config),
        "dataset": without_errors(fingerprint_of(source, "train", config.data, device, config.seed)),
        "versions": versions(),
        "sources": sources(config),
    }


def facts_of(config: Config, source: DataSource, device: torch.device, loop: LoopSource | None = None) -> Facts:
    """What all ranks have to agree on, whatever their loop does; causes stand before what may come of them. `loop`: the
    file with the training loop, if it is known."""
    settings = {key: value for key, value in flatten(config).items() if not is_one_of(key, OF_THE_MACHINE)}
    return {
        "versions": {**versions(), "distloop": f"{distloop.__version__} (source {_source_of_distloop()})"},
        "environment": _environment(device),
        "config": {key: _plain(clean_mapping(value, key, environ={})) for key, value in settings.items()},
        "sources": sources(config) | ({Path(loop.path).name: loop.sha256} if loop else {}),
        "data": dict(_data(config, source, device)),
    }


def facts_of_model(task: Any, model: nn.Module) -> Facts:
    """The task; and the parameters and buffers of the model, and of a task that is a module (as "task: NAME"): their
    names, forms and initial values."""
    kind = f"{type(task).__module__}.{type(task).__qualname__}"
    modules = [("", model)] + ([(OF_TASK, task)] if isinstance(task, nn.Module) else [])
    tensors: dict[str, tuple[Tensor, str]] = {
        whose + name: (tensor, "trained" if tensor.requires_grad else "frozen")
        for whose, module in modules
        for name, tensor in module.named_parameters()
    }
    order = {str(place): name for place, name in enumerate(tensors)}
    tensors |= {
        whose + name: (tensor, "a buffer") for whose, module in modules for name, tensor in module.named_buffers()
    }
    # Their values may be anything: a forward pass fills them.
    scratch = {
        whose + f"{prefix}.{name}".lstrip(".")
        for whose, module in modules
        for prefix, inner in module.named_modules()
        for name in inner._non_persistent_buffers_set
    }
    return {
        "task": {"class": kind, "weight": task.weight, "best": _plain(task.best)},
        "model": {name: _form(tensor, role) for name, (tensor, role) in tensors.items()},
        "order": order,
        "values": {name: _values(tensor) for name, (tensor, _) in tensors.items() if name not in scratch},
    }


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide how is trained."""
    return {"Python": platform.python_version(), "torch": str(torch.__version__), "distloop": distloop.__version__}


def sources(config: Config) -> dict[str, str]:
    """The SHA-256 of the files of the modules that the config names as module:callable, by module."""
    files = {module: getattr(sys.modules.get(module), "__file__", None) for module in named_modules(config)}
    return {module: _digest(Path(file)) for module, file in files.items() if file}


def _digest(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError:
        return "not readable"


@functools.cache  # the files do not change any more for this process, which has imported them
def _source_of_distloop() -> str:
    folder, digest = Path(distloop.__file__).parent, hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(f"{file.relative_to(folder)} {_digest(file)}\n".encode())
    return digest.hexdigest()[:8]


def _environment(device: torch.device) -> dict[str, Any]:
    kind = device.type
    precision: dict[str, Any] = {name: _torch_value(name) for name in PRECISION}
    precision |= {
        "NVIDIA_TF32_OVERRIDE": os.environ.get("NVIDIA_TF32_OVERRIDE"),
        "torch.get_default_dtype()": str(torch.get_default_dtype()),
        "torch.is_autocast_enabled()": torch.is_autocast_enabled(kind),
        "torch.get_autocast_dtype()": str(torch.get_autocast_dtype(kind)),
    }
    variables = {name: os.environ.get(name) for name in VARIABLES}
    return {"threads": torch.get_num_threads(), **variables, **precision}


def _torch_value(dotted_name: str) -> str | None:
    """A flag of torch; None where this version has none, or refuses to say since two ways of setting it were mixed."""
    value: Any = torch
    try:
        for name in dotted_name.split("."):
            value = getattr(value, name)
    except (AttributeError, RuntimeError):
        return None
    return str(value)


def _data(config: Config, source: DataSource, device: torch.device) -> Iterator[tuple[str, Any]]:
    for half in halves(source):
        found: Mapping[str, Any] = fingerprint_of(source, half, config.data, device, config.seed)
        word = word_of(half)
        yield f"{word} samples", found["samples"]
        yield f"{word} data", found.get("sha256")
        yield from ((f"{word} sample {index}", digest) for index, digest in found.get("contents", {}).items())
    yield "class names", None if source.classes is None else _plain(list(source.classes))
    yield "mean and std", _plain([source.mean, source.std])


def _form(tensor: Tensor, role: str) -> str:
    if nn.parameter.is_lazy(tensor):
        return f"not yet initialised, {role}"
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}, {role}"


def _values(tensor: Tensor) -> str:
    """What changes with a tensor's values, at the cost of reading it once on its device; "" for those without bits."""
    if nn.parameter.is_lazy(tensor) or tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        return ""
    values = tensor.detach().reshape(-1)
    if values.is_complex():
        values = torch.view_as_real(values.resolve_conj()).reshape(-1)
    size = values.element_size()
    try:
        values = values.clone() if values.storage_offset() else values
        bits = values.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size])
        wide = values.view(torch.int64) if len(values) * size % 8 == 0 else bits  # 30 times as fast on the CPU
    except (RuntimeError, NotImplementedError):  # a subclass whose values are no single tensor
        return ""
    some = bits[:: max(1, len(bits) // SAMPLED_VALUES)]
    return f"{int(wide.sum(dtype=torch.int64))} {hashlib.sha256(repr(some.tolist()).encode()).hexdigest()[:16]}"


def _plain(value: Any) -> Any:
    """Tuples as lists, and what JSON has no form for as text: as a rank that hears of it compares it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
