"""The report of a run and of several: everything is there, nothing is believed, nothing is fetched."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from html import unescape
from pathlib import Path

import numpy as np
import pytest

from distloop.commands.report import page
from distloop.commands.report.curves import read_metrics
from distloop.commands.report.page import SECTIONS, main, write_report
from distloop.commands.report.plots import Trace, draw_curves
from distloop.tracking.wording import number_on_axis
from tests.tools.browser import measure, open_page
from tests.tools.ranks import REPOSITORY
from tests.tools.report_runs import (
    EVIL,
    PICTURE,
    full_run,
    small_run,
    train_row,
    validation_detail,
    validation_row,
    without,
    write_figure,
    write_json,
    write_rows,
)

HEADINGS = [section.title for section in SECTIONS]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return full_run(tmp_path_factory.mktemp("runs") / "a & <b>")


@pytest.fixture(scope="module")
def report(run: Path) -> str:
    assert main([str(run)]) == 0
    return (run / "report.html").read_text()


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("sweep")
    runs = [full_run(folder / "worse", lr=0.1, worse=0.3), full_run(folder / "better", lr=0.02)]
    small_run(folder / "new", lr=0.5)
    write_report([*runs, folder / "new"], folder / "report.html")
    return (folder / "report.html").read_text()


def section_of(html: str, title: str) -> str:
    found = re.search(rf"<section[^>]*><h2>{title}</h2>(.*?)</section>", html, re.DOTALL)
    assert found, title
    return found[1]


def words(html: str) -> str:
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", html)).split())


def assert_self_contained(html: str) -> None:
    """Nothing in the page's own elements leads out of it; the text of a run may say what it likes."""
    for tag in re.findall(r"<[a-zA-Z][^>]*>", html):
        assert not re.search(r"https?:|//\w", tag), tag
        for value in re.findall(r"""(?:src|href)=["']?([^"'\s>]*)""", tag):
            assert value.startswith(("data:", "#")), tag
    assert not re.search(r"<(script|link|iframe|object|embed|base)\b", html)
    assert not re.search(r"url\((?!#)", html)
    assert not re.search(r"@import", html)


def test_a_full_run_shows_every_section(report: str) -> None:
    for title in HEADINGS:
        assert 'class="quiet"' not in section_of(report, title)[:20], title
    assert "cannot be shown" not in report
    assert words(section_of(report, "Curves")).count("attempt 2") == 5  # plots
    assert section_of(report, "Curves").count("<svg") == 5
    assert "<h3>Training penalty</h3>" in section_of(report, "Curves")
    assert section_of(report, "Throughput and memory").count("<svg") == 3


def test_the_top_has_state_reason_and_the_numbers_that_matter(report: str) -> None:
    top = words(report.partition("<section")[0].rpartition("</style>")[2])
    for part in ("failed", "rank 1: it broke", "400 step of 1,000", "0.8 best accuracy, step 400", "80.0 % goodput"):
        assert part in top
    for part in ("3:20 wall time, 2 attempts", "samples per second", "world size 2", "commit 0123456789 with uncom"):
        assert part in top


def test_time_accounts_are_shown_per_attempt_with_what_was_lost(report: str) -> None:
    section = words(section_of(report, "Time"))
    assert "2 × cpu 200 → 400 70.0 10.0 8.0 2.0 4.0 6.0 1:40 80.0 %" in section
    assert "all 140.0 20.0 16.0 4.0 8.0 12.0 3:20 80.0 %" in section


def test_classes_come_worst_first_with_their_most_frequent_wrong_answer(tmp_path: Path) -> None:
    run = without(full_run(tmp_path / "a", classes=40), tmp_path / "b")
    write_report([run], tmp_path / "r.html")
    html = (tmp_path / "r.html").read_text()
    classes = section_of(html, "Classes")
    assert "class 4 class 5 4× 20 16 80.0 %" in words(classes)
    assert words(classes).index("class 4 ") < words(classes).index("class 3 ")
    assert "10 more classes" in classes  # folded
    assert "<svg" in section_of(html, "Confusion matrix")  # a picture: too many for numbers
    assert "class 4 class 5 4 20.0 %" in words(section_of(html, "Confusion matrix"))


