"""Before step 1: do all ranks train the same? One small exchange; the ranks and the first difference are named."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from distloop.config.settings import Config
from distloop.data.datasets import DataSource
from distloop.data.fingerprint import OWN_DRAWS, RAISES, likeness
from distloop.errors import UsageError
from distloop.ranks.environment import node_name
from distloop.ranks.places import Position
from distloop.ranks.ranks import Ranks
from distloop.run.checkpoint import MANIFEST, digest
from distloop.run.files import Start
from distloop.run.identity import OF_TASK, Facts, facts_of, facts_of_model

NOT_THE_SAME = "The ranks do not train the same:"
SAMPLED_BYTES = 4096  # of a tensor, at three places
ABSENT = "ABSENT"  # in the place of a value that a rank lacks
SAME_DATA = (
    "All ranks must see the same data in the same order: have the files copied to all machines, sort what "
    "os.listdir(), glob() or a set gave (sorted(…)), and seed a split of your own "
    "(torch.Generator().manual_seed(0), numpy.random.default_rng(0))."
)
SAME_LENGTH = (
    "Have the same files copied to all machines, and split them, or leave some out, by what is the same on all ranks: "
    "not by rank, machine or unseeded draws."
)
SAME_ORDER = (
    "The same samples come there in another order: sort what os.listdir(), glob() or a set gave (sorted(…)), and "
    "shuffle or split with a seed (torch.Generator().manual_seed(0), numpy.random.default_rng(0))."
)
SOME_SAMPLES = (
    "Have the files copied to all machines, and number labels by what is sorted, not as os.listdir() or a set gave "
    "(sorted(…)) their names."
)
OTHER_CPUS = (
    "If the files are equal, CPUs of different kinds round a sample otherwise (a resize, a normalisation): take "
    "machines of one kind, or store the samples as they are after that."
)
OWN_GENERATOR = (
    "It is another one each time, also under the same seed: draw from generators that are seeded for each sample, such "
    "as random.random(), numpy.random.normal() and torch.randn(), and not from one of its own (default_rng(), "
    "random.Random(), os.urandom)."
)
SAME_CODE = "Its code must not ask which rank or which machine it runs on."


def refuse_unlike_ranks(
    config: Config,
    source: DataSource,
    device: torch.device,
    task: Any,
    model: nn.Module,
    position: Position | None = None,
) -> None:
    """Raise the same UsageError on all ranks if they differ in what they train. Collective: 32 bytes of each rank, and
    the facts themselves only if they differ. Call it before DDP copies rank 0's model to the others. `position`: this
    rank's; a rank that still builds its model is behind those that wait here."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return
    facts = {**facts_of(config, source, device), **facts_of_model(task, model)}
    summary = hashlib.sha256(json.dumps(facts).encode()).digest()
    # On the CPU: distloop's groups have gloo there, which does not wait for a GPU's queue.
    own = torch.frombuffer(bytearray(summary), dtype=torch.int64)
    rows = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    if position is not None:
        position.enter("comparing the ranks")
    dist.all_gather(rows, own)
    if all(torch.equal(row, rows[0]) for row in rows):
        return
    found: list[Any] = [None] * len(rows)
    dist.all_gather_object(found, (node_name(), facts))
    if message := first_difference([each for _, each in found], [node for node, _ in found]):
        raise UsageError(message)


def refuse_unlike_rank_0(ranks: Ranks, of_rank_0: Facts, own: Facts, start: Start) -> None:
    """Raise UsageError, on this rank, if its facts are others than those that rank 0 has sent, or if it does not find
    the files that rank 0 found and that all load. Exchanges nothing."""
    if ranks.world_size == 1:
        return
    nodes = [ranks.roll_call.places[0].node, node_name()]
    if message := first_difference([of_rank_0, own], nodes, [0, ranks.rank]):
        raise UsageError(message)
    file = start.checkpoint / MANIFEST if start.checkpoint else start.weights
    if ranks.is_main or file is None or ((found := _digest_of(file)) == start.sha256):
        return
    there, here = f"rank {ranks.rank} (on {nodes[1]})", f"rank 0 (on {nodes[0]})"
    problem = f"has other contents on {there} than on {here}" if found else f"is not to be found on {there}"
    raise UsageError(
        f"{NOT_THE_SAME} {file.resolve()} {problem}. Let all machines see the run directory (--runs-dir) and "
        "the weights of --init-from in the same folder, such as one on a shared file system."
    )


