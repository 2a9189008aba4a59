"""Random numbers that are derived and not carried."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from distloop.config.settings import Data, Task
from distloop.data.datasets import load_data
from distloop.data.seeding import (
    Place,
    building,
    derive,
    generators_restored,
    hashes,
    seed_building,
    seed_forward,
    seed_place,
    seed_sample,
    uniforms,
)
from distloop.training.builtin_tasks import build_task

reproducible = settings(derandomize=True, deadline=None)
seeds = st.integers(0, 2**63 - 1)
CPU = torch.device("cpu")


def test_the_numbers_are_those_that_earlier_versions_drew() -> None:
    assert derive() == 0
    assert derive(0) == 16294208416658607535
    assert derive(1, 2, 3) == 7702586659592502839
    drawn = uniforms(1, 2, np.array([0, 5]), 3)
    assert drawn == pytest.approx(
        np.array(
            [
                [0.34988521540119727, 0.8643489361272658, 0.09027947753862856],
                [0.5047722044272221, 0.1426360684987338, 0.9376496290645314],
            ]
        ),
        abs=1e-15,
    )
    assert hashes([4], np.array([0, 1, 2**40]))[0].tolist() == [
        15719281747526243928,
        17088576380778660272,
        6265416331207216552,
    ]


def test_the_mixing_is_that_of_splitmix64() -> None:
    """The first outputs of the reference implementation for the seeds 0 and 1234567."""
    assert derive(0) == 0xE220A8397B1DCDAF
    assert derive(1234567) == 6457827717110365317


@reproducible
@given(seeds, st.integers(0, 100), st.lists(st.integers(0, 2**62), min_size=1, max_size=20), st.randoms())
def test_a_samples_numbers_do_not_depend_on_the_batch_it_is_in(
    seed: int, epoch: int, indices: list[int], shuffler: random.Random
) -> None:
    together = uniforms(seed, epoch, np.array(indices), 3)
    shuffled = list(range(len(indices)))
    shuffler.shuffle(shuffled)
    assert np.array_equal(uniforms(seed, epoch, np.array(indices)[shuffled], 3), together[shuffled])
    for row, index in enumerate(indices):
        assert np.array_equal(uniforms(seed, epoch, np.array([index]), 3)[0], together[row])
    # A sample that draws more does not draw otherwise.
    assert np.array_equal(uniforms(seed, epoch, np.array(indices), 5)[:, :3], together)


def test_each_of_seed_epoch_index_and_draw_changes_the_numbers() -> None:
    drawn = [uniforms(seed, epoch, np.arange(50), 4) for seed in range(4) for epoch in range(4)]
    assert len(np.unique(np.stack(drawn))) == 16 * 50 * 4


def test_uniforms_fill_the_unit_interval_evenly() -> None:
    drawn = uniforms(3, 1, np.arange(100_000), 2)
    assert drawn.shape == (100_000, 2)
    assert drawn.dtype == np.float64
    assert drawn.min() >= 0
    assert drawn.max() < 1
    counts = np.bincount((drawn[:, 0] * 100).astype(int), minlength=100)
    assert ((counts - 1000) ** 2 / 1000).sum() < 99 + 5 * 198**0.5
    assert abs(np.corrcoef(drawn[:, 0], drawn[:, 1])[0, 1]) < 5 / 100_000**0.5
    assert abs(np.corrcoef(drawn[:-1, 0], drawn[1:, 0])[0, 1]) < 5 / 100_000**0.5


def test_the_largest_hash_is_still_below_one() -> None:
    index = np.array([-4153537508696988599])
    # 2**64 - 1, which as a float64 would be 2**64.
    assert hashes([derive(0, 0, 0)], index)[0].tolist() == [2**64 - 1]
    assert uniforms(0, 0, index, 1).max() < 1


def test_no_draws_are_an_empty_row_each() -> None:
    assert uniforms(0, 0, np.arange(7), 0).shape == (7, 0)


@reproducible
@given(st.lists(st.integers(0, 2**64 - 1), max_size=4), st.lists(st.integers(0, 2**64 - 1), max_size=4))
def test_derived_seeds_differ_where_anything_in_them_does(one: list[int], other: list[int]) -> None:
    assert (derive(*one) == derive(*other)) == (one == other)
    assert 0 <= derive(*one) < 2**64


def drawn_from_all_generators() -> tuple[float, ...]:
    return float(torch.rand(())), float(np.random.random()), random.random()


@pytest.mark.parametrize("place", [(0, 0, 0), (3, 2, 10**12), (2**63, 1, 5)])
def test_a_samples_own_transforms_draw_the_same_again(place: tuple[int, int, int]) -> None:
    seed_sample(*place)
    first = drawn_from_all_generators()
    drawn_from_all_generators()
    seed_sample(*place)
    assert drawn_from_all_generators() == first


def test_other_samples_epochs_and_seeds_draw_otherwise_from_every_generator() -> None:
    drawn = []
    for place in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]:
        seed_sample(*place)
        drawn.append(drawn_from_all_generators())
    for column in zip(*drawn, strict=True):
        assert len(set(column)) == 4


def test_dropout_changes_with_step_position_and_seed_and_repeats() -> None:
    dropout, ones = nn.Dropout(0.5), torch.ones(200)

    def masked(seed: int, step: int, position: int) -> tuple[float, ...]:
        seed_forward(seed, step, position, CPU)
        return tuple(dropout(ones).tolist())

    places = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]
    masks = [masked(*place) for place in places]
    assert len(set(masks)) == 4
    assert [masked(*place) for place in reversed(places)] == masks[::-1]


def test_a_forward_pass_draws_nothing_that_a_sample_has_drawn() -> None:
    seed_sample(0, 0, 0)
    sample = torch.rand(5)
    seed_forward(0, 0, 0, CPU)
    assert not torch.equal(torch.rand(5), sample)


def test_the_numbers_that_torch_draws_are_those_of_earlier_versions() -> None:
    seed_forward(0, 0, 0, CPU)
    assert torch.default_generator.initial_seed() == derive(0, 0, 0, 0xD0)
    seed_sample(1, 2, 3)
    assert torch.default_generator.initial_seed() == derive(1, 2, 3)


def test_each_place_and_number_draws_otherwise_from_every_generator_and_draws_the_same_again() -> None:
    calls: list[Callable[[], None]] = [functools.partial(seed_place, place, 0, CPU) for place in Place]
    calls += [lambda: seed_place(Place.UPDATE, 1, CPU), lambda: seed_place(Place.UPDATE, 0, CPU, 1)]
    calls += [lambda: seed_place(Place.VALIDATION, 0, CPU, 1), lambda: seed_forward(0, 0, 1, CPU)]
    calls += [lambda: seed_sample(0, 0, 0), lambda: seed_sample(0, 0, Place.UPDATE)]

    def drawn(call: Callable[[], None]) -> tuple[float, ...]:
        call()
        return drawn_from_all_generators()

    first = [drawn(call) for call in calls]
    for column in zip(*first, strict=True):
        assert len(set(column)) == len(calls)
    assert [drawn(call) for call in reversed(calls)] == first[::-1]


def test_a_loop_that_seeds_before_it_loads_data_without_a_seed_goes_on_with_its_own_numbers() -> None:
    """As copies of the loop did before load_data() took a seed."""
    torch.manual_seed(3)
    load_data(Data("digits"))
    build_task(Task("classification"))
    drawn = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(3))


@pytest.mark.parametrize("draws", [0, 3])
def test_what_is_built_next_does_not_depend_on_how_much_was_drawn(draws: int) -> None:
    with building(Place.DATA, 5):
        for _ in range(draws):
            drawn_from_all_generators()
    after = drawn_from_all_generators()
    seed_building(Place.REST, 5)
    assert drawn_from_all_generators() == after


def test_the_generators_are_restored_also_after_an_error() -> None:
    seed_sample(0, 0, 0)
    following = drawn_from_all_generators()
    seed_sample(0, 0, 0)

    @generators_restored()
    def fails() -> None:
        raise RuntimeError(f"after {drawn_from_all_generators()}")

    with pytest.raises(RuntimeError):
        fails()
    assert drawn_from_all_generators() == following


class FakeCuda:
    """In place of torch.cuda: two GPUs of which the second is this rank's, with generators of the CPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.generators = torch.Generator().manual_seed(7), torch.Generator().manual_seed(7)
        monkeypatch.setattr(torch.cuda, "default_generators", self.generators)
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)


def test_a_sample_may_draw_on_the_ranks_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    seed_sample(1, 2, 3)
    assert [generator.initial_seed() for generator in cuda.generators] == [7, derive(1, 2, 3)]


def test_the_gpus_generator_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    following = torch.rand(3, generator=torch.Generator().manual_seed(7))
    with generators_restored():
        seed_sample(1, 2, 3)
    assert torch.equal(torch.rand(3, generator=cuda.generators[1]), following)


@pytest.mark.parametrize(("index", "seeded"), [(None, 0), (0, 0), (1, 1)])
def test_the_generator_of_the_ranks_own_gpu_is_seeded(
    monkeypatch: pytest.MonkeyPatch, index: int | None, seeded: int
) -> None:
    generators = torch.Generator().manual_seed(7), torch.Generator().manual_seed(7)
    monkeypatch.setattr(torch.cuda, "default_generators", generators)
    seed_forward(1, 2, 3, torch.device("cuda") if index is None else torch.device("cuda", index))
    assert generators[seeded].initial_seed() == torch.default_generator.initial_seed() != 7
    assert generators[1 - seeded].initial_seed() == 7
