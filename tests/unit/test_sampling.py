"""The order of samples and its division into steps, ranks and micro-batches, as properties of any plan."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Literal, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from distloop.config.settings import Batch, Config, Train
from distloop.data import order as sampling
from distloop.data.order import (
    CHUNK,
    EXACT_LIMIT,
    FixedBatchSampler,
    MicroBatch,
    MicroBatchSampler,
    Order,
    Part,
    Plan,
    accumulation_steps,
    permuted,
)
from distloop.data.seeding import derive
from distloop.errors import UsageError
from distloop.ranks.ranks import Ranks

reproducible = settings(derandomize=True, deadline=None)
seeds = st.integers(0, 2**63 - 1)
epochs = st.integers(0, 5)


@st.composite
def plans(draw: st.DrawFn) -> list[Plan]:
    """The plans of all ranks' processes: any samples, global batch, world size, micro-batch and remainder."""
    world_size, rank_batch = draw(st.integers(1, 6)), draw(st.integers(1, 12))
    micro = draw(st.none() | st.integers(1, rank_batch + 2))
    remainder: Literal["drop", "train"] = draw(st.sampled_from(["drop", "train"]))
    samples = draw(st.integers(1 if remainder == "train" else world_size * rank_batch, 300))
    return [Plan(samples, world_size * rank_batch, world_size, micro, remainder) for _ in range(world_size)]


def trains_remainder(plan: Plan) -> bool:
    """Whether the plan trains the remainder."""
    return plan.steps_per_epoch * plan.global_batch_size > plan.samples


def positions(parts: list[Part]) -> list[int]:
    return [position for part in parts for position in range(part.start, part.stop)]


def part_of(plan: Plan, rank: int, steps: int, seed: int = 0) -> Plan:
    """The plan of this rank in a run of so many steps."""
    remainder: Literal["drop", "train"] = "train" if trains_remainder(plan) else "drop"
    sizes = (plan.samples, plan.global_batch_size, plan.world_size, plan.micro_batch_size)
    return Plan(*sizes, remainder, total_steps=steps, rank=rank, seed=seed)


def taken(plan: Plan, rank: int, start: int, stop: int, seed: int = 0) -> list[tuple[int, list[int]]]:
    """What one rank's sampler yields, as plain numbers."""
    sampler = MicroBatchSampler(part_of(plan, rank, stop, seed), start)
    return [(batch.epoch, batch.indices.tolist()) for batch in sampler]