def _digest_of(file: Path) -> str:
    try:
        return digest_of_start(file)
    except OSError:
        return ""


def digest_of_start(file: Path) -> str:
    """A SHA-256 that tells the file from which a run starts from others. Of a safetensors file, which may be large and
    is loaded by each rank anyway: of the header, which has names and shapes, and of the first, middle and last 4 KiB of
    each tensor. Of any other, such as a manifest: of the whole. Raises OSError."""
    found, all_bytes = hashlib.sha256(), file.stat().st_size
    with open(file, "rb") as opened:
        start = 8 + int.from_bytes(opened.read(8), "little")
        if start > all_bytes:
            return digest(file)
        header = opened.read(start - 8)
        found.update(header + str(all_bytes).encode())
        try:
            for begin, end in [entry["data_offsets"] for entry in json.loads(header).values() if "dtype" in entry]:
                for place in (begin, (begin + end) // 2, max(begin, end - SAMPLED_BYTES)):
                    opened.seek(start + place)
                    found.update(opened.read(min(SAMPLED_BYTES, end - place)))
        except (ValueError, TypeError, KeyError, AttributeError):
            return digest(file)
    return found.hexdigest()


def first_difference(facts: Sequence[Facts], nodes: Sequence[str], ranks: Sequence[int] | None = None) -> str | None:
    """A message on the first fact in which a rank differs from the first one, in the order of the kinds; None if they
    agree. `facts` and `nodes`: of each rank. `ranks`: their numbers, if not 0, 1, …"""
    numbers = range(len(facts)) if ranks is None else ranks
    for kind in facts[0]:
        for name in dict.fromkeys(name for each in facts for name in each[kind]):
            values = [each[kind].get(name, ABSENT) for each in facts]
            if kind == "data" and " sample " in name and ABSENT in values:
                continue  # a slow data set: the other rank has had time for more samples
            # A sample that no rank can load is the same on all, wherever its files lie.
            # As JSON, since NaN is not equal to itself.
            same = [RAISES if str(value).startswith(RAISES) else json.dumps(value, sort_keys=True) for value in values]
            others = [place for place, value in enumerate(same) if value != same[0]]
            if others:
                more = "" if len(others) == 1 else f" (as on {len(others) - 1} more)"
                there = f"rank {numbers[others[0]]} (on {nodes[others[0]]}){more}"
                here = f"rank {numbers[0]} (on {nodes[0]})"
                advice = _advice(name, facts[others[0]][kind], facts[0][kind]) if kind == "data" else ""
                text = _words(kind, name, values[others[0]], values[0], there, here, advice)
                return f"{NOT_THE_SAME} {text}"
    return None


def _words(kind: str, name: str, theirs: Any, ours: Any, there: str, here: str, data_advice: str) -> str:
    """What differs, where, and what to do. `theirs`: the value on the rank `there`; `ours`: on rank 0, `here`."""
    if kind == "versions":
        advice = "Install the same version everywhere, or start all ranks from one environment."
        return f"{there} runs {name} {theirs}, but {here} {name} {ours}. {advice}"
    if kind == "environment":
        return _words_on_environment(name, theirs, ours, there, here)
    if kind == "config":
        advice = "Give all ranks the same config file and command line."
        return f"{name} = {_setting(theirs)} on {there}, but {_setting(ours)} on {here}. {advice}"
    if kind == "sources":
        file = name if name.endswith(".py") else f"{name.rpartition('.')[2]}.py"
        return f"{file} on {there} has another source than that on {here}. Copy the same files to all machines."
    if kind == "data":
        return _words_on_data(name, theirs, ours, there, here, data_advice)
    if kind == "task":
        return f"the task's {name} is {theirs!r} on {there}, but {ours!r} on {here}. {SAME_CODE}"
    if kind == "values":
        return (
            f"the {_whose(name)} begins with other values on {there} than on {here}. Draw initial values from the "
            "global generators, which are seeded alike on all ranks (torch.nn.init does), not from one of your own, "
            "load weights from the same file, and leave nothing uninitialised (torch.empty)."
        )
    if kind == "order":
        return (
            f"the model's parameters are in another order on {there} than on {here}: {theirs!r} where the other has "
            f"{ours!r}. Gradients are exchanged in this order. {SAME_CODE} Do not build layers in the order of a set."
        )
    if ABSENT in (theirs, ours):
        only, form = (here, ours) if theirs == ABSENT else (there, theirs)
        owner, name = ("task", name.removeprefix(OF_TASK)) if name.startswith(OF_TASK) else ("model", name)
        return f"the {owner} has {name} ({form}) on {only} only. {SAME_CODE}"
    return f"the {_whose(name)} is {theirs} on {there}, but {ours} on {here}. {SAME_CODE}"


def _whose(name: str) -> str:
    return f"task's {name.removeprefix(OF_TASK)}" if name.startswith(OF_TASK) else f"model's {name}"


def _words_on_environment(name: str, theirs: Any, ours: Any, there: str, here: str) -> str:
    if name == "threads":
        return (
            f"{there} computes with {theirs} CPU threads, but {here} with {ours}, which rounds sums otherwise. Set "
            "OMP_NUM_THREADS to one number for all ranks, and call torch.set_num_threads() on all or on none."
        )
    if name.startswith(("torch.", "backends.")):
        flag = name if name.startswith("torch.") else f"torch.{name}"
        return (
            f"{there} computes in another precision than {here}: {flag} is {theirs} there, and {ours} on rank 0. "
            "Leave it to the config (precision, matmul_precision, dtype), or set it on all ranks alike."
        )
    theirs, ours = (f"{name}={value}" if value is not None else f"no {name}" for value in (theirs, ours))
    return f"{there} has {theirs}, but {here} {ours}. Set it alike for all ranks, before they start (export {name}=…)."


def _words_on_data(name: str, theirs: Any, ours: Any, there: str, here: str, advice: str) -> str:
    if name.endswith(" samples"):
        return f"the data has {theirs} {name} on {there}, but {ours} on {here}. {SAME_LENGTH}"
    if " sample " not in name:
        if name.endswith(" data"):
            return f"the {name} has other contents on {there} than on {here}. {SAME_DATA}"
        return f"the data's {name} are {theirs} on {there}, but {ours} on {here}. {SAME_DATA}"
    for value, one, other in ((theirs, there, here), (ours, here, there)):
        if value.startswith(RAISES):
            error = value.removeprefix(RAISES)
            return f"{name} can be loaded on {other}, but on {one} it raises {error}. {SAME_DATA}"
    advice = OWN_GENERATOR if theirs.startswith(OWN_DRAWS) else advice
    return f"{name} is another one on {there} than on {here}. {advice}"


def _advice(name: str, theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """What to do about a sample that differs, from what the others of its half that were looked at show."""
    half = f"{name.partition(' sample ')[0]} sample "
    before, now = ({key: facts[key] for key in facts if key.startswith(half)} for facts in (theirs, ours))
    found = likeness(before, now)
    if found.in_other_order:
        return SAME_ORDER
    if found.same:
        return (
            f"{found.same} of the {found.compared} samples that were compared are the same. {SOME_SAMPLES} {OTHER_CPUS}"
        )
    return f"{SAME_DATA} {OTHER_CPUS}"


def _setting(value: Any) -> str:
    return "not set" if value == ABSENT else repr(value)
