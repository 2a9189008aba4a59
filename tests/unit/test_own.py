"""Settings that a loop declares."""

from __future__ import annotations

from typing import Any

import pytest

from distloop.config.comparison import differences, flatten, training_hash
from distloop.config.load import config_from_mapping, dump, load_config
from distloop.config.own import with_own
from distloop.config.settings import Config
from distloop.config.yaml_text import parse_yaml
from distloop.errors import UsageError


def own(given: dict[str, Any], **declared: Any) -> dict[str, Any]:
    return with_own(Config(own=given), declared).own


def test_a_setting_that_is_not_given_has_the_loops_default() -> None:
    assert own({"alpha": 0.5}, alpha=0.2, name="x", sizes=[1, 2]) == {"alpha": 0.5, "name": "x", "sizes": [1, 2]}
    assert own({}) == {}


@pytest.mark.parametrize(
    ("default", "given", "found"),
    [(0.2, 1, 1.0), (1, 2, 2), (True, False, False), ("a", "b", "b"), ([1], [], []), ({}, {"a": 1}, {"a": 1})],
)
def test_a_value_has_the_type_of_the_default(default: Any, given: Any, found: Any) -> None:
    value = own({"value": given}, value=default)["value"]
    assert value == found
    assert type(value) is type(default)


@pytest.mark.parametrize("given", [1, "text", None, [2.5], {"a": True}])
def test_a_default_of_none_takes_any_value(given: Any) -> None:
    assert own({"value": given}, value=None) == {"value": given}


@pytest.mark.parametrize(
    ("default", "given"),
    [(1, 1.5), (1, True), (0.5, True), (0.5, "0.5"), (True, 1), ("a", 1), ([1], "1"), ({}, [1]), (0.5, None)],
)
def test_a_value_of_another_type_is_refused(default: Any, given: Any) -> None:
    with pytest.raises(UsageError) as refusal:
        own({"value": given}, value=default)
    assert str(refusal.value) == (
        f"own.value = {given!r} is of type {type(given).__name__}; the loop's default, {default!r}, "
        f"is of type {type(default).__name__}."
    )


@pytest.mark.parametrize("default", [(1, 2), {1, 2}, object, {1: 2}, [float("nan")], float("inf"), b"x"])
def test_a_default_that_a_config_file_cannot_hold_is_refused(default: Any) -> None:
    with pytest.raises(UsageError, match=r"own=\{'value': …\}: a default is a finite number, text"):
        own({}, value=default)


def test_a_setting_that_the_loop_does_not_declare_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UsageError, match=r"own\.alhpa = 1: the loop declares no such setting\. Did you mean 'alpha'"):
        own({"alhpa": 1}, alpha=0.2, beta=1)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--own.alpha", "0.5", "--own.two-words", "[1, a]"],
        ["--own.alpha=0.5", "--own.two_words=[1, a]"],
        ["--own", "{alpha: 0.5, two_words: [1, a]}"],
    ],
)
def test_the_command_line_takes_one_setting_or_the_mapping(arguments: list[str]) -> None:
    assert load_config(arguments).own == {"alpha": 0.5, "two_words": [1, "a"]}


def test_the_command_line_counts_over_the_file(tmp_path: Any) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("own: {alpha: 0.1, beta: 3}\n")
    assert load_config(["--config", str(file), "--own.alpha", "0.5"]).own == {"alpha": 0.5, "beta": 3}
    file.write_text("own:\n")
    assert load_config(["--config", str(file)]).own == {}
    file.write_text("own: [1]\n")
    with pytest.raises(UsageError, match=r"run\.yaml: own = \[1\]: input should be a mapping, so that --own\.alpha"):
        load_config(["--config", str(file), "--own.alpha", "0.5"])
    with pytest.raises(UsageError, match="own = "):
        load_config(["--config", str(file)])


def test_own_settings_come_back_from_the_runs_config() -> None:
    config = Config(own={"alpha": 0.5, "sizes": [1, 2], "inner": {"a": None}})
    assert config_from_mapping(parse_yaml(dump(config)), "file") == config


def test_own_settings_belong_to_what_is_trained() -> None:
    old, new = Config(own={"alpha": 0.5, "gone": 1}), Config(own={"alpha": 0.7, "new": 2})
    expected = {"own.alpha": (0.5, 0.7), "own.gone": (1, None), "own.new": (None, 2)}
    assert differences(old, new) == expected
    assert differences(Config(), Config(own={"alpha": 1})) == {"own.alpha": (None, 1)}
    assert training_hash(old) != training_hash(new)


def test_without_own_settings_a_run_is_what_it_was_before_there_were_any() -> None:
    assert "own" not in flatten(Config())
    assert training_hash(Config()) == training_hash(Config(own={}))


def test_help_shows_the_loops_own_settings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load_config(["--help"], own={"alpha": 0.2})
    assert "{alpha: 0.2}" in capsys.readouterr().out


def test_a_loops_own_settings_are_checked_wherever_they_are_given() -> None:
    assert load_config(["--own", "{alpha: 1}"], own={"alpha": 0.2, "beta": 3}).own == {"alpha": 1.0, "beta": 3}
    for arguments in (["--own", "{gamma: 1}"], ["--own.gamma", "1"]):
        with pytest.raises(UsageError, match=r"own\.gamma = 1: the loop declares no such setting"):
            load_config(arguments, own={"alpha": 0.2})


@pytest.mark.parametrize("given", [float("inf"), float("-inf"), float("nan"), [float("inf")]])
def test_a_number_that_json_lacks_is_refused(given: Any) -> None:
    with pytest.raises(UsageError, match=r"own\.value = .*: give finite numbers"):
        own({"value": given}, value=None)


@pytest.mark.parametrize("setting", [{"token": "attention"}, {"note": "ghp_0123456789abcdefghijABCDEFGHIJ012345"}])
def test_what_would_not_be_recorded_as_it_is_is_refused(setting: dict[str, str]) -> None:
    """A resume with another value would train differently without a word: both are *** in config.yaml."""
    (name,) = setting
    with pytest.raises(UsageError, match=rf"own\.{name}: its name or value looks like a secret"):
        own(setting, **{name: "x"})
    with pytest.raises(UsageError, match=rf"own\.{name}: its name or value looks like a secret"):
        own({}, **setting)
    assert own({"token_count": 3}, token_count=1) == {"token_count": 3}
