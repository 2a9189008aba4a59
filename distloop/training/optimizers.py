"""The optimizer that the config names: one of torch.optim, the user's own, or several for the parts of a model."""

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from distloop.config.registry import call, import_callable
from distloop.config.settings import Optim
from distloop.errors import StoppedEarly, UsageError, suggest
from distloop.ranks.ddp_words import in_short
from distloop.training.groups import Member, check_patterns, freeze, groups_of_members, members
from distloop.training.sparse import check_sparse, sparse_gradients

# Settings of optim that belong to torch's optimizers of these names; for others they are written in optim.args.
SHORTCUTS = {"sgd": ("momentum", "nesterov"), "adam": ("betas", "eps"), "adamw": ("betas", "eps")}
SINCE = {"muon": "2.9"}  # the first version of torch that has the optimizer
FUSED = {"sgd": ("cpu", "cuda"), "adam": ("cpu", "cuda"), "adamw": ("cpu", "cuda"), "adagrad": ("cpu",)}  # devices


class SeveralOptimizers(torch.optim.Optimizer):
    """Several optimizers, each with groups of its own, as one: the loop, checkpoints and Accelerate see one."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self.optimizers = list(optimizers)
        super().__init__([group for one in optimizers for group in one.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let the optimizers have this one's groups and state, which parameters tell apart."""
        first = 0
        for one in self.optimizers:
            last = first + len(one.param_groups)
            one.__setstate__({"state": self.state, "param_groups": self.param_groups[first:last]})
            first = last

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # by load_state_dict()
        self._share()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # torch's may return a closure's loss
        for one in self.optimizers:
            one.step()