@contextmanager
def small_limits(exact: int, chunk: int) -> Iterator[None]:
    """The arithmetic of large data sets on small ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "EXACT_LIMIT", exact)
        patch.setattr(sampling, "CHUNK", chunk)
        yield


# ---- steps, ranks and micro-batches ----------------------------------------------------------------------------


@reproducible
@given(plans(), st.integers(0, 60))
def test_the_ranks_slices_of_a_step_are_disjoint_and_make_up_its_global_batch(ranks: list[Plan], step: int) -> None:
    slices = [positions(plan.window(step, rank)) for rank, plan in enumerate(ranks)]
    _, start, stop = ranks[0].span(step)
    assert sorted(itertools.chain(*slices)) == list(range(start, stop))


@reproducible
@given(plans(), seeds, st.integers(0, 20))
def test_the_samples_of_a_step_do_not_depend_on_the_world_or_the_micro_batch(
    ranks: list[Plan], seed: int, step: int
) -> None:
    plan = ranks[0]
    alone = Plan(plan.samples, plan.global_batch_size, remainder="train" if trains_remainder(plan) else "drop")
    step %= min(plan.steps_per_epoch, alone.steps_per_epoch) * 3
    epoch, start, stop = plan.span(step)
    together: list[int] = []
    for rank in range(plan.world_size):
        parts = plan.window(step, rank)
        batches = taken(plan, rank, step, step + 1, seed)
        assert [owner for owner, _ in batches] == [epoch] * len(parts)
        for part, (_, indices) in zip(parts, batches, strict=True):
            together += indices if part.stop > part.start else []
    assert sorted(together) == sorted(taken(alone, 0, step, step + 1, seed)[0][1])
    assert sorted(together) == sorted(Order(plan.samples, seed)(epoch, start, stop).tolist())


@reproducible
@given(plans(), seeds, epochs)
def test_an_epoch_visits_each_sample_once_but_for_the_dropped_remainder(
    ranks: list[Plan], seed: int, epoch: int
) -> None:
    plan = ranks[0]
    order = Order(plan.samples, seed)
    seen: list[int] = []
    for step in range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch):
        for rank in range(plan.world_size):
            for part in plan.window(step, rank):
                seen += order(epoch, part.start, part.stop).tolist()
    assert len(seen) == len(set(seen))
    dropped = 0 if trains_remainder(plan) else plan.samples % plan.global_batch_size
    assert len(seen) == plan.samples - dropped


@pytest.mark.parametrize(("remainder", "steps", "visited"), [("drop", 12, 1200), ("train", 13, 1203)])
def test_the_remainder_is_dropped_or_trained_as_the_config_says(
    remainder: Literal["drop", "train"], steps: int, visited: int
) -> None:
    plan = Plan(1203, 100, 2, 25, remainder)
    assert plan.steps_per_epoch == steps
    assert sum(plan.span(step)[2] - plan.span(step)[1] for step in range(steps)) == visited
    assert plan.span(steps)[:2] == (1, 0)


@reproducible
@given(plans(), seeds, st.integers(0, 30), st.integers(0, 12), st.data())
def test_starting_at_a_step_equals_having_iterated_up_to_it(
    ranks: list[Plan], seed: int, start: int, more: int, data: st.DataObject
) -> None:
    plan = ranks[0]
    rank = data.draw(st.integers(0, plan.world_size - 1))
    skipped = sum(len(plan.window(step, rank)) for step in range(start))
    assert taken(plan, rank, start, start + more, seed) == taken(plan, rank, 0, start + more, seed)[skipped:]


@reproducible
@given(plans(), st.integers(0, 30), st.integers(0, 5), st.data())
def test_the_sampler_notes_which_part_each_micro_batch_is(
    ranks: list[Plan], start: int, more: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(0, ranks[0].world_size - 1))
    plan = part_of(ranks[0], rank, start + more)
    sampler = MicroBatchSampler(plan, start)
    expected = [part for step in range(start, start + more) for part in plan.window(step, rank)]
    for number, _ in enumerate(sampler):
        assert list(sampler.parts) == expected[: number + 1]  # noted when the loader asks for it
    assert list(sampler.parts) == expected


@reproducible
@given(plans(), st.integers(0, 60))
def test_a_part_tells_its_step_its_place_in_the_global_batch_and_whether_it_is_the_ranks_last(
    ranks: list[Plan], step: int
) -> None:
    plan = ranks[0]
    windows = [plan.window(step, rank) for rank in range(plan.world_size)]
    parts = sorted(itertools.chain(*windows), key=lambda part: part.number)
    assert [part.number for part in parts] == list(range(len(parts)))
    assert [part.start for part in parts[1:]] == [part.stop for part in parts[:-1]]
    assert plan.sample_count(step) == parts[-1].stop - parts[0].start
    for rank, window in enumerate(windows):
        assert [part.number for part in window] == list(range(rank, len(parts), plan.world_size))
        assert [part.is_last for part in window] == [False] * (len(window) - 1) + [True]
        assert {part.step for part in window} == {step}


@reproducible
@given(plans(), st.integers(0, 60))
def test_all_ranks_have_equally_many_micro_batches_in_a_step(ranks: list[Plan], step: int) -> None:
    assert len({len(plan.window(step, rank)) for rank, plan in enumerate(ranks)}) == 1


@reproducible
@given(plans(), seeds, st.integers(0, 60))
def test_a_rank_without_samples_in_a_short_step_gets_the_first_sample_of_it(
    ranks: list[Plan], seed: int, step: int
) -> None:
    plan = ranks[0]
    epoch, first, _ = plan.span(step)
    for rank in range(plan.world_size):
        for part, (_, indices) in zip(plan.window(step, rank), taken(plan, rank, step, step + 1, seed), strict=True):
            assert len(indices) == max(1, part.stop - part.start)
            if part.start == part.stop:
                assert indices == Order(plan.samples, seed)(epoch, first, first + 1).tolist()


@reproducible
@given(st.integers(1, 8), st.sampled_from([(1, 2), (2, 4), (1, 3), (2, 6), (1, 6), (3, 6)]), seeds, st.integers(0, 9))
def test_a_part_of_the_global_batch_has_the_same_samples_on_any_number_of_ranks(
    micro: int, worlds: tuple[int, int], seed: int, step: int
) -> None:
    by_part: list[dict[int, list[int]]] = []
    for world_size in worlds:
        plan = Plan(500, 12 * micro, world_size, micro)
        parts: dict[int, list[int]] = {}
        for rank in range(world_size):
            for turn, (_, indices) in enumerate(taken(plan, rank, step, step + 1, seed)):
                parts[turn * world_size + rank] = indices
        by_part.append(parts)
    assert by_part[0] == by_part[1]
    assert len(by_part[0]) == 12


@reproducible
@given(st.integers(1, 5), st.integers(1, 24), st.integers(1, 30), st.integers(0, 40))
def test_no_micro_batch_is_larger_than_micro_size(world_size: int, rank_batch: int, micro: int, step: int) -> None:
    plan = Plan(211, world_size * rank_batch, world_size, micro, "train")
    for rank in range(world_size):
        assert all(part.stop - part.start <= micro for part in plan.window(step, rank))


@reproducible
@given(st.integers(1, 200), st.none() | st.integers(1, 250))
def test_the_accumulation_is_the_least_that_divides(rank_batch: int, micro: int | None) -> None:
    parts = accumulation_steps(rank_batch, micro)
    assert rank_batch % parts == 0
    assert rank_batch // parts <= (micro or rank_batch)
    fewer = [n for n in range(1, parts) if rank_batch % n == 0]
    assert all(rank_batch // n > (micro or rank_batch) for n in fewer)


def test_the_micro_batches_of_a_whole_step_are_equal() -> None:
    plan = Plan(1000, 60, 2, 7)
    assert (plan.accumulation, plan.micro_batch_size) == (5, 6)
    assert {part.stop - part.start for rank in range(2) for part in plan.window(3, rank)} == {6}


@pytest.mark.parametrize(
    ("train", "expected"), [(Train(steps=7), 7), (Train(epochs=2), 26), (Train(epochs=None, steps=3), 3)]
)
def test_the_plan_of_a_rank_comes_from_the_config(train: Train, expected: int) -> None:
    batch = Batch(global_size=100, micro_size=25, remainder="train")
    config = Config(batch=batch, train=train, seed=5)
    plan = Plan.of(config, 1203, cast(Ranks, SimpleNamespace(rank=1, world_size=2)))
    assert (plan.samples, plan.global_batch_size, plan.world_size, plan.rank) == (1203, 100, 2, 1)
    assert (plan.micro_batch_size, plan.accumulation, plan.steps_per_epoch) == (25, 2, 13)
    assert plan.total_steps == expected
    assert plan.order(1, 0, 9).tolist() == Order(1203, 5)(1, 0, 9).tolist()


@pytest.mark.parametrize(
    ("global_batch_size", "world_size", "near"), [(64, 6, 66), (100, 8, 104), (33, 4, 32), (3, 8, 8), (7, 3, 6)]
)
def test_a_world_that_does_not_divide_the_global_batch_is_refused_with_the_nearest_that_it_does(
    global_batch_size: int, world_size: int, near: int
) -> None:
    with pytest.raises(UsageError) as refusal:
        Plan(10_000, global_batch_size, world_size)
    message = str(refusal.value)
    assert f"batch.global_size = {global_batch_size}" in message
    assert f"{world_size} processes" in message
    assert f"--batch.global-size {near}" in message
    Plan(10_000, near, world_size)


def test_too_few_samples_are_refused_unless_the_remainder_is_trained() -> None:
    with pytest.raises(UsageError, match=r"batch\.global_size = 64 .* 63 training samples.*batch\.remainder: train"):
        Plan(63, 64)
    assert Plan(63, 64, remainder="train").steps_per_epoch == 1
    assert Plan(64, 64).steps_per_epoch == 1


@pytest.mark.parametrize("remainder", ["drop", "train"])
def test_empty_data_is_refused(remainder: Literal["drop", "train"]) -> None:
    with pytest.raises(UsageError, match="empty"):
        Plan(0, 64, remainder=remainder)


# ---- validation ------------------------------------------------------------------------------------------------


@reproducible
@given(st.integers(1, 300), st.integers(1, 70), st.integers(1, 6))
def test_validation_deals_fixed_batches_whole_and_each_sample_once(
    samples: int, batch_size: int, world_size: int
) -> None:
    alone = [batch.indices.tolist() for batch in FixedBatchSampler(samples, batch_size, 0, 1)]
    assert list(itertools.chain(*alone)) == list(range(samples))
    for rank in range(world_size):
        sampler = FixedBatchSampler(samples, batch_size, rank, world_size)
        assert sampler.batches == len(alone)
        assert [batch.indices.tolist() for batch in sampler] == alone[rank::world_size]


# ---- the order -------------------------------------------------------------------------------------------------


@reproducible
@given(st.integers(1, 3000), seeds, epochs)
def test_the_order_of_an_epoch_is_a_permutation(samples: int, seed: int, epoch: int) -> None:
    assert sorted(Order(samples, seed)(epoch, 0, samples).tolist()) == list(range(samples))


@pytest.mark.parametrize("samples", [EXACT_LIMIT, EXACT_LIMIT + 1, EXACT_LIMIT + 54321])
def test_the_order_is_a_permutation_on_both_sides_of_the_limit(samples: int) -> None:
    indices = Order(samples, 1)(2, 0, samples)
    assert len(indices) == samples
    assert np.array_equal(np.sort(indices), np.arange(samples))


def test_the_whole_permutation_is_kept_up_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the bijection is for larger data sets")

    monkeypatch.setattr(sampling, "permuted", refuse)
    assert EXACT_LIMIT == 2**20
    assert len(Order(EXACT_LIMIT, 0)(0, 0, 10)) == 10
    with pytest.raises(AssertionError):
        Order(EXACT_LIMIT + 1, 0)(0, 0, 10)


@reproducible
@given(st.integers(1, 2500), st.integers(0, 2**64 - 1))
def test_permuted_is_a_bijection_for_any_size_and_key(samples: int, key: int) -> None:
    assert sorted(permuted(np.arange(samples), samples, key).tolist()) == list(range(samples))


@pytest.mark.parametrize("bits", range(2, 14))
def test_the_feistel_network_is_a_bijection_of_the_numbers_with_so_many_bits(bits: int) -> None:
    images = sampling._feistel(np.arange(2**bits, dtype=np.uint64), bits, 12345)
    assert sorted(images.tolist()) == list(range(2**bits))


@reproducible
@given(st.integers(1, 10**15), st.integers(0, 2**64 - 1), st.data())
def test_permuted_maps_a_position_alike_in_whatever_company(samples: int, key: int, data: st.DataObject) -> None:
    asked = data.draw(st.lists(st.integers(0, samples - 1), min_size=1, max_size=20, unique=True))
    images = permuted(np.array(asked), samples, key)
    assert images.tolist() == [int(permuted(np.array([position]), samples, key)[0]) for position in asked]
    assert len(set(images.tolist())) == len(asked)
    assert images.min() >= 0
    assert images.max() < samples


@reproducible
@given(st.integers(17, 400), seeds, epochs, st.data())
def test_slices_across_chunk_borders_agree_with_the_whole(
    samples: int, seed: int, epoch: int, data: st.DataObject
) -> None:
    with small_limits(exact=data.draw(st.sampled_from([16, 500])), chunk=32):
        whole = Order(samples, seed)(epoch, 0, samples)
        order = Order(samples, seed)
        for _ in range(5):  # one Order asked for this and that keeps nothing that misleads it
            start = data.draw(st.integers(0, samples))
            stop = data.draw(st.integers(start, samples))
            assert order(epoch, start, stop).tolist() == whole[start:stop].tolist()
            order(epoch + 1, 0, min(40, samples))
    assert sorted(whole.tolist()) == list(range(samples))


def test_slices_across_the_chunks_of_large_data_agree_with_single_positions() -> None:
    samples = 10**9
    across = Order(samples, 4)(1, 3 * CHUNK - 5, 3 * CHUNK + 5)
    order = Order(samples, 4)
    assert across.tolist() == [order(1, p, p + 1).item() for p in range(3 * CHUNK - 5, 3 * CHUNK + 5)]


@reproducible
@given(plans(), seeds, st.integers(0, 25), st.data())
def test_the_sampler_seeks_alike_above_the_limit(ranks: list[Plan], seed: int, start: int, data: st.DataObject) -> None:
    plan = ranks[0]
    rank = data.draw(st.integers(0, plan.world_size - 1))
    skipped = sum(len(plan.window(step, rank)) for step in range(start))
    with small_limits(exact=0, chunk=16):
        assert taken(plan, rank, start, start + 5, seed) == taken(plan, rank, 0, start + 5, seed)[skipped:]


@pytest.mark.parametrize("samples", [50, 1000, EXACT_LIMIT + 1])
def test_orders_of_other_epochs_and_seeds_differ(samples: int) -> None:
    firsts = {tuple(Order(samples, seed)(epoch, 0, 30).tolist()) for seed in range(5) for epoch in range(4)}
    assert len(firsts) == 20


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (5, 4), (0, 11), (11, 12)])
def test_positions_outside_of_the_data_are_an_error(start: int, stop: int) -> None:
    with pytest.raises(IndexError, match=f"{start}:{stop} of 10"):
        Order(10, 0)(0, start, stop)


# ---- cost ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [10**8, 10**12])
def test_a_seek_and_a_batch_cost_the_same_at_any_number_of_samples(
    samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[int] = []
    original = sampling._feistel

    def counting(values: NDArray[np.uint64], bits: int, key: int) -> NDArray[np.uint64]:
        computed.append(len(values))
        return original(values, bits, key)

    monkeypatch.setattr(sampling, "_feistel", counting)
    plan = Plan(samples, 1024, 4, 64, rank=1)
    steps = 640  # ten chunks
    start = plan.steps_per_epoch * 2 + plan.steps_per_epoch // 2
    plan.total_steps = start + steps
    tracemalloc.start()
    try:
        batches = iter(MicroBatchSampler(plan, start))
        first = next(batches)
        seek = sum(computed)
        rest = list(batches)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert first.epoch == 2
    assert len(rest) == steps * plan.accumulation - 1
    # Cycle-walking visits less than two values for each that is asked for.
    assert seek <= 2 * 2 * CHUNK
    chunks = steps * 1024 // CHUNK + 2
    assert sum(computed) <= 2 * chunks * CHUNK
    assert peak < 16 * 2**20


def test_an_exact_order_is_sorted_once_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    sorts: list[int] = []
    original = np.argsort

    def counting(values: NDArray[Any], **options: Any) -> NDArray[Any]:
        sorts.append(len(values))
        return original(values, **options)

    monkeypatch.setattr(np, "argsort", counting)
    plan = Plan(10_000, 100, total_steps=205)
    list(MicroBatchSampler(plan, 95))  # epochs 0, 1 and 2
    assert sorts == [10_000] * 3


# ---- what it looks like ----------------------------------------------------------------------------------------


def test_the_order_is_the_one_that_earlier_versions_trained_on() -> None:
    assert Order(10, 0)(0, 0, 10).tolist() == [8, 3, 5, 9, 1, 0, 2, 4, 7, 6]
    assert Order(10, 0)(1, 0, 10).tolist() == [4, 1, 2, 9, 7, 0, 3, 6, 5, 8]
    assert Order(10, 7)(0, 0, 10).tolist() == [3, 2, 4, 8, 5, 0, 6, 7, 1, 9]
    large = Order(2**20 + 7, 3)
    assert large(0, 0, 6).tolist() == [77349, 405738, 521861, 260111, 823205, 367218]
    assert large(2, 2**20 + 3, 2**20 + 7).tolist() == [320626, 147900, 897163, 216181]
    assert permuted(np.arange(7), 7, 5).tolist() == [4, 2, 3, 6, 0, 1, 5]
    assert permuted(np.arange(3), 10**12, 5).tolist() == [688649861849, 255559415522, 992084371164]


def test_the_micro_batches_are_those_that_earlier_versions_trained_on() -> None:
    plan = Plan(10, 4, 2, 1, "train")
    assert taken(plan, 1, 1, 4) == [(0, [0]), (0, [4]), (0, [6]), (1, [1]), (1, [9])]
    batch = next(iter(MicroBatchSampler(part_of(plan, 0, 1), 0)))
    assert isinstance(batch, MicroBatch)
    assert batch.indices.dtype == np.int64


def chi_square(rows: NDArray[np.int64], columns: NDArray[np.int64], samples: int, cells: int = 16) -> float:
    """Of the table of pairs (row, column), each in `cells` classes, against all cells alike."""
    table = np.zeros((cells, cells))
    np.add.at(table, (rows * cells // samples, columns * cells // samples), 1)
    return float(((table - len(rows) / cells**2) ** 2 / (len(rows) / cells**2)).sum())


@pytest.mark.parametrize(("samples", "exact"), [(4096, True), (4096, False), (3000, False)])
def test_shuffled_orders_look_random(samples: int, exact: bool) -> None:
    places = np.arange(samples)
    statistics: dict[str, list[float]] = {"place": [], "successor": [], "next epoch": [], "next seed": []}
    with small_limits(exact=samples if exact else 0, chunk=CHUNK):
        for seed in range(30):
            one = Order(samples, seed)(0, 0, samples)
            statistics["place"].append(chi_square(places, one, samples))
            statistics["successor"].append(chi_square(one[:-1], one[1:], samples))
            statistics["next epoch"].append(chi_square(one, Order(samples, seed)(1, 0, samples), samples))
            statistics["next seed"].append(chi_square(one, Order(samples, seed + 1)(0, 0, samples), samples))
            assert abs(np.corrcoef(places, one)[0, 1]) < 5 / samples**0.5
    for name, values in statistics.items():
        # Both margins are fixed: 15² = 225 degrees of freedom, standard deviation √450 ≈ 21.
        assert max(values) < 225 + 5 * 21.2, name
        assert abs(np.mean(values) - 225) < 5 * 21.2 / 30**0.5, name


def test_the_first_place_of_a_tiny_order_falls_to_each_sample_alike() -> None:
    for draw in (lambda key: Order(5, key)(0, 0, 1)[0], lambda key: permuted(np.array([0]), 5, derive(key))[0]):
        counts = np.bincount([draw(key) for key in range(3000)], minlength=5)
        assert ((counts - 600) ** 2 / 600).sum() < 25  # 4 degrees of freedom: 25 is beyond 1 in 20 000


def test_a_chunk_of_large_data_is_spread_over_all_of_it() -> None:
    samples = 10**9
    for seed in range(5):
        counts = np.bincount(Order(samples, seed)(0, 7 * CHUNK, 8 * CHUNK) * 256 // samples, minlength=256)
        assert ((counts - CHUNK / 256) ** 2 / (CHUNK / 256)).sum() < 255 + 5 * (2 * 255) ** 0.5


@pytest.mark.parametrize("world_size", [2, 3, 4, 7])
def test_rank_0_never_is_without_a_sample_of_a_short_step(world_size: int) -> None:
    # Its BatchNorm statistics are the ones that are kept: the stand-in of an empty part must not enter them.
    for rest in range(1, 3 * world_size):
        plan = Plan(5 * 12 * world_size + rest, 12 * world_size, world_size, 2, "train")
        assert all(part.start < part.stop for part in plan.window(plan.steps_per_epoch - 1, 0)), rest
