"""Compare the settings of two configs that decide what is trained. Imports no large library, for `distloop status`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from distloop.config.references import recorded
from distloop.config.secrets import clean_mapping

if TYPE_CHECKING:
    from distloop.config.settings import Config

# Settings that may change between two starts of a run, since they do not decide what is trained. A change of another
# one is refused, or recorded with --resume extend.
FREE_KEYS: tuple[str, ...] = (
    "config",
    "name",
    "runs_dir",
    "device",
    "compile",
    "resume",
    "expect_world",
    "batch.micro_size",
)
FREE_KEYS += ("data.root", "data.workers", "data.timeout_seconds", "train.detect_anomaly", "optim.show")
FREE_KEYS += ("train.on_nonfinite",)  # the steps before the first non-finite one are the same with both values
FREE_KEYS += ("data.on_bad_sample",)  # the same, for the first bad sample
FREE_KEYS += ("validate", "checkpoint", "stop", "log", "tracking", "ddp")
FREE_KEYS += ("model.channels_last",)  # other kernels: up to rounding the same, as with compile
FREE_KEYS += ("model.checkpointing",)
# --resume extend may not change these either: step 100 of a checkpoint means something else with another value.
FIXED_KEYS: tuple[str, ...] = ("seed", "dtype", "data.name", "model.name", "model.pretrained", "model.args")
FIXED_KEYS += ("optim.name", "batch.global_size", "batch.remainder", "init_from", "init_fit")


def flatten(config: Config) -> dict[str, Any]:
    """The config as {"optim.lr": 0.001, …}; `args` stay whole mappings. Without own settings there is no key own."""
    flat = dotted(recorded(config), levels=2)
    return {key: value for key, value in flat.items() if key != "own"}


def dotted(settings: Mapping[str, Any], levels: int | None = None) -> dict[str, Any]:
    """{"optim": {"lr": 1}} -> {"optim.lr": 1}, to at most `levels` parts of a key; empty mappings stay as they are."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value and levels != 1:
            inner = dotted(value, None if levels is None else levels - 1)
            flat.update({f"{key}.{name}": setting for name, setting in inner.items()})
        else:
            flat[str(key)] = value
    return flat


def training_hash(config: Config) -> str:
    """The SHA-256, in hexadecimal, of all settings that decide what is trained, with secrets masked."""
    trained = {key: value for key, value in flatten(config).items() if not is_one_of(key, FREE_KEYS)}
    settings = {key: clean_mapping(value, key, environ={}) for key, value in trained.items()}
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def is_one_of(key: str, keys: tuple[str, ...]) -> bool:
    """True if `keys` has the dotted `key` or its section."""
    return any(key == other or key.startswith(other + ".") for other in keys)


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """The (old, new) values of the settings that differ and change what is trained, by dotted key."""
    before, after = flatten(old), flatten(new)
    keys = dict.fromkeys((*after, *before))  # one may lack an own setting
    changed = [key for key in keys if before.get(key) != after.get(key) and not is_one_of(key, FREE_KEYS)]
    return {key: (before.get(key), after.get(key)) for key in changed}
