"""A user's mistake ends every rank with exit code 2 and is said once: what was wrong, where, and the way out."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from distloop.data.order import Order
from tests.lab.wrong import SAMPLES, WRONG_LABEL
from tests.tools.ranks import REPOSITORY, Outcome, accelerate_launch, command, train, write_config

BASE: dict[str, Any] = {
    "device": "cpu",
    "data": "diabetes",
    "model": "linear",
    "task": "regression",
    "batch": {"global_size": 16},
    "train": {"steps": 4},
    "log": {"every_steps": 1},
}
USER = "tests.lab.wrong"
OWN_DATA = {"data": f"{USER}:rows", "task": "classification"}
# Where there is internet, a download has to fail all the same: nothing listens on this port.
OFFLINE = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
RANKS = pytest.mark.parametrize("world_size", [1, 2])


@dataclasses.dataclass
class Mistake:
    """Settings that replace those of BASE, words on the command line, and what the message has to say of them."""

    says: tuple[str, ...]
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    environment: dict[str, str] = dataclasses.field(default_factory=dict)


MISTAKES = {
    # ---- config ----
    "unknown key in the file": Mistake(("run.yaml", "optim.lrr = 0.1", "Did you mean 'lr'"), {"optim": {"lrr": 0.1}}),
    "unknown section in the file": Mistake(("run.yaml", "optimm", "Did you mean 'optim'"), {"optimm": {"lr": 0.1}}),
    "wrong type in the file": Mistake(("run.yaml", "optim.lr = 'fast'", "number"), {"optim": {"lr": "fast"}}),
    "value out of range": Mistake(("run.yaml", "train.steps = 0", "greater than"), {"train": {"steps": 0}}),
    "unknown choice in the file": Mistake(("optim.name = 'sdg'", "'sgd'"), {"optim": {"name": "sdg"}}),
    "one of a pair too many": Mistake(("train.epochs", "train.steps"), {"train": {"steps": 4, "epochs": 1}}),
    "a name that is no folder": Mistake(("name = '../up'", "letters"), arguments=("--name", "../up")),
    "missing file": Mistake(("missing.yaml", "no such file", "'run.yaml'"), arguments=("--config", "missing.yaml")),
    # ---- batch and world ----
    "fewer samples than a global batch": Mistake(
        ("batch.global_size = 16", "5 training samples", "batch.remainder"),
        {"data": {"name": f"{USER}:rows", "args": {"train": 5}}, "task": "classification"},
    ),
    # ---- data ----
    "unknown data set": Mistake(("data.name = 'diabetis'", "Did you mean 'diabetes'"), {"data": "diabetis"}),
    "nothing to train on": Mistake(
        (f"data.name = '{USER}:rows'", "train half is empty"),
        {"data": {"name": f"{USER}:rows", "args": {"train": 0}}, "task": "classification"},
    ),
    "nothing to validate on": Mistake(
        (f"data.name = '{USER}:rows'", "validation half is empty"),
        {"data": {"name": f"{USER}:rows", "args": {"validation": 0}}, "task": "classification"},
    ),
    "not a data set": Mistake((f"data.name = '{USER}:a_list'", "list", "DataSource"), {"data": f"{USER}:a_list"}),
    "a stream": Mistake((f"data.name = '{USER}:stream'", "__len__"), {"data": f"{USER}:stream"}),
    "unknown argument of a data set": Mistake(
        ("data.args", "'trian'", "train"), {"data": {"name": f"{USER}:rows", "args": {"trian": 3}}}
    ),
    "all labels at hand, one wrong": Mistake(
        ("Sample 41", f"label {WRONG_LABEL}", "3 classes", "model.args.num_classes"),
        {"data": {"name": f"{USER}:wrong_label_in_memory", "args": {"wrong": 41}}, "task": "classification"},
    ),
    **{
        f"missing {name}, download {download}": Mistake(
            (title, "no/such/folder", "--data.root", "downloading failed" if download else "download is false"),
            {
                "data": {"name": name, "root": "no/such/folder", "args": {"download": download}},
                "model": "cnn",
                "task": "classification",
            },
            environment=OFFLINE,
        )
        for name, title in (("fashion_mnist", "FashionMNIST"), ("cifar10", "CIFAR10"))
        for download in (True, False)
    },
    "missing image folder": Mistake(
        ("image_folder", "no/such/folder/train", "--data.root"),
        {"data": {"name": "image_folder", "root": "no/such/folder"}, "task": "classification"},
    ),
    # ---- model and task ----
    "unknown model": Mistake(("model.name = 'resnet19'", "Did you mean 'resnet1"), {"model": "resnet19"}),
    "unknown argument of a model": Mistake(
        ("model.args", "'hiden'", "hidden"), {"model": {"name": "mlp", "args": {"hiden": 3}}}
    ),
    "not a model": Mistake((f"model.name = '{USER}:a_list'", "list", "torch.nn.Module"), {"model": f"{USER}:a_list"}),
    "no such module": Mistake(
        ("model.name = 'no_such_module:net'", "no module 'no_such_module'"), {"model": "no_such_module:net"}
    ),
    "a module that does not import": Mistake(
        ("model.name", "RuntimeError: the user's module is broken", "raises_at_import.py, line 3"),
        {"model": "tests.lab.raises_at_import:net"},
    ),
    "no such attribute": Mistake(
        (f"data.name = '{USER}:rowz'", "no callable 'rowz'", "Did you mean 'rows'"), {"data": f"{USER}:rowz"}
    ),
    "unknown task": Mistake(("task.name = 'regresion'", "Did you mean 'regression'"), {"task": "regresion"}),
    "not a task": Mistake((f"task.name = '{USER}:a_list'", "list", "Task"), {"task": f"{USER}:a_list"}),
    "a model that does not suit the task": Mistake(
        ("classification", "[batch, classes]", "[1, 3, 1]"), {**OWN_DATA, "model": f"{USER}:three_outputs_in_a_row"}
    ),
    "targets that do not suit the task": Mistake(("classification", "integer label"), {"task": "classification"}),
    # ---- machine ----
    "run directory below a file": Mistake(
        ("run.yaml/runs/run", "cannot be written", "--runs-dir"), arguments=("--runs-dir", "run.yaml/runs")
    ),
    "run directory where nobody may write": Mistake(
        ("/proc/runs/run", "cannot be written", "--runs-dir"), arguments=("--runs-dir", "/proc/runs")
    ),
    "fp16 on the CPU": Mistake(("precision = 'fp16'", "GPU", "bf16"), {"precision": "fp16"}),
    "CUDA where there is none": Mistake(
        ("device = 'cuda'", "--device"), {"device": "cuda"}, environment={"CUDA_VISIBLE_DEVICES": ""}
    ),
    "unknown key on the command line": Mistake(
        ("command line: optim.lrr = 0.1", "Did you mean 'lr'?"), arguments=("--optim.lrr", "0.1")
    ),
    "wrong type on the command line": Mistake(
        ("command line: optim.lr = 'fast'", "valid number"), arguments=("--optim.lr", "fast")
    ),
    "unknown choice on the command line": Mistake(
        ("command line: precision = 'bf61'", "'no', 'bf16' or 'fp16'"), arguments=("--precision", "bf61")
    ),
    "a word that is no setting": Mistake(("command line: 'everything'", "--help"), arguments=("everything",)),
    "a variable that is not set": Mistake(
        ("data.args.x = 'env:NOWHERE'", "no environment variable NOWHERE"), arguments=("--data.args.x", "env:NOWHERE")
    ),
}


def check(outcome: Outcome, says: tuple[str, ...]) -> None:
    """Every rank ended with 2, none with a traceback, and the message is in one rank's output, once."""
    assert outcome.codes == [2] * len(outcome.codes), outcome.output
    assert "Traceback" not in outcome.output
    assert outcome.output.count("\ndistloop: ") == 1, outcome.output
    for words in says:
        assert words in outcome.output, f"{words!r} is missing in: {outcome.output}"