def test_mistakes_are_pictures_with_the_names_of_the_classes(report: str) -> None:
    section = section_of(report, "Most confident mistakes")
    assert f'src="{PICTURE}"' in section
    assert "class 1 taken for class 2 98.0 %" in words(section)
    assert section.count("<img") == 1  # one has none, and what is no picture is not shown
    assert section.count("no picture") == 2


def page_of(run: Path) -> str:
    write_report([run], run / "report.html")
    return (run / "report.html").read_text()


def test_values_of_the_loops_own_have_a_curve_where_they_were_logged(tmp_path: Path) -> None:
    rows = [train_row(step) | ({"penalty": 1 / step} if step % 10 == 0 else {}) for step in range(1, 101)]
    rows[49]["penalty"], rows[59]["penalty"] = None, "high"
    rows += [{"kind": "epoch", "step": step, "loss": 1.0, "rates": [0.1, step]} for step in (50, 100)]
    run = small_run(tmp_path / "run")
    write_rows(run, [*rows, {"kind": "train", "step": 101, "words": "no number"}])
    metrics = read_metrics(run)
    assert list(metrics.own) == ["Training penalty", "Training words", "Epoch rates/0", "Epoch rates/1"]
    steps, values = metrics.own["Training penalty"].all()
    assert steps.tolist() == list(range(10, 101, 10))  # no gap at the steps without it
    assert np.isnan(values).nonzero()[0].tolist() == [4, 5]
    assert metrics.own["Epoch rates/1"].all().tolist() == [[50, 100], [50, 100]]
    curves = section_of(page_of(run), "Curves")
    assert "2 logged values were no numbers, the first at step 50" in words(curves)
    assert "<h3>Epoch rates/1</h3>" in curves
    assert "Training words" not in curves  # there is nothing to draw


