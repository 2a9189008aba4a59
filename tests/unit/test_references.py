"""A setting env:NAME has the environment's value, and is recorded as env:NAME."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re
from pathlib import Path
from typing import Any

import pytest

from distloop.commands import evaluate
from distloop.config import secrets as redaction
from distloop.config.comparison import differences, flatten, training_hash
from distloop.config.load import config_from_mapping, dump, dump_without_secrets, load_config
from distloop.config.references import FromEnvironment, recorded
from distloop.config.secrets import clean_command, clean_mapping, clean_message, clean_text
from distloop.config.yaml_text import dump_yaml, parse_yaml
from distloop.errors import UsageError

VALUE = "value-of-the-variable"
FILE: dict[str, Any] = {
    "runs_dir": "env:SOMEWHERE",
    "seed": "env:SEED",
    "compile": "env:COMPILE",
    "precision": "env:PRECISION",
    "data": {"root": "env:SOMEWHERE", "args": {"token": "env:SOMEWHERE", "list": [{"inner": "env:SOMEWHERE"}, "x"]}},
    "model": "env:MODEL",
    "optim": {"lr": "env:RATE", "betas": ["env:RATE", 0.5]},
    "tracking": {"tags": ["env:SOMEWHERE", "x"], "notes": "see env:SOMEWHERE"},
}


@pytest.fixture(autouse=True)
def variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_remembered", "_from_environment"):
        monkeypatch.setattr(redaction, name, set())
    values = {"SOMEWHERE": VALUE, "SEED": "7", "COMPILE": "true", "PRECISION": "bf16", "MODEL": "mlp", "RATE": "0.25"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NOWHERE", raising=False)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(dump_yaml(FILE))
    return path


def test_the_run_has_the_values(file: Path) -> None:
    config = load_config(["--config", str(file)])
    assert (config.runs_dir, config.seed, config.compile, config.precision) == (VALUE, 7, True, "bf16")
    assert (config.data.root, config.data.args) == (VALUE, {"token": VALUE, "list": [{"inner": VALUE}, "x"]})
    assert (config.model.name, config.optim.lr, config.optim.betas) == ("mlp", 0.25, (0.25, 0.5))
    assert (config.tracking.tags, config.tracking.notes) == ((VALUE, "x"), "see env:SOMEWHERE")
    assert f"{config.runs_dir}/x" == str(config.runs_dir) + "/x" == f"{VALUE}/x"
    assert Path(config.data.root) == Path(VALUE)


def test_recorded_is_the_name_of_text_and_the_value_of_what_trains(file: Path) -> None:
    config = load_config(["--config", str(file)])
    for text in (dump(config), dump_without_secrets(config)):
        found = parse_yaml(text)
        assert {key: found[key] for key in ("runs_dir", "seed", "compile", "precision")} == {
            "runs_dir": "env:SOMEWHERE",
            "seed": 7,
            "compile": True,
            "precision": "bf16",
        }
        assert found["data"]["args"] == FILE["data"]["args"]
        assert (found["model"]["name"], found["optim"]["lr"], found["optim"]["betas"]) == ("mlp", 0.25, [0.25, 0.5])
        assert found["tracking"]["tags"] == ["env:SOMEWHERE", "x"]
        assert VALUE not in text
    for text in (repr(config), str(config), str(flatten(config)), str(dataclasses.asdict(config.data))):
        assert VALUE not in text
        assert "env:SOMEWHERE" in text
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert VALUE.encode() not in pickle.dumps(config, protocol)
    for again in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config), copy.copy(config)):
        assert again == config
        assert recorded(again) == recorded(config)
        assert again.data.args["token"] == VALUE


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--data.args.x", "env:SOMEWHERE"], VALUE),
        (["--data.args.x=env:SOMEWHERE"], VALUE),
        (["--data.args", "{x: env:SOMEWHERE}"], VALUE),
        (["--data.args.x", "[env:SOMEWHERE]"], [VALUE]),
        (["--data.args.x", "env:SEED"], "7"),
        (["--data.args.x", "'env: 1 and 2'"], "env: 1 and 2"),
        (["--data.args.x", "xenv:SOMEWHERE"], "xenv:SOMEWHERE"),
        (["--data.args.x", "env: SOMEWHERE"], {"env": "SOMEWHERE"}),
        (["--data.args.x", "env:"], {"env": None}),
    ],
)
def test_the_command_line_takes_it_too_and_only_as_the_whole_value(words: list[str], value: Any) -> None:
    assert load_config(words).data.args == {"x": value}


@pytest.mark.parametrize("value", ["env:1", "env:SOMEWHERE/x", "env:MY-TOKEN"])
def test_a_variable_amid_other_text_is_refused_not_taken_literally(value: str) -> None:
    with pytest.raises(UsageError, match=re.escape(f"data.args.x = {value!r}: env:NAME stands alone")):
        load_config(["--data.args.x", value])
    with pytest.raises(UsageError, match=re.escape(f"runs_dir = {value!r}: env:NAME stands alone")):
        load_config(["--runs-dir", value])


def test_the_file_may_be_named_by_a_variable(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECIPE", str(file))
    config = load_config(["--config", "env:RECIPE"])
    assert (config.name, config.seed, recorded(config)["config"]) == ("run", 7, "env:RECIPE")
    file.write_text("seed: -1")
    with pytest.raises(UsageError, match=r"^env:RECIPE: seed = -1: input should be"):
        load_config(["--config", "env:RECIPE"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data.args.x", "env:NOWHERE"], "data.args.x = 'env:NOWHERE': there is no environment variable NOWHERE"),
        (["--data.args", "{a: [{b: env:NOWHERE}]}"], "data.args.a.b = 'env:NOWHERE'"),
        (["--seed", "env:NOWHERE"], "seed = 'env:NOWHERE': there is no"),
        (["--config", "env:NOWHERE"], "config = 'env:NOWHERE': there is no"),
        (["--own.alpha", "env:NOWHERE"], "own.alpha = 'env:NOWHERE': there is no"),
        (["--seed", "env:SOMEWHERE"], "command line: seed = 'env:SOMEWHERE': input should be a valid integer"),
        (["--precision", "env:SOMEWHERE"], "command line: precision = 'env:SOMEWHERE': input should be 'no', 'bf16'"),
        (["--compile", "env:SOMEWHERE"], "command line: compile = 'env:SOMEWHERE': input should be a valid boolean"),
        (["--data.workers", "env:SOMEWHERE"], "command line: data.workers = 'env:SOMEWHERE': input should be"),
        (["--data.args", "env:SOMEWHERE"], "command line: data.args = 'env:SOMEWHERE': input should be a valid dict"),
        (["--name", "env:SPACE"], "name = 'env:SPACE': use letters"),
        (["--checkpoint.best", "env:SPACE"], "checkpoint.best = 'env:SPACE': write"),
    ],
)
def test_a_mistake_shows_the_name_and_not_the_value(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPACE", f"{VALUE} x")
    with pytest.raises(UsageError) as refusal:
        load_config(words)
    assert str(refusal.value).startswith(said)
    assert VALUE not in str(refusal.value)


def test_a_resume_compares_names_of_text_and_values_of_what_trains(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = load_config(["--config", str(file)])
    old = config_from_mapping(parse_yaml(dump_without_secrets(before)), "config.yaml")
    monkeypatch.setenv("SOMEWHERE", "a rotated key")
    rotated = load_config(["--config", str(file)])
    assert rotated.data.args["token"] == "a rotated key"
    assert differences(old, rotated) == {}
    assert training_hash(before) == training_hash(rotated)
    monkeypatch.setenv("RATE", "0.5")
    monkeypatch.setenv("MODEL", "linear")
    changed = differences(old, load_config(["--config", str(file)]))
    assert changed == {
        "model.name": ("mlp", "linear"),
        "optim.lr": (0.25, 0.5),
        "optim.betas": ((0.25, 0.5), (0.5, 0.5)),
    }
    other = differences(old, load_config(["--config", str(file), "--data.args.token", "env:SEED"]))
    assert VALUE not in str(other)
    assert {"data.args", *changed} == set(other)


def test_the_copy_of_the_config_starts_a_run_with_what_the_variable_has_then(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = tmp_path / "config.yaml"
    copied.write_text(dump_without_secrets(load_config(["--config", str(file)])))
    monkeypatch.setenv("SOMEWHERE", "elsewhere")
    config = load_config(["--config", str(copied)])
    assert (config.data.args["token"], config.runs_dir, config.optim.lr) == ("elsewhere", "elsewhere", 0.25)
    monkeypatch.delenv("SOMEWHERE")
    with pytest.raises(UsageError, match=r"runs_dir = 'env:SOMEWHERE': there is no environment variable SOMEWHERE"):
        load_config(["--config", str(copied)])


def test_what_user_code_gets_is_masked_in_messages_whatever_the_setting_is_called(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = f"cannot open {VALUE}/x as ordinary"
    assert clean_message(text) == text
    monkeypatch.setenv("WORD", "ordinary")
    monkeypatch.setenv("LINES", "the first line\nthe second line")
    load_config(["--data.args.place", "env:SOMEWHERE", "--data.args.list", "[env:WORD, env:LINES]"])
    assert clean_message(text) == "cannot open ***/x as ***"
    assert clean_message("+the first line\n+the second line") == "+***\n+***"
    assert clean_message(f"{VALUE.encode()!r}") == "b'***'"


def test_other_settings_and_sources_with_the_same_words_are_recorded_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else a resume would not see that such a setting has changed, and the recorded loop would not be one."""
    monkeypatch.setenv("WORD", "constant")
    words = ["--tracking.group", "env:WORD", "--data.args.x", "env:WORD", "--schedule", "constant"]
    config = load_config(words)
    assert config_from_mapping(parse_yaml(dump_without_secrets(config)), "") == dataclasses.replace(
        config,
        tracking=dataclasses.replace(config.tracking, group="env:WORD"),
        data=dataclasses.replace(config.data, args={"x": "env:WORD"}),
    )
    assert clean_text("from training.constant import rate") == "from training.constant import rate"
    other = load_config([*words, "--schedule", "cosine"])
    assert training_hash(config) != training_hash(other)