def run(
    folder: Path,
    settings: dict[str, Any],
    arguments: tuple[str, ...] = (),
    world_size: int = 1,
    environment: dict[str, str] | None = None,
) -> Outcome:
    config = write_config(folder, {**BASE, **settings})
    # A second --config is the one that counts, as for every flag.
    words = arguments if "--config" in arguments else ("--config", config.name, *arguments)
    return train(folder, list(words), world_size, environment)


def met_by(rank: int) -> int:
    """The index of a sample that this rank of two meets in the third step: its half of the global batch."""
    return int(Order(SAMPLES, seed=0)(0, 0, SAMPLES)[2 * 16 + rank * 8 + 3])


@RANKS
@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_said_once_by_all_ranks_together(tmp_path: Path, mistake: Mistake, world_size: int) -> None:
    outcome = run(tmp_path, mistake.settings, mistake.arguments, world_size, mistake.environment)
    check(outcome, mistake.says)
    assert not (tmp_path / "runs").exists()


def test_a_global_batch_that_the_world_does_not_divide_is_refused_with_the_nearest_that_it_does(tmp_path: Path) -> None:
    outcome = run(tmp_path, {"batch": {"global_size": 15}}, world_size=2)
    check(outcome, ("batch.global_size = 15", "2 processes", "--batch.global-size 16"))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("world_size", "rank", "workers"), [(1, 0, 0), (1, 0, 2), (2, 0, 0), (2, 1, 0), (2, 0, 2), (2, 1, 2)]
)
def test_a_wrong_label_that_one_rank_meets_in_its_loader_ends_all(
    tmp_path: Path, world_size: int, rank: int, workers: int
) -> None:
    wrong = met_by(rank)
    data = {"name": f"{USER}:wrong_label", "args": {"wrong": wrong}, "workers": workers}
    outcome = run(tmp_path, {"data": data, "task": "classification"}, world_size=world_size)
    check(outcome, (f"Sample {wrong} ", f"label {WRONG_LABEL}", "3 classes", "model.args.num_classes"))


