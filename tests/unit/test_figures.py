"""Pictures that a loop shows: each kind becomes a PNG, their number and size are bounded, a failure is one line."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from distloop.errors import UsageError
from distloop.run.figures import FILE, LARGEST_SIDE, MOST_OF_A_STEP, STEPS_KEPT, Figures
from tests.unit.test_metrics_file import room_for

GREY = np.linspace(0, 1, 12).reshape(3, 4)
COLOURS = np.arange(90, dtype=np.uint8).reshape(5, 6, 3)


def drawn(width: float = 3, height: float = 2) -> Figure:
    figure = Figure(figsize=(width, height), dpi=100)
    figure.add_subplot().plot([1, 2])
    return figure


@pytest.fixture
def written(tmp_path: Path) -> Callable[[Any], Any]:
    """Writes a picture; returns what is in its file."""

    def write(picture: Any) -> Any:
        file = Figures(tmp_path, 0).write("name", 7, picture)
        assert file == "figures/step_00000007/name.png"
        image = Image.open(tmp_path / file)
        assert image.format == "PNG"
        return np.asarray(image)

    return write


bytes_of_grey = np.rint(GREY * 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("picture", "pixels"),
    [
        (bytes_of_grey, bytes_of_grey),
        (GREY, bytes_of_grey),
        (GREY.astype(np.float16), np.rint(GREY.astype(np.float16) * 255).astype(np.uint8)),
        (GREY[None], bytes_of_grey),
        (COLOURS, COLOURS),
        (np.moveaxis(COLOURS, 2, 0), COLOURS),
        (np.dstack([COLOURS, COLOURS[..., :1]]), np.dstack([COLOURS, COLOURS[..., :1]])),
        (torch.tensor(GREY, requires_grad=True), bytes_of_grey),
        (torch.tensor(GREY[None]).float(), bytes_of_grey),
        (torch.tensor(COLOURS).permute(2, 0, 1), COLOURS),
        (torch.tensor(COLOURS), COLOURS),
        (torch.ones(1, 2, 3, dtype=torch.bfloat16), np.full((2, 3), 255, np.uint8)),
        # Three rows and columns of three colours: each library's own order.
        (COLOURS[:3, :3], COLOURS[:3, :3]),
        (torch.tensor(COLOURS[:3, :3]).permute(2, 0, 1), COLOURS[:3, :3]),
        (Image.fromarray(COLOURS), COLOURS),
        (Image.fromarray(bytes_of_grey), bytes_of_grey),
        (Image.fromarray(COLOURS).convert("CMYK"), COLOURS),
        (Image.fromarray(bytes_of_grey > 100), np.where(bytes_of_grey > 100, 255, 0)),
    ],
)
def test_each_kind_of_picture_is_written_as_it_is(written: Callable[[Any], Any], picture: Any, pixels: Any) -> None:
    assert np.array_equal(written(picture), pixels)


def test_a_figure_of_matplotlib_is_written_and_stays_open(written: Callable[[Any], Any]) -> None:
    figure = drawn()
    pixels = written(figure)
    assert pixels.shape == (200, 300, 4)
    assert pixels[..., :3].min() < 200 < pixels[..., :3].max()
    assert figure.dpi == 100
    assert len(figure.axes) == 1


@pytest.mark.parametrize(
    "picture",
    [
        "a.png",
        None,
        drawn().add_subplot(),
        [[0.5]],
        np.zeros(4),
        np.zeros((2, 3, 5)),
        np.zeros((4, 2, 2)),
        np.zeros((1, 2, 3, 4)),
        np.zeros((0, 4)),
        np.zeros((2, 2), np.int64),
        np.zeros((2, 2), bool),
        torch.zeros(5, 6, 7),
        torch.zeros(4, 4, dtype=torch.int32),
        Image.new("F", (2, 2)),
        Image.new("I", (2, 2)),
    ],
)
def test_what_is_no_picture_is_refused_with_what_is_taken(tmp_path: Path, picture: Any) -> None:
    with pytest.raises(UsageError, match=r"^trackers\.figure\('name', 3, …\): .*It takes a figure of matplotlib, an i"):
        Figures(tmp_path, 0).write("name", 3, picture)
    assert not (tmp_path / "figures").exists()


@pytest.mark.parametrize("name", ["", "a/b", "..", "a b", "ä", "a.png", "x" * 101, 3])
def test_a_name_that_is_none_for_a_file_is_refused(tmp_path: Path, name: Any) -> None:
    with pytest.raises(UsageError, match="name has 1 to 100 letters, digits, _ and -"):
        Figures(tmp_path, 0).write(name, 3, GREY)


@pytest.mark.parametrize("worst", [-1.0, 1.5, np.nan, np.inf])
def test_values_outside_of_0_to_1_are_cut_off_and_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], worst: float
) -> None:
    picture = GREY.copy()
    picture[0, 0] = worst
    figures = Figures(tmp_path, 0)
    for step in (1, 2):
        file = figures.write("name", step, picture)
        assert file is not None
        expected = bytes_of_grey.copy()
        expected[0, 0] = 255 if worst > 1 else 0
        assert np.array_equal(np.asarray(Image.open(tmp_path / file)), expected)
    said = capsys.readouterr().out
    assert said.count("\n") == said.count("WARNING: trackers.figure('name', 1, …): the picture's values go from ") == 1


@pytest.mark.parametrize(
    ("picture", "size"),
    [
        (np.zeros((5000, 2500), np.uint8), (1000, 2000)),
        (Image.new("RGB", (4000, 10)), (2000, 5)),
        (torch.zeros(3, 1, 2001), (2000, 1)),
        (drawn(40, 20), (2000, 1000)),
        (Figure(figsize=(700, 350)), (2000, 1000)),  # too large to be drawn as it is
    ],
)
def test_a_large_picture_is_made_smaller(written: Callable[[Any], Any], picture: Any, size: tuple[int, int]) -> None:
    pixels = written(picture)
    assert (pixels.shape[1], pixels.shape[0]) == size
    if isinstance(picture, Image.Image):
        assert picture.size == (4000, 10)


def test_a_figure_that_matplotlibs_settings_enlarge_is_made_smaller(written: Callable[[Any], Any]) -> None:
    import matplotlib

    figure = drawn(20, 20)
    figure.text(1.3, 0.5, "far outside")
    with matplotlib.rc_context({"savefig.bbox": "tight"}):
        assert max(written(figure).shape) == LARGEST_SIDE


def test_a_step_has_a_bounded_number_of_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = Figures(tmp_path, 0)
    for step in (1, 2):
        files = [figures.write(f"name-{number}", step, GREY) for number in range(MOST_OF_A_STEP + 3)]
        assert [file is None for file in files] == [False] * MOST_OF_A_STEP + [True] * 3
        assert len(list((tmp_path / "figures" / f"step_0000000{step}").iterdir())) == MOST_OF_A_STEP
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert f"WARNING: trackers.figure('name-{MOST_OF_A_STEP}', 1, …): a step has at most 16 pictures" in said


def test_the_last_steps_with_pictures_are_kept(tmp_path: Path) -> None:
    figures = Figures(tmp_path, 0)
    (tmp_path / "figures" / "step_of_mine").mkdir(parents=True)
    for step in range(10, 10 * (STEPS_KEPT + 4), 10):
        figures.write("name", step, GREY)
    kept = sorted(path.name for path in (tmp_path / "figures").iterdir() if path.name != "step_of_mine")
    assert kept == [f"step_{step:08d}" for step in range(40, 10 * (STEPS_KEPT + 4), 10)]
    assert (tmp_path / "figures" / "step_of_mine").exists()


def test_an_attempt_begins_without_the_pictures_of_steps_that_it_does_again(tmp_path: Path) -> None:
    before = Figures(tmp_path, 0)
    for step in (10, 20, 30):
        before.write("name", step, GREY)
    Figures(tmp_path, 20)
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == ["step_00000010", "step_00000020"]


def test_who_owns_the_run_is_checked_before_a_picture_is_written(tmp_path: Path) -> None:
    def taken_over() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Figures(tmp_path, 0, taken_over).write("name", 1, GREY)
    assert not (tmp_path / "figures").exists()


def test_a_full_disk_is_said_in_a_line_and_leaves_no_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (200, 200), np.uint8)
    figures = Figures(tmp_path, 0)
    assert figures.write("name", 1, GREY)
    with room_for(1000):
        assert [figures.write(name, 1, noise) for name in ("name", "other")] == [None, None]
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert "WARNING: trackers.figure('name', 1, …) was not written (File too large); training goes on" in said
    assert [path.name for path in (tmp_path / "figures" / "step_00000001").iterdir()] == ["name.png"]
    assert np.asarray(Image.open(tmp_path / "figures" / "step_00000001" / "name.png")).shape == (3, 4)
    assert figures.write("name", 2, noise)


def test_a_library_that_fails_is_said_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = drawn()
    broken.axes[0].set_title(r"$\nothing{$")
    torn = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (99, 99), np.uint8)).save(torn, "PNG")
    figures = Figures(tmp_path, 0)
    assert figures.write("broken", 1, broken) is None
    said = capsys.readouterr().out
    assert said.startswith("distloop: WARNING: trackers.figure('broken', 1, …) was not written (")
    assert said.count("\n") == 1
    assert Figures(tmp_path, 0).write("torn", 1, Image.open(io.BytesIO(torn.getvalue()[:2000]))) is None
    assert capsys.readouterr().out.count("\n") == 1
    assert list((tmp_path / "figures").rglob("*.png")) == []


@pytest.mark.parametrize(
    ("file", "is_one"),
    [
        ("figures/step_00000120/a-b_C.png", True),
        ("figures/step_00000120/../../../secret.png", False),
        ("/etc/step_00000120/a.png", False),
        ("figures/step_00000120/a.jpg", False),
        ("figures/step_00000120/a.png\n", False),
    ],
)
def test_a_row_can_name_no_file_elsewhere(file: str, is_one: bool) -> None:
    assert bool(FILE.fullmatch(file)) == is_one