def test_a_value_is_masked_everywhere_if_its_variable_or_setting_has_a_secrets_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PLACE", "a value of mine")
    monkeypatch.setenv("MY_TOKEN", "another value of mine")
    load_config(["--data.args.password", "env:PLACE", "--data.args.x", "env:MY_TOKEN"])
    assert clean_text("a value of mine, another value of mine", {}) == "***, ***"


@pytest.mark.parametrize(
    "text",
    [
        "token: env:HF_TOKEN",
        "+  password: 'env:DB_PASSWORD'",
        "{token: env:HF_TOKEN, size: 3}",
        "data.args = {'token': 'env:HF_TOKEN', 'size': 3}: no",
        '{"token": "env:HF_TOKEN"}',
        r'"text": "{\"token\": \"env:HF_TOKEN\"}"',
        "run --data.args.token env:HF_TOKEN --lr 0.1",
        "run --data.args.token=env:HF_TOKEN",
        "    token: env:HF_TOKEN  # from my account",
    ],
)
def test_a_name_of_a_variable_is_no_secret(text: str) -> None:
    assert clean_text(text, {}) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("token: env:HF_TOKEN abc", "token: ***"),
        ("token: env:HF-abc", "token: ***"),
        ("f(token='env:A' + 'abc')", "f(token='***')"),
        ("f(token='env:A' 'abc')", "f(token='***')"),
        ("f(token='env:A abc')", "f(token='***')"),
        ("token='env:A'abc", "token=***"),
    ],
)
def test_what_only_begins_like_one_is_masked(text: str, shown: str) -> None:
    assert clean_text(text, {}) == shown


