"""Ranks that would train different things are refused before step 1: by rank, with the first difference, once."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from distloop.commands.copy import copy_of
from tests.lab.crashing import mount, mount_is_allowed
from tests.tools.ranks import (
    LOOP,
    REPOSITORY,
    Outcome,
    _rank,
    accelerate_launch,
    clean_environment,
    command,
    forkserver,
    free_port,
    rank_environment,
    train,
    write_config,
)
from tests.tools.records import rows, status

LAB = "tests.lab.disagreeing"
BASE: dict[str, Any] = {
    "device": "cpu",
    "data": {"name": f"{LAB}:make_data", "workers": 0},
    "model": f"{LAB}:make_model",
    "task": f"{LAB}:Task",
    "batch": {"global_size": 16},
    "train": {"steps": 3},
    "log": {"every_steps": 1},
    "ddp": {"timeout_seconds": 60},
}
RANK_1, RANK_0 = r"rank 1 \(on \S+\)", r"rank 0 \(on \S+\)"

# Where it differs, what differs, and what the message has to say.
MEMBERS = {
    "fewer samples": ("data", r"80 training samples on {1}, but 96 on {0}", "unseeded draws"),
    "order": ("data", r"Training sample 0 is another one on {1} than on {0}", "in another order: sort"),
    "one sample": ("data", r"Training sample 40 is another one on {1}.* 7 of the 8 samples", "CPUs of different kinds"),
    "contents": ("data", r"Training sample 0 is another one on {1} than on {0}", "manual_seed"),
    "one column": ("data", r"Training sample 0 is another one on {1} than on {0}", "sorted("),
    "validation": ("data", r"Validation sample 0 is another one on {1} than on {0}", "sorted("),
    "class names": ("data", r"class names are .*bird.*dog.*cat.* on {1}, but .*cat.*dog.*bird.* on {0}", "sorted("),
    "own generator": ("data", r"Training sample 0 is another one on {1} than on {0}", "numpy.random.normal()"),
    "last file": ("data", r"sample 95 can be loaded on {0}, but on {1} it raises FileNotFoundError: .*95", "copied"),
    "torch": ("data", r"{1} runs torch 2\.0\.0, but {0} torch ", "Install"),
    "distloop": ("data", r"{1} runs distloop 0\.0\.9.*, but {0} distloop ", "Install"),
    "Python": ("data", r"{1} runs Python 3\.10\.1, but {0} Python ", "Install"),
    "threads": ("data", r"{1} computes with 2 CPU threads, but {0} with 1", "OMP_NUM_THREADS"),
    "TF32": ("data", r"{1} computes in another precision than {0}: .*cudnn", "matmul_precision"),
    "autocast": ("data", r"{1} computes in another precision than {0}: .*autocast", "precision"),
    "default dtype": ("data", r"{1} computes in another precision than {0}: .*float64", "dtype"),
    "one layer more": ("model", r"4\.weight.* on {1} only", "which rank"),
    "width": ("model", r"0\.weight is float32 \[9, 4\].* on {1}, but float32 \[8, 4\].* on {0}", "which rank"),
    "initial values": ("model", r"3\.weight begins with other values on {1} than on {0}", "global generators"),
    "buffer": ("model", r"1\.running_mean begins with other values on {1} than on {0}", "global generators"),
    "order of layers": ("model", r"parameters are in another order on {1} than on {0}: 'b\.\w+'", "order of a set"),
    "frozen": ("model", r"0\.bias is .*frozen.* on {1}, but .*trained.* on {0}", "which rank"),
    "weight": ("task", r"weight is 'tokens' on {1}, but 'samples' on {0}", "which rank"),
    "best": ("task", r"best is .*loss.* on {1}, but .*accuracy.* on {0}", "which rank"),
}


def refused(outcome: Outcome, pattern: str, way_out: str) -> None:
    """Exit code 2 on all ranks, no step, and one message that names both ranks."""
    assert outcome.codes == [2] * len(outcome.codes), outcome.output
    assert len(re.findall(pattern.replace("{1}", RANK_1).replace("{0}", RANK_0), outcome.output, re.I)) == 1, (
        outcome.output
    )
    assert way_out in outcome.output
    assert outcome.output.count("distloop: ") == 1, outcome.output
    assert "Traceback" not in outcome.output


OFTEN = (
    "order of layers",
    "fewer samples",
    "order",
    "one sample",
    "own generator",
    "torch",
    "threads",
    "one layer more",
    "initial values",
    "weight",
)


@pytest.mark.parametrize("differs", [pytest.param(m, marks=[] if m in OFTEN else pytest.mark.long) for m in MEMBERS])
def test_ranks_that_differ_are_refused_before_the_first_step(tmp_path: Path, differs: str) -> None:
    section, pattern, way_out = MEMBERS[differs]
    name = BASE[section]["name"] if isinstance(BASE[section], dict) else BASE[section]
    more = {"workers": 0} if section == "data" else {}
    settings = {**BASE, section: {"name": name, "args": {"differs": differs}, **more}}
    refused(train(tmp_path, ["--config", str(write_config(tmp_path, settings))], 2), pattern, way_out)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (2, 0), (2, 1)])
def test_samples_that_draw_from_seeded_generators_are_the_same_on_all_ranks(
    tmp_path: Path, world_size: int, workers: int
) -> None:
    settings = {**BASE, "data": {"name": f"{LAB}:augmented", "workers": workers}}
    train(tmp_path, ["--config", str(write_config(tmp_path, settings))], world_size).check()
    assert len(rows(tmp_path / "runs" / "run", "train")) == 3


def test_what_a_forward_pass_fills_and_a_setting_that_is_no_number_are_the_same_on_all_ranks(tmp_path: Path) -> None:
    """A buffer that no checkpoint holds may begin with any values, and NaN is not equal to itself."""
    model = {"name": f"{LAB}:make_model", "args": {"differs": "scratch"}}
    settings = {**BASE, "model": model}
    config = write_config(tmp_path, settings)
    config.write_text(config.read_text().replace("differs: scratch", "differs: scratch\n    number: .nan"))
    train(tmp_path, ["--config", str(config)], 2).check()


# ---- each rank on a machine of its own, as far as it can tell -------------------------------------------------


def on_machines(
    folders: Sequence[Path],
    arguments: Callable[[int], list[str]],
    environment: Callable[[int], dict[str, str]] = lambda rank: {},
    loop: str = LOOP,
    own_disks: bool = False,
) -> Outcome:
    """Start a rank in each of the folders, with arguments and variables of its own. `own_disks`: all are in the first
    folder, as far as they can tell, in whose place the others find their own."""
    port, processes = free_port(), []
    outputs = [folder / f".output-{rank}" for rank, folder in enumerate(folders)]
    for rank, folder in enumerate(folders):
        variables = {**clean_environment(), **rank_environment(rank, len(folders), port), **environment(rank)}
        mounted = (str(folder), str(folders[0])) if own_disks and rank else None
        target = (loop, arguments(rank), str(folders[0] if own_disks else folder), variables, str(outputs[rank]))
        process = forkserver.Process(target=_rank_with_a_disk, args=(mounted, target))
        process.start()
        processes.append(process)
    for process in processes:
        process.join(120)
        with contextlib.suppress(OSError):
            process.kill()
        process.join()
    return Outcome([process.exitcode or 0 for process in processes], [path.read_text() for path in outputs])


def _rank_with_a_disk(mounted: tuple[str, str] | None, target: tuple[Any, ...]) -> None:
    """Start a rank. `mounted`: a folder that only it finds in the place of another one."""
    if mounted:
        library = ctypes.CDLL(None, use_errno=True)
        assert library.unshare(0x00020000) == 0, os.strerror(ctypes.get_errno())  # CLONE_NEWNS
        mount("--make-rprivate", "/")
        mount("--bind", *mounted)
    _rank(*target)


@pytest.fixture
def machines(tmp_path: Path) -> list[Path]:
    """Two folders with the same config and the same code."""
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
        (folder / "mine.py").write_text(f"from {LAB} import *\n")
        write_config(folder, {**BASE, "data": {"name": "mine:make_data", "workers": 0}})
        text = (REPOSITORY / "distloop" / "train.py").read_text()
        (folder / "my_loop.py").write_text(copy_of(text, "my_loop.py"))
    return folders


def shared(folders: Sequence[Path], *more: str) -> list[str]:
    return ["--config", "run.yaml", "--runs-dir", str(folders[0].parent / "runs"), *more]


def test_ranks_on_machines_that_agree_train(machines: list[Path]) -> None:
    # Where files lie, and how many loader processes a machine has, is its own affair.
    own = (["--data.root", "here"], ["--data.root", "there", "--data.workers", "1"])
    on_machines(machines, lambda rank: shared(machines, *own[rank])).check()


@pytest.mark.parametrize(("setting", "shown"), [("optim.lr", "0.125"), ("log.every-steps", "5")])
def test_another_config_is_refused(machines: list[Path], setting: str, shown: str) -> None:
    outcome = on_machines(machines, lambda rank: shared(machines, *rank * [f"--{setting}", shown]))
    pattern = rf"{re.escape(setting.replace('-', '_'))} = {re.escape(shown)} on {{1}}, but \S+ on {{0}}"
    refused(outcome, pattern, "command line")


@pytest.mark.parametrize("variable", ["PYTHONHASHSEED", "CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE"])
def test_another_environment_is_refused(machines: list[Path], variable: str) -> None:
    outcome = on_machines(machines, lambda rank: shared(machines), lambda rank: {variable: "1"} if rank else {})
    refused(outcome, f"{{1}}.*{variable}", "export")


@pytest.mark.parametrize(("cpus", "is_refused"), [(("1", "2"), False), (("1", "1"), True)])
def test_machines_with_other_numbers_of_cpus_compute_with_the_fewest_threads(
    machines: list[Path], cpus: tuple[str, str], is_refused: bool
) -> None:
    for folder in machines:  # as torch does in a process that imports it
        set_threads = "import os, torch\ntorch.set_num_threads(int(os.environ['OMP_NUM_THREADS']))\n"
        (folder / "fresh.py").write_text(f"{set_threads}from distloop.train import train\n")
    # What share_cpus() has set is what the rank's share of the CPUs is; another number was set by hand.
    variables = [{"SLURM_CPUS_PER_TASK": cpus[rank], "OMP_NUM_THREADS": str(rank + 1)} for rank in range(2)]
    outcome = on_machines(machines, lambda rank: shared(machines), lambda rank: variables[rank], "fresh")
    if is_refused:
        refused(outcome, r"{1} computes with 2 CPU threads, but {0} with 1", "OMP_NUM_THREADS")
    else:
        outcome.check()


def test_variables_that_are_not_compared_may_differ(machines: list[Path]) -> None:
    on_machines(machines, lambda rank: shared(machines), lambda rank: {"HOSTNAME": f"n{rank}"}).check()


def test_another_source_of_the_users_module_is_refused(machines: list[Path]) -> None:
    with open(machines[1] / "mine.py", "a") as file:
        file.write("# one line more\n")
    refused(on_machines(machines, lambda rank: shared(machines)), r"mine\.py on {1} .* than .* on {0}", "same files")


def test_another_source_of_the_users_loop_is_refused(machines: list[Path]) -> None:
    on_machines(machines, lambda rank: shared(machines, "--name", "same"), loop="my_loop").check()
    with open(machines[1] / "my_loop.py", "a") as file:
        file.write("# one line more\n")
    outcome = on_machines(machines, lambda rank: shared(machines), loop="my_loop")
    refused(outcome, r"my_loop\.py on {1} .* than .* on {0}", "same files")
    assert not (machines[0].parent / "runs" / "run" / "metrics.jsonl").exists()


def test_a_loop_that_builds_its_own_models_is_refused_as_well(machines: list[Path]) -> None:
    for folder in machines:
        write_config(folder, {"device": "cpu", "batch": {"global_size": 16}, "train": {"steps": 2}})
    outcome = on_machines(machines, lambda rank: shared(machines, *rank * ["--seed", "7"]), loop="tests.lab.loops.gan")
    refused(outcome, r"seed = 7 on {1}, but 0 on {0}", "command line")


def test_ranks_that_differ_are_refused_by_evaluate(tmp_path: Path) -> None:
    train(tmp_path, ["--config", str(write_config(tmp_path, BASE))]).check()
    evaluate = accelerate_launch(2, str(REPOSITORY / "distloop" / "evaluate.py"), "--quiet")
    done = command([*evaluate, "runs/run", "--data.args", "{differs: order}"], tmp_path, {"ACCELERATE_USE_CPU": "true"})
    assert done.returncode != 0
    assert len(re.findall(f"sample 0 is another one on {RANK_1} than on {RANK_0}", done.stdout)) == 1, done.stdout


@pytest.mark.parametrize(
    "what",
    ["weights", pytest.param("checkpoint", marks=pytest.mark.long), pytest.param("nothing", marks=pytest.mark.long)],
)
def test_other_weights_on_the_disk_of_a_machine_are_refused(machines: list[Path], what: str) -> None:
    if not mount_is_allowed(machines[0].parent):
        pytest.skip("no right to mount a folder here")
    more = ["--init-from", "runs/other/checkpoints/step_00000003"] if what == "weights" else []
    for number, folder in enumerate(machines[: 1 if what == "nothing" else 2]):
        rate = ["--optim.lr", str(0.001 + number)]
        train(folder, ["--config", "run.yaml", *rate, "--name", "other" if more else "run"]).check()
        if not more:
            killed(folder)
    outcome = on_machines(machines, lambda rank: ["--config", "run.yaml", *more], own_disks=True)
    if what == "nothing":
        refused(outcome, r"manifest\.json is not to be found on {1}", "same folder")
    else:
        file = r"manifest\.json" if what == "checkpoint" else r"model\.safetensors"
        refused(outcome, rf"{file} has other contents on {{1}} than on {{0}}", "same folder")


# ---- on resume -----------------------------------------------------------------------------------------------


def killed(folder: Path) -> None:
    (folder / "runs" / "run" / "status.json").unlink()  # as if it had been killed


def start(folder: Path, differs: str = "", *more: str, world_size: int = 1) -> Outcome:
    data = {"name": f"{LAB}:make_data", "args": {"differs": "", "on_all": True}, "workers": 0}
    write_config(folder, {**BASE, "data": data})
    run = folder / "runs" / "run" / "config.yaml"
    if run.exists() and differs:  # other contents behind the same settings
        run.write_text(run.read_text().replace("differs: ''", f"differs: {differs}"))
    words = ["--data.args.differs", differs] if differs else []
    return train(folder, ["--config", "run.yaml", *words, *more], world_size)


REASONS = {
    "order": ", since they come in another order (sort what os.listdir() or a set gave)",
    "one sample": " in 1 of 8 that were compared",
    "contents": "",
}


@pytest.mark.parametrize("differs", REASONS)
def test_a_run_is_not_continued_with_other_contents_of_as_many_samples(tmp_path: Path, differs: str) -> None:
    start(tmp_path).check()
    killed(tmp_path)
    outcome = start(tmp_path, differs)
    assert outcome.codes == [2]
    assert f"was trained on other data: these 96 samples have other contents{REASONS[differs]}. Give" in outcome.output
    assert "--resume extend" in outcome.output
    assert "that may be why" not in outcome.output
    start(tmp_path, differs, "--resume", "extend").check()


def test_where_the_code_has_changed_with_the_contents_of_samples_that_is_said(tmp_path: Path) -> None:
    config = write_config(tmp_path, {**BASE, "data": {"name": "mine:make_data", "workers": 0}})
    for shift in (0, 10):  # of another length, by which Python knows that the file has changed within a second
        (tmp_path / "mine.py").write_text(
            "import torch\nfrom torch.utils.data import TensorDataset\n"
            f"rows, labels = torch.ones(96, 4) + {shift}, torch.arange(96) % 3\n"
            "def make_data():\n    return TensorDataset(rows, labels), TensorDataset(rows[:20], labels[:20])\n"
        )
        outcome = train(tmp_path, ["--config", str(config)])
        if not shift:
            outcome.check()
            killed(tmp_path)
    assert outcome.codes == [2]
    assert "(mine.py has another source than when step 3 was trained: that may be why.)" in outcome.output


@pytest.mark.parametrize("world_size", [1, 2])
def test_another_version_of_torch_is_said_and_recorded_and_the_run_goes_on(tmp_path: Path, world_size: int) -> None:
    start(tmp_path, world_size=world_size).check()
    killed(tmp_path)
    outcome = start(tmp_path, "torch", world_size=world_size).check()
    assert outcome.output.count(f"torch 2.0.0 now, and {torch.__version__} when step 3 was trained") == 1
    record = json.loads((tmp_path / "runs" / "run" / "config_changes.jsonl").read_text())
    assert record["changes"] == {"versions.torch": [str(torch.__version__), "2.0.0"]}
    assert status(tmp_path / "runs" / "run")["state"] == "finished"


def test_a_run_is_continued_whose_samples_draw_from_a_generator_of_their_own(tmp_path: Path) -> None:
    settings = {**BASE, "data": {"name": f"{LAB}:make_data", "args": {"differs": "own generator"}, "workers": 0}}
    config = write_config(tmp_path, settings)
    train(tmp_path, ["--config", str(config)]).check()
    killed(tmp_path)
    train(tmp_path, ["--config", str(config)]).check()


def test_another_source_of_the_users_module_is_said_and_recorded(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(f"from {LAB} import *\n")
    config = write_config(tmp_path, {**BASE, "data": {"name": "mine:make_data", "workers": 0}})
    train(tmp_path, ["--config", str(config)]).check()
    killed(tmp_path)
    assert "another source" not in train(tmp_path, ["--config", str(config)]).check().output
    killed(tmp_path)
    with open(tmp_path / "mine.py", "a") as file:
        file.write("# one line more\n")
    outcome = train(tmp_path, ["--config", str(config)]).check()
    assert outcome.output.count("mine.py has another source than when step 3 was trained") == 1
    record = json.loads((tmp_path / "runs" / "run" / "config_changes.jsonl").read_text())
    assert list(record["changes"]) == ["sources.mine"]
