"""Read a YAML file and the command line into a checked Config."""

import dataclasses
import functools
import operator
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic
import yaml

from distloop.config.command_line import HELP, Given, read_command_line
from distloop.config.comparison import is_one_of
from distloop.config.help import help_text
from distloop.config.named_secrets import MASK
from distloop.config.notes import notes_on
from distloop.config.own import with_own
from distloop.config.places import KEYS as PLACES
from distloop.config.places import absolute, check_file_name, check_place, remember_start
from distloop.config.references import read_environment, recorded
from distloop.config.secrets import clean_mapping, masked_keys, remember_secrets
from distloop.config.settings import SECTIONS, Config, types_of_settings
from distloop.config.yaml_text import dump_yaml, in_words, parse_yaml
from distloop.errors import UsageError, suggest

COMMAND_LINE = "command line"
# Exactly one setting of each pair has a value. One on the command line replaces the other one in the file.
ALTERNATIVES = (("train.epochs", "train.steps"), ("validate.every_epochs", "validate.every_steps"))


def load_config(
    arguments: list[str],
    quiet: bool = False,
    own: Mapping[str, Any] | None = None,
    unused: Sequence[str] = (),
    notes: list[str] | None = None,
) -> Config:
    """The config of a command line such as ["--config", "configs/digits.yaml", "--optim.lr", "0.1"].

    `own`: the settings that a loop declares; None: any are taken. With --help among the arguments, print what the
    settings are, unless `quiet` since another rank does, and leave with code 0. `unused`: settings and sections of the
    file that the command has no use for, so that their variables need not be set. `notes`: gets lines to print, on
    settings that have no effect or may be meant otherwise. Raises UsageError for any mistake.
    """
    remember_start()
    wants_help = not HELP.isdisjoint(arguments)
    given = read_command_line([word for word in arguments if word not in HELP])
    file = read_environment({key: value for key, value in given if key == "config"}).get("config")
    source = COMMAND_LINE if file is None else recorded(file)
    of_file = _read_file(file) if file is not None else {}
    settings = {key: value for key, value in of_file.items() if key not in unused}
    _choose_alternatives(settings, given)
    for key, value in given:
        _put(settings, key, value, source)
    config = with_own(config_from_mapping(read_environment(settings), source, given), own)
    if wants_help:
        if not quiet:
            print(help_text(config))
        raise SystemExit(0)
    if config.name is None:
        name = Path(config.config).stem if config.config else config.data.name.rpartition(":")[2]
        config = dataclasses.replace(config, name=name)
    check(config)
    remember_secrets(dataclasses.asdict(config))
    if notes is not None:
        notes += notes_on(config, of_file, given)
    return config


def _read_file(text: str) -> dict[str, Any]:
    """The mapping in the file that --config names."""
    check_place("config", text)
    return read_yaml(absolute(text))


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UsageError if the file is missing or has other contents."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        folder = path.resolve().parent
        names = sorted(file.name for file in folder.glob("*.yaml")) if folder.is_dir() else []
        hint = suggest(path.name, names) if names else f" There is no YAML file in {folder}."
        raise UsageError(f"--config {path}: no such file (looked for {path.resolve()!s}).{hint}") from None
    except OSError as error:
        raise UsageError(f"--config {path}: cannot be read: {error}") from None
    try:
        settings = parse_yaml(content)
    except yaml.YAMLError as error:
        raise UsageError(f"{path}{in_words(error)}") from None
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise UsageError(f"{path}: expected settings like 'seed: 0', found a {type(settings).__name__}.")
    return settings


