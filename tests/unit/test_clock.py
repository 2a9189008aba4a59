"""The clock of an attempt: every second in one account, and a rate that counts training alone."""

from __future__ import annotations

import os
import re
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from distloop.run import clock as clock_module
from distloop.run.clock import ACCOUNTS, Clock, peak_memory, process_age

START_UP, LOAD, STEP = 5.0, 0.25, 1.0
SAMPLES = 64


class Hands:
    """A clock's hands, which a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def hands(monkeypatch: pytest.MonkeyPatch) -> Hands:
    found = Hands()
    monkeypatch.setattr("time.perf_counter", found.perf_counter)
    monkeypatch.setattr(clock_module, "process_age", lambda: START_UP)
    return found


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The devices that were waited for."""
    found: list[Any] = []
    monkeypatch.setattr(torch.cuda, "synchronize", found.append)
    return found


class Training:
    """A loop as train.py has it, whose parts take known times."""

    def __init__(self, hands: Hands, device: str = "cpu") -> None:
        self.hands, self.clock = hands, Clock(torch.device(device))
        self.batches = self.clock.waiting(self._load())

    def _load(self) -> Any:
        while True:
            self.hands.now += LOAD
            yield None

    def step(self, seconds: float = STEP) -> None:
        next(self.batches)
        self.hands.now += seconds
        self.clock.add(SAMPLES)

    def take(self, account: str, seconds: float) -> None:
        with self.clock.on(account):
            self.hands.now += seconds


def test_each_second_goes_to_the_account_of_what_it_was_spent_on(hands: Hands) -> None:
    training = Training(hands)
    hands.now += 2
    for _ in range(4):
        training.step()
    training.take("validation", 10)
    training.step()
    training.take("checkpoint", 20)
    training.clock.switch("checkpoint")
    hands.now += 3
    training.clock.switch("start_up")
    hands.now += 7
    first_step = LOAD + STEP
    assert training.clock.totals() == {
        "start_up": START_UP + 2 + first_step + 7,  # with Python's own start, and the end
        "data": 4 * LOAD,
        "compute": 4 * STEP,
        "validation": 10,
        "checkpoint": 20 + 3,
        "lost": 0,
    }


def test_the_accounts_add_up_at_every_moment(hands: Hands) -> None:
    training = Training(hands)
    begun = hands.now - START_UP
    for _ in range(3):
        training.step()
        with training.clock.on("validation"):
            hands.now += 0.5
            assert sum(training.clock.totals().values()) == pytest.approx(hands.now - begun)
            assert training.clock.totals()["validation"] > training.clock.seconds["validation"]
        assert sum(training.clock.totals().values()) == pytest.approx(hands.now - begun)


def test_the_rate_leaves_out_start_up_the_slow_first_step_validation_and_checkpoints(hands: Hands) -> None:
    training = Training(hands)
    training.step(seconds=60)
    training.take("validation", 30)
    for _ in range(3):
        training.step()
    training.take("checkpoint", 40)
    training.step()
    row = training.clock.read()
    assert row["samples_per_second"] == pytest.approx(SAMPLES / (LOAD + STEP))
    assert row["data_seconds"] == pytest.approx(4 * LOAD)
    assert row["compute_seconds"] == pytest.approx(4 * STEP)
    assert (row["validation_seconds"], row["checkpoint_seconds"]) == (30, 40)
    training.take("validation", 5)
    training.step()
    row = training.clock.read()
    assert row["samples_per_second"] == pytest.approx(SAMPLES / (LOAD + STEP))  # since the last reading
    assert (row["validation_seconds"], row["checkpoint_seconds"]) == (5, 0)
    assert row["compute_seconds"] == pytest.approx(STEP)


def test_the_first_step_alone_has_the_rate_of_itself_and_the_next_its_own(hands: Hands) -> None:
    training = Training(hands)
    hands.now += 9  # between the start of the process and the loop
    rates = []
    for seconds in (3.0, STEP, STEP):
        training.step(seconds)
        rates.append(training.clock.read()["samples_per_second"])
    usual = SAMPLES / (LOAD + STEP)
    assert rates == pytest.approx([SAMPLES / (LOAD + 3), usual, usual])


def test_a_run_without_a_step_has_nothing_but_start_up_and_its_end(hands: Hands) -> None:
    # Continued after its last step: it was killed before it could say that it is finished.
    training = Training(hands)
    hands.now += 2
    training.clock.switch("checkpoint")
    training.clock.switch("start_up")
    hands.now += 1
    assert training.clock.totals() == {**dict.fromkeys(ACCOUNTS, 0.0), "start_up": START_UP + 3}


def test_only_the_first_step_validation_and_checkpoints_wait_for_the_device(hands: Hands, waits: list[Any]) -> None:
    training = Training(hands, "cuda")
    assert waits == []
    training.step()
    assert len(waits) == 1
    for _ in range(50):
        training.step()
    training.clock.read()
    training.clock.totals()
    assert len(waits) == 1
    training.take("validation", 1)
    assert len(waits) == 3  # before, so that what was queued is compute, and after


def test_an_error_passes_through_an_account(hands: Hands) -> None:
    training = Training(hands)
    training.step()

    def fail() -> None:
        with training.clock.on("validation"):
            hands.now += 2
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        fail()
    hands.now += 1
    assert training.clock.totals()["validation"] == 3  # until the attempt ends


def test_another_thread_never_sees_a_second_twice_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Clock(torch.device("cpu"))
    inside, go_on = threading.Event(), threading.Event()

    class Slow(dict[str, float]):
        """Accounts that are added to slowly."""

        def __setitem__(self, key: str, value: float) -> None:
            super().__setitem__(key, value)
            inside.set()
            go_on.wait(0.5)

    found.seconds = Slow(found.seconds)
    begun = time.perf_counter() - sum(found.totals().values())
    switching = threading.Thread(target=found.switch, args=("compute",))
    switching.start()
    assert inside.wait(10)
    seen = sum(found.totals().values())
    most = time.perf_counter() - begun
    go_on.set()
    switching.join()
    assert seen <= most + 1e-6
    assert sum(found.totals().values()) >= seen


def test_a_process_is_as_old_as_the_system_says() -> None:
    before = time.perf_counter() - process_age()
    time.sleep(0.05)
    after = time.perf_counter() - process_age()
    assert after == pytest.approx(before, abs=0.02)  # the same beginning, whenever it is asked for


def test_the_age_of_a_process_is_more_exact_than_the_time_of_the_boot() -> None:
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    seconds = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    assert process_age() == pytest.approx(seconds, abs=0.1)


@pytest.mark.parametrize("error", [psutil.AccessDenied(), RuntimeError("btime"), OSError(2, "no /proc/stat")])
def test_a_system_that_does_not_say_how_old_a_process_is_is_no_error(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refuse() -> float:
        raise error

    monkeypatch.setattr(psutil, "boot_time", refuse)
    assert process_age() == 0.0


def test_the_peak_of_memory_is_in_gib() -> None:
    said = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert said is not None
    assert peak_memory(torch.device("cpu")) == pytest.approx(int(said[1]) / 2**20, rel=0.05)
