"""Files that are open before loader processes start are refused where these would share a position in them, and let be
where they would not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distloop.config.settings import Data
from distloop.data.fingerprint import fingerprint
from distloop.errors import UsageError
from tests.lab import open_early
from tests.lab.handles import ROWS
from tests.lab.open_early import FINE, SHARED, Rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    open_early.write_all(folder)
    return folder


@pytest.fixture(autouse=True)
def mixed_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXED_UP", str(folder))


@pytest.mark.parametrize("opened", SHARED, ids=lambda opened: opened.__name__)
def test_a_file_with_one_position_for_all_loader_processes_is_refused_by_name(folder: Path, opened: Any) -> None:
    data = Rows(opened(folder), range(ROWS))
    with pytest.raises(UsageError, match=rf"{folder}/\S+ was opened before .* share one position .*--data.workers 0"):
        fingerprint(data, Data("x:y", workers=2))
    assert fingerprint(data, Data("x:y", workers=0))["contents"]


@pytest.mark.parametrize("opened", FINE, ids=lambda opened: opened.__name__)
def test_what_is_open_and_has_no_common_position_is_let_be(folder: Path, opened: Any) -> None:
    with_workers = fingerprint(Rows(opened(folder), range(ROWS)), Data("x:y", workers=2))
    assert with_workers == fingerprint(Rows(opened(folder), range(ROWS)), Data("x:y", workers=0))
