"""What is said of a run of the parts: the machine, and the table of results."""

import contextlib
import datetime
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

COLUMNS = 120
# Asked in a process of its own: importing torch takes seconds, and may fail.
ASK = """
import importlib.metadata, json, torch
found = {"torch": torch.__version__, "cuda": torch.version.cuda}
if torch.cuda.is_available():
    card = torch.cuda.get_device_properties(0)
    found |= {"card": card.name, "memory_gib": round(card.total_memory / 2**30, 1)}
for name in ("torchvision", "accelerate", "pytest"):
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        found[name] = None
print(json.dumps(found))
"""


def machine(device: str) -> dict[str, Any]:
    """What this machine is. Exits with code 2 and one message if the parts cannot run on it."""
    done = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        refuse(f"{sys.executable} cannot import torch ({said}). PYTHON=/path/to/python names the Python that has it.")
    found = json.loads(done.stdout.splitlines()[-1])
    if not new_enough(found["torch"]):
        refuse(f"{sys.executable} has torch {found['torch']}; distloop needs 2.8 or newer.")
    if device == "cuda" and "card" not in found:
        refuse(f"torch {found['torch']} (CUDA {found['cuda']}) sees no GPU. --device cpu runs what a CPU can run.")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device,
        "card": None,
        "driver": driver(),
        "python": sys.version.split()[0],
        "cpus": len(os.sched_getaffinity(0)),
        **found,
    }


def driver() -> str | None:
    """NVIDIA's driver, as the kernel or nvidia-smi says it."""
    file = Path("/proc/driver/nvidia/version")
    if file.exists():
        return file.read_text().splitlines()[0]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=10, check=True)
        return f"NVIDIA {done.stdout.split()[0]}"
    return None


def new_enough(torch: str) -> bool:
    """Whether a version of torch, as in "2.8.0a0+cu130", is 2.8 or newer."""
    numbers = re.match(r"(\d+)\.(\d+)", torch)
    return numbers is not None and (int(numbers[1]), int(numbers[2])) >= (2, 8)


def refuse(message: str) -> None:
    print(f"tests/gpu: {message}", file=sys.stderr)
    sys.exit(2)


def table(results: dict[str, Any]) -> str:
    """The contents of gpu_results.json in lines of at most 120 columns: the machine, the parts, their figures."""
    where = [results["card"] or f"{results['device']}, no card", results["driver"] or "no NVIDIA driver"]
    packages = ("torch", "cuda", "python", "torchvision", "accelerate", "cpus")
    where += [f"{name} {results.get(name)}" for name in packages]
    lines = [*wrapped(f"{results['date']}: ", ", ".join(where)), ""]
    lines.append(f"{'part':<12}{'state':<13}{'passed':>6}{'failed':>8}{'skipped':>9}{'seconds':>9}  why")
    figures: list[str] = []
    for name, part in results["parts"].items():
        begun = len(figures)
        counts = [sum(test["outcome"] == kind for test in part["tests"]) for kind in ("passed", "failed", "skipped")]
        numbers = "{:>6}{:>8}{:>9}".format(*counts)
        lines += wrapped(f"{name:<12}{part['state']:<13}{numbers}{part['seconds']:>9.1f}  ", why(part), 14)
        for test in part["tests"]:
            found = (f"{figure} {value_text(value)}" for figure, value in test.get("figures", {}).items())
            if text := "; ".join(found):
                figures += textwrap.wrap(
                    f"  {test['test'].removeprefix('test_')}: {text}", COLUMNS, subsequent_indent="    "
                )
        if len(figures) > begun:
            figures.insert(begun, f"\n{name}")
    return "\n".join([*lines, *figures])


def value_text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def why(part: dict[str, Any]) -> str:
    """The reasons of a part in one text: its own, its failed tests', and the different ones of those skipped."""
    reasons = [part["why"]] if part["why"] else []
    reasons += [f"{test['test']}: {test.get('why')}" for test in part["tests"] if test["outcome"] == "failed"]
    skipped = dict.fromkeys(str(test.get("why")) for test in part["tests"] if test["outcome"] == "skipped")
    reasons += [f"skipped: {reason}" for reason in skipped]
    return "; ".join(" ".join(reason.split())[:300] for reason in reasons)


def wrapped(head: str, text: str, indent: int | None = None) -> list[str]:
    """`head` and `text`, folded: the text's further lines below its first one, or `indent` columns from the left."""
    if len(head) > COLUMNS - 40:
        return [*textwrap.wrap(head, COLUMNS), *wrapped("    ", text)]
    below = " " * (len(head) if indent is None else indent)
    return textwrap.wrap(text, COLUMNS, initial_indent=head, subsequent_indent=below) or [head.rstrip()]
