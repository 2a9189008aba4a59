"""~, $NAME and relative paths in settings: what they name, how they are recorded and shown, and what is refused."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest

from distloop.config.comparison import differences, flatten
from distloop.config.load import config_from_mapping, dump_without_secrets, load_config
from distloop.config.places import KEYS, absolute, shown
from distloop.config.settings import Config, path_of
from distloop.config.yaml_text import parse_yaml
from distloop.data.datasets import load_data
from distloop.errors import UsageError


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """$HOME, in a folder beside the one where the test is."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.delenv("NOT_SET", raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return folder


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("runs", "{here}/runs"),
        ("./runs", "{here}/runs"),
        ("../runs", "{here}/../runs"),
        ("/a/b", "/a/b"),
        ("~", "{home}"),
        ("~/runs", "{home}/runs"),
        ("~root/runs", "/root/runs"),
        ("$HOME/runs", "{home}/runs"),
        ("${SCRATCH}/runs", "/scratch/me/runs"),
        ("a/$USERNAME_OF_TEST/b", "{here}/a/me/b"),
        ("a~/b$", "{here}/a~/b$"),
        ("./~/runs", "{here}/~/runs"),
    ],
)
def test_a_place_is_made_absolute_and_recorded_as_it_was_given(
    given: str, expected: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("USERNAME_OF_TEST", "me")
    here = os.getcwd()
    config = load_config(["--name", "x", "--runs-dir", given, "--init-from", given, "--data.root", given])
    monkeypatch.chdir("/")  # as a user's code may do from here on
    assert str(path_of(config)) == f"{expected.format(here=here, home=home)}/x"
    assert str(absolute(str(config.init_from))) == expected.format(here=here, home=home)
    recorded = parse_yaml(dump_without_secrets(config))
    assert (recorded["runs_dir"], recorded["init_from"], recorded["data"]["root"]) == (given, given, given)
    assert flatten(config)["init_from"] == given
    assert differences(config_from_mapping(recorded, "config.yaml"), config) == {}


def test_a_data_set_gets_its_root_as_an_absolute_path(home: Path) -> None:
    (home / "data").mkdir()
    for given, expected in (("data", f"{os.getcwd()}/data"), ("~/data", f"{home}/data")):
        config = load_config(["--data", "tests.unit.test_places:data_of", "--data.root", given])
        root = load_data(config.data).train[0]
        assert (root, type(root)) == (expected, str)


@pytest.mark.parametrize("root", ["s3://bucket/data", "s3://bucket/$NOT_SET/~", "env:BUCKET"])
def test_a_root_that_is_no_path_reaches_the_data_set_as_it_is(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUCKET", "user:pass$word@host")
    config = load_config(["--data", "tests.unit.test_places:data_of", "--data.root", root])
    assert load_data(config.data).train == [os.environ["BUCKET"] if root == "env:BUCKET" else root]


def data_of(root: str) -> tuple[list[str], list[str]]:
    return [root], [root]


def test_a_config_file_is_found_at_home(home: Path) -> None:
    (home / "own.yaml").write_text("seed: 7\n")
    for given in ("~/own.yaml", "$HOME/own.yaml"):
        config = load_config([f"--config={given}"])
        assert (config.seed, config.name, config.config) == (7, "own", given)
    with pytest.raises(UsageError, match=r"^--config .*/home/other\.yaml: no such file .*Did you mean 'own\.yaml"):
        load_config(["--config=~/other.yaml"])


@pytest.mark.parametrize("given", ["~/runs", "env:PLACE", "$PLACE", "${PLACE}"])
def test_a_place_may_come_from_a_variable(given: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLACE", "~/runs")
    config = load_config(["--runs-dir", given, "--name", "x"])
    assert str(path_of(config)) == f"{home}/runs/x"
    assert parse_yaml(dump_without_secrets(config))["runs_dir"] == given


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty: give a path"),
        ("$NOT_SET/x", "'$NOT_SET/x': there is no environment variable 'NOT_SET'. Set it, and export it."),
        ("${NOT_SET}", "'${NOT_SET}': there is no environment variable 'NOT_SET'"),
        ("$SET_BUT_EMPTY", "the environment variable 'SET_BUT_EMPTY' is empty"),
        ("${SET_BUT_EMPTY}/x", "the environment variable 'SET_BUT_EMPTY' is empty"),
        ("${SCRATCH:-/tmp}", "${NAME} takes the name of a variable, and no default as in a shell"),
        ("$OF_WINDOWS/x", "has a carriage return in it"),
        ("$OF_NOBODY/x", "there is no user 'nobody_of_this_name'"),
        ("~nobody_of_this_name/x", "there is no user 'nobody_of_this_name'. Write ./~nobody_of_this_name for"),
        ("~/made_before", "there is something here that has just this name, too"),
        ("$HOME/made_before", "there is something here that has just this name, too"),
    ],
)
def test_a_place_that_is_none_is_refused(
    key: str, text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("SET_BUT_EMPTY", ""), ("OF_WINDOWS", "/a\r"), ("OF_NOBODY", "~nobody_of_this_name")):
        monkeypatch.setenv(name, value)
    for literal in ("~", "$HOME"):
        Path(literal, "made_before").mkdir(parents=True)
    section, _, name = key.rpartition(".")
    file = tmp_path / "x.yaml"
    file.write_text(f'{section}: {{{name}: "{text}"}}\n' if section else f'{name}: "{text}"\n')
    arguments = [f"--config={text}"] if key == "config" else ["--config", str(file)]
    if (key, text) == ("config", ""):
        monkeypatch.setenv("EMPTY", "")
        arguments = ["--config", "env:EMPTY"]
    with pytest.raises(UsageError) as refusal:
        load_config(arguments)
    assert str(refusal.value).startswith(key)
    assert said in str(refusal.value)


@pytest.mark.parametrize("name", ["price$5", "price$five", "$5"])
def test_a_dollar_in_the_name_of_what_is_there_is_no_variable(name: str, home: Path) -> None:
    for folder in (Path(), home):
        (folder / name).mkdir()
    for given, expected in ((name, f"{os.getcwd()}/{name}"), (f"~/{name}", f"{home}/{name}")):
        config = load_config(["--init-from", given, "--runs-dir", given])
        assert str(absolute(str(config.init_from))) == expected
        assert str(path_of(config)) == f"{expected}/{config.name}"


def test_a_place_stays_where_it_was_when_the_config_was_read(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = {"$SCRATCH/runs": "/scratch/me/runs", "~/runs": f"{home}/runs", "runs": f"{os.getcwd()}/runs"}
    for given, expected in places.items():
        config = load_config(["--runs-dir", given, "--data.root", given, "--data", "tests.unit.test_places:data_of"])
        with monkeypatch.context() as changed:  # as a user's code may
            changed.delenv("SCRATCH")
            changed.setenv("HOME", "/elsewhere")
            changed.chdir("/")
            assert str(path_of(config)) == f"{expected}/{config.name}"
            assert load_data(config.data).train == [expected]


def test_a_path_is_shown_as_it_was_given_and_used_as_an_absolute_one(monkeypatch: pytest.MonkeyPatch) -> None:
    here = os.getcwd()
    for given in ("runs", "../runs", "/a/runs"):
        path = path_of(load_config(["--runs-dir", given, "--name", "x"]))
        assert path.is_absolute()
        assert os.fspath(path) == str(Path(here, given, "x"))
        for one in (path, pickle.loads(pickle.dumps(path))):
            assert f"{one / 'y'} {one.parent}" == f"{given}/x/y {given}"
    path = path_of(load_config(["--runs-dir", "runs", "--name", "x"]))
    monkeypatch.chdir("/")
    assert f"{path}" == "runs/x"
    assert path.with_name("y").is_absolute()
    assert shown(f"{here}/data") == "data"
    assert shown("/data") == "/data"


def test_a_start_in_a_folder_that_was_removed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(UsageError, match="does not exist any more"):
        load_config(["--seed", "1"])


def test_a_config_that_was_made_by_hand_begins_in_the_current_folder(tmp_path: Path) -> None:
    assert str(path_of(Config(name="x"))) == f"{tmp_path}/here/runs/x"
