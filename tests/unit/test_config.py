"""From YAML files and the command line to a checked config."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distloop.config.comparison import FIXED_KEYS, FREE_KEYS, differences, dotted, flatten, is_one_of
from distloop.config.load import check, config_from_mapping, dump, load_config, read_yaml
from distloop.config.settings import Batch, Config, Data, EarlyStop, Model, Optim, Schedule, Task, Train
from distloop.config.yaml_text import parse_yaml
from distloop.errors import UsageError
from tests.tools.ranks import REPOSITORY

RECIPES = sorted((REPOSITORY / "configs").glob("*.yaml"))


def load(folder: Path, text: str, *arguments: str) -> Config:
    """The config of a file with this text and a command line."""
    path = folder / "recipe.yaml"
    path.write_text(text)
    return load_config(["--config", str(path), *arguments])


def refusal(folder: Path, text: str, *arguments: str) -> str:
    with pytest.raises(UsageError) as error:
        load(folder, text, *arguments)
    return str(error.value)


# ---- files and the command line --------------------------------------------------------------------------------


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    config = load(tmp_path, "seed: 3\noptim: {name: sgd, lr: 0.5, momentum: 0.8}\n", "--optim.lr", "0.25")
    assert config.seed == 3
    assert config.optim == Optim(name="sgd", lr=0.25, momentum=0.8)
    assert config.batch == Batch()


def test_without_a_file_the_defaults_hold() -> None:
    assert load_config([]) == Config(name="digits")


def test_the_run_is_named_after_the_file_unless_it_is_given_a_name(tmp_path: Path) -> None:
    assert load(tmp_path, "seed: 1").name == "recipe"
    assert load(tmp_path, "name: theirs").name == "theirs"
    assert load(tmp_path, "name: theirs", "--name", "mine").name == "mine"


def test_without_a_file_or_a_name_the_run_is_named_after_the_callable_of_its_data() -> None:
    assert load_config(["--data", "tests.lab.user_code:digits_head"]).name == "digits_head"


def test_of_several_files_the_last_one_counts(tmp_path: Path) -> None:
    for seed in (1, 2):
        (tmp_path / f"{seed}.yaml").write_text(f"seed: {seed}")
    config = load_config(["--config", str(tmp_path / "1.yaml"), f"--config={tmp_path / '2.yaml'}"])
    assert config == Config(name="2", seed=2, config=str(tmp_path / "2.yaml"))


@pytest.mark.parametrize("form", [["--seed", "5"], ["--seed=5"]])
def test_flags_take_their_value_in_either_form(tmp_path: Path, form: list[str]) -> None:
    assert load(tmp_path, "seed: 1", *form).seed == 5


def test_underscores_and_hyphens_mean_the_same_flag() -> None:
    assert load_config(["--batch.global-size", "32"]) == load_config(["--batch.global_size", "32"])


def test_an_empty_file_and_an_empty_section_are_the_defaults(tmp_path: Path) -> None:
    assert load(tmp_path, "").optim == Optim()
    assert load(tmp_path, "optim:\nmodel: mlp\n").optim == Optim()


def test_no_and_powers_of_ten_are_read_as_meant(tmp_path: Path) -> None:
    config = load(tmp_path, "precision: no\ncompile: false\noptim: {lr: 1e-3, eps: 1E-6, weight_decay: 5e-4}\n")
    assert config.precision == "no"
    assert config.compile is False
    assert (config.optim.lr, config.optim.eps, config.optim.weight_decay) == (0.001, 1e-6, 5e-4)
    assert load(tmp_path, "precision: bf16", "--precision", "no").precision == "no"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),
        ("on", "on"),
        ("Yes", "Yes"),
        ("true", True),
        ("False", False),
        ("1e-3", 1e-3),
        ("+1.5E3", 1500.0),
        (".5", 0.5),
        ("2.", 2.0),
        ("-.inf", float("-inf")),
        ("12", 12),
        ("'1e3'", "1e3"),
        ("1.2.3", "1.2.3"),
        ("2024-01-01", "2024-01-01"),
        ("e3", "e3"),
        (".", "."),
        ("~", None),
        ("[1e1, {a: off}]", [10.0, {"a": "off"}]),
    ],
)
def test_yaml_scalars_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    found = parse_yaml(text)
    assert found == value
    assert type(found) is type(value)


def test_yaml_builds_plain_values_only() -> None:
    with pytest.raises(Exception, match="python/object"):
        parse_yaml("!!python/object/apply:os.getcwd []")


def test_a_section_given_as_one_word_is_its_name(tmp_path: Path) -> None:
    config = load(tmp_path, "data: diabetes\nmodel: mlp\ntask: regression\noptim: sgd\nschedule: constant\n")
    assert config.data == Data("diabetes")
    assert config.model == Model("mlp")
    assert config.task == Task("regression")
    assert config.optim == Optim("sgd")
    assert config.schedule == Schedule("constant")


@pytest.mark.parametrize("form", [["--model", "mlp"], ["--model=mlp"], ["--model.name", "mlp"]])
def test_the_command_line_takes_a_section_as_one_word(tmp_path: Path, form: list[str]) -> None:
    config = load(tmp_path, "model: {name: cnn, args: {hidden: 8}}", *form, "--optim", "sgd")
    assert config.model == Model("mlp", args={"hidden": 8})
    assert config.optim.name == "sgd"


def test_a_value_that_ends_in_a_sections_name_is_no_section() -> None:
    config = load_config(["--name", "mydata", "--data.root", "mymodel"])
    assert (config.name, config.data.root) == ("mydata", "mymodel")


def test_single_arguments_join_those_of_the_file_and_whole_mappings_replace_them(tmp_path: Path) -> None:
    text = "model: {name: mlp, args: {hidden: 8, layers: 3}}"
    assert load(tmp_path, text, "--model.args.hidden", "64").model.args == {"hidden": 64, "layers": 3}
    assert load(tmp_path, text, "--model.args.hidden=64").model.args == {"hidden": 64, "layers": 3}
    assert load(tmp_path, text, "--model.args", "{hidden: 64}").model.args == {"hidden": 64}
    assert load(tmp_path, "model: mlp", "--model.args.hidden", "64").model == Model("mlp", args={"hidden": 64})


def test_single_arguments_are_yaml_values() -> None:
    config = load_config(["--model.args.num-classes", "7", "--task.args.label_smoothing", "1e-1"])
    assert config.model.args == {"num_classes": 7}
    assert config.task.args == {"label_smoothing": 0.1}


@pytest.mark.parametrize("flag", ["--model.args.hidden", "--config"])
def test_a_flag_at_the_end_without_its_value_is_refused(flag: str) -> None:
    with pytest.raises(UsageError, match=f"{flag} needs a"):
        load_config([flag])


def test_a_single_argument_that_is_not_yaml_is_refused_with_its_flag() -> None:
    with pytest.raises(UsageError, match=r"command line: model\.args\.hidden = '\{': it is not valid YAML"):
        load_config(["--model.args.hidden", "{"])


def test_a_single_argument_does_not_join_a_list_in_the_file(tmp_path: Path) -> None:
    message = refusal(tmp_path, "model: {args: [1]}", "--model.args.hidden", "64")
    expected = "model.args = [1]: input should be a mapping, so that --model.args.hidden can be set."
    assert message == f"{tmp_path / 'recipe.yaml'}: {expected}"


def test_one_of_a_pair_on_the_command_line_replaces_the_other_in_the_file(tmp_path: Path) -> None:
    assert load(tmp_path, "train: {epochs: 5}", "--train.steps", "9").train == Train(epochs=None, steps=9)
    assert load(tmp_path, "train: {steps: 5}", "--train.epochs", "9").train == Train(epochs=9, steps=None)
    validate = load(tmp_path, "validate: {every_steps: 7}", "--validate.every-epochs=2").validate
    assert (validate.every_epochs, validate.every_steps) == (2, None)


def test_one_of_a_pair_in_the_file_replaces_the_others_default(tmp_path: Path) -> None:
    assert load(tmp_path, "train: {steps: 5}").train == Train(epochs=None, steps=5)
    assert load(tmp_path, "validate: {every_steps: 7}").validate.every_epochs is None


# ---- mistakes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sead: 1", ["sead = 1", "no such setting", "Did you mean 'seed'?"]),
        ("optim: {learning: 1}", ["optim.learning = 1", "no such setting", "Known: args, betas, clip_norm"]),
        ("optim: {lrr: 0.5}", ["optim.lrr = 0.5", "no such setting", "Did you mean 'lr'?"]),
        ("optim: {lr: fast}", ["optim.lr = 'fast'", "valid number"]),
        ("optim: {lr: 0}", ["optim.lr = 0", "greater than 0"]),
        ("optim: {momentum: 1.0}", ["optim.momentum = 1.0", "less than 1"]),
        ("optim: {betas: [0.9]}", ["optim.betas"]),
        ("schedule: {name: lion}", ["schedule.name = 'lion'", "'warmup_stable_decay' or module:callable"]),
        (
            "optim: {groups: [{match: a}, {match: b, lr: 1}]}",
            ["optim.groups.1.lr = 1", "Known: freeze, lr_scale, match"],
        ),
        ("optim: [1]", ["optim = [1]", "dictionary"]),
        ("optim: 3", ["optim = 3", "dictionary"]),
        ("data: {workers: many}", ["data.workers = 'many'", "integer", "'auto'"]),
        ("data: {workers: -1}", ["data.workers = -1", "greater than or equal to 0"]),
        ("model: {args: 5}", ["model.args = 5", "dictionary"]),
        ("batch: {global_size: 1.5}", ["batch.global_size = 1.5", "integer"]),
        ("batch: {remainder: keep}", ["batch.remainder = 'keep'", "'drop' or 'train'"]),
        ("train: {epochs: 0}", ["train.epochs = 0", "greater than or equal to 1"]),
        ("precision: fp8", ["precision = 'fp8'", "'no', 'bf16' or 'fp16'"]),
        ("name: 5", ["name = 5", "valid string"]),
        ("1: 2", ["1 = ", "keys should be strings"]),
    ],
)
def test_a_wrong_setting_is_named_with_its_file_its_value_and_what_it_takes(
    tmp_path: Path, text: str, said: list[str]
) -> None:
    message = refusal(tmp_path, text)
    for part in [str(tmp_path / "recipe.yaml"), *said]:
        assert part in message
    assert len(message.splitlines()) == 1


def test_all_wrong_settings_are_told_at_once(tmp_path: Path) -> None:
    message = refusal(tmp_path, "seed: -1\noptim: {lr: fast}\nsead: 1\n")
    assert len(message.splitlines()) == 3
    for key in ("seed = -1", "optim.lr = 'fast'", "sead = 1"):
        assert key in message


def test_a_value_that_only_the_command_line_has_is_checked_as_well() -> None:
    with pytest.raises(UsageError, match=r"^command line: optim\.lr = -1: input should be greater than 0"):
        load_config(["--optim.lr", "-1"])


def test_a_missing_file_is_told_with_where_it_was_looked_for_and_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "digits.yaml").write_text("seed: 1")
    with pytest.raises(UsageError) as error:
        load_config(["--config", str(tmp_path / "digit.yaml")])
    assert str(tmp_path / "digit.yaml") in str(error.value)
    assert "no such file" in str(error.value)
    assert "Did you mean 'digits.yaml'?" in str(error.value)
    with pytest.raises(UsageError, match=r"Known: digits\.yaml"):
        load_config([f"--config={tmp_path / 'something_else'}"])


def test_a_missing_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=rf"There is no YAML file in {tmp_path}/nowhere"):
        load_config(["--config", str(tmp_path / "nowhere" / "digits.yaml")])


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read_yaml(tmp_path)
    (tmp_path / "bytes.yaml").write_bytes(b"seed: \xff\xfe")
    with pytest.raises(UsageError, match="cannot be read"):
        read_yaml(tmp_path / "bytes.yaml")


def test_invalid_yaml_is_told_with_its_line(tmp_path: Path) -> None:
    message = refusal(tmp_path, "seed: 1\noptim: {lr: 0.1\n")
    assert f"{tmp_path / 'recipe.yaml'} is not valid YAML" in message
    assert re.search(r"line \d", message)


@pytest.mark.parametrize(("text", "kind"), [("- seed: 1\n", "list"), ("digits\n", "str"), ("3\n", "int")])
def test_yaml_that_is_not_a_mapping_is_refused(tmp_path: Path, text: str, kind: str) -> None:
    message = refusal(tmp_path, text)
    assert f"found a {kind}" in message
    assert "seed: 0" in message


@pytest.mark.parametrize(("one", "other"), [("train.epochs", "train.steps")])
def test_both_of_a_pair_in_one_place_are_refused(tmp_path: Path, one: str, other: str) -> None:
    said = f"{one} and {other}: both are given; set exactly one"
    assert said in refusal(tmp_path, "train: {epochs: 1, steps: 2}")
    assert said in refusal(tmp_path, "seed: 1", "--train.steps", "3", "--train.epochs", "1")
    assert "validate.every_epochs and validate.every_steps: both" in refusal(
        tmp_path, "validate: {every_steps: 1, every_epochs: 2}"
    )


@pytest.mark.parametrize(("key", "value"), [("every_steps", 100), ("every_epochs", 2)])
def test_validating_at_the_end_only_and_every_so_often_is_refused(tmp_path: Path, key: str, value: int) -> None:
    message = refusal(tmp_path, f"validate: {{at_end: only, {key}: {value}}}")
    assert f"validate.{key} = {value} and validate.at_end = 'only'" in message
    assert "--validate.every-epochs 1 takes" in message
    file = f"validate: {{{key}: {value}}}"
    validate = load(tmp_path, file, "--validate.at-end", "only", "--validate.every-epochs", "1").validate
    assert (validate.at_end, validate.every_steps, validate.at_start) == ("only", None, False)


def test_neither_of_a_pair_is_refused(tmp_path: Path) -> None:
    assert "neither is given" in refusal(tmp_path, "train: {epochs: null}")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_of_float64_is_refused_with_both_ways_out(tmp_path: Path, precision: str) -> None:
    message = refusal(tmp_path, f"precision: {precision}\ndtype: float64\n")
    for part in (f"precision = '{precision}'", "dtype = 'float64'", "precision: no", "dtype: float32"):
        assert part in message
    assert load(tmp_path, "dtype: float64").dtype == "float64"


@pytest.mark.parametrize("name", ["a/b", "..", ".", "a b", "", "a\n", "*"])
def test_a_name_that_cannot_name_a_folder_is_refused(name: str) -> None:
    with pytest.raises(UsageError) as error:
        check(Config(name=name))
    assert f"name = {name!r}" in str(error.value)


@pytest.mark.parametrize("name", ["a", "run-3", "lr=0.1", "a.b", "größer", "x@y+z"])
def test_a_name_that_can_name_a_folder_is_taken(name: str) -> None:
    check(Config(name=name))


def test_multi_step_without_milestones_is_refused(tmp_path: Path) -> None:
    assert "schedule.milestones" in refusal(tmp_path, "schedule: multi_step")
    assert load(tmp_path, "schedule: {name: multi_step, milestones: [3, 5]}").schedule.milestones == (3, 5)


# ---- dump ------------------------------------------------------------------------------------------------------

# Without digits: strings that look like numbers are the test below.
texts = st.text("abcxyz_ -:#'\"{}[],&*!?äö\n", max_size=12)
plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts
arguments = st.dictionaries(
    texts, st.recursive(plain, lambda inner: st.lists(inner) | st.dictionaries(texts, inner), max_leaves=5)
)


@settings(derandomize=True, deadline=None)
@given(arguments, st.floats(1e-12, 1e12), st.floats(0, 0.999), st.lists(st.integers(1, 10**9)), texts)
def test_a_dumped_config_is_read_back_equal(
    args: dict[str, Any], lr: float, beta: float, milestones: list[int], root: str
) -> None:
    config = dataclasses.replace(
        Config(name="run"),
        data=Data(root=root, args=args),
        model=Model(args=args),
        optim=Optim(lr=lr, betas=(beta, 0.5)),
        schedule=Schedule(milestones=tuple(milestones)),
    )
    back = config_from_mapping(parse_yaml(dump(config)), "config.yaml")
    assert back == config
    assert differences(config, back) == {}


@pytest.mark.parametrize(
    "value",
    ["no", "yes", "on", "true", "null", "~", "12", "1.5", "0x1f", "", "1e-3", "1e5", "1.5e3", "3e8", "2024-01-01"],
)
def test_strings_that_look_like_something_else_stay_strings(value: str) -> None:
    config = Config(name="run", runs_dir=value, model=Model(args={"key": value}))
    assert config_from_mapping(parse_yaml(dump(config)), "config.yaml") == config


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_dumped_recipe_is_read_back_equal(recipe: Path) -> None:
    config = load_config(["--config", str(recipe)])
    assert config_from_mapping(parse_yaml(dump(config)), "config.yaml") == config


# ---- the recipes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_and_is_named_after_its_file(recipe: Path) -> None:
    config = load_config(["--config", str(recipe)])
    assert config.name == recipe.stem
    assert config.config == str(recipe)
    assert config != dataclasses.replace(Config(), name=config.name, config=config.config)


def test_the_digits_recipe_is_the_defaults_spelled_out() -> None:
    changed = differences(Config(), load_config(["--config", str(REPOSITORY / "configs" / "digits.yaml")]))
    # The arguments are what the functions have as their own defaults.
    assert {key: new for key, (_, new) in changed.items()} == {"data.args": {"shift": 1}, "model.args": {"width": 32}}


def test_the_digits_recipes_arguments_are_the_functions_own_defaults() -> None:
    import inspect

    from distloop.data.datasets import digits
    from distloop.training.models import cnn

    assert inspect.signature(digits).parameters["shift"].default == 1
    assert inspect.signature(cnn).parameters["width"].default == 32


# ---- help ------------------------------------------------------------------------------------------------------


def test_help_shows_every_field_with_a_text(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as end:
        load_config(["--help"])
    assert end.value.code == 0
    printed = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    lines = [line.strip("│ ") for line in printed.splitlines() if not line.startswith(("╭", "╰"))]
    said: dict[str, str] = {}
    flag = ""
    for line in lines:
        if line.startswith("-"):
            flag = line.split()[0].rstrip(",").lstrip("-").replace("-", "_")
            said[flag] = ""
        elif flag:
            said[flag] += f" {line}"
    for key in flatten(Config()):
        assert key in said, f"--help does not show {key}"
        help_text = re.sub(r"\(default: [^)]*\)\s*$", "", said[key]).strip()
        assert len(help_text) >= 9, f"--help says {help_text!r} of {key}"


# ---- what may change between two starts ------------------------------------------------------------------------

FREE = {
    "config",
    "name",
    "runs_dir",
    "device",
    "compile",
    "resume",
    "expect_world",
    "data.root",
    "data.workers",
    "batch.micro_size",
    "validate.every_epochs",
    "validate.every_steps",
    "validate.at_start",
    "validate.at_end",
    "validate.batch_size",
    "checkpoint.every_steps",
    "checkpoint.keep_last",
    "checkpoint.keep_every_steps",
    "checkpoint.best",
    "checkpoint.on_failure",
    "stop.after_minutes",
    "stop.reserve_seconds",
    "stop.max_requeues",
    "train.on_nonfinite",
    "data.on_bad_sample",
    "train.detect_anomaly",
    "data.timeout_seconds",
    "log.every_steps",
    "tracking.wandb",
    "tracking.project",
    "tracking.entity",
    "tracking.group",
    "tracking.tags",
    "tracking.notes",
    "tracking.start_seconds",
    "tracking.end_seconds",
    "tracking.report",
    "ddp.join_seconds",
    "ddp.timeout_seconds",
    "ddp.find_unused_parameters",
    "ddp.gradient_as_bucket_view",
    "ddp.bucket_cap_mb",
    "model.channels_last",
    "model.checkpointing",
    "optim.show",
}


def changed_in(key: str) -> Config:
    """The defaults with another value at `key`."""
    section, _, name = key.rpartition(".")
    owner: Any = getattr(Config(), section) if section else Config()
    changed = dataclasses.replace(owner, **{name: (flatten(Config())[key], "other")})
    return dataclasses.replace(Config(), **{section: changed}) if section else changed


@pytest.mark.parametrize("key", flatten(Config()))
def test_only_what_does_not_change_the_training_may_change_between_two_starts(key: str) -> None:
    found = differences(Config(), changed_in(key))
    assert set(found) == (set() if key in FREE else {key})
    if found:
        default = flatten(Config())[key]
        assert found[key] == (default, (default, "other"))


def test_the_lists_of_keys_name_what_there_is() -> None:
    known = {*flatten(Config()), *(field.name for field in dataclasses.fields(Config))}
    assert set(FREE_KEYS) | set(FIXED_KEYS) <= known
    assert not any(is_one_of(key, FREE_KEYS) and is_one_of(key, FIXED_KEYS) for key in flatten(Config()))


def test_nested_settings_have_dotted_keys() -> None:
    settings: dict[str, Any] = {
        "seed": 0,
        "model": {"name": "mlp", "args": {"sizes": {"hidden": 64}, 3: [{"a": 1}], "none": {}}},
    }
    inner = {"model.args.sizes.hidden": 64, "model.args.3": [{"a": 1}], "model.args.none": {}}
    assert dotted(settings) == {"seed": 0, "model.name": "mlp", **inner}
    assert dotted(settings, levels=2) == {"seed": 0, "model.name": "mlp", "model.args": settings["model"]["args"]}


def test_a_key_is_in_a_section_and_not_in_one_whose_name_it_begins_with() -> None:
    assert is_one_of("model.args", ("model",))
    assert is_one_of("model", ("model",))
    assert not is_one_of("models.args", ("model",))
    assert not is_one_of("model", ("model.args",))


def test_null_on_the_command_line_is_what_it_is_in_a_file() -> None:
    config = load_config(["--optim.clip-norm", "null", "--model.args.hidden", "null", "--data.args", "{root: null}"])
    assert (config.optim.clip_norm, config.model.args, config.data.args) == (None, {"hidden": None}, {"root": None})


def test_an_early_stop_is_set_whole_or_by_its_keys(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("train: {early_stop: {patience: 5, metric: min loss}}")
    words = ["--config", str(file)]
    assert load_config(words).train.early_stop == EarlyStop(5, "min loss", 0.0)
    assert load_config([*words, "--train.early-stop.patience", "9"]).train.early_stop == EarlyStop(9, "min loss", 0.0)
    assert load_config([*words, "--train.early-stop", "{patience: 2}"]).train.early_stop == EarlyStop(2, None, 0.0)
    assert load_config([*words, "--train.early-stop", "null"]).train.early_stop is None


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("5", "train.early_stop = 5: input should be a dictionary"),
        ("{patience: 0}", "train.early_stop.patience = 0: input should be greater than or equal to 1"),
        ("{metric: min loss}", "train.early_stop = {'metric': 'min loss'}: patience is missing"),
        ("{patience: 1, metric: loss}", "train.early_stop.metric = 'loss': write 'max METRIC' or 'min METRIC'"),
        ("{patience: 1, min_delta: -1}", "train.early_stop.min_delta = -1: input should be greater than or equal to 0"),
        ("{patience: 1, delta: 1}", "train.early_stop.delta = 1: there is no such setting. Did you mean 'min_delta'?"),
    ],
)
def test_a_mistake_in_an_early_stop_is_named(tmp_path: Path, setting: str, says: str) -> None:
    assert says in refusal(tmp_path, f"train: {{early_stop: {setting}}}")
