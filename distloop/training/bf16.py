"""Whether bf16 is computed by the hardware here: a line where it is set and is not, or is not set and would help."""

import platform

import torch
from torch import nn

from distloop.config.settings import Config

LARGE = 1_000_000  # parameters; a smaller model has little to gain


def advice_on_bf16(config: Config, model: nn.Module, device: torch.device, first_step: int) -> list[str]:
    """One line, or none. What it advises changes results, and is left to the user. A run that has begun keeps its
    precision, so that it is advised nothing."""
    kind = native_bf16(device)
    if config.precision == "bf16" and device.type == "cpu" and kind == "":
        return [
            "distloop: WARNING: this CPU has no instructions for bf16 (AMX, AVX512-BF16): a ResNet-18 took 19 times as "
            "long as in float32 on such a one. --precision no is faster"
        ]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    is_float32 = config.precision == "no" and config.dtype == "float32"
    if is_float32 and first_step == 0 and parameters >= LARGE and kind:
        has = "GPU computes bf16" if device.type == "cuda" else f"CPU has {kind}"
        return [f"bf16 is off, and would make steps faster, as this {has}: --precision bf16 (results differ a little)"]
    return []


def native_bf16(device: torch.device) -> str | None:
    """The name of the device's instructions for bf16; "": it has none; None: not known."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else ""
    if device.type != "cpu" or platform.machine().lower() not in ("x86_64", "amd64"):
        return None
    checks = {"AMX": "_is_amx_tile_supported", "AVX512-BF16": "_is_avx512_bf16_supported"}
    found = {name: check() for name, attribute in checks.items() if (check := getattr(torch.cpu, attribute, None))}
    return next((name for name, is_there in found.items() if is_there), "" if len(found) == len(checks) else None)
