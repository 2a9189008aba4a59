"""What editors, other systems and YAML itself do to a config file: it is read as it says, or refused with its line."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from distloop.config.load import load_config
from distloop.config.yaml_text import dump_yaml, parse_yaml
from distloop.errors import UsageError
from tests.tools.ranks import command

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  # Python opens files as ASCII then


def refusal(folder: Path, content: str | bytes, *arguments: str) -> str:
    """The message, without the file's name, with which a file of this content is refused."""
    file = folder / "recipe.yaml"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UsageError) as error:
        load_config(["--config", str(file), *arguments])
    assert len(str(error.value).splitlines()) == 1
    assert str(error.value).startswith(str(file))
    return str(error.value).removeprefix(str(file)).lstrip(": ")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("optim: {lr: 0.02}\nseed: 1\noptim:\n  eps: 1\n", "optim is there twice, in lines 1 and 3"),
        ("seed: 1\noptim:\n  lr: 0.1\n  name: sgd\n  lr: 0.2\n", "optim.lr is there twice, in lines 3 and 5"),
        ("model: {args: {a: 1, a: 2}}\n", "model.args.a is there twice, in line 1"),
        (
            "model:\n  args:\n    sizes: [{x: 1,\n      'x': 2}]\n",
            "model.args.sizes.x is there twice, in lines 3 and 4",
        ),
        ("model: {args: {1: a, 0x1: b}}\n", "model.args.1 is there twice, in line 1"),
        ("seed: 1\nseed: 1\n", "seed is there twice, in lines 1 and 2"),
    ],
)
def test_a_section_or_key_twice_is_refused_with_both_lines(tmp_path: Path, text: str, said: str) -> None:
    assert refusal(tmp_path, text) == f"{said}: all but the last would be dropped. Write it once."


def test_a_merge_is_refused_and_a_key_of_that_name_is_none(tmp_path: Path) -> None:
    text = "x: &x {a: 1}\nmodel:\n  args:\n    <<: *x\n"
    assert refusal(tmp_path, text) == "line 4: << (merge) is not taken: write the keys out."
    assert parse_yaml("{'<<': 1}") == {"<<": 1}


def test_the_same_key_in_two_sections_and_an_anchor_used_twice_are_no_key_twice() -> None:
    text = "a: &x {lr: 1}\nb: *x\nc: {lr: 2}\nd: [{k: 1}, {k: 2}]\n"
    assert parse_yaml(text) == {"a": {"lr": 1}, "b": {"lr": 1}, "c": {"lr": 2}, "d": [{"k": 1}, {"k": 2}]}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("optim:\n\tlr: 0.1\n", "line 2: there is a tab, where YAML takes spaces only."),
        ("optim:\n  lr: 0.1\n\teps: 1\n", "line 3: there is a tab, where YAML takes spaces only."),
        ("seed: 1\nmodel: !!python/object/apply:os.getcwd []\n", "line 2: the tag !!python/object/apply:os.getcwd"),
        ("model: {args: {x: !!timestamp 2024-01-01}}\n", "line 1: the tag !!timestamp"),
        ("data: {args: {x: !mine 5}}\n", "line 1: the tag !mine"),
        ("seed: 1\noptim: {lr: 0.1\n", "is not valid YAML"),
        ("seed: 1\n---\nseed: 2\n", "is not valid YAML"),
        ("a: \x07\n", "is not valid YAML"),
        (b"seed: \xff\xfe", "cannot be read: it is no text in UTF-8"),
        ("name: größe\n".encode("latin-1"), "cannot be read: it is no text in UTF-8"),
        ("- seed: 1\n", "expected settings like 'seed: 0', found a list."),
        ("3\n", "expected settings like 'seed: 0', found a int."),
        ("optim.lr: 0.1\n", "optim.lr = 0.1: there is no such setting. In a file: optim: {lr: 0.1}"),
        ("--optim.lr: 0.1\n", "--optim.lr = 0.1: there is no such setting. In a file: optim: {lr: 0.1}"),
        ("batch: {global-size: 8}\n", "batch.global-size = 8: there is no such setting. Did you mean 'global_size'?"),
        ("optim: {lr: }\n", "optim.lr has no value: input should be a valid number"),
        ("optim:\n  lr:\n  eps: 1e-8\n", "optim.lr has no value: input should be a valid number"),
        (f"seed: {2**64}\n", f"seed = {2**64}: input should be less than 184467440737095"),
        ("seed: yes\n", "seed = 'yes': input should be a valid integer"),
        ("optim: {lr: 1e-3s}\n", "optim.lr = '1e-3s': input should be a valid number"),
        ("optim: {clip_norm: off}\n", "optim.clip_norm = 'off': input should be a valid number"),
        ("stop: {after_minutes: 1:30}\n", "stop.after_minutes = '1:30': input should be a valid number"),
        ("seed: 2024-01-01\n", "seed = '2024-01-01': input should be a valid integer"),
    ],
)
def test_what_is_wrong_in_a_file_is_said_in_one_line(tmp_path: Path, text: str | bytes, said: str) -> None:
    assert refusal(tmp_path, text).startswith(said)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", "true"),
        ("train.epochs", "true"),
        ("optim.clip_norm", "true"),
        ("checkpoint.keep_every_steps", "yes"),
        ("checkpoint.keep_every_steps", "true"),
        ("stop.reserve_seconds", "false"),
        ("data.workers", "false"),
        ("optim.betas", "[false, 0.9]"),
        ("schedule.milestones", "[true]"),
    ],
)
def test_true_and_false_are_no_numbers(tmp_path: Path, key: str, value: str) -> None:
    section, _, name = key.rpartition(".")
    message = refusal(tmp_path, f"{section}: {{{name}: {value}}}\n" if section else f"{name}: {value}\n")
    assert message.startswith(key)
    assert "input should be a valid" in message


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_a_file_means_the_same_in_each_encoding_of_yaml_and_with_each_line_end(
    tmp_path: Path, encoding: str, line_end: str
) -> None:
    text = "# größer\nname: größer\noptim:\n  lr: 0.5\ntracking: {notes: 'läuft'}\n"
    (tmp_path / "x.yaml").write_bytes(text.replace("\n", line_end).encode(encoding))
    config = load_config(["--config", str(tmp_path / "x.yaml")])
    assert (config.name, config.optim.lr, config.tracking.notes) == ("größer", 0.5, "läuft")


