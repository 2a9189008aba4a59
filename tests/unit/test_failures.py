"""What is said of a rank that failed, and which errors are taken for the consequence of another's end."""

from __future__ import annotations

import datetime
import multiprocessing
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distloop.errors import RunFailed, UsageError
from distloop.ranks.places import Place, Position
from distloop.ranks.verdicts import End, describe_error, is_consequence, verdict_on
from tests.tools import ranks


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:
        return caught


# ---- consequences --------------------------------------------------------------------------------------------

LIMIT = datetime.timedelta(seconds=1)


def collective(name: str) -> None:
    """One that waits for the other rank."""
    tensor = torch.ones(4)
    if name == "all_reduce":
        dist.all_reduce(tensor)
    elif name == "asynchronous":
        dist.all_reduce(tensor, async_op=True).wait()
    elif name == "broadcast":
        dist.broadcast_object_list([None], src=1)
    elif name == "barrier":
        dist.barrier()
    elif name == "monitored_barrier":
        dist.monitored_barrier(timeout=LIMIT)
    elif name == "gather":
        dist.all_gather([tensor, tensor], tensor)
    elif name == "backward":
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 1))
        model(tensor).sum().backward()


def lonely(port: int, rank: int, name: str, peer: str, answers: Any) -> None:
    """What rank 0 meets in a collective when the other rank is dead, or does not come; sent through `answers`."""
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2, timeout=LIMIT)
    if name == "backward" and (rank == 0 or peer == "dead"):  # both make the model, which is a collective too
        torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 1))
    if rank == 1:
        if peer == "dead":
            os._exit(0)
        answers.recv()  # it does something else meanwhile
        os._exit(0)
    try:
        collective(name)
        answers.send("nothing")
    except Exception as error:
        answers.send((is_consequence(error), describe_error(error)[0], f"{type(error).__name__}: {error}"))
    os._exit(0)


def meets(name: str, peer: str) -> Any:
    context, port = ranks.forkserver, ranks.free_port()
    ours, theirs = multiprocessing.Pipe()
    other, others = multiprocessing.Pipe()
    processes = [
        context.Process(target=lonely, args=(port, rank, name, peer, (theirs, others)[rank])) for rank in range(2)
    ]
    for process in processes:
        process.start()
    try:
        assert ours.poll(60), "no answer"
        return ours.recv()
    finally:
        other.send("enough")
        for process in processes:
            process.kill()
            process.join()


@pytest.mark.parametrize(
    ("name", "peer"),
    [
        ("all_reduce", "dead"),
        ("all_reduce", "elsewhere"),
        ("asynchronous", "dead"),
        ("broadcast", "dead"),
        ("monitored_barrier", "elsewhere"),
        *(
            pytest.param(name, peer, marks=pytest.mark.long)
            for name in ("asynchronous", "broadcast", "barrier", "monitored_barrier", "gather")
            for peer in ("dead", "elsewhere")
        ),
    ],
)
def test_what_gloo_says_of_a_peer_that_is_gone_or_does_not_come_is_a_consequence(name: str, peer: str) -> None:
    consequence, kind, text = meets(name, peer)
    assert (consequence, kind) == (True, "consequence"), text


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError(104, "Connection reset by peer"),
        ConnectionRefusedError(111, "Connection refused"),
        BrokenPipeError(32, "Broken pipe"),
        TimeoutError("gloo"),
        RuntimeError("Connection closed by peer: my own database"),
        RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
        RuntimeError("a gloomy picture"),
        RuntimeError(
            "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
            '  File "/home/me/nccl/data.py", line 3, in __getitem__\nRuntimeError: this picture is broken'
        ),
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Segmentation fault."),
        ValueError("NCCL is a nice word"),
        MemoryError(),
    ],
    ids=lambda error: f"{type(error).__name__}: {error}".splitlines()[0][:50],
)
def test_a_users_own_error_is_no_consequence(error: BaseException) -> None:
    assert not is_consequence(error)
    assert describe_error(raised(error))[0] == "failed"


def test_torchs_own_errors_of_collectives_are_consequences() -> None:
    assert is_consequence(dist.DistBackendError("NCCL error in: …, remote process exited or there was a network error"))
    assert is_consequence(dist.DistNetworkError("the store is gone"))


# ---- what an error is ----------------------------------------------------------------------------------------


def test_an_error_is_described_by_its_last_line_and_its_traceback() -> None:
    kind, what, trace = describe_error(raised(KeyError("label")))
    assert (kind, what) == ("failed", "KeyError: 'label'")
    assert trace.startswith("Traceback (most recent call last):")
    assert "in raised" in trace


@pytest.mark.parametrize(("error", "kind"), [(UsageError("do that"), "mistake"), (RunFailed("no disk"), "known")])
def test_what_needs_no_traceback_has_none(error: Exception, kind: str) -> None:
    assert describe_error(raised(error)) == (kind, str(error), "")


@pytest.mark.parametrize("code", [0, 3, None, "enough"])
def test_an_early_sys_exit_is_a_failure_whatever_its_code(code: Any) -> None:
    kind, what, trace = describe_error(raised(SystemExit(code)))
    assert (kind, what) == ("failed", f"it left with sys.exit({code!r}) before the run was done")
    assert "Traceback" in trace