def test_more_values_of_the_loops_own_than_curves_are_counted(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    own = {f"{name}_{number}": 1.0 for name in ("value", EVIL) for number in range(15)}
    write_rows(run, [train_row(step) | own | {"list": [0.5] * 1000} for step in (1, 2)])
    curves = section_of(page_of(run), "Curves")
    assert (curves.count("<h3>Training "), "<script" in curves) == (20, False)
    assert "20 more values of the loop have no curve." in words(curves)


def test_the_newest_picture_of_each_name_is_shown(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    files = [("a", 1), ("b", 1), ("a", 2), ("c", 2), ("a", 3)]
    rows = [{"kind": "figure", "step": s, "name": n, "file": write_figure(run, s, n)} for n, s in files]
    gone = {"kind": "figure", "step": 3, "name": "gone", "file": "figures/step_00000003/gone.png"}
    write_rows(run, [train_row(1), *rows, gone])
    figures = section_of(page_of(run), "Figures")
    assert re.findall(r'alt="(\w+)"', figures) == ["a", "c", "b"]
    assert "a · step 3 c · step 2 b · step 1 Not shown, " in words(figures)
    assert words(figures).endswith("no room in this page: gone.")
    assert_self_contained(figures)


def test_the_pictures_of_a_page_have_a_bounded_size(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    png = b"\x89PNG\r\n\x1a\n" + bytes(3_000_000)
    rows = [
        {"kind": "figure", "step": step, "name": f"n{step % 60}", "file": write_figure(run, step, "n", png)}
        for step in range(1, 62)
    ]
    write_rows(run, rows)
    page = page_of(run)
    assert len(page) < 12_000_000
    assert re.findall(r'alt="(\w+)"', page) == ["n1", "n0"]
    assert "n59, n58" in words(page)
    assert "and 38 more" in words(page)


@pytest.mark.parametrize("file", ["../secret.png", "{folder}/secret.png", "figures/step_00000001/../../../secret.png"])
def test_a_figure_row_shows_no_file_from_elsewhere_and_nothing_that_is_no_picture(tmp_path: Path, file: str) -> None:
    run = small_run(tmp_path / "run")
    write_figure(tmp_path, 1, "x")
    (tmp_path / "secret.png").write_bytes((tmp_path / "figures/step_00000001/x.png").read_bytes())
    text = write_figure(run, 1, "text", b"key = 123")
    rows = [{"kind": "figure", "step": 1, "name": n, "file": f} for n, f in [("a", file), ("b", text), ("c", 7)]]
    rows[0]["file"] = file.format(folder=tmp_path)
    write_rows(run, [*rows, {"kind": "figure", "step": 1}])
    figures = section_of(page_of(run), "Figures")
    assert "<img" not in figures
    assert "None, c, b, a" in words(figures)


def test_config_shows_what_differs_from_the_defaults_and_folds_the_rest(report: str) -> None:
    section = section_of(report, "Config")
    shown, _, folded = section.partition("<details>")
    assert "optim.lr 0.01 0.001" in words(shown)
    assert "optim.eps" not in shown
    assert "optim.eps: 1e-08" in folded


def test_checkpoints_say_which_is_the_best(report: str) -> None:
    assert re.search(r"400 last, best .* 300 ", words(section_of(report, "Checkpoints")))


def test_whatever_a_run_says_is_escaped(report: str, comparison: str) -> None:
    for html in (report, comparison):
        assert "<script" not in html
        assert_self_contained(html)
    for title in ("Confusion matrix", "Classes", "Config", "Config changes", "Environment", "Uncommitted changes"):
        assert "&lt;script&gt;" in section_of(report, title), title
    for title in ("Failures", "Most confident mistakes", "Figures"):
        assert "&lt;script&gt;" in section_of(report, title), title
    assert "<h1>a &amp; &lt;b&gt;</h1>" in report
    assert "http://127.0.0.1" not in report


def test_names_that_a_run_chooses_are_escaped_once(tmp_path: Path) -> None:
    runs = [full_run(tmp_path / "one", lr=0.1), full_run(tmp_path / "other")]
    for run in runs:
        write_rows(run, [train_row(20), validation_row(20, **{EVIL: 0.5})])
        status = {"state": EVIL, "step": 20, "total_steps": EVIL, "best": {EVIL: 0.5}, "best_rule": [EVIL, "max"]}
        write_json(run / "status.json", status)
        attempt = {"attempt": EVIL, "state": EVIL, "began": EVIL, "device": EVIL, "step": EVIL, "seconds": {EVIL: 3.0}}
        write_json(run / "time.json", {"attempts": [attempt, attempt]})
        write_json(run / "environment.json", {EVIL: EVIL, "versions": {EVIL: EVIL}, "git_commit": EVIL})
        write_json(run / "failures" / "attempt_0003.json", {EVIL: EVIL, "rank": EVIL, "node": EVIL, "phase": EVIL})
    for shown, seconds in ((runs[:1], "3.0 s"), (runs, "6.0 s")):
        write_report(shown, tmp_path / "r.html")
        html = (tmp_path / "r.html").read_text()
        assert f"best {EVIL}" in words(html)
        assert f'{EVIL} {seconds}"' in unescape(html)  # the title of a bar
        assert "cannot be shown" not in html
        assert "<script" not in html
        assert "&amp;lt;" not in html


def test_the_page_is_the_same_in_every_encoding(run: Path, report: str) -> None:
    assert (run / "report.html").read_bytes().isascii()


def test_the_page_is_written_aside_and_renamed(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "r.html").write_text("old")
    monkeypatch.setattr(page, "_page", lambda runs: "new")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert main([str(run), "--output", str(tmp_path / "r.html")]) == 2
    assert (tmp_path / "r.html").read_text() == "old"


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"\x00\xff{",
        b"[1, 2]",
        b"null",
        b'{"attempts": [{"seconds": {"compute": "much"}}], "classes": 3, "git_changes": 5, "mistakes": [7]}',
        b'{"attempts": [7], "confusion": [["a"]], "per_class": [{}], "mistakes": "no", "versions": 3}',
        b'{"kind": "train", "step": 5, "loss": "high"}\n{"kind": "validate", "step": 5, "loss": [1, 2], "loss2": {}}',
    ],
)
def test_damaged_files_cost_their_section_only(run: Path, tmp_path: Path, damage: bytes) -> None:
    copy = without(run, tmp_path / "copy")
    for path in [path for path in copy.rglob("*") if path.is_file() and path.suffix in (".json", ".jsonl", ".yaml")]:
        path.write_bytes(damage)
    assert main([str(copy)]) == 0
    html = (copy / "report.html").read_text()
    assert [title for title in HEADINGS if f"<h2>{title}</h2>" in html] == HEADINGS
    assert "Traceback (most" not in html
    assert main([str(copy), str(run), "--output", str(tmp_path / "both.html")]) == 0


def test_what_is_missing_is_said_in_a_line_each(tmp_path: Path) -> None:
    html_file = tmp_path / "r.html"
    write_report([small_run(tmp_path / "new")], html_file)
    html = html_file.read_text()
    for title in HEADINGS:
        if title != "Config":
            assert section_of(html, title).startswith('<p class="quiet">'), title
    assert "There is no metrics.jsonl yet." in section_of(html, "Curves")
    assert "No validation yet." in section_of(html, "Classes")


def test_a_running_run_is_shown_up_to_a_torn_last_line(tmp_path: Path) -> None:
    run = small_run(tmp_path / "new")
    write_json(run / "status.json", {"state": "running", "step": 0, "total_steps": 1000, "attempt": 1})
    write_rows(run, [train_row(20), train_row(40, loss=None, gradient_norm=None), {"kind": "new", "step": 41}])
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 60, "lo')
    assert main([str(run)]) == 0
    html = (run / "report.html").read_text()
    assert "40 step of 1,000" in words(html)
    assert "1 logged training losses were no numbers, the first at step 40" in words(html)
    assert "1 lines of metrics.jsonl are no rows" in words(html)
    assert section_of(html, "Throughput and memory").count("<svg") == 3


def test_thinning_keeps_spikes_gaps_ends_and_means(tmp_path: Path) -> None:
    losses = [1.0 + step % 2 for step in range(20_000)]
    losses[7_777], losses[12_345], losses[-1] = 99.0, -5.0, 1.5
    rows = [train_row(step, attempt=1 if step < 15_000 else 2, loss=loss) for step, loss in enumerate(losses)]
    rows[3_333] |= {"loss": None, "validation_seconds": 7.0, "memory_gib": [3.0, 0.42]}
    write_rows(tmp_path, rows)
    metrics = read_metrics(tmp_path)
    points = metrics.train["loss"].all()
    assert points.shape[1] < 4_000
    assert (np.diff(points[0]) > 0).all()
    seen = dict(points.T.tolist())
    assert (seen[0], seen[7_777], seen[12_345], seen[19_999]) == (1.0, 99.0, -5.0, 1.5)
    assert np.isnan(seen[3_333])
    assert np.median(metrics.train["loss"].mean()[1]) == pytest.approx(1.5, abs=0.05)
    seconds = np.concatenate(metrics.seconds, axis=1)
    assert seconds[1:].sum(axis=1) == pytest.approx([2_000, 20_000, 7.0, 400])
    assert np.concatenate(metrics.memory, axis=1)[1:].max(axis=1).tolist() == [3.0, 0.42]
    assert metrics.attempts == {1: 0, 2: 15_000}
    assert (metrics.rows, metrics.damaged, metrics.last_step) == (20_000, 0, 19_999)


def test_a_long_file_is_read_without_holding_its_rows(tmp_path: Path) -> None:
    line = json.dumps(train_row(5)) + "\n"
    (tmp_path / "metrics.jsonl").write_text(line * 100_000)  # 35 MB; its rows would take 150 MB
    program = (
        "import sys; from pathlib import Path; from distloop.commands.report.curves import read_metrics\n"
        "use = lambda: int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0]) // 1024\n"
        "before = use()\n"
        "metrics = read_metrics(Path(sys.argv[1]))\n"
        "print(metrics.rows, use() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, cwd=REPOSITORY, check=True
    )
    rows, mebibytes = map(int, done.stdout.split())
    assert rows == 100_000
    assert mebibytes < 60


def test_a_row_that_is_valid_json_is_read_whatever_it_holds(tmp_path: Path) -> None:
    odd = [{"words": "\udcff"}, {"words": "ä\ud83d"}, {"deep": json.loads("[" * 300 + "]" * 300)}, {"large": 10**40}]
    write_rows(tmp_path, [train_row(step, **each) for step, each in enumerate(odd, 1)])
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 5, "loss": NaN}\n{"step": 6, "loss": 01}\n{"step": 7, "loss": "\xff"}\n\n7\n{"step": 8')
    metrics = read_metrics(tmp_path)
    assert metrics.train["loss"].all()[0].tolist() == [1, 2, 3, 4]
    assert (metrics.rows, metrics.damaged) == (5, 5)


def test_the_ranks_of_a_world_that_changes_each_keep_their_memory(tmp_path: Path) -> None:
    run = small_run(tmp_path / "new")
    memory = [[0.1], [0.1, None], [0.1, 0.2, 0.3], None, "much"]
    write_rows(run, [train_row(step, memory_gib=each) for step, each in enumerate(memory, 1)])
    assert np.nanmax(np.concatenate(read_metrics(run).memory, axis=1), axis=1).tolist() == [5, 0.1, 0.2, 0.3]
    write_report([run], tmp_path / "r.html")
    assert "rank 2" in words(section_of((tmp_path / "r.html").read_text(), "Throughput and memory"))


def test_several_runs_are_ranked_beside_what_differs(comparison: str) -> None:
    table = words(section_of(comparison, "Ranking"))
    assert table.startswith("# run optim.lr data.args.shift model.name state")
    better, worse, new = f"1 better 0.02 {EVIL} mlp", f"2 worse 0.1 {EVIL} mlp", "– new 0.5 – cnn"
    assert table.index(better) < table.index(worse) < table.index(new)
    assert "failed 0.8 400 0.1624 0.8 400 / 1,000 3:20 80.0 % 1003" in table
    assert section_of(comparison, "Curves").count("<svg") == 5
    assert "<h3>Training penalty</h3>" in section_of(comparison, "Curves")
    assert "Without any rows in metrics.jsonl: new" in section_of(comparison, "Curves")
    assert "Without time.json: new" in section_of(comparison, "Time")


def test_more_runs_than_colours_are_grey_with_a_note(tmp_path: Path) -> None:
    runs = [small_run(tmp_path / f"run-{index}") for index in range(12)]
    for index, run in enumerate(runs):
        write_rows(run, [train_row(step, loss=index + step) for step in (1, 2, 3)])
    write_report(runs, tmp_path / "r.html")
    section = section_of((tmp_path / "r.html").read_text(), "Curves")
    assert "the other 2" in words(section)
    assert "Only the first 10 runs of the ranking have colours of their own" in words(section)


@pytest.mark.parametrize("value", [0.0, -1.0, 1e-30, 1e300, 5.0])
def test_odd_values_are_drawn_without_a_warning(value: float, recwarn: pytest.WarningsRecorder) -> None:
    for values in ([value], [value, value], [value, 1.0, float("nan")], [1e-300, value]):
        curve = np.array([np.arange(len(values)), values], dtype=np.float64)
        svg = draw_curves([Trace(curve, "blue", "thin"), Trace(curve, "red")], {1: 0, 2: 0, 3: 1}, last_step=1)
        assert svg.startswith("<svg")
        assert "nan" not in svg
        assert "var(--blue)" in svg
        assert not re.search("#[0-9a-f]{6}", svg)  # or it would not follow a dark page
    assert not recwarn.list


def test_a_spike_far_above_the_rest_makes_the_axis_logarithmic() -> None:
    flat = np.array([np.arange(100), np.linspace(2.0, 1.0, 100)])
    spike = flat.copy()
    spike[1, 50] = 1000.0
    assert ">1000<" not in draw_curves([Trace(flat, "blue")], {}, 100)
    assert all(label in draw_curves([Trace(spike, "blue")], {}, 100) for label in (">1<", ">10<", ">1000<"))


@pytest.mark.parametrize(
    ("value", "label"), [(0, "0"), (0.0005, "0.0005"), (0.05, "0.05"), (1500, "1500"), (20_000, "20k"), (1.5e6, "1.5M")]
)
def test_axes_have_short_labels(value: float, label: str) -> None:
    assert number_on_axis(value) == label
    if value:
        svg = draw_curves([Trace(np.array([[0.0, 1.0], [0.0, value]]), "blue")], {}, 1)
        assert f">{label}<" in svg


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{folder}/nowhere"], "there is no such directory"),
        (["{folder}"], "is no run's directory. It holds 1 runs: name them, as in {folder}/new"),
        (["{folder}/new/checkpoints"], "is no run's directory."),
        (["{folder}/new", "--output", "{folder}"], "is a directory: give a file"),
        (["{folder}/new", "--output", "{folder}/nowhere/r.html"], "there is no directory"),
    ],
)
def test_a_mistake_is_said_in_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (small_run(tmp_path / "new") / "checkpoints").mkdir()
    assert main([argument.format(folder=tmp_path) for argument in arguments]) == 2
    said = capsys.readouterr()
    assert message.format(folder=tmp_path) in said.err
    assert said.err.count("\n") == 1
    assert not said.out