@pytest.mark.parametrize("text", ["", "\n", "# nothing\n", "---\n", "\ufeff", "null\n"])
def test_an_empty_file_is_the_defaults(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.yaml").write_text(text, encoding="utf-8")
    assert load_config(["--config", str(tmp_path / "x.yaml")]).optim == load_config([]).optim


@pytest.mark.parametrize(
    ("text", "value"),
    [("0777", 777), ("-010", -10), ("+7", 7), ("0x1F", 31), ("1e1", 10.0), ("0777.5", 777.5), ("1_000", "1_000")],
)
def test_numbers_are_what_they_look_like(text: str, value: Any) -> None:
    found = parse_yaml(text)
    assert (found, type(found)) == (value, type(value))
    assert parse_yaml(dump_yaml({"x": text})) == {"x": text}  # as text it comes back as text


def test_a_file_in_utf_8_is_read_under_another_locale_and_what_is_written_is_utf_8(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("name: run\ntracking: {notes: 'größer – 学習'}\n", encoding="utf-8")
    program = (
        "import sys; from distloop.config.load import load_config;"
        "c = load_config(sys.argv[1:]); print(ascii(c.tracking.notes), ascii(c.tracking.group))"
    )
    words = [sys.executable, "-c", program, "--config", "x.yaml", "--tracking.group", "größe"]
    ended = command(words, tmp_path, ASCII)
    assert ended.returncode == 0, ended.stdout
    assert ended.stdout.strip() == f"{'größer – 学習'!a} {'größe'!a}"


@pytest.mark.parametrize("setting", ["name: größer", "runs_dir: läufe", "data: {root: ~/daten-ü}", "init_from: ö"])
def test_a_file_name_that_the_locale_would_write_otherwise_is_refused(tmp_path: Path, setting: str) -> None:
    (tmp_path / "x.yaml").write_text(f"{setting}\n", encoding="utf-8")
    words = [
        sys.executable,
        "-m",
        "distloop.train",
        "--config",
        "x.yaml",
        "--device",
        "cpu",
        "--train.steps",
        "2",
        "--tracking.no-report",
    ]
    ended = command(words, tmp_path, ASCII)
    assert ended.returncode == 2, ended.stdout
    assert "file names here are in ascii" in ended.stdout
    assert "PYTHONUTF8=1" in ended.stdout
    assert os.listdir(tmp_path) == ["x.yaml"]