def test_settings_and_command_lines_keep_names_of_variables() -> None:
    settings = {"token": "env:HF_TOKEN", "password": ["env:A", "abc"]}
    assert clean_mapping(settings, environ={}) == {"token": "env:HF_TOKEN", "password": ["env:A", "***"]}
    words = ["x.py", "--data.args.token", "env:HF_TOKEN", "--task.args={secret: env:A, b: 1}", "--token=env:B"]
    assert clean_command(words, {}) == words


# ---- a loop's own settings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("default", "variable", "value", "is_recorded_as"),
    [
        ("x", "SOMEWHERE", VALUE, "env:SOMEWHERE"),
        (None, "SOMEWHERE", VALUE, "env:SOMEWHERE"),
        ("x", "SEED", "7", "env:SEED"),
        (3, "SEED", 7, 7),
        (0.1, "RATE", 0.25, 0.25),
        (0.1, "SEED", 7.0, 7.0),
        (False, "COMPILE", True, True),
    ],
)
def test_own_text_is_recorded_by_name_and_an_own_number_by_value(
    default: Any, variable: str, value: Any, is_recorded_as: Any
) -> None:
    config = load_config(["--own.alpha", f"env:{variable}"], own={"alpha": default})
    assert config.own["alpha"] == value
    assert (recorded(config.own), flatten(config)["own.alpha"]) == ({"alpha": is_recorded_as}, is_recorded_as)
    assert isinstance(config.own["alpha"], str if isinstance(value, str) else type(default))


