"""Lines at the start of a run, on settings that have no effect or may mean something else than their user thinks.

They refuse nothing: a recipe may be tried with another model. What would train otherwise than it says is refused, by
refuse_without_effect().
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from distloop.config.command_line import Given
from distloop.config.comparison import flatten
from distloop.config.secrets import clean_mapping
from distloop.config.settings import SECTIONS, Config
from distloop.errors import UsageError

Effect = tuple[tuple[str, ...], str, Callable[[Any], bool]]
ON_WANDB = ("project", "entity", "group", "tags", "notes", "start_seconds", "end_seconds")
# These settings have an effect if that setting has a value for which the function is true; with others of these a new
# run is refused, since it would train otherwise than its user thinks.
OF_TRAINING: tuple[Effect, ...] = (
    (("optim.momentum", "optim.nesterov"), "optim.name", lambda name: name == "sgd"),
    (("optim.betas", "optim.eps"), "optim.name", lambda name: name in ("adam", "adamw")),
    (("schedule.warmup_steps",), "schedule.name", lambda name: ":" not in name),
    (("schedule.final_ratio",), "schedule.name", lambda name: name in ("linear", "cosine", "warmup_stable_decay")),
    (("schedule.milestones", "schedule.gamma"), "schedule.name", lambda name: name == "multi_step"),
    (("schedule.decay_steps",), "schedule.name", lambda name: name == "warmup_stable_decay"),
)
OTHERS: tuple[Effect, ...] = (
    (tuple(f"tracking.{name}" for name in ON_WANDB), "tracking.wandb", lambda mode: mode != "off"),
    (("data.root",), "data.name", lambda name: name not in ("digits", "diabetes")),
    (("data.timeout_seconds",), "data.workers", lambda workers: workers != 0),
    (("model.pretrained",), "init_from", lambda weights: weights is None),  # which all come from there
    (("init_fit",), "init_from", lambda weights: weights is not None),
)
WITH_ARGUMENTS = ("data", "model", "task")
FALSE_IN_YAML_1_1 = ("no", "No", "NO", "off", "Off", "OFF")


def notes_on(config: Config, file: Mapping[str, Any], given: Sequence[Given]) -> list[str]:
    """The lines, without secrets. `file`: the settings of the config file; `given`: those of the command line."""
    unused = [*_without_effect(config, OF_TRAINING), *_late_milestones(config), *_without_effect(config, OTHERS)]
    return [
        *_not_read(given),
        *([f"without effect: {', '.join(unused)}"] if unused else []),
        *_of_another_callable(config, file, given),
        *(line for name in WITH_ARGUMENTS for line in _words(getattr(config, name).args, f"{name}.args")),
    ]


def way_out(key: str, arguments: Mapping[str, Any]) -> str:
    """The end of a message on arguments that do not fit: how to drop those of the config file. `key`: model.args."""
    if not arguments:
        return ""
    return f" If they belong to another {key.split('.')[0]}, --{key} '{{}}' takes them away."


def _not_read(given: Sequence[Given]) -> Iterator[str]:
    files = [one.value for one in given if one.key == "config"]
    for file in files[:-1]:
        if file != files[-1]:
            yield f"--config {file} is not read: --config {files[-1]} stands after it"


def refuse_without_effect(config: Config) -> None:
    """Raise UsageError for settings of the optimizer and of the learning rate that have no effect beside the others."""
    unused = list(_without_effect(config, OF_TRAINING))
    if not unused:
        return
    defaults, text = flatten(Config()), ", ".join(unused)
    away = " ".join(
        f"--{key.replace('_', '-')} {_as_word(defaults[key])}"
        for keys, *_ in OF_TRAINING
        for key in keys
        if f"{key} = " in text
    )
    args = ""
    if "optim." in text and config.optim.name not in ("sgd", "adam", "adamw"):
        args = f" Arguments of {config.optim.name} itself belong into optim.args."
    raise UsageError(
        f"without effect: {text}. The run would train otherwise than these settings say.{args} Take them out of the "
        f"config, or on the command line: {away}"
    )


def _as_word(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return f"'{list(value)}'" if isinstance(value, (list, tuple)) else text


def _without_effect(config: Config, effects: Sequence[Effect]) -> Iterator[str]:
    values, defaults = flatten(config), flatten(Config())
    for keys, decider, has_effect in effects:
        for key in keys:
            if key == "model.pretrained" and config.init_fit:
                continue  # not all come from there
            if values[key] != defaults[key] and not has_effect(values[decider]):
                yield f"{_setting(key, values[key])} ({decider} is {values[decider]})"


def _late_milestones(config: Config) -> Iterator[str]:
    steps = config.train.steps
    if config.schedule.name == "multi_step" and steps is not None:
        late = [str(milestone) for milestone in config.schedule.milestones if milestone >= steps]
        if late:
            yield f"schedule.milestones {', '.join(late)} (train.steps is {steps})"


def _of_another_callable(config: Config, file: Mapping[str, Any], given: Sequence[Given]) -> Iterator[str]:
    """Lines on arguments in the file whose callable another one on the command line has replaced."""
    on_command_line = {one.key for one in given}
    for name in WITH_ARGUMENTS:
        section = file.get(name)
        if not isinstance(section, Mapping) or f"{name}.name" not in on_command_line:
            continue
        before = section.get("name") or SECTIONS[name]().name
        if before == getattr(config, name).name:
            continue
        for key, nothing in ((f"{name}.args", "'{}'"), (f"{name}.collate", "null")):
            value = section.get(key.partition(".")[2])
            if value and key not in on_command_line:
                these, away = ("are those", "them") if key.endswith("args") else ("is that", "it")
                setting = _setting(key, value)
                yield f"{setting} {these} of the file, for {before!r}: --{key} {nothing} takes {away} away"


def _words(value: Any, key: str) -> Iterator[str]:
    """Lines on words that user code gets as they are."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _words(inner, f"{key}.{name}")
    elif isinstance(value, list):
        for inner in value:
            yield from _words(inner, key)
    elif value in FALSE_IN_YAML_1_1:
        yield f"{key} = {value!r} is a word, which Python takes for true: write false if you mean that"
    elif value == "None":
        yield f"{key} = 'None' is a word: null is Python's None"
    elif isinstance(value, str) and value.startswith(("~/", "$")):
        yield f"{_setting(key, value)} reaches your code as it is: ~ and $NAME are filled in where distloop has a path"


def _setting(key: str, value: Any) -> str:
    return f"{key} = {clean_mapping(value, key)!r}"
