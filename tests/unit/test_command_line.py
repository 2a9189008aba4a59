"""What the words of a command line mean: each setting in all its forms, and each mistake as one in a file is told."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from distloop.config.comparison import flatten
from distloop.config.load import load_config
from distloop.config.settings import Config
from distloop.errors import UsageError

inf = float("inf")


def changed(config: Config) -> dict[str, Any]:
    """The settings that are not the defaults, but for the name of the run that follows from others."""
    found, defaults = flatten(config), flatten(Config(name="digits"))
    return {key: value for key, value in found.items() if key not in defaults or value != defaults[key]}


# Words in a shell, and what they change.
MEANINGS: list[tuple[str, dict[str, Any]]] = [
    ("--seed 5", {"seed": 5}),
    ("--seed=5", {"seed": 5}),
    ("--seed +5", {"seed": 5}),
    ("--seed 007", {"seed": 7}),
    ("--seed 1_000", {"seed": 1000}),
    ("--seed 1 --seed 2", {"seed": 2}),
    ("--seed=1 --seed 2 --seed=3", {"seed": 3}),
    ("--seed 5 --", {"seed": 5}),
    # numbers
    ("--optim.lr .5", {"optim.lr": 0.5}),
    ("--optim.lr 5", {"optim.lr": 5.0}),
    ("--optim.lr 1e3", {"optim.lr": 1000.0}),
    ("--optim.lr 1_0", {"optim.lr": 10.0}),
    ("--optim.lr inf", {"optim.lr": inf}),
    ("--data.workers 4", {"data.workers": 4}),
    ("--data.workers auto", {}),
    # hyphens
    ("--batch.global-size 32", {"batch.global_size": 32}),
    ("--batch.global_size=32", {"batch.global_size": 32}),
    ("--optim.clip-norm=1", {"optim.clip_norm": 1.0}),
    # choices
    ("--precision no", {}),
    ("--precision bf16", {"precision": "bf16"}),
    ("--tracking.wandb offline", {"tracking.wandb": "offline"}),
    ("--resume=never", {"resume": "never"}),
    # true and false
    ("--compile", {"compile": True}),
    ("--no-compile", {}),
    ("--no-compile --compile", {"compile": True}),
    ("--compile --no-compile", {}),
    ("--compile --seed 5", {"compile": True, "seed": 5}),
    ("--tracking.report", {}),
    ("--tracking.no-report", {"tracking.report": False}),
    ("--tracking.no_report", {"tracking.report": False}),
    ("--tracking.no-report --tracking.report", {}),
    ("--optim.nesterov --optim.no-nesterov", {}),
    ("--compile true", {"compile": True}),
    ("--compile True --seed 5", {"compile": True, "seed": 5}),
    ("--compile=true", {"compile": True}),
    ("--compile '{mode: max-autotune}'", {"compile.mode": "max-autotune", "compile.dynamic": None}),
    ("--compile --compile.dynamic false", {"compile.mode": "default", "compile.dynamic": False}),
    ("--compile.mode reduce-overhead --compile.dynamic", {"compile.mode": "reduce-overhead", "compile.dynamic": True}),
    ("--compile.mode max-autotune --no-compile", {}),
    ("--compile false", {}),
    ("--tracking.report False", {"tracking.report": False}),
    ("--tracking.report=false", {"tracking.report": False}),
    ("--ddp.find-unused-parameters True", {"ddp.find_unused_parameters": True}),
    # several values
    ("--optim.betas 0.5 0.95", {"optim.betas": (0.5, 0.95)}),
    ("--optim.betas=0.5 0.95 --seed 5", {"optim.betas": (0.5, 0.95), "seed": 5}),
    ("--schedule.milestones 10 20", {"schedule.milestones": (10, 20)}),
    ("--schedule.milestones=10 20", {"schedule.milestones": (10, 20)}),
    ("--schedule.milestones=10", {"schedule.milestones": (10,)}),
    ("--schedule.milestones", {}),
    ("--schedule.milestones 10 --schedule.milestones 20 30", {"schedule.milestones": (20, 30)}),
    ("--tracking.tags a b", {"tracking.tags": ("a", "b")}),
    ("--tracking.tags a --compile", {"tracking.tags": ("a",), "compile": True}),
    ("--tracking.tags 1 true -1", {"tracking.tags": ("1", "true", "-1")}),
    ("--tracking.tags '[a, b]'", {"tracking.tags": ("a", "b")}),
    ("--tracking.tags ''", {"tracking.tags": ("",)}),
    # as W&B sweeps, Hydra, Optuna, Ray Tune and shell loops write values
    ("--optim.nesterov=True", {"optim.nesterov": True}),
    ("--optim.nesterov=1", {"optim.nesterov": True}),
    ("--tracking.report=no", {"tracking.report": False}),
    ("--train.steps=1e1", {"train.epochs": None, "train.steps": 10}),
    ("--data.workers=2.0 --expect-world=2e0", {"data.workers": 2, "expect_world": 2}),
    ("--optim.lr=9.999999999999999e-05", {"optim.lr": 9.999999999999999e-05}),
    ("--optim.clip_norm=None", {}),
    ("'--optim.betas=[0.9, 0.95]'", {"optim.betas": (0.9, 0.95)}),
    ("--optim.betas=[0.9,0.95]", {"optim.betas": (0.9, 0.95)}),
    ("--optim.betas '[0.9, 0.95]' --seed 5", {"optim.betas": (0.9, 0.95), "seed": 5}),
    ("--optim.betas [0.9, 0.95] --seed 5", {"optim.betas": (0.9, 0.95), "seed": 5}),
    ("'--optim.betas=(0.9, 0.95)'", {"optim.betas": (0.9, 0.95)}),
    ("--schedule.milestones=[10,20]", {"schedule.milestones": (10, 20)}),
    ("--schedule.milestones '[ 1e1 ]'", {"schedule.milestones": (10,)}),
    ("--schedule.milestones '(10,)'", {"schedule.milestones": (10,)}),
    ("--schedule.milestones []", {}),
    ('\'--model.args={"hidden": 64, "norm": null}\'', {"model.args": {"hidden": 64, "norm": None}}),
    # text is what it is
    ("--name 5", {"name": "5"}),
    ("--name true", {"name": "true"}),
    ("--runs-dir 5", {"runs_dir": "5"}),
    ("--data.root 0x10", {"data.root": "0x10"}),
    ("--data.collate 1:2", {"data.collate": "1:2"}),
    ("--tracking.notes 'a: b'", {"tracking.notes": "a: b"}),
    ("--tracking.notes ''", {"tracking.notes": ""}),
    ("--tracking.notes=a=b", {"tracking.notes": "a=b"}),
    ("--tracking.notes=--a", {"tracking.notes": "--a"}),
    ("--tracking.notes '-a b'", {"tracking.notes": "-a b"}),
    ("--tracking.notes \"'x'\"", {"tracking.notes": "'x'"}),
    ("--checkpoint.best 'min loss'", {"checkpoint.best": "min loss"}),
    # nothing
    ("--name null", {}),
    ("--name None", {}),
    ("--init-from null", {}),
    ("--expect-world None", {}),
    ("--optim.clip-norm 1 --optim.clip-norm null", {}),
    # one of a pair
    ("--train.steps 5", {"train.epochs": None, "train.steps": 5}),
    ("--train.epochs null --train.steps 5", {"train.epochs": None, "train.steps": 5}),
    ("--train.steps 5 --train.epochs null", {"train.epochs": None, "train.steps": 5}),
    ("--validate.every_steps 5", {"validate.every_epochs": None, "validate.every_steps": 5}),
    # names
    ("--model mlp", {"model.name": "mlp"}),
    ("--model=mlp", {"model.name": "mlp"}),
    ("--model mlp --model.name linear", {"model.name": "linear"}),
    ("--model.name linear --model mlp", {"model.name": "mlp"}),
    ("--data diabetes --task=regression", {"name": "diabetes", "data.name": "diabetes", "task.name": "regression"}),
    ("--optim sgd --schedule constant", {"optim.name": "sgd", "schedule.name": "constant"}),
    # arguments, and a loop's own settings
    ("--model.args.hidden 64", {"model.args": {"hidden": 64}}),
    ("--model.args.hidden=64", {"model.args": {"hidden": 64}}),
    ("--model.args.two-words '[1, a]'", {"model.args": {"two_words": [1, "a"]}}),
    ("--model.args.a.b 3", {"model.args": {"a": {"b": 3}}}),
    ("--model.args.x -5", {"model.args": {"x": -5}}),
    ("--model.args.x --seed", {"model.args": {"x": "--seed"}}),
    ("--model.args.x null", {"model.args": {"x": None}}),
    ("--model.args.x None", {"model.args": {"x": "None"}}),
    ("--model.args.x no", {"model.args": {"x": "no"}}),
    ("--model.args.x a=b", {"model.args": {"x": "a=b"}}),
    ("--model.args '{a: 1, b: None}'", {"model.args": {"a": 1, "b": "None"}}),
    ("--model.args='a: 1'", {"model.args": {"a": 1}}),
    ("--model.args {}", {}),
    ("--model.args.hidden 64 --model.args '{a: 1}'", {"model.args": {"a": 1}}),
    ("--model.args '{a: 1}' --model.args.hidden 64", {"model.args": {"a": 1, "hidden": 64}}),
    ("--own.alpha 0.5 --own.alpha 0.6", {"own.alpha": 0.6}),
    ("--own '{alpha: 1}' --own.beta [2]", {"own.alpha": 1, "own.beta": [2]}),
    ("--own.beta 2 --own '{alpha: 1}'", {"own.alpha": 1}),
]


@pytest.mark.parametrize(("words", "settings"), MEANINGS, ids=[words for words, _ in MEANINGS])
def test_the_words_of_a_command_line_mean(words: str, settings: dict[str, Any]) -> None:
    found = changed(load_config(shlex.split(words)))
    assert found == settings
    assert [type(found[key]) for key in settings] == [type(value) for value in settings.values()]


@pytest.mark.parametrize(
    ("text", "words", "settings"),
    [
        ("compile: true\ntracking: {report: false}", "--no-compile --tracking.report", {}),
        ("compile: {mode: max-autotune}", "--compile", {"compile": True}),
        ("compile: true", "--compile.dynamic true", {"compile.mode": "default", "compile.dynamic": True}),
        ("tracking: {tags: [x, y]}", "--tracking.tags a", {"tracking.tags": ("a",)}),
        ("tracking: {tags: [x, y]}", "--tracking.tags", {}),
        ("optim: {name: sgd, lr: 0.5}", "--optim adam", {"optim.name": "adam", "optim.lr": 0.5}),
        ("optim: sgd", "--optim.lr 0.5", {"optim.name": "sgd", "optim.lr": 0.5}),
        ("optim:", "--optim.lr 0.5", {"optim.lr": 0.5}),
        ("model: mlp", "--model.args.hidden 3", {"model.name": "mlp", "model.args": {"hidden": 3}}),
        ("model: {args: {a: {b: 1, c: 2}}}", "--model.args.a.b 3", {"model.args": {"a": {"b": 3, "c": 2}}}),
        ("own: {alpha: 1, beta: 2}", "--own.beta 3", {"own.alpha": 1, "own.beta": 3}),
        ("own: {alpha: 1}", "--own null", {}),
        ("train: {steps: 3}", "--train.steps null --train.epochs 7", {"train.epochs": 7}),
        ("init_from: x", "--init-from null", {}),
    ],
)
def test_the_words_of_a_command_line_change_what_the_file_says(
    tmp_path: Path, text: str, words: str, settings: dict[str, Any]
) -> None:
    file = tmp_path / "digits.yaml"
    file.write_text(text)
    assert changed(load_config(["--config", str(file), *shlex.split(words)])) == settings | {"config": str(file)}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--sead 1", "sead = 1: there is no such setting. Did you mean 'seed'?"),
        ("--sead", "sead = True: there is no such setting. Did you mean 'seed'?"),
        ("--tracking.tag a b", "tracking.tag = ['a', 'b']: there is no such setting. Did you mean 'tags'?"),
        ("--optim.lrr 1", "optim.lrr = 1: there is no such setting. Did you mean 'lr'?"),
        ("--opt.lr 1", "opt = {'lr': 1}: there is no such setting. Did you mean 'optim'?"),
        ("--epochs 1", "epochs = 1: there is no such setting. Did you mean 'train.epochs'?"),
        (
            "--batch-global_size=32",
            "batch_global_size = 32: there is no such setting. Did you mean 'batch.global_size'?",
        ),
        ("--frobnicate 1", "frobnicate = 1: there is no such setting. --help lists them."),
        ("--no-seed", "no_seed = True: there is no such setting. Did you mean 'seed'?"),
        ("--no-compile=x", "no_compile = 'x': there is no such setting. Did you mean 'compile'?"),
        (
            "--train.args.x 1",
            "train.args = {'x': 1}: there is no such setting. Known: detect_anomaly, early_stop, epochs",
        ),
        ("--batch 5", "batch = 5: input should be a dictionary or an instance of Batch"),
        ("--optim.lr fast", "optim.lr = 'fast': input should be a valid number"),
        ("--optim.lr '{'", "optim.lr = '{': input should be a valid number"),
        ("--optim.lr -1", "optim.lr = -1: input should be greater than 0"),
        ("--optim.lr null", "optim.lr = None: input should be a valid number"),
        ("--seed 1.5", "seed = 1.5: input should be a valid integer"),
        (
            "--data.workers -1",
            "data.workers = -1: input should be greater than or equal to 0 or input should be 'auto'",
        ),
        (
            "--schedule.name COSINE",
            "schedule.name = 'COSINE': input should be 'constant', 'linear', 'cosine', 'multi_step', 'one_cycle' or "
            "'warmup_stable_decay' or module:callable",
        ),
        ("--train '{steps: 20}'", "--train is a section: give its settings one by one, as --train.NAME VALUE."),
        ("--compile maybe", "compile = 'maybe': input should be a valid boolean"),
        ("--compile.mode fast", "compile.mode = 'fast': input should be 'default', 'reduce-overhead'"),
        ("--compile '{mod: x}'", "compile.mod = 'x': there is no such setting. Did you mean 'mode'?"),
        ("--optim.betas 0.9", "optim.betas = [0.9]: field required"),
        ("--optim.betas 0.1 0.2 0.3", "optim.betas = [0.1, 0.2, 0.3]: tuple should have at most 2 items"),
        ("--optim.betas 0.1 x", "optim.betas = 'x': input should be a valid number"),
        ("--runs-dir null", "runs_dir = None: input should be a valid string"),
        ("--model.args '{a: '", "model.args = '{a: ': it is not valid YAML"),
        ("--model.args.a '{'", "model.args.a = '{': it is not valid YAML"),
        ("--model.args 5", "model.args = 5: input should be a valid dictionary"),
        ("--seed --compile", "--seed needs a value."),
        ("--model", "--model needs a value."),
        ("--own.alpha", "--own.alpha needs a value."),
        ("--seed 1 2", "'2': expected a setting, as in --optim.lr 0.1; --help lists them."),
        ("--no-compile true", "'true': expected a setting"),
        ("--optim.betas [0.9", "optim.betas = '[0.9': input should be"),
        ("--optim.betas '[[0.9, 0.95]]'", "optim.betas = "),
        ("--train.steps=1.5e0", "train.steps = 1.5: input should be a valid integer"),
        ("--train.steps=True", "train.steps = True: input should be a valid number, not true or false"),
        ("--optim.lr=", "--optim.lr has an empty value; null stands for none. Was a variable of the shell not set?"),
        ("--optim.clip-norm ''", "--optim.clip-norm has an empty value"),
        ("--compile=", "--compile has an empty value"),
        ("--init-from ''", "--init-from has an empty value"),
        ("--config=", "--config has an empty value"),
        ("--data.root ''", "--data.root has an empty value"),
        ("--data.collate ''", "--data.collate has an empty value"),
        ("--checkpoint.best=", "--checkpoint.best has an empty value"),
        (
            "--model.args.x ''",
            "--model.args.x has an empty value; null stands for none, and \"''\" for the empty text.",
        ),
        ("--own.alpha=", "--own.alpha has an empty value"),
        ("--model.args '{a: 1, a: 2}'", "model.args = '{a: 1, a: 2}': a is there twice, in line 1"),
        ("--model.args '{a: !!set {1}}'", "model.args = '{a: !!set {1}}': line 1: the tag !!set is not taken"),
        ("-seed 1", "'-seed': expected a setting"),
        ("seed=1", "'seed=1': expected a setting"),
    ],
)
def test_a_mistake_on_the_command_line_is_told_like_one_in_a_file(words: str, said: str) -> None:
    with pytest.raises(UsageError) as refusal:
        load_config(shlex.split(words))
    assert str(refusal.value).startswith(f"command line: {said}")
    assert len(str(refusal.value).splitlines()) == 1


def test_the_empty_text_and_none_have_words_of_their_own() -> None:
    assert load_config(["--model.args.x", "''", "--model.args.y", "null"]).model.args == {"x": "", "y": None}


@pytest.mark.parametrize(
    ("words", "tags"),
    [
        (["[a, b]"], ("a", "b")),
        (["[a,", "1e3]"], ("a", "1e3")),
        (["['a, b', null]"], ("a, b", "null")),
        (["[a]", "b"], ("[a]", "b")),
        (["[a: ]b]"], ("[a: ]b]",)),
        (["a,b"], ("a,b",)),
    ],
)
def test_a_list_of_texts_is_read_as_yaml_has_it(words: list[str], tags: tuple[str, ...]) -> None:
    assert load_config(["--tracking.tags", *words]).tracking.tags == tags


@pytest.mark.parametrize(
    "words", [["--seed", "5\r"], ["--data.root=data\r"], ["--model.args.path", "a\r"], ["--compile\r"]]
)
def test_a_word_that_ends_as_lines_of_windows_do_is_refused(words: list[str]) -> None:
    with pytest.raises(UsageError) as refusal:
        load_config(words)
    assert str(refusal.value).startswith(f"command line: {words[-1]!r} ends in a carriage return")
    assert "dos2unix" in str(refusal.value)


def test_mistakes_in_the_file_and_on_the_command_line_are_told_together_each_with_its_place(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("seed: -1\noptim: {lr: 0, eps: 1}\nmodel: {nam: x}\n")
    with pytest.raises(UsageError) as refusal:
        load_config(["--config", str(file), "--optim.lr", "x", "--sead", "1", "--batch", "x"])
    places = {line.split(" = ")[0] for line in str(refusal.value).splitlines()}
    on_command_line = {f"command line: {key}" for key in ("optim.lr", "sead", "batch.name")}
    assert places == {f"{file}: seed", f"{file}: model.nam", *on_command_line}


def test_help_has_the_values_of_file_and_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("seed: 17\noptim: {lr: 0.25}\n")
    for quiet in (False, True):
        with pytest.raises(SystemExit) as end:
            load_config(["--config", str(file), "-h", "--seed", "19"], quiet)
        assert end.value.code == 0
        printed = " ".join(capsys.readouterr().out.split())
        assert ("initial weights and dropout. (default: 19)" in printed) is not quiet
        assert ("--optim.lr number > 0 Peak learning rate." in printed) is not quiet
        assert ("(default: 0.25)" in printed) is not quiet