def test_an_error_in_a_loader_worker_is_described_by_what_the_worker_says() -> None:
    # torch rebuilds it in the parent, with all of the worker's traceback as its message.
    text = "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback …\nValueError: picture 7 is broken"
    kind, what, trace = describe_error(raised(ValueError(text)))
    assert kind == "failed"
    assert "ValueError: picture 7 is broken" in what.splitlines()[0]
    assert "Original Traceback" in trace


# ---- what is said --------------------------------------------------------------------------------------------


def place(rank: int = 1, step: int = 5, phase: str = "forward pass") -> Place:
    return Place(rank, f"n{rank}", 100 + rank, step, phase)


@pytest.mark.parametrize("kind", ["failed", "gone", "silent", "standing", "behind", "consequence"])
def test_what_is_said_names_rank_node_step_and_phase(kind: str) -> None:
    said = verdict_on(End(place(), kind, "ValueError: no\nmore of it", "the stack\n"), place(0), 4, 0.0)
    assert said.code == 1
    for words in ("rank 1 on n1", "step 5", "forward pass"):
        assert words in said.reason
    assert "\n" not in said.reason  # a line of status.json
    assert said.text.startswith(f"\ndistloop: {said.reason}\n")
    assert "  the stack\n" in said.text
    assert said.text.endswith("distloop: all 4 ranks end because of it")


def test_a_mistake_is_said_without_more_and_with_exit_code_2() -> None:
    assert verdict_on(End(place(), "mistake", "use it rightly", ""), place(0), 4, 0.0) == (
        2,
        "use it rightly",
        "\ndistloop: use it rightly",
    )
    assert verdict_on(End(place(), "known", "no disk", ""), place(0), 4, 0.0).code == 1


def test_one_process_is_not_called_a_rank() -> None:
    said = verdict_on(End(place(0), "failed", "ValueError: no", "the stack"), place(0), 1, 0.0)
    assert "rank" not in said.text
    assert said.text == "the stack\ndistloop: failed in step 5, forward pass: ValueError: no"


def test_before_the_first_step_there_is_no_number() -> None:
    said = verdict_on(End(place(1, 0, "building the model"), "failed", "ValueError: no", ""), place(0), 2, 0.0)
    assert said.reason == "rank 1 on n1, before the first step, building the model, failed first: ValueError: no"


# ---- positions -----------------------------------------------------------------------------------------------


def test_a_position_counts_the_phases_of_a_step() -> None:
    position = Position()
    seen = []
    actions: list[Callable[[], None]] = [
        lambda: position.enter("loading the data set"),
        lambda: position.start_step(1),
        lambda: position.enter("forward pass"),
        lambda: position.enter("backward pass"),
        lambda: position.start_step(2),
    ]
    for action in actions:
        action()
        seen.append((position.step, position.marks))
    assert seen == [(0, 1), (1, 0), (1, 1), (1, 2), (2, 0)]
    assert seen[1:] == sorted(seen[1:])  # who is behind has the smaller one


def test_a_place_has_moved_when_its_position_changed() -> None:
    there = Place(1)
    before = there.moved
    there.update({"step": 0, "marks": 0, "phase": "starting", "stack": "in main"})
    assert there.moved == before
    assert there.heard > before
    assert there.stack == "in main"
    there.update({"step": 0, "marks": 1, "phase": "loading the data set"})
    assert there.moved == there.heard
    assert there.stack == ""  # it moves again


def test_a_place_has_moved_when_its_line_changed() -> None:
    there = Place(1)
    there.update({"step": 0, "marks": 0, "phase": "starting", "line": "train.py:3 a = 1", "line_number": 3})
    before = there.moved
    assert before == there.heard
    there.update({"step": 0, "marks": 0, "phase": "starting", "line": "train.py:3 a = 1", "line_number": 3})
    assert there.moved == before < there.heard
    there.update({"step": 0, "marks": 0, "phase": "starting", "line": "train.py:4 b = 2", "line_number": 4})
    assert there.moved == there.heard > before


def test_a_place_with_a_line_shows_it() -> None:
    there = place()
    assert there.where == "in step 5, forward pass"
    there.line = "train.py:101 outputs = task.forward(task_model, micro.batch)"
    assert there.where == "in step 5, forward pass (train.py:101 outputs = task.forward(task_model, micro.batch))"


@pytest.mark.parametrize(
    ("one", "other", "is_behind"),
    [
        ((4, 9, 9), (5, 1, 1), True),  # (step, marks, line_number)
        ((5, 1, 9), (5, 2, 1), True),
        ((5, 1, 3), (5, 1, 4), True),
        ((5, 1, 4), (5, 1, 4), False),
        ((5, 1, 0), (5, 1, 4), False),
        ((5, 1, 3), (5, 1, 0), False),
        ((5, 2, 3), (5, 1, 4), False),
    ],
)
def test_who_is_behind_is_decided_by_step_then_mark_then_line(
    one: tuple[int, int, int], other: tuple[int, int, int], is_behind: bool
) -> None:
    first, second = (Place(0, step=step, marks=marks, line_number=line) for step, marks, line in (one, other))
    assert first.is_behind(second) == is_behind
    assert not second.is_behind(first) or not is_behind
