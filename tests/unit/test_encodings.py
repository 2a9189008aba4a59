"""Text files are in UTF-8 under every locale: what opens one says so."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from tests.tools.ranks import REPOSITORY, command

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  # Python opens files as ASCII then
SOURCES = sorted((REPOSITORY / "distloop").rglob("*.py"))
# Methods of paths, and how many of their arguments may come before `encoding`.
OPENING = {"read_text": 0, "write_text": 1, "open": 2}


def text_files_in_the_locale(source: str) -> list[int]:
    """The lines of calls that open, read or write a text file without saying its encoding."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        keywords = {keyword.arg for keyword in node.keywords}
        modes = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
        modes += [
            word.value.value for word in node.keywords if word.arg == "mode" and isinstance(word.value, ast.Constant)
        ]
        is_binary = any(isinstance(mode, str) and "b" in mode and len(mode) <= 3 for mode in modes)
        match node.func:
            case ast.Name(id="open") | ast.Attribute(value=ast.Name(id="io"), attr="open"):
                opens = True
            case ast.Attribute(value=ast.Name(id="os" | "safetensors" | "Image" | "self"), attr="open"):
                opens = False
            case ast.Attribute(attr="read_text" | "write_text"):
                opens = True
            case ast.Attribute(attr="open"):
                opens = bool(node.args or node.keywords)
            case ast.Attribute(attr="run" | "Popen" | "check_output"):
                opens = "text" in keywords or "universal_newlines" in keywords
            case ast.Attribute(attr="NamedTemporaryFile" | "TemporaryFile" | "fdopen"):
                opens = bool(modes)
            case _:
                opens = False
        if opens and not is_binary and "encoding" not in keywords:
            found.append(node.lineno)
    return found


@pytest.mark.parametrize("file", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_a_text_file_is_opened_with_its_encoding(file: Path) -> None:
    assert text_files_in_the_locale(file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("open(path)", [1]),
        ("open(path, 'w')", [1]),
        ("path.open('a')", [1]),
        ("x = 1\npath.read_text()", [2]),
        ("path.write_text(text)", [1]),
        ("subprocess.run(command, text=True)", [1]),
        ("open(path, 'rb')", []),
        ("open(path, mode='xb')", []),
        ("path.open('rb')", []),
        ("open(path, encoding='utf-8')", []),
        ("path.read_text(encoding='utf-8')", []),
        ("os.open(path, os.O_RDONLY)", []),
        ("self.records.open()", []),
        ("subprocess.run(command)", []),
    ],
)
def test_a_call_without_an_encoding_is_found(source: str, lines: list[int]) -> None:
    assert text_files_in_the_locale(source) == lines


def test_a_run_under_another_locale_leaves_files_in_utf_8_and_its_commands_read_them(tmp_path: Path) -> None:
    notes = "größer – 学習"
    (tmp_path / "run.yaml").write_text(
        f"name: run\ntrain: {{steps: 4}}\ndevice: cpu\ntracking: {{notes: '{notes}', wandb: offline}}\n"
        "checkpoint: {every_steps: 2}\nown: {}\nmodel: {name: 'mine:Größe', args: {größe: 8}}\n",
        encoding="utf-8",
    )
    (tmp_path / "mine.py").write_text(
        "import torch\n\n\ndef Größe(größe):\n    return torch.nn.Sequential(torch.nn.Flatten(), "
        "torch.nn.Linear(64, größe), torch.nn.ReLU(), torch.nn.Linear(größe, 10))\n",
        encoding="utf-8",
    )
    python = [sys.executable, "-m"]
    words = [*python, "distloop.train", "--config", "run.yaml"]
    for more in ([], ["--resume", "extend", "--train.steps", "6"]):
        ended = command([*words, *more], tmp_path, ASCII)
        assert ended.returncode == 0, ended.stdout
    assert notes in (tmp_path / "runs" / "run" / "config.yaml").read_text(encoding="utf-8")
    for one in (["status", "runs"], ["status", "runs/run", "--json"], ["report", "runs/run"], ["evaluate", "runs/run"]):
        ended = command([*python, "distloop.commands.cli", *one], tmp_path, ASCII)
        assert ended.returncode == 0, ended.stdout
        assert "Traceback" not in ended.stdout


def test_no_text_file_is_opened_in_the_locale_s_encoding_while_a_run_trains(tmp_path: Path) -> None:
    """Python itself tells of each that is."""
    words = [sys.executable, "-X", "warn_default_encoding", "-W", "always::EncodingWarning", "-m", "distloop.train"]
    ended = command([*words, "--train.steps", "2", "--device", "cpu", "--tracking.no-report"], tmp_path)
    assert ended.returncode == 0, ended.stdout
    assert [line for line in ended.stdout.splitlines() if "EncodingWarning" in line and "/distloop/" in line] == []