def test_the_default_output_is_in_the_run_or_for_several_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = small_run(tmp_path / "one"), small_run(tmp_path / "other")
    monkeypatch.chdir(tmp_path)
    assert main(["one", str(one)]) == 0  # the same twice
    assert main(["one", "other"]) == 0
    assert capsys.readouterr().out == "report: one/report.html\nreport: report.html\n"
    assert (tmp_path / "report.html").exists()
    assert (one / "report.html").exists()
    assert not (other / "report.html").exists()


def test_the_command_imports_neither_torch_nor_pyplot(tmp_path: Path) -> None:
    run = full_run(tmp_path / "run")
    program = (
        "import sys; from distloop.commands.report.page import main\n"
        "print(sorted({'matplotlib', 'torch'} & set(sys.modules)))\n"
        f"main([{str(run)!r}]); print(sorted({{'torch', 'matplotlib.pyplot', 'PIL.ImageTk'}} & set(sys.modules)))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "DISPLAY"} | {
        "PYTHONPATH": str(REPOSITORY)
    }
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert (done.stdout.splitlines()[0], done.stdout.splitlines()[-1], done.stderr) == ("[]", "[]", "")


def test_a_thousand_classes_make_no_page_of_many_megabytes(tmp_path: Path) -> None:
    run = small_run(tmp_path / "new")
    write_json(run / "validation.json", validation_detail(1000))
    write_report([run], tmp_path / "r.html")
    assert (tmp_path / "r.html").stat().st_size < 2_000_000
    assert "the largest of 4 × 4 classes" in words((tmp_path / "r.html").read_text())


