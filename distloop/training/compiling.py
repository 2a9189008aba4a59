"""The memory format of the model's weights, torch.compile, and the folder that keeps what it has compiled."""

import contextlib
import os
import stat
from collections.abc import MutableMapping
from pathlib import Path

import torch
from torch import nn

from distloop.config.settings import Compile

CACHE = "TORCHINDUCTOR_CACHE_DIR"
NOT_BUILT = "left to this loop, whose model is not one of build_model()"  # which applies the settings
KEPT = Path("/var/tmp")  # on the machine's own disk, and kept from one job to the next (FHS 3.0, chapter 5.15)


def to_channels_last(model: nn.Module) -> None:
    """Put the weights of four dimensions, in place, into the memory format channels_last: a convolution then computes,
    and hands on, in that format, whatever format its input has (PyTorch, "Channels Last Memory Format")."""
    model._apply(lambda tensor: tensor.to(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor)


def compile_model(model: nn.Module, settings: bool | Compile) -> None:
    """Compile the model as the config says, in place: the names of its parameters stay."""
    if not settings:
        return
    keep_compiled(os.environ)
    # The model may have a compile() of its own.
    if settings is True:
        nn.Module.compile(model)
    else:
        nn.Module.compile(model, mode=settings.mode, dynamic=settings.dynamic)


def keep_compiled(environ: MutableMapping[str, str], kept: Path = KEPT) -> None:
    """Let inductor keep compiled code in a folder of this user in `kept`, so that a later start finds it again.

    By itself it takes $TMPDIR, which many clusters empty after each job. The run directory is no place for it: it often
    lies on a file system of the network, where many small files are slow, and other runs of the model would compile
    anew. A folder that the user has set stays; and where this one cannot be had, or others may write into it, which
    would let them put code there, inductor's own stays."""
    if environ.get(CACHE):
        return
    folder = kept / f"distloop-compiled-{os.getuid()}"
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        is_own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
        if is_own and os.access(folder, os.W_OK | os.X_OK):
            environ[CACHE] = str(folder)


def in_words(channels_last: bool, settings: bool | Compile, model: nn.Module) -> list[str]:
    """Such as ["channels_last on (20 weights)", "compile on (max-autotune, code in /var/tmp/…)"]."""
    formats = [one.is_contiguous(memory_format=torch.channels_last) for one in model.parameters() if one.dim() == 4]
    effect = f"{len(formats)} weight{'s' if len(formats) > 1 else ''}"
    if not all(formats):
        effect = NOT_BUILT
    elif not formats:
        effect = "without effect: no weight has 4 dimensions"
    texts = [f"channels_last on ({effect})" if channels_last else "channels_last off"]
    if not settings:
        return [*texts, "compile off"]
    if model._compiled_call_impl is None:
        return [*texts, f"compile on ({NOT_BUILT})"]
    settings = Compile() if settings is True else settings
    shapes = {None: [], True: ["dynamic shapes"], False: ["fixed shapes"]}[settings.dynamic]
    kept = [f"code kept in {os.environ[CACHE]}"] if os.environ.get(CACHE) else []
    return [*texts, f"compile on ({', '.join([settings.mode, *shapes, *kept])})"]