@pytest.mark.parametrize(("world_size", "rank"), [(1, 0), (2, 0), (2, 1)])
def test_a_wrong_label_that_one_rank_meets_in_validation_ends_all(tmp_path: Path, world_size: int, rank: int) -> None:
    data = {"name": f"{USER}:wrong_label_in_validation", "args": {"wrong": rank * 32 + 5}, "workers": 0}
    settings = {"data": data, "task": "classification", "validate": {"batch_size": 32}}
    check(run(tmp_path, settings, world_size=world_size), (f"Sample {rank * 32 + 5} ", f"label {WRONG_LABEL}"))


@RANKS
def test_another_config_under_the_same_name_is_refused_with_what_differs(tmp_path: Path, world_size: int) -> None:
    run(tmp_path, {"optim": {"lr": 0.01}}, world_size=world_size).check()
    record = (tmp_path / "runs" / "run" / "metrics.jsonl").read_text()
    outcome = run(tmp_path, {"optim": {"lr": 0.02}, "seed": 1}, world_size=world_size)
    check(outcome, ("optim.lr: 0.01 there, 0.02 now", "seed: 0 there, 1 now", "--name", "--resume never"))
    assert "\n  model" not in outcome.output  # what is the same is not listed
    assert (tmp_path / "runs" / "run" / "metrics.jsonl").read_text() == record


@pytest.mark.parametrize("where", ["at the start", "in the loader of rank 1"])
def test_under_an_elastic_launcher_the_message_is_said_once_too(tmp_path: Path, where: str) -> None:
    settings: dict[str, Any] = {"data": f"{USER}:rowz"}
    if where != "at the start":
        data = {"name": f"{USER}:wrong_label", "args": {"wrong": met_by(rank=1)}, "workers": 0}
        settings = {"data": data, "task": "classification"}
    config = write_config(tmp_path, {**BASE, **settings})
    words = [*accelerate_launch(2), "--config", str(config)]
    done = command(words, tmp_path, {"ACCELERATE_USE_CPU": "true"})
    assert done.returncode != 0
    assert done.stdout.count("\ndistloop: ") == 1, done.stdout
    assert f'File "{REPOSITORY}/distloop' not in done.stdout, done.stdout  # the launcher's traceback, none of ours


# As on a busy machine: rank 1 has met the mistake, and waits for rank 0 to speak, before that has imported anything.
SLOW_RANK_0 = """
import os, sys, time
while os.environ["RANK"] == "0" and not os.path.exists("rank-1-waits"):
    time.sleep(0.01)
from distloop.ranks import roll_call, start
from distloop.ranks.leaving import leave
from distloop.train import train

def let_others_speak(*arguments, really=roll_call.let_others_speak):
    if os.environ["RANK"] == "1":
        open("rank-1-waits", "w").close()
    really(*arguments)

roll_call.let_others_speak = let_others_speak
leave(start.main(train, sys.argv[1:]))
"""


@pytest.mark.parametrize(
    "arguments", [["--config", "nowhere.yaml"], pytest.param(["--optim.lr", "fast"], marks=pytest.mark.long)]
)
def test_an_elastic_launcher_does_not_end_the_rank_that_is_still_to_speak(tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "slow.py").write_text(SLOW_RANK_0)
    words = [*accelerate_launch(2, str(tmp_path / "slow.py")), *arguments]
    done = command(words, tmp_path, {"ACCELERATE_USE_CPU": "true"})
    assert done.returncode != 0
    message = "--config nowhere.yaml: no such file" if "--config" in arguments else "command line: optim.lr = 'fast'"
    assert done.stdout.count(message) == 1, done.stdout