@pytest.mark.parametrize("which", ["report", "comparison"])
def test_a_browser_shows_every_section_without_complaint_or_request(
    tmp_path: Path, request: pytest.FixtureRequest, which: str
) -> None:
    file = tmp_path / "page.html"
    file.write_text(request.getfixturevalue(which))
    opened = open_page(file, tmp_path)
    for title in HEADINGS if which == "report" else ("Ranking", "Curves", "Time"):
        assert f"<h2>{title}</h2>" in opened.dom
    assert "<script" not in opened.dom
    assert EVIL not in opened.dom
    assert opened.console == []
    assert opened.requests == []


def test_a_browser_would_be_heard_to_complain_and_to_ask(tmp_path: Path, report: str) -> None:
    outside = '<img src="http://127.0.0.1:9/x.png">'
    file = tmp_path / "page.html"
    file.write_text(report.replace("</body>", f"{outside}</body>"))
    opened = open_page(file, tmp_path)
    assert "Content Security Policy" in opened.console[0]
    assert opened.requests == []
    file.write_text(report.replace("http-equiv", "x").replace("</body>", f"{outside}</body>"))
    assert open_page(file, tmp_path).requests


# How wide the page is and how much of it is used: by sections that stand side by side, and by plots in a section.
USED_WIDTH = """(() => {
    const rows = selector => {
        const used = {};
        for (const each of document.querySelectorAll(selector)) {
            const box = each.getBoundingClientRect();
            used[Math.round(box.top)] = (used[Math.round(box.top)] || 0) + box.width / window.innerWidth;
        }
        return Object.values(used);
    };
    return {
        overflow: document.documentElement.scrollWidth - window.innerWidth,
        sections: Math.min(...rows("section:not(.empty)")),
        plots: Math.max(...rows("#curves svg")),
        rows: rows("#curves svg").length,
    };
})()"""