def config_from_mapping(settings: dict[str, Any], source: str, given: Sequence[Given] = ()) -> Config:
    """A Config made of nested mappings. Raises UsageError that names each wrong key, its value, and its source: the
    command line if `given` has the key, else `source`, a file. A section that is one word is its name: `model: mlp` for
    `model: {name: mlp}`."""
    settings = {
        key: {"name": value} if key in SECTIONS and isinstance(value, str) else value
        for key, value in settings.items()
        if not (key in (*SECTIONS, "own") and value is None)
    }
    try:
        return _adapter().validate_python(settings)
    except pydantic.ValidationError as error:
        problems: dict[str, tuple[Any, list[str]]] = {}
        for problem in error.errors():
            if problem["loc"] == ("compile", "bool") and isinstance(problem["input"], Mapping):
                continue  # a mapping was meant
            key, names = _dotted_key(problem["loc"])
            if problem["type"] == "missing" and isinstance(problem["loc"][-1], str):
                key, text = key.rpartition(".")[0], f"{problem['loc'][-1]} is missing"
            elif problem["type"] == "unexpected_keyword_argument":
                text = f"there is no such setting.{_instead(str(problem['loc'][-1]), names, problem['input'])}"
            else:
                text = problem["msg"][0].lower() + problem["msg"][1:]
            problems.setdefault(key, (problem["input"], []))[1].append(text)
        lines = []
        for key, (value, texts) in problems.items():
            here = any(is_one_of(one.key, (key,)) or is_one_of(key, (one.key,)) for one in given)
            has = f"{key} has no value" if value is None and not here else f"{key} = {value!r}"
            lines.append(f"{COMMAND_LINE if here else source}: {has}: {' or '.join(texts)}")
        raise UsageError("\n".join(lines)) from None


def _instead(name: str, names: list[str], value: Any) -> str:
    """What to write for `name`, which is no setting. `names`: those that there are in its place."""
    meant = name.removeprefix("--").replace("-", "_")
    if meant in types_of_settings() and ("." in name or name.startswith("--")):  # as on a command line
        for part in reversed(meant.split(".")):
            value = {part: value}
        text = dump_yaml(value, in_one_line=True).strip()
        return f" In a file: {text[1:-1].strip()}"
    return suggest(name, names) or " --help lists them."


def dump(config: Config) -> str:
    """The config as YAML, for config_from_mapping()."""
    return dump_yaml(recorded(config))


def dump_without_secrets(config: Config) -> str:
    """The config as YAML with *** for each secret. check() refuses a config with *** in it."""
    return dump_yaml(clean_mapping(recorded(config)))


def check(config: Config) -> None:
    """Raise UsageError for settings that do not go together."""
    if masked := masked_keys(recorded(config)):
        settings = (".".join(key.split(".")[:3]) for key in masked)  # data.args.KEY at most
        options = dict.fromkeys(f"--{key.replace('_', '-')}" for key in settings)
        raise UsageError(
            f"In place of {', '.join(masked)} the config has {MASK}, as a run's copy of it does where a value looks "
            f"like a secret. Give what is meant with {', '.join(options)}, or use your own config file."
        )
    for key in PLACES:
        if (place := operator.attrgetter(key)(config)) is not None:
            check_place(key, place)
    if not re.fullmatch(r"[\w.+=@-]+", config.name or "") or set(config.name or ".") <= {"."}:
        raise UsageError(f"name = {config.name!r}: use letters, digits and . _ - + = @, since it names a folder.")
    check_file_name("name", str(config.name))
    for one, other in ALTERNATIVES:
        values = [getattr(getattr(config, section), name) for section, name in (one.split("."), other.split("."))]
        if values.count(None) != 1:
            have = "both are given" if None not in values else "neither is given"
            raise UsageError(f"{one} and {other}: {have}; set exactly one of them.")
    if config.validate.at_end == "only" and config.train.early_stop is not None:
        raise UsageError(
            "train.early_stop decides after validations, and validate.at_end = 'only' leaves out all but the last one. "
            "Take one of them away."
        )
    if config.validate.at_end == "only" and (config.validate.every_steps or config.validate.every_epochs != 1):
        key = "every_steps" if config.validate.every_steps else "every_epochs"
        raise UsageError(
            f"validate.{key} = {getattr(config.validate, key)} and validate.at_end = 'only', which leaves out all "
            f"validations but the last: set one of them. On a command line, --validate.every-epochs 1 takes {key} back."
        )
    if config.precision != "no" and config.dtype == "float64":
        raise UsageError(
            f"precision = {config.precision!r} with dtype = 'float64': mixed precision is for float32 "
            "parameters; set precision: no or dtype: float32."
        )
    if config.model.checkpointing and config.compile:
        raise UsageError(
            "model.checkpointing and compile: torch.compile chooses by itself what it computes again in the backward "
            "pass. Set one of them to false."
        )
    if config.optim.nesterov and config.optim.momentum == 0:
        raise UsageError("optim.nesterov needs optim.momentum above 0.")
    rules = {"checkpoint.best": config.checkpoint.best}
    if config.train.early_stop is not None:
        rules["train.early_stop.metric"] = config.train.early_stop.metric
    for key, rule in rules.items():
        if rule is not None and not re.fullmatch(r"(min|max) [^\s]+", rule):
            raise UsageError(f"{key} = {rule!r}: write 'max METRIC' or 'min METRIC'.")
    if config.schedule.name == "multi_step" and not config.schedule.milestones:
        raise UsageError("schedule.name = 'multi_step' needs schedule.milestones, the steps at which the rate drops.")


