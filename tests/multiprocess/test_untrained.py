"""Parameters that nothing would train are named: those without a gradient, by rank, and those of a task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from distloop.errors import UsageError
from distloop.ranks.ddp_words import in_short
from distloop.training.untrained import refuse_parameters_of_task, unused_parameters
from tests.lab import unused
from tests.multiprocess.test_weights import BASE as WEIGHTS
from tests.multiprocess.test_weights import nothing_is_saved, refused
from tests.tools.ranks import Outcome, train, write_config
from tests.tools.records import weights

LAB = "tests.lab.unused"
BASE = {**WEIGHTS, "task": "classification", "train": {"steps": 8}, "log": {"every_steps": 100}}
RANKS = pytest.mark.parametrize("world_size", [1, 2])
SPARE = "spare.weight, spare.bias got no gradient"


def run(folder: Path, kind: str, world_size: int, *words: str, **more: Any) -> Outcome:
    settings = {**BASE, "model": {"name": f"{LAB}:Net", "args": {"kind": kind}}, **more}
    return train(folder, ["--config", str(write_config(folder, settings)), *words], world_size)


@pytest.mark.parametrize(
    ("kind", "when"),
    [
        ("unused", "in the rehearsal on rank"),
        ("later", "in step"),
        ("on rank 1", "in the rehearsal on rank 1"),
        ("later on rank 1", "in step"),
    ],
)
def test_several_ranks_refuse_parameters_without_a_gradient(tmp_path: Path, kind: str, when: str) -> None:
    refused(run(tmp_path, kind, 2), f"{SPARE} {when}", "ddp.find_unused_parameters", "requires_grad_(False)")
    nothing_is_saved(tmp_path)
    run(tmp_path, kind, 2, "--ddp.find-unused-parameters").check()


def test_ranks_are_not_left_waiting_where_tokens_are_counted(tmp_path: Path) -> None:
    outcome = run(tmp_path, "later on rank 1", 2, task="tests.lab.weighing:Views", ddp={"timeout_seconds": 20})
    refused(outcome, f"{SPARE} in a step on rank 1")


def test_one_rank_names_them_once_and_trains_on(tmp_path: Path) -> None:
    outcome = run(tmp_path, "unused", 1).check()
    assert outcome.output.count(SPARE) == 1
    assert "several ranks would refuse them" in outcome.output
    assert "got no gradient" not in run(tmp_path, "", 1, "--name", "used").check().output


@RANKS
def test_a_frozen_body_stays_as_it_is_and_a_model_with_nothing_to_train_is_refused(
    tmp_path: Path, world_size: int
) -> None:
    outcome = run(tmp_path, "frozen", world_size).check()
    assert "got no gradient" not in outcome.output
    torch.manual_seed(0)
    trained, initial = weights(tmp_path / "runs" / "run"), unused.Net("frozen").state_dict()
    same = {name for name in initial if torch.equal(trained[name], initial[name])}
    assert {name.partition(".")[0] for name in same if "running" not in name and "batches" not in name} == {
        "body",
        "spare",
    }
    assert "body.1.running_mean" not in same
    refused(run(tmp_path, "all frozen", world_size, "--name", "frozen"), "no parameters that require a gradient")


@RANKS
@pytest.mark.parametrize("kind", ["twice", "checkpoint", "checkpoint reentrant"])
def test_layers_that_are_used_twice_or_computed_again_train(tmp_path: Path, kind: str, world_size: int) -> None:
    assert "got no gradient" not in run(tmp_path, kind, world_size).check().output


def test_what_ddp_says_of_a_layer_that_is_computed_again_becomes_one_message(tmp_path: Path) -> None:
    outcome = run(tmp_path, "checkpoint reentrant", 2, "--ddp.find-unused-parameters")
    refused(outcome, "spare.", " got its gradient twice", "use_reentrant=False")


def test_what_ddp_says_in_a_loop_that_does_not_look_becomes_one_message(tmp_path: Path) -> None:
    settings = {**BASE, "model": {"name": f"{LAB}:Net", "args": {"kind": "later"}}}
    outcome = train(tmp_path, ["--config", str(write_config(tmp_path, settings))], 2, loop="tests.lab.bare_loop")
    refused(outcome, f"{SPARE} in the backward pass before", "on rank", "ddp.find_unused_parameters")


@pytest.mark.parametrize(
    ("kind", "names"), [("frozen later", "body.0.weight, body.0.bias"), ("trained later", "spare.weight, spare.bias")]
)
def test_names_are_those_of_ddps_parameters_if_others_are_frozen_by_now(tmp_path: Path, kind: str, names: str) -> None:
    settings = {**BASE, "model": {"name": f"{LAB}:Net", "args": {"kind": kind}}}
    outcome = train(tmp_path, ["--config", str(write_config(tmp_path, settings))], 2, loop="tests.lab.bare_loop")
    refused(outcome, f" {names} got no gradient in the backward pass before", "__init__, not later")


def test_sums_of_another_shape_on_one_rank_are_named(tmp_path: Path) -> None:
    outcome = run(tmp_path, "shapes", 2, task=f"{LAB}:Shapes", validate={"batch_size": 32})
    refused(outcome, "'outputs' is of shape [4] on rank 1, but of shape [3] on rank 0", "which rank")


# ---- a task's own ----------------------------------------------------------------------------------------------

HELD = {
    "module": "held.weight, held.bias",
    "parameter": "held",
    "list": "held[1].weight, held[1].bias",
    "dict": "held['a'][1]['b'].weight, held['a'][1]['b'].bias",
    "tensor": "held",
}


@pytest.mark.parametrize("where", HELD)
def test_parameters_in_any_attribute_of_a_task_are_found(where: str) -> None:
    with pytest.raises(UsageError) as caught:
        refuse_parameters_of_task(unused.Heads(where))
    assert f"({HELD[where]})" in str(caught.value)
    refuse_parameters_of_task(unused.Heads(where, frozen=True))


def test_parameters_of_a_tasks_class_are_found_and_those_of_a_module_are_its_own() -> None:
    with pytest.raises(UsageError, match=r"\(scale\)"):
        refuse_parameters_of_task(unused.Shared())
    task = unused.Proxies()
    refuse_parameters_of_task(task)  # they are trained
    vars(task)["more"] = [torch.nn.Parameter(torch.ones(3))]
    with pytest.raises(UsageError, match=r"\(more\[0\]\)"):
        refuse_parameters_of_task(task)


@RANKS
def test_a_task_with_parameters_is_refused_and_with_a_frozen_teacher_it_trains(tmp_path: Path, world_size: int) -> None:
    task = {"name": f"{LAB}:Heads", "args": {"where": "module"}}
    outcome = run(tmp_path, "", world_size, task=task)
    refused(outcome, "The task Heads has parameters of its own (held.weight, held.bias)", "Make the task an nn.Module")
    assert not (tmp_path / "runs").exists()
    run(tmp_path, "", world_size, task={**task, "args": {"where": "module", "frozen": True}}).check()


# ---- names -----------------------------------------------------------------------------------------------------


def test_parameters_without_a_gradient_are_those_that_a_backward_pass_left_out() -> None:
    net = unused.Net("unused")
    net(torch.ones(2, 4)).sum().backward()
    assert unused_parameters(net) == ["spare.weight", "spare.bias"]
    net.spare.requires_grad_(False)
    assert unused_parameters(net) == []


def test_of_many_names_the_first_are_said_and_how_many_there_are() -> None:
    assert in_short(list("abcdefgh")) == "a, b, c, d, e, f and 2 more"
