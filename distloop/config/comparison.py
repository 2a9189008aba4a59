"""Two configs side by side: what trains differently, and the hash of what is trained."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

from distloop.config.secrets import clean_mapping
from distloop.config.settings import Config

# What may change between two starts of a run: where things are, how they are computed and what is written,
# but not what is trained. Everything else that differs is refused (or recorded, with --resume extend).
FREE_KEYS = (
    "config",
    "name",
    "runs_dir",
    "device",
    "compile",
    "resume",
    "expect_world",
    "data.root",
    "data.workers",
    "data.timeout_seconds",
    "batch.micro_size",
    "train.detect_anomaly",
    "train.on_nonfinite",  # makes no difference to the steps before the first one that is not finite
    "validate",
    "checkpoint",
    "stop",
    "log",
    "tracking",
    "ddp",
)


# What gives the stored step its meaning, so that not even --resume extend may change it.
FIXED_KEYS = ("seed", "dtype", "data.name", "model", "optim.name", "batch.global_size", "batch.remainder", "init_from")


def flatten(config: Config) -> dict[str, Any]:
    """The config as {"optim.lr": 0.001, …}; arguments stay whole mappings."""
    flat: dict[str, Any] = {}
    for key, value in dataclasses.asdict(config).items():
        if dataclasses.is_dataclass(getattr(config, key)):
            flat.update({f"{key}.{name}": inner for name, inner in value.items()})
        else:
            flat[key] = value
    return flat


def training_hash(config: Config) -> str:
    """The SHA-256 of all settings that decide what is trained, in hexadecimal.

    Secrets are left out: a token may change, and nobody shall try out which one gives the hash.
    """
    settings = {
        key: clean_mapping(value, key, environ={})
        for key, value in flatten(config).items()
        if not is_one_of(key, FREE_KEYS)
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def is_one_of(key: str, keys: tuple[str, ...]) -> bool:
    """Whether the dotted `key` is in `keys`, or inside a section that is."""
    return any(key == other or key.startswith(other + ".") for other in keys)


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """The keys that would train differently, with their (old, new) values."""
    before, after = flatten(old), flatten(new)
    return {
        key: (before[key], after[key]) for key in after if before[key] != after[key] and not is_one_of(key, FREE_KEYS)
    }
