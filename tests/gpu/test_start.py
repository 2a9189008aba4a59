"""Part "start": how a run gets its device; compiling, loader workers, NCCL with one rank, peak memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.conftest import Figures
from tests.tools import stage
from tests.tools.ranks import free_port, rank_environment, train, write_config
from tests.tools.records import losses, rows, run_of, status

SETTINGS: dict[str, Any] = {
    "data": "tests.gpu.data:packed_digits",
    "model": {"name": "cnn", "args": {"width": 8}},
    "task": "tests.lab.resuming:StoppedClassification",
    "train": {"epochs": None, "steps": 12},
    "log": {"every_steps": 1},
    "validate": {"every_epochs": None, "every_steps": 6},
}


def config(folder: Path, **changes: Any) -> list[str]:
    return ["--config", str(write_config(folder, {**SETTINGS, **changes}))]


def one_rank(local_rank: int = 0) -> dict[str, str]:
    """What a launcher gives the only rank of a run, which is `local_rank` of those that it started on this machine."""
    return {**rank_environment(0, 2, free_port()), "WORLD_SIZE": "1", "LOCAL_RANK": str(local_rank)}


# ---- the device ----------------------------------------------------------------------------------------------


def uuid_of_gpu() -> str:
    """The UUID of the first GPU, as CUDA_VISIBLE_DEVICES takes it."""
    script = "import torch; print(torch.cuda.get_device_properties(0).uuid)"
    return "GPU-" + subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout


def test_auto_takes_the_gpu_where_there_is_one(tmp_path: Path, device: str) -> None:
    outcome = train(tmp_path, config(tmp_path)).check()
    assert f"1 process on {device}" in outcome.output


@pytest.mark.parametrize("visible", ["", "-1", "0,0"])  # a number that comes twice hides all, too
def test_with_all_gpus_hidden_auto_takes_the_cpu_and_cuda_is_refused(tmp_path: Path, visible: str) -> None:
    environment = {"CUDA_VISIBLE_DEVICES": visible}
    assert "1 process on cpu" in train(tmp_path, config(tmp_path), environment=environment).check().output
    outcome = train(tmp_path, [*config(tmp_path), "--name", "other", "--device", "cuda"], environment=environment)
    assert outcome.codes == [2], outcome.output
    assert "PyTorch sees no such device here" in outcome.output


@pytest.mark.usefixtures("gpu_only")
@pytest.mark.parametrize("visible", ["0", "UUID"])
def test_a_gpu_can_be_chosen_by_number_and_by_uuid(tmp_path: Path, visible: str) -> None:
    value = uuid_of_gpu().strip() if visible == "UUID" else visible
    outcome = train(tmp_path, config(tmp_path), environment={"CUDA_VISIBLE_DEVICES": value}).check()
    assert "1 process on cuda" in outcome.output


@pytest.mark.parametrize("local_rank", [0, 3])
def test_one_rank_of_a_launcher_trains_on_the_device_that_it_sees(
    tmp_path: Path, device: str, figures: Figures, local_rank: int
) -> None:
    """A Slurm task may see one device only, number 0, whatever its local rank. One rank in DDP, over NCCL on a GPU."""
    train(tmp_path, [*config(tmp_path), "--name", "alone", "--device", device]).check()
    arguments = [*config(tmp_path), "--name", "ranked", "--device", device]
    outcome = train(tmp_path, arguments, environment=one_rank(local_rank)).check()
    assert f"1 process on {device}" in outcome.output
    one, other = (losses(tmp_path / "runs" / name) for name in ("alone", "ranked"))
    figures["largest_difference"] = max(abs(a / b - 1) for a, b in zip(one, other, strict=True))
    assert other == pytest.approx(one, rel=1e-3)


@pytest.mark.usefixtures("gpu_only")
def test_two_ranks_on_one_gpu_are_refused_once(tmp_path: Path, device: str) -> None:
    outcome = train(tmp_path, [*config(tmp_path), "--device", device], 2, {"CUDA_VISIBLE_DEVICES": "0"})
    assert outcome.codes == [2, 2], outcome.output
    assert outcome.output.count("Ranks 0, 1 are on one GPU") == 1
    assert "Traceback" not in outcome.output
    assert "NCCL" not in outcome.output


# ---- compiling, loading, memory ------------------------------------------------------------------------------


def test_a_compiled_run_stops_and_continues(tmp_path: Path, device: str, figures: Figures) -> None:
    # Linear layers: compiling them for the CPU takes seconds.
    arguments = config(tmp_path, model={"name": "mlp", "args": {"hidden": 32}}, optim={"ema_decay": 0.9})
    arguments += ["--device", device]
    train(tmp_path, [*arguments, "--name", "eager"]).check()
    compiled = [*arguments, "--compile", "--name", "compiled"]
    stage.interrupt(tmp_path, "loss", 5)
    train(tmp_path, compiled).check()
    run = tmp_path / "runs" / "compiled"
    assert status(run)["state"] == "stopped"
    train(tmp_path, compiled).check()
    assert status(run)["state"] == "finished"
    eager = losses(tmp_path / "runs" / "eager")
    figures["largest_difference"] = max(abs(a / b - 1) for a, b in zip(losses(run), eager, strict=True))
    assert losses(run) == pytest.approx(eager, rel=2e-2)


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_that_workers_load_are_those_that_the_rank_loads(tmp_path: Path, device: str, workers: int) -> None:
    """Workers come from a forkserver where there is a GPU; batches go through pinned memory."""
    arguments = config(
        tmp_path,
        data={"name": "tests.lab.user_code:shapes", "args": {"samples": 256}},
        model="tests.lab.user_code:segmenter",
        task="tests.lab.user_code:Segmentation",
        batch={"global_size": 16},
    )
    for name, where, number in (("cpu", "cpu", 0), ("there", device, workers)):
        more = ["--name", name, "--device", where, "--data.workers", str(number), "--dtype", "float64"]
        train(tmp_path, [*arguments, *more]).check()
    one, other = (losses(tmp_path / "runs" / name) for name in ("cpu", "there"))
    assert other == pytest.approx(one, rel=1e-7)


def test_rows_have_the_peak_of_the_memory(tmp_path: Path, device: str, figures: Figures) -> None:
    train(tmp_path, [*config(tmp_path, model={"name": "mlp", "args": {"hidden": 4096}}), "--device", device]).check()
    peaks = [row["memory_gib"] for row in rows(run_of(tmp_path), "train")]
    figures["peak_gib"] = peaks[-1][0]
    # 17 million parameters with gradients and two moments of Adam's, in float32.
    assert peaks[-1][0] > 4 * 17e6 * 4 / 2**30
    assert all(len(peak) == 1 for peak in peaks)
    assert peaks == sorted(peaks)
