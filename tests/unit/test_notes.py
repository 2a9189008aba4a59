"""What a run says at its start on settings that have no effect, or mean something else than they may seem to."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from distloop.config.load import load_config
from distloop.config.notes import refuse_without_effect
from distloop.config.settings import types_of_settings
from distloop.errors import UsageError
from tests.tools.ranks import REPOSITORY, train

RECIPES = sorted((REPOSITORY / "configs").glob("*.yaml"))


def notes(words: str, folder: Path | None = None, text: str = "") -> list[str]:
    """The notes on the settings of a command line, and of a file with this text."""
    found: list[str] = []
    arguments = shlex.split(words)
    if folder is not None:
        (folder / "x.yaml").write_text(text)
        arguments = ["--config", str(folder / "x.yaml"), *arguments]
    load_config(arguments, notes=found)
    return found


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--optim.momentum 0.5", "optim.momentum = 0.5 (optim.name is adamw)"),
        ("--optim adam --optim.nesterov", "optim.nesterov = True (optim.name is adam)"),
        ("--optim sgd --optim.betas 0.9 0.95", "optim.betas = (0.9, 0.95) (optim.name is sgd)"),
        ("--optim sgd --optim.eps 1e-6", "optim.eps = 1e-06 (optim.name is sgd)"),
        ("--schedule.gamma 0.5", "schedule.gamma = 0.5 (schedule.name is cosine)"),
        ("--schedule constant --schedule.milestones 5", "schedule.milestones = (5,) (schedule.name is constant)"),
        ("--schedule one_cycle --schedule.final-ratio 0.1", "schedule.final_ratio = 0.1 (schedule.name is one_cycle)"),
        ("--schedule.decay-steps 3", "schedule.decay_steps = 3 (schedule.name is cosine)"),
        (
            "--schedule multi_step --schedule.milestones 5 50 --train.steps 9",
            "schedule.milestones 50 (train.steps is 9)",
        ),
        ("--tracking.group a", "tracking.group = 'a' (tracking.wandb is off)"),
        ("--tracking.tags a b", "tracking.tags = ('a', 'b') (tracking.wandb is off)"),
        ("--tracking.start-seconds 3", "tracking.start_seconds = 3.0 (tracking.wandb is off)"),
        ("--data.root /d", "data.root = '/d' (data.name is digits)"),
        ("--data.timeout-seconds 5 --data.workers 0", "data.timeout_seconds = 5 (data.workers is 0)"),
        ("--model resnet18 --model.pretrained --init-from x", "model.pretrained = True (init_from is x)"),
    ],
)
def test_a_setting_without_effect_is_said(words: str, said: str) -> None:
    assert notes(words) == [f"without effect: {said}"]


def test_all_of_them_are_said_in_one_line_also_those_of_the_file(tmp_path: Path) -> None:
    found = notes("--optim.eps 1e-6", tmp_path, "optim: {name: sgd}\nschedule: {gamma: 0.5}\n")
    assert found == [
        "without effect: optim.eps = 1e-06 (optim.name is sgd), schedule.gamma = 0.5 (schedule.name is cosine)"
    ]


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--optim.momentum 0.9 --optim.no-nesterov --schedule.gamma 0.1 --tracking.project distloop",  # the defaults
        "--optim sgd --optim.momentum 0.5 --optim.nesterov",
        "--optim.betas 0.5 0.6 --optim.eps 1e-3",
        "--schedule linear --schedule.final-ratio 0.1 --schedule.warmup-steps 3",
        "--schedule constant --schedule.warmup-steps 3",
        "--schedule multi_step --schedule.milestones 5 8 --schedule.gamma 0.3 --train.steps 9",
        "--schedule warmup_stable_decay --schedule.decay-steps 3 --schedule.final-ratio 0.1",
        "--tracking.wandb offline --tracking.group a --tracking.end-seconds 3",
        "--data image_folder --data.root /d --data.timeout-seconds 5",
        "--model resnet18 --model.pretrained",
        "--ddp.timeout-seconds 5 --stop.max-requeues 3 --checkpoint.keep-every-steps 7 --validate.batch-size 7",
    ],
)
def test_what_has_an_effect_or_is_the_default_is_not_said(words: str) -> None:
    assert notes(words) == []


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_there_is_nothing_to_say_of_a_recipe(recipe: Path) -> None:
    assert notes(f"--config {recipe}") == []


def test_a_secret_is_not_shown() -> None:
    [line] = notes("--tracking.notes 'api_key=abcdefghijk'")
    assert "abcdefghijk" not in line


def test_every_setting_that_a_note_names_exists() -> None:
    from distloop.config.notes import OF_TRAINING, OTHERS

    assert {key for keys, decider, _ in (*OF_TRAINING, *OTHERS) for key in (*keys, decider)} <= set(types_of_settings())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--model.args.bias no", "model.args.bias = 'no' is a word, which Python takes for true: write false"),
        ("--task.args.x.y '[1, Off]'", "task.args.x.y = 'Off' is a word, which Python takes for true: write false"),
        ("--model.args.norm=None", "model.args.norm = 'None' is a word: null is Python's None"),
        ("--data.args.file ~/x", None),
        ("--data.args.file \"'~/x'\"", "data.args.file = '~/x' reaches your code as it is: ~ and $NAME are filled in"),
        ("--data.args.file '$HOME/x'", "data.args.file = '$HOME/x' reaches your code as it is"),
    ],
)
def test_a_word_that_may_be_meant_as_something_else_is_said(words: str, said: str | None) -> None:
    found = notes(words)
    assert len(found) == 1
    assert found[0].startswith(said or "data.args.file = '~/x' reaches your code as it is")


@pytest.mark.parametrize(
    "words", ["--model.args.norm none", "--model.args.bias false", "--data.args.file a~/b", "--own.x no"]
)
def test_other_words_are_not_said(words: str) -> None:
    assert notes(words) == []


def test_a_config_that_another_one_replaces_is_said(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.yaml").write_text("seed: 1\n")
    one, other = (f"--config {tmp_path / name}.yaml" for name in ("a", "b"))
    assert notes(f"{one} {other}") == [f"{one} is not read: {other} stands after it"]
    assert notes(f"{one} {one}") == []


# ---- arguments of the file, and another callable on the command line ---------------------------------------------


@pytest.mark.parametrize(
    ("text", "words", "said"),
    [
        (
            "model: {name: cnn, args: {width: 8}}",
            "--model mlp",
            "model.args = {'width': 8} are those of the file, for 'cnn': --model.args '{}' takes them away",
        ),
        (
            "model: {args: {width: 8}}",
            "--model.name mlp --model.args.hidden 3",
            "model.args = {'width': 8} are those of the file, for 'cnn': --model.args '{}' takes them away",
        ),
        (
            "data: {name: a:b, args: {size: 3}}",
            "--data digits",
            "data.args = {'size': 3} are those of the file, for 'a:b': --data.args '{}' takes them away",
        ),
        (
            "data: {name: a:b, collate: a:c}",
            "--data digits",
            "data.collate = 'a:c' is that of the file, for 'a:b': --data.collate null takes it away",
        ),
        (
            "task: {args: {label_smoothing: 0.1}}",
            "--task regression",
            "task.args = {'label_smoothing': 0.1} are those of the file, for 'classification': --task.args '{}' takes",
        ),
        ("model: {name: cnn, args: {width: 8}}", "--model mlp --model.args {}", None),
        ("model: {name: cnn, args: {width: 8}}", "--model cnn", None),
        ("model: {name: cnn, args: {width: 8}}", "--model.args.width 3", None),
        ("model: cnn", "--model mlp", None),
        ("data: {name: a:b, collate: a:c}", "--data digits --data.collate null", None),
    ],
)
def test_arguments_of_the_file_for_another_callable_are_said(
    tmp_path: Path, text: str, words: str, said: str | None
) -> None:
    found = notes(words, tmp_path, text)
    assert [line[: len(said or "")] for line in found] == ([said] if said else [])


@pytest.mark.parametrize(
    ("words", "key"),
    [
        ("--model mlp", "model.args"),
        ("--model resnet18", "model.args"),
        ("--data tests.lab.points:points --task regression --model linear", "data.args"),
        ("--task tests.lab.user_code:NextLetter", "task.args"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_with_the_way_to_take_them_away(
    tmp_path: Path, words: str, key: str
) -> None:
    (tmp_path / "run.yaml").write_text(
        "data: {args: {shift: 1}}\nmodel: {args: {width: 8}}\ntask: {args: {label_smoothing: 0.1}}\ndevice: cpu\n"
    )
    ended = train(tmp_path, ["--config", "run.yaml", *words.split()])
    assert ended.codes == [2], ended.output
    assert f"{key} = " in ended.output
    assert f"--{key} '{{}}' takes them away" in ended.output


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_says_it_once_at_its_start(tmp_path: Path, ranks: int) -> None:
    ended = train(tmp_path, ["--train.steps", "2", "--device", "cpu", "--data.root", "/d"], ranks).check()
    assert ended.output.count("without effect: data.root = '/d' (data.name is digits)") == 1


def test_a_new_run_is_refused_that_would_train_otherwise_than_its_settings_say(tmp_path: Path) -> None:
    words = ["--train.steps", "2", "--device", "cpu", "--optim.momentum", "0.5", "--schedule.milestones", "3"]
    ended = train(tmp_path, words)
    assert ended.codes == [2], ended.output
    assert "optim.momentum = 0.5 (optim.name is adamw), schedule.milestones = (3,) (schedule.name is cosine)" in (
        ended.output
    )
    away = ["--optim.momentum", "0.9", "--schedule.milestones", "[]"]
    assert "on the command line: --optim.momentum 0.9 --schedule.milestones '[]'" in ended.output
    train(tmp_path, [*words, *away]).check()


def test_a_run_that_an_earlier_version_has_begun_so_goes_on(tmp_path: Path) -> None:
    words = ["--device", "cpu", "--checkpoint.every-steps", "1"]
    train(tmp_path, [*words, "--train.steps", "2"]).check()
    config = tmp_path / "runs" / "digits" / "config.yaml"
    text = config.read_text()
    assert "  momentum: 0.9\n" in text
    config.write_text(text.replace("  momentum: 0.9\n", "  momentum: 0.5\n"))
    ended = train(tmp_path, [*words, "--train.steps", "4", "--resume", "extend", "--optim.momentum", "0.5"]).check()
    assert "without effect: optim.momentum = 0.5" in ended.output
    assert "continuing after step 2" in ended.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--optim nadam --optim.betas 0.9 0.95", "Arguments of nadam itself belong into optim.args."),
        ("--schedule mine:f --schedule.warmup-steps 3", "schedule.warmup_steps = 3 (schedule.name is mine:f)"),
        ("--optim sgd --optim.betas 0.9 0.95", "on the command line: --optim.betas '[0.9, 0.999]'"),
        ("--schedule.decay-steps 3", "on the command line: --schedule.decay-steps null"),
        ("--optim.nesterov", "on the command line: --optim.nesterov false"),
    ],
)
def test_the_refusal_says_how_to_take_the_setting_away(words: str, said: str) -> None:
    with pytest.raises(UsageError) as raised:
        refuse_without_effect(load_config(shlex.split(words)))
    assert said in str(raised.value)


def test_load_config_without_a_list_for_notes_takes_all_of_this() -> None:
    assert load_config(["--optim.momentum", "0.5"]).optim.momentum == 0.5
    with pytest.raises(UsageError, match="no such setting"):
        load_config(["--optim.momentums", "0.5"], notes=[])
