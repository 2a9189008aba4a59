"""Read a YAML file and the command line into a checked Config."""

import contextlib
import dataclasses
import functools
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pydantic
import tyro
import yaml

from distloop.config.named_secrets import MASK
from distloop.config.own import with_own
from distloop.config.secrets import clean_mapping, masked_keys, remember_secrets
from distloop.config.settings import Config
from distloop.config.yaml_text import dump_yaml, parse_yaml
from distloop.errors import UsageError, suggest

SECTIONS = [field.name for field in dataclasses.fields(Config) if dataclasses.is_dataclass(field.default)]
# Exactly one setting of each pair has a value. One on the command line replaces the other one in the file.
ALTERNATIVES = (("train.epochs", "train.steps"), ("validate.every_epochs", "validate.every_steps"))


def load_config(arguments: list[str], quiet: bool = False, own: Mapping[str, Any] | None = None) -> Config:
    """The config of a command line such as ["--config", "configs/digits.yaml", "--optim.lr", "0.1"].

    `quiet`: print neither help nor errors of the command line, since another rank prints them. `own`: the settings that
    a loop declares; None: any are taken. Raises UsageError for a mistake in the file, SystemExit (0 for --help, 2 for
    an error) for one on the command line.
    """
    arguments = [_expand_shorthand(argument) for argument in arguments]
    path = _find_config_path(arguments)
    settings: dict[str, Any] = read_yaml(Path(path)) if path else {}
    arguments = _take_single_arguments(arguments, settings)
    arguments = ["None" if argument == "null" else argument for argument in arguments]  # null is YAML's word
    _choose_alternatives(settings, arguments)
    base = with_own(config_from_mapping(settings, path or "command line"), own)  # for --help
    about = "Train a model. Settings come from --config FILE and, over it, from the command line."
    with contextlib.ExitStack() as redirections:
        if quiet:  # tyro's own option for this leaves some messages
            for redirect in (contextlib.redirect_stdout, contextlib.redirect_stderr):
                redirections.enter_context(redirect(io.StringIO()))
        config = tyro.cli(Config, default=base, args=arguments, prog="distloop train", description=about)
    config = with_own(config_from_mapping(dataclasses.asdict(config), "command line"), own)
    if config.name is None:
        name = Path(config.config).stem if config.config else config.data.name.rpartition(":")[2]
        config = dataclasses.replace(config, name=name)
    check(config)
    remember_secrets(dataclasses.asdict(config))
    return config


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UsageError if the file is missing or has other contents."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        folder = path.resolve().parent
        names = sorted(file.name for file in folder.glob("*.yaml")) if folder.is_dir() else []
        hint = suggest(path.name, names) if names else f" There is no YAML file in {folder}."
        raise UsageError(f"--config {path}: no such file (looked for {path.resolve()}).{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path}: cannot be read: {error}") from None
    try:
        settings = parse_yaml(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not valid YAML: {error}") from None
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise UsageError(f"{path}: expected settings like 'seed: 0', found a {type(settings).__name__}.")
    return settings


def config_from_mapping(settings: dict[str, Any], source: str) -> Config:
    """A Config made of nested mappings. Raises UsageError that names each wrong key of `source`, a file, and its value.
    A section that is one word is its name: `model: mlp` for `model: {name: mlp}`."""
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
            key, names = _dotted_key(problem["loc"])
            if problem["type"] == "unexpected_keyword_argument":
                text = f"there is no such setting.{suggest(str(problem['loc'][-1]), names)}"
            else:
                text = problem["msg"][0].lower() + problem["msg"][1:]
            problems.setdefault(key, (problem["input"], []))[1].append(text)
        lines = [f"{key} = {value!r}: {' or '.join(texts)}" for key, (value, texts) in problems.items()]
        raise UsageError("\n".join(f"{source}: {line}" for line in lines)) from None


def dump(config: Config) -> str:
    """The config as YAML, for config_from_mapping()."""
    return dump_yaml(_adapter().dump_python(config, mode="json"))


def dump_without_secrets(config: Config) -> str:
    """The config as YAML with *** for each secret. check() refuses a config with *** in it."""
    return dump_yaml(clean_mapping(_adapter().dump_python(config, mode="json")))


def check(config: Config) -> None:
    """Raise UsageError for settings that do not go together."""
    masked = dict.fromkeys(masked_keys(dataclasses.asdict(config)))
    if masked:
        options = dict.fromkeys("--" + ".".join(key.split(".")[:3]) for key in masked)  # --data.args.KEY at most
        raise UsageError(
            f"In place of {', '.join(masked)} the config has {MASK}, as a run's copy of it does where a value looks "
            f"like a secret. Give what is meant with {', '.join(options)}, or use your own config file."
        )
    if not re.fullmatch(r"[\w.+=@-]+", config.name or "") or set(config.name or ".") <= {"."}:
        raise UsageError(f"name = {config.name!r}: use letters, digits and . _ - + = @, since it names a folder.")
    for one, other in ALTERNATIVES:
        values = [getattr(getattr(config, section), name) for section, name in (one.split("."), other.split("."))]
        if values.count(None) != 1:
            have = "both are given" if None not in values else "neither is given"
            raise UsageError(f"{one} and {other}: {have}; set exactly one of them.")
    if config.precision != "no" and config.dtype == "float64":
        raise UsageError(
            f"precision = {config.precision!r} with dtype = 'float64': mixed precision is for float32 "
            "parameters; set precision: no or dtype: float32."
        )
    if config.optim.nesterov and config.optim.momentum == 0:
        raise UsageError("optim.nesterov needs optim.momentum above 0.")
    if config.checkpoint.best and not re.fullmatch(r"(min|max) [^\s]+", config.checkpoint.best):
        raise UsageError(f"checkpoint.best = {config.checkpoint.best!r}: write 'max METRIC' or 'min METRIC'.")
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
    fields: dict[str, Any] = {}
    for part in location:
        names.append(str(part))
        fields = {field.name: field.default for field in dataclasses.fields(owner)}
        if not dataclasses.is_dataclass(fields.get(str(part))):
            break
        owner = fields[str(part)]
    return ".".join(names), list(fields)


def _expand_shorthand(argument: str) -> str:
    """--model mlp -> --model.name mlp."""
    flag, equals, value = argument.partition("=")
    has_name = flag.startswith("--") and flag[2:] in ("data", "model", "task", "optim", "schedule")
    return f"{flag}.name{equals}{value}" if has_name else argument


def _find_config_path(arguments: list[str]) -> str | None:
    for position, argument in reversed(list(enumerate(arguments))):  # the last --config wins, as with any flag
        flag, equals, value = argument.partition("=")
        if flag == "--config":
            if not equals and position + 1 == len(arguments):
                raise UsageError("--config needs a file, as in --config configs/digits.yaml")
            return value if equals else arguments[position + 1]
    return None


def _take_single_arguments(arguments: list[str], settings: dict[str, Any]) -> list[str]:
    """Move each --SECTION.args.KEY VALUE and --own.KEY VALUE from the arguments to the settings; return the others."""
    rest: list[str] = []
    queue = iter(arguments)
    for argument in queue:
        match = re.fullmatch(r"--(?:(\w+)\.args|own)\.([\w-]+)(?:=(.*))?", argument, re.DOTALL)
        if match is None:
            rest.append(argument)
            continue
        section, key, value = match.groups()
        if value is None and (value := next(queue, None)) is None:
            raise UsageError(f"{argument} needs a value.")
        inner = settings.get(section or "own") or {}
        inner = {"name": inner} if section and isinstance(inner, str) else inner
        earlier = inner if section is None else inner.get("args") or {} if isinstance(inner, dict) else None
        if not isinstance(earlier, dict):
            place = f"{section}.args" if section else "own"
            raise UsageError(f"{place}: the file has something else than a mapping there, so {argument} cannot be set.")
        try:
            changed = {**earlier, key.replace("-", "_"): parse_yaml(value)}
        except yaml.YAMLError:
            raise UsageError(f"{argument}: {value!r} is not valid YAML.") from None
        settings[section or "own"] = {**inner, "args": changed} if section else changed
    return rest


def _choose_alternatives(settings: dict[str, Any], arguments: list[str]) -> None:
    """Clear the other setting of a pair if exactly one is set on the command line or, if none is there, in the file."""
    flags = {argument.partition("=")[0].removeprefix("--").replace("-", "_") for argument in arguments}
    for pair in ALTERNATIVES:
        section = pair[0].split(".")[0]
        inner = settings.get(section) or {}
        if not isinstance(inner, dict):
            continue
        names = [key.split(".")[1] for key in pair]
        chosen = [name for name in names if f"{section}.{name}" in flags]
        chosen = chosen or [name for name in names if inner.get(name) is not None]
        if len(chosen) == 1:
            settings[section] = {**inner, **{name: None for name in names if name not in chosen}}