@pytest.mark.parametrize("which", ["report", "comparison"])
def test_the_page_uses_the_width_of_its_window_and_never_more(
    tmp_path: Path, request: pytest.FixtureRequest, which: str
) -> None:
    file = tmp_path / "page.html"
    file.write_text(request.getfixturevalue(which))
    found = measure(file, tmp_path, [400, 800, 1440, 1920], USED_WIDTH)
    for width, used in found.items():
        assert used["overflow"] <= 0, width
        assert used["sections"] > 0.85, width
        assert used["plots"] > 0.8, width
    assert [used["rows"] for used in found.values()] == [5, 5, 2, 2]  # rows of five plots


# Backgrounds and words of all that can be seen, as [red, green, blue], and how far the page is too wide.
COLOURS = """(() => {
    const seen = [...document.querySelectorAll("body, body *")].filter(each => each.checkVisibility());
    const colours = name => seen.map(each => window.getComputedStyle(each)[name].match(/[\\d.]+/g).map(Number));
    const opaque = colours("backgroundColor").filter((each, i) => each[3] !== 0 && !seen[i].matches("i, .matrix *"));
    return {
        backgrounds: opaque,
        words: colours("color"),
        strokes: seen.filter(each => each.tagName == "path").map(each => window.getComputedStyle(each).stroke),
        overflow: document.documentElement.scrollWidth - window.innerWidth,
    };
})()"""
DARK = "--blink-settings=preferredColorScheme=0"


def test_print_is_dark_on_white_also_for_a_reader_with_a_dark_screen(tmp_path: Path, report: str) -> None:
    swapped = {
        "@media print": "@media screen",
        "@media screen": "@media print",
    }  # the browser shows what it would print
    file = tmp_path / "page.html"
    file.write_text(report)
    screen = measure(file, tmp_path, [700], COLOURS, DARK)[700]
    file.write_text(re.sub("|".join(swapped), lambda media: swapped[media[0]], report))
    paper = measure(file, tmp_path, [700], COLOURS, DARK)[700]
    assert max(map(max, screen["backgrounds"])) < 100 < 200 < max(map(max, screen["words"]))
    assert min(map(min, paper["backgrounds"])) > 220
    assert sum(sum(words[:3]) < 3 * 150 for words in paper["words"]) > 0.9 * len(paper["words"])
    assert paper["overflow"] <= 0
    assert not set(screen["strokes"]) & set(paper["strokes"]) - {"none"}  # curves follow the page