@functools.cache
def _adapter() -> pydantic.TypeAdapter[Config]:
    return pydantic.TypeAdapter(Config)


def _dotted_key(location: tuple[int | str, ...]) -> tuple[str, list[str]]:
    """The setting at pydantic's location, without a union's branch, and all settings of its section. ("data",
    "workers", "int") -> "data.workers", ["name", "root", "workers", …]"""
    names: list[str] = []
    owner: Any = Config
    types: dict[str, Any] = {}
    for part in location:
        if owner is not Config and part in (owner.__name__, "bool"):
            continue  # a union's branch
        names.append(str(part))
        if isinstance(part, int):  # a place in a list of sections
            continue
        types = {field.name: field.type for field in dataclasses.fields(owner)}
        if (inner := _section_in(types.get(part))) is None:
            break
        owner = inner
    return ".".join(names), [*types, *(types_of_settings() if owner is Config else ())]


def _section_in(hint: Any) -> Any:
    """The section in a field's type: itself, in a tuple of them, or beside None. None: there is none."""
    hints = (hint, *typing.get_args(hint))
    return next((each for each in hints if isinstance(each, type) and dataclasses.is_dataclass(each)), None)


def _put(settings: dict[str, Any], key: str, value: Any, source: str) -> None:
    """Put the value of a setting on the command line into the settings of the file."""
    *outer, name = key.split(".")
    inner = settings
    for number, part in enumerate(outer):
        below = inner.get(part)
        if number == 0 and part in SECTIONS and isinstance(below, str):
            below = {"name": below}
        if part == "compile" and isinstance(below, bool):
            below = {}
        if not isinstance(below, dict | None):
            place = ".".join(outer[: number + 1])
            raise UsageError(f"{source}: {place} = {below!r}: input should be a mapping, so that --{key} can be set.")
        inner[part] = inner = dict(below or {})
    inner[name] = value


def _choose_alternatives(settings: dict[str, Any], given: list[Given]) -> None:
    """Clear the other setting of a pair if exactly one is set on the command line or, if none is there, in the file."""
    for pair in ALTERNATIVES:
        section = pair[0].split(".")[0]
        inner = settings.get(section) or {}
        if not isinstance(inner, dict):
            continue
        names = [key.split(".")[1] for key in pair]
        chosen = [name for name in names if f"{section}.{name}" in dict(given)]
        chosen = chosen or [name for name in names if inner.get(name) is not None]
        if len(chosen) == 1:
            settings[section] = {**inner, **{name: None for name in names if name not in chosen}}
