"""From names in the config to callables, and what is said where that fails."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distloop.config.registry import call, import_callable, resolve
from distloop.data.datasets import digits
from distloop.errors import UsageError
from distloop.training.models import cnn

KNOWN = {"linear": int, "mlp": float}


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to be in, with a module of the user's; what is imported from it is forgotten afterwards."""
    (tmp_path / "users_module.py").write_text(
        "CONSTANT = 3\n\n\ndef build_model(hidden, width=3):\n    return hidden * width\n\n\nclass Net:\n    pass\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_a_known_name_is_the_registered_callable() -> None:
    assert resolve("model.name", "mlp", KNOWN) is float


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError) as refusal:
        resolve("model.name", "linera", KNOWN)
    message = str(refusal.value)
    assert "model.name = 'linera' is not known" in message
    assert "Did you mean 'linear'?" in message
    assert "module:callable" in message


def test_a_name_like_no_other_is_refused_with_all_that_there_are() -> None:
    with pytest.raises(UsageError, match="Known: linear, mlp"):
        resolve("model.name", "transformer", KNOWN)


def test_module_and_callable_are_found_in_the_current_folder(module: Path) -> None:
    assert resolve("model.name", "users_module:build_model", KNOWN)(2) == 6
    assert import_callable("model.name", "users_module:Net").__name__ == "Net"


def test_the_current_folder_does_not_go_before_the_installed_packages(
    module: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (module / "colorsys.py").write_text("hls_to_rgb = print\n")
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    assert import_callable("model.name", "colorsys:hls_to_rgb") is not print
    assert sys.path.count(os.getcwd()) == 1


def test_a_module_that_does_not_exist_is_named_with_where_it_was_looked_for(module: Path) -> None:
    with pytest.raises(UsageError) as refusal:
        import_callable("model.name", "no_such_module:net")
    message = str(refusal.value)
    assert "model.name = 'no_such_module:net'" in message
    assert "no module 'no_such_module'" in message
    assert str(module) in message


def test_a_missing_package_of_a_dotted_name_is_named(module: Path) -> None:
    with pytest.raises(UsageError, match=r"no module 'users_module\.parts'"):
        import_callable("model.name", "users_module.parts:net")


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("\n\nraise ValueError('bad luck')\n", 3, "ValueError: bad luck"),
        ("x = 1\nimport a_package_that_is_not_there\n", 2, "No module named 'a_package_that_is_not_there'"),
        ("\n1 / 0\n", 2, "ZeroDivisionError"),
        ("import users_brok\n", 1, "No module named 'users_brok'"),  # the module's own name begins like this
        ("x = 1\ndef net(:\n    pass\n", 2, "SyntaxError"),
    ],
)
def test_an_error_inside_of_the_module_is_told_with_its_file_and_line(
    module: Path, text: str, line: int, said: str
) -> None:
    (module / "users_broken.py").write_text(text)
    with pytest.raises(UsageError) as refusal:
        import_callable("data.name", "users_broken:net")
    message = str(refusal.value)
    assert said in message
    assert f"({module / 'users_broken.py'}, line {line})" in message


def test_a_callable_that_is_not_there_is_refused_with_the_nearest(module: Path) -> None:
    with pytest.raises(UsageError, match=r"users_module has no callable 'buid_model'\. Did you mean 'build_model'\?"):
        import_callable("model.name", "users_module:buid_model")


def test_what_cannot_be_called_is_refused_with_what_can(module: Path) -> None:
    with pytest.raises(UsageError, match=r"no callable 'CONSTANT'\. Known: Net, build_model"):
        import_callable("model.name", "users_module:CONSTANT")


def test_a_name_without_a_callable_is_refused(module: Path) -> None:
    with pytest.raises(UsageError, match="no callable ''"):
        import_callable("model.name", "users_module:")


def takes(hidden: int, width: int = 3) -> tuple[int, int]:
    return hidden, width


def takes_everything(**options: Any) -> dict[str, Any]:
    return options


def test_a_callable_gets_its_arguments_and_what_it_names_of_the_offers() -> None:
    assert call("model.args", takes, {"hidden": 1}, {"width": 5, "depth": 7}) == (1, 5)
    assert call("model.args", takes, {"hidden": 1}, {}) == (1, 3)


def test_the_config_wins_over_the_offers() -> None:
    assert call("model.args", takes, {"hidden": 1, "width": 2}, {"width": 5}) == (1, 2)


def test_nothing_is_offered_to_a_callable_that_does_not_name_it() -> None:
    assert call("model.args", takes_everything, {"hidden": 1}, {"width": 5}) == {"hidden": 1}


def test_an_argument_that_is_missing_is_told_with_how_to_give_it() -> None:
    with pytest.raises(UsageError, match=r"missing .*'hidden'.* Give it: --model\.args\.hidden VALUE\."):
        call("model.args", takes, {}, {})


@pytest.mark.parametrize(
    ("arguments", "said"), [({"hiden": 1}, "hiden"), ({}, "'hidden'"), ({"hidden": 1, "depth": 2}, "'depth'")]
)
def test_arguments_that_do_not_fit_are_refused_with_what_the_callable_takes(
    arguments: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError) as refusal:
        call("model.args", takes, arguments, {})
    message = str(refusal.value)
    assert f"model.args = {arguments}" in message
    assert said in message
    assert "it takes (hidden: 'int', width: 'int' = 3)" in message


def test_a_type_error_inside_of_the_callable_is_not_taken_for_wrong_arguments() -> None:
    def broken(hidden: int) -> None:
        raise TypeError("inside")

    with pytest.raises(TypeError, match="inside"):
        call("model.args", broken, {"hidden": 1}, {})


def test_a_builtin_without_a_signature_is_called_with_the_arguments() -> None:
    assert call("data.args", dict, {"a": 1}, {"b": 2}) == {"a": 1}


def test_what_a_built_in_does_not_take_is_a_users_mistake() -> None:
    offered = {"input_shape": (1, 8, 8), "num_outputs": 10}
    with pytest.raises(UsageError, match=r"model.args = \{'norm': 'layer'\}: norm is one of group, batch, none"):
        call("model.args", cnn, {"norm": "layer"}, offered)
    with pytest.raises(UsageError, match="images cannot be shifted by -1 pixels"):
        call("data.args", digits, {"shift": -1}, {})


class Lines:
    def __repr__(self) -> str:
        return "Sequential(\n  (0): ReLU()\n)"


def test_a_note_on_an_error_is_one_line() -> None:
    def mine(text: str) -> None:
        raise ValueError("my own mistake")

    with pytest.raises(ValueError, match="my own mistake") as raised:
        call("model.args", mine, {"text": Lines()}, {})  # its repr has several lines
    [note] = raised.value.__notes__
    assert note.startswith("distloop: calling ")
    assert "\n" not in note


def test_what_goes_wrong_in_a_users_own_code_keeps_its_traceback() -> None:
    def mine(size: int) -> None:
        raise ValueError("my own mistake")

    with pytest.raises(ValueError, match="my own mistake"):
        call("model.args", mine, {"size": 1}, {})