def test_an_own_secret_is_taken_from_the_environment_only() -> None:
    own = {"hub_token": None, "alpha": 0.1}
    config = load_config(["--own.hub_token", "env:SOMEWHERE"], own=own)
    assert config.own["hub_token"] == VALUE
    assert parse_yaml(dump_without_secrets(config))["own"] == {"hub_token": "env:SOMEWHERE", "alpha": 0.1}
    with pytest.raises(UsageError, match=r"own\.hub_token: its name or value looks like a secret.*env:NAME"):
        load_config(["--own.hub_token", "abc"], own=own)


@pytest.mark.parametrize("default", [0.1, 3, True, ["x"], {"x": 1}])
def test_text_of_the_environment_is_no_number(default: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (VALUE, "{", "[secret]", "{secret: 1}"):
        monkeypatch.setenv("SOMEWHERE", value)
        with pytest.raises(UsageError, match=r"own\.alpha = 'env:SOMEWHERE' is of type str; the loop's default, .*"):
            load_config(["--own.alpha", "env:SOMEWHERE"], own={"alpha": default})


def test_it_is_text_for_those_who_use_it() -> None:
    text = FromEnvironment("env:SOMEWHERE")
    assert isinstance(text, str)
    assert (text, len(text), text + "x", f"{text}", text in {VALUE}) == (VALUE, len(VALUE), f"{VALUE}x", VALUE, True)
    assert type(text + "") is str


def test_evaluate_needs_the_variables_that_it_uses_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A colleague evaluates a run whose W&B team and folder are named by variables."""
    (tmp_path / "config.yaml").write_text(
        "runs_dir: env:NOWHERE\ntracking: {entity: env:NOWHERE}\ndata: {args: {x: env:SOMEWHERE}}\n"
    )
    assert evaluate.config_of(tmp_path, [], quiet=True).data.args == {"x": VALUE}
    monkeypatch.delenv("SOMEWHERE")
    with pytest.raises(UsageError, match="no environment variable SOMEWHERE"):
        evaluate.config_of(tmp_path, [], quiet=True)