def optimizers_of(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """The optimizers of SeveralOptimizers; else the one."""
    return optimizer.optimizers if isinstance(optimizer, SeveralOptimizers) else [optimizer]


def build_optimizer(
    model: nn.Module | list[dict], config: Optim, device: torch.device, precision: str, task: nn.Module | None = None
) -> torch.optim.Optimizer:
    """The optimizer that the config names, for a model, whose parameters it freezes as the config says, or for groups
    that parameter_groups() made. `task`: one that is a module, whose parameters have the names task.NAME here. Raises
    UsageError if it does not fit the parameters, or if there are none to train; StoppedEarly, with the table, for
    optim.show."""
    if not isinstance(model, nn.Module):
        _refuse_none(model)
        return _build("optim", config, model, device, precision != "fp16")
    check_patterns(model, config.groups, task)
    freeze(model, config.groups, task)
    found = list(members(model, config, task))
    if config.show:
        raise StoppedEarly(f"the parameters, as optim trains them:\n{table(found, config)}")
    trained = [member for member in found if member.parameter.requires_grad]
    _refuse_none([parameter for parameter in model.parameters() if parameter.requires_grad])
    if all(member.group.until_step for member in trained):
        raise UsageError(
            "optim.groups freeze all parameters in the first steps (until_step): nothing would be trained."
        )
    have_sparse = set(sparse_gradients(model))
    by_optimizer: dict[str | None, list[Member]] = {}
    for member in trained:
        by_optimizer.setdefault(member.label if member.group.optimizer else None, []).append(member)
    optimizers = []
    for label, some in by_optimizer.items():
        own, key, settings = some[0].group.optimizer, "optim", config
        if own is not None:
            place = next(place for place, group in enumerate(config.groups) if group.match == label)
            key, settings = f"optim.groups[{place}].optimizer", Optim(own.name, own.args, lr=config.lr)
        sparse = [member.name for member in some if member.name in have_sparse]
        _check_fit(key, settings.name, some, sparse)
        fuses = precision != "fp16" and not sparse
        optimizers.append(_build(key, settings, groups_of_members(some), device, fuses))
        for member in some:
            if member.name in sparse:
                check_sparse(key, settings.name, member, optimizers[-1], device)
    return optimizers[0] if len(optimizers) == 1 else SeveralOptimizers(optimizers)


def _refuse_none(trained: Sequence[Any]) -> None:
    if not trained:
        raise UsageError(
            "The model has no parameters that require a gradient: there is nothing to train. If its layers are in a "
            "list or dict, make that an nn.ModuleList or nn.ModuleDict: PyTorch does not see them otherwise."
        )


def _build(key: str, config: Optim, groups: list[dict], device: torch.device, fuses: bool) -> torch.optim.Optimizer:
    """One optimizer. `key`: of its settings, for messages. `fuses`: whether it may be fused."""
    kind = optimizer_kind(f"{key}.name", config.name)
    shortcuts = {name: getattr(config, name) for name in SHORTCUTS.get(config.name, ())}
    _refuse_taken(key, config.args, () if "groups" in key else tuple(shortcuts))  # a group has no such settings itself
    # Fused: one pass over the parameters instead of one operation each. Not with fp16, where the fused optimizers
    # leave a step out by themselves, so that nobody could count it. None: PyTorch chooses; False is its slowest way.
    # Fused ones take no complex parameters and no sparse gradients; and SGD's moments begin undampened, which a fused
    # one that leaves its first step out would not know.
    is_plain = all(parameter.is_floating_point() for group in groups for parameter in group["params"])
    is_plain = is_plain and not config.args.get("dampening")
    offered: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    if fuses and is_plain and device.type in FUSED.get(config.name, ()):
        offered["fused"] = True
    with _garbage_left():
        optimizer = call(f"{key}.args", kind, {**shortcuts, **config.args}, offered, groups)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UsageError(
            f"{key}.name = {config.name!r} gave a {type(optimizer).__name__}; let it return a torch.optim.Optimizer."
        )
    given = {id(parameter) for group in groups for parameter in group["params"]}
    if {id(parameter) for group in optimizer.param_groups for parameter in group["params"]} != given:
        raise UsageError(
            f"{key}.name = {config.name!r} gave an optimizer of other parameters than those that it got. Let it hand "
            "its first argument, the groups of parameters, to the optimizer as they are; optim.groups makes others."
        )
    return optimizer


@contextlib.contextmanager
def _garbage_left() -> Iterator[None]:
    """No search for garbage. torch's first optimizer imports torch._dynamo, which makes 900 modules that stay: to look
    for garbage among them takes a seventh of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _refuse_taken(key: str, arguments: Mapping[str, Any], shortcuts: Sequence[str]) -> None:
    """Raise UsageError for arguments that belong to other settings, or that the run gives itself."""
    for name in arguments:
        if name in ("params", "fused"):
            raise UsageError(f"{key}.args.{name}: leave it out, the run gives it where the optimizer takes it.")
        if name in ("lr", "weight_decay", *shortcuts):
            other = "lr_scale" if name == "lr" and "groups" in key else name
            raise UsageError(f"{key}.args.{name}: give it as {key.removesuffix('.optimizer')}.{other}.")


def optimizer_kind(key: str, name: str) -> Callable[..., Any]:
    """The class in torch.optim with this name in small letters, or the user's own callable. Raises UsageError."""
    if ":" in name:
        return import_callable(key, name)
    if name == "lbfgs":
        raise UsageError(
            f"{key} = 'lbfgs' calls the model several times in a step (its closure), which this loop does not do. "
            "Choose another optimizer."
        )
    if (kind := known_optimizers().get(name)) is not None:
        return kind
    if name in SINCE:
        raise UsageError(
            f"{key} = {name!r} is there from torch {SINCE[name]} on; torch {torch.__version__} is installed."
        )
    known = sorted(known_optimizers())
    raise UsageError(
        f"{key} = {name!r} is not known.{suggest(name.lower(), known)} (torch {torch.__version__}) Your own: "
        "module:callable."
    )


def known_optimizers() -> dict[str, Callable[..., Any]]:
    """torch's optimizers by their names in small letters, without the one that needs a closure."""
    return {
        name.lower(): kind
        for name, kind in vars(torch.optim).items()
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and name not in ("Optimizer", "LBFGS")
    }


def _check_fit(key: str, name: str, found: Sequence[Member], sparse: Sequence[str]) -> None:
    """Raise UsageError for parameters of a kind that the optimizer does not take. `sparse`: with sparse gradients."""
    if name == "muon":
        others = [member.name for member in found if member.parameter.ndim != 2]
        takes = "matrices (2-D parameters) only"
    elif name == "sparseadam":
        others = [member.name for member in found if member.name not in sparse]
        takes = "sparse gradients only, as an embedding with sparse=True gives them"
    else:
        return
    if others:
        raise UsageError(
            f"{key}.name = {name!r} takes {takes}, and would get {in_short(others)}. Give the others another "
            "optimizer: optim: {name: adamw, groups: [{match: PATTERN, optimizer: {name: "
            f"{name}}}}}]}}, with a PATTERN that is found in the names of the right ones alone."
        )


def table(found: Sequence[Member], config: Optim) -> str:
    """What --optim.show prints: a line for each parameter."""
    rows = [("parameter", "shape", "group", "optimizer", "rate", "decay", "")]
    for member in found:
        frozen = f"until step {member.group.until_step}" if member.group.until_step else ""
        own = member.group.optimizer
        rows.append(
            (
                member.name,
                str(list(member.parameter.shape)),
                member.label,
                config.name if own is None else own.name,
                f"{config.lr * member.lr_scale:g}",
                f"{member.weight_decay:g}",
                "frozen" if not member.parameter.requires_grad else frozen and f"frozen {frozen}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def in_words(optimizer: torch.optim.Optimizer) -> str:
    """Such as "AdamW, fused" or "Muon and AdamW, fused"."""
    texts = []
    for one in optimizers_of(optimizer):
        fused = any(group.get("fused") for group in one.param_groups)
        decays = "weight_decay" in one.defaults or not any(group.get("weight_decay") for group in one.param_groups)
        texts.append(type(one).__name__ + (", fused" if fused else "") + ("" if decays else ", without weight decay"))
    return " and ".join(texts)
