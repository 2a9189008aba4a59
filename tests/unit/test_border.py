"""Batches, data sets, pictures and weights in forms of the user's own: exact, or refused with the way out."""

from __future__ import annotations

import dataclasses
import struct
import zlib
from collections import UserDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import TensorDataset, default_collate
from torchvision.datasets import FakeData

from distloop.config.settings import Data
from distloop.data import DataSource, InMemory, WholeBatches, load_data
from distloop.data.batches import cast, inputs_of, send, targets_of, to_model, with_inputs, with_targets
from distloop.data.datasets import class_names, image_folder
from distloop.data.order import MicroBatch
from distloop.data.pictures import load_picture
from distloop.data.seeded import SeededDataset, no_check
from distloop.data.whole_batches import gives_batches
from distloop.errors import UsageError
from distloop.run.checkpoint import load_weights, weights_of, write_weights
from distloop.run.metrics import check_names
from distloop.tasks import Classification
from distloop.training.averaging import Average
from distloop.training.conversion import convert
from tests.lab.bordering import Net, Plain, State

CPU = torch.device("cpu")


# ---- batches ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Record:
    inputs: Any
    targets: Any
    names: tuple[str, ...] = ("a",)


class Swapped(NamedTuple):
    targets: Any
    inputs: Any


class Tokens(UserDict):
    pass


class Frozen(Mapping):
    """As frozendict and immutabledict are: no copy of it changes."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = dict(values)

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


@dataclasses.dataclass(frozen=True, slots=True)
class Slots:
    inputs: Any
    targets: Any


@dataclasses.dataclass
class Later:
    inputs: Any
    targets: Any
    mask: Any = dataclasses.field(init=False)
    features: Any = dataclasses.field(init=False, repr=False)  # for the model to set

    def __post_init__(self) -> None:
        self.mask = self.inputs > 0


INPUTS, TARGETS = torch.ones(2, 3, dtype=torch.float64), torch.arange(2)
FORMS = [
    (INPUTS, TARGETS),
    [INPUTS, TARGETS],
    {"inputs": INPUTS, "targets": TARGETS},
    Tokens(targets=TARGETS, inputs=INPUTS),
    Record(INPUTS, TARGETS),
    Swapped(TARGETS, INPUTS),
    MappingProxyType({"inputs": INPUTS, "targets": TARGETS}),
    Frozen({"inputs": INPUTS, "targets": TARGETS}),
    Slots(INPUTS, TARGETS),
    Later(INPUTS, TARGETS),
]


@pytest.mark.parametrize("batch", FORMS, ids=lambda batch: type(batch).__name__)
def test_inputs_and_targets_are_found_and_cast_in_each_form_which_stays(batch: Any) -> None:
    other = with_inputs(cast(batch, torch.float32, CPU), 2 * inputs_of(cast(batch, torch.float32)))
    assert type(other) is type(batch)
    assert (inputs_of(other).dtype, inputs_of(other).tolist()) == (torch.float32, (2 * INPUTS).tolist())
    assert torch.equal(targets_of(other), TARGETS)
    assert (inputs_of(batch).dtype, float(inputs_of(batch)[0, 0])) == (torch.float64, 1.0)  # the batch is as it was


@pytest.mark.parametrize("batch", FORMS, ids=lambda batch: type(batch).__name__)
def test_targets_are_replaced_in_each_form_which_stays(batch: Any) -> None:
    other = with_targets(batch, TARGETS + 5)
    assert type(other) is type(batch)
    assert torch.equal(targets_of(other), TARGETS + 5)
    assert torch.equal(inputs_of(other), INPUTS)
    assert torch.equal(targets_of(batch), TARGETS)


def tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    values: Any = value
    if dataclasses.is_dataclass(value):
        values = {field.name: getattr(value, field.name, "") for field in dataclasses.fields(value)}
    values = values.values() if hasattr(values, "keys") else values
    return [tensor for each in values if not isinstance(each, str) for tensor in tensors_in(each)]


@pytest.mark.parametrize("batch", [*FORMS, [Record({"deep": INPUTS}, TARGETS)]], ids=lambda batch: type(batch).__name__)
def test_a_batch_of_any_form_goes_to_the_device(batch: Any) -> None:
    tensors = tensors_in(send(batch, torch.device("meta")))
    assert len(tensors) == len(tensors_in(batch))
    assert all(tensor.is_meta for tensor in tensors)
    assert not any(tensor.is_meta for tensor in tensors_in(batch))


def test_packed_sequences_are_cast_but_for_their_lengths() -> None:
    packed = cast(pack_sequence([torch.ones(3, 2), torch.ones(2, 2)]), torch.float64, CPU)
    assert (packed.data.dtype, packed.batch_sizes.tolist()) == (torch.float64, [2, 2, 1])
    assert cast(pack_sequence([torch.arange(3)]), torch.float64).data.dtype == torch.int64


def test_a_batch_of_another_class_is_moved_by_itself_or_refused() -> None:
    class Moves(Plain):
        def to(self, device: torch.device) -> Moves:
            return Moves(self.inputs.to(device), self.targets.to(device))

    assert send(Moves(INPUTS, TARGETS), torch.device("meta")).inputs.is_meta

    class MovesItself(Plain):
        def to(self, device: torch.device) -> None:
            self.inputs, self.targets = self.inputs.to(device), self.targets.to(device)

    with pytest.raises(UsageError, match=r"MovesItself\.to\(device\) returns None\..* return self"):
        send([MovesItself(INPUTS, TARGETS)], CPU)
    with pytest.raises(UsageError, match=r"holds a Plain, whose tensors \(inputs, targets\).*@dataclasses.dataclass"):
        cast((INPUTS, Plain(INPUTS, TARGETS)), torch.float32, CPU)
    paths = [Path("a"), object(), "text", None, np.ones(2)]
    assert cast(paths, torch.float32, CPU) == paths


def test_a_named_tuple_of_which_one_name_stands_elsewhere_is_refused() -> None:
    class Half(NamedTuple):
        label: Any
        inputs: Any

    assert inputs_of(Half(TARGETS, INPUTS)) is INPUTS
    with pytest.raises(UsageError, match="no targets: it is a Half of label, inputs"):
        targets_of(Half(TARGETS, INPUTS))


@pytest.mark.parametrize(("dtype", "other"), [(torch.float32, torch.complex64), (torch.float64, torch.complex128)])
def test_complex_inputs_are_as_precise_as_real_ones(dtype: torch.dtype, other: torch.dtype) -> None:
    value = torch.tensor([1 + 2j], dtype=torch.complex64)
    assert (cast(value, dtype).dtype, cast(value, dtype).tolist()) == (other, [1 + 2j])


@pytest.mark.parametrize("dtype", [torch.int16, torch.uint16, torch.int32, torch.int64])
def test_images_of_other_integers_are_not_normalised_as_bytes_are_and_refused(dtype: torch.dtype) -> None:
    batch = (torch.full((1, 1, 2, 2), 300).to(dtype), TARGETS[:1])
    with pytest.raises(UsageError, match=rf"{str(dtype)[6:]}, and mean and std.* 65535"):
        to_model(batch, DataSource(None, None, mean=(0.5,), std=(0.2,)), torch.float32)


def test_an_array_that_is_seen_backwards_is_refused_with_the_sample() -> None:
    dataset = SeededDataset([np.arange(3)[::-1]] * 2, 0, default_collate, no_check)
    with pytest.raises(UsageError, match=r"Samples \[0, 1\].*\.copy\(\)"):
        dataset.__getitems__(MicroBatch(0, np.array([0, 1])))


def test_labels_of_all_integer_types_are_checked() -> None:
    task = Classification()
    task.classes = 3
    for dtype in (torch.uint8, torch.int8, torch.uint16, torch.uint32, torch.uint64, torch.int16, torch.int64):
        task.check_targets(torch.tensor([0, 2]).to(dtype))
        with pytest.raises(UsageError, match="Sample 1 has label 3"):
            task.check_targets(torch.tensor([0, 3]).to(dtype))
        outputs = torch.eye(3)[:2]
        sums = task.metrics(outputs, (outputs, torch.tensor([0, 2]).to(dtype)))
        assert int(sums["correct"]) == 1
    with pytest.raises(UsageError, match=r"one integer label per sample; the data gave torch\.complex64"):
        task.check_targets(torch.tensor([0, 1j]))


# ---- data sets -------------------------------------------------------------------------------------------------------


def test_whole_batches_are_asked_of_those_who_say_so_and_know_how() -> None:
    class OwnSample(InMemory):
        def __getitem__(self, index: int) -> Any:
            return super().__getitem__(index)

    class Both(OwnSample):
        def batch(self, indices: Any, random: Any) -> Any:
            return super().batch(indices, random)

    class Mixed(TensorDataset, WholeBatches):
        pass

    rows = torch.zeros(2, 1), torch.zeros(2)
    asked = [InMemory(*rows), OwnSample(*rows), Both(*rows), Mixed(*rows), TensorDataset(*rows)]
    assert [gives_batches(dataset) for dataset in asked] == [True, False, True, False, False]


def test_as_many_targets_as_inputs() -> None:
    with pytest.raises(ValueError, match="2 inputs, but 3 targets"):
        InMemory(torch.zeros(2, 1), torch.zeros(3))


def test_names_of_classes_come_from_the_source_or_from_torchvision() -> None:
    pictures: Any = FakeData(2)
    pictures.classes = ["cat", "dog"]
    assert class_names(DataSource(pictures, pictures)) == ("cat", "dog")
    assert class_names(DataSource(pictures, pictures, classes=["a"])) == ("a",)
    pictures.classes = 2
    assert class_names(DataSource(pictures, pictures)) == ()
    other = TensorDataset(torch.zeros(2))
    other.classes = ["cat", "dog"]  # type: ignore[attr-defined]
    assert class_names(DataSource(other, other)) == ()


def named_data() -> Any:
    data = TensorDataset(torch.zeros(2, 1), torch.zeros(2))
    data.classes = ["cat", "dog"]  # type: ignore[attr-defined]
    return data, data


def test_names_that_are_not_looked_at_are_said_to_be_so(capsys: Any, monkeypatch: Any) -> None:
    load_data(Data(name=f"{__name__}:named_data"))
    said = capsys.readouterr().err
    assert said.startswith("distloop: WARNING: the classes of TensorDataset are not looked at")
    assert "classes=train.classes" in said
    monkeypatch.setenv("LOCAL_RANK", "1")  # rank 0 has said it
    load_data(Data(name=f"{__name__}:named_data"))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"classes": "cat"}, r"classes='cat'.*\(\"cat\", \"dog\"\)"),
        ({"classes": 10}, "classes=10"),
        ({"classes": {"cat": 0}}, "classes="),
        ({"mean": (0.5,)}, "mean and std work together"),
        ({"mean": 0.5, "std": 0.2}, "mean=0.5.*each channel"),
        ({"mean": (123.7,), "std": (58.4,)}, "scaled to"),
        ({"mean": (0.5,), "std": (0.0,)}, "can be 0: it divides"),
    ],
)
def test_a_source_whose_values_mean_something_else_is_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        DataSource(None, None, **fields)
    kept = DataSource(None, None, classes=["a"], mean=np.array([0.5]), std=[0.25])  # type: ignore[arg-type]
    assert (kept.classes, kept.mean, kept.std) == (("a",), (0.5,), (0.25,))


# ---- pictures --------------------------------------------------------------------------------------------------------


def picture_folder(folder: Path, picture: Any, name: str) -> DataSource:
    for half in ("train", "val"):
        (folder / half / "one").mkdir(parents=True)
        picture.save(folder / half / "one" / name)
    return image_folder(str(folder), crop=4, resize=4)


@pytest.mark.parametrize(
    ("values", "dtype", "name"), [(30000, np.uint16, "a.png"), (300, np.int32, "a.tiff"), (0.5, np.float32, "a.tiff")]
)
def test_a_picture_of_more_bits_is_refused_with_its_path_and_values(
    tmp_path: Path, values: float, dtype: Any, name: str
) -> None:
    source = picture_folder(tmp_path, Image.fromarray(np.full((4, 4), values, dtype)), name)
    with pytest.raises(UsageError, match=rf"val/one/{name} has values from {values:g} to {values:g}.*8 bits"):
        source.validation[0]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"])
def test_pictures_of_eight_bits_are_what_they_are_in_any_mode(tmp_path: Path, mode: str) -> None:
    grey = np.arange(16, dtype=np.uint8).reshape(4, 4) * 16
    if mode == "1":
        grey = np.where(grey > 100, 255, 0).astype(np.uint8)
    wide = {"I;16": np.uint16, "I": np.int32, "F": np.float32}
    if mode in wide:
        picture: Any = Image.fromarray(grey.astype(wide[mode]))
    else:
        picture = Image.fromarray(grey).convert(mode if mode != "CMYK" else "RGB").convert(mode)
    tensor, _ = picture_folder(tmp_path, picture, "a.tiff").validation[0]
    assert tensor.dtype == torch.uint8
    assert all(torch.equal(channel, torch.from_numpy(grey)) for channel in tensor)


def png_of_16_bits(channels: int) -> bytes:
    def chunk(kind: bytes, contents: bytes) -> bytes:
        return struct.pack(">I", len(contents)) + kind + contents + struct.pack(">I", zlib.crc32(kind + contents))

    color = {2: 4, 3: 2, 4: 6}[channels]  # grey and alpha; RGB; RGBA
    head = struct.pack(">IIBBBBB", 4, 4, 16, color, 0, 0, 0)
    lines = (b"\0" + b"\x12\x34" * 4 * channels) * 4
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def tiff_of_16_bits() -> bytes:
    pixels = b"\x34\x12" * 48
    tags = [(256, 4, 1, 4), (257, 4, 1, 4), (258, 3, 3, 8), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 14)]
    tags += [(277, 3, 1, 3), (278, 4, 1, 4), (279, 4, 1, len(pixels))]
    table = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    return b"II*\0" + struct.pack("<I3H", 14 + len(pixels), 16, 16, 16) + pixels + table


COLOURS_OF_16_BITS = {
    **{f"{channels}.png": png_of_16_bits(channels) for channels in (2, 3, 4)},
    "a.tiff": tiff_of_16_bits(),
    "a.ppm": b"P6 4 4 65535\n" + b"\x12\x34" * 48,
}


@pytest.mark.parametrize("name", COLOURS_OF_16_BITS)
def test_colours_of_more_bits_are_refused_with_their_path(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(COLOURS_OF_16_BITS[name])
    with pytest.raises(UsageError, match=rf"{name} has more than 8 bits a channel.*Convert the files"):
        load_picture(str(tmp_path / name))


def test_a_picture_of_16_bits_for_all_three_channels_loses_nothing(tmp_path: Path) -> None:
    masks = struct.pack("<3I", 0xF800, 0x07E0, 0x001F)
    head = struct.pack("<IiiHHIIiiII", 40, 2, 2, 1, 16, 3, 8, 0, 0, 0, 0)
    (tmp_path / "a.bmp").write_bytes(b"BM" + struct.pack("<IHHI", 74, 0, 0, 66) + head + masks + b"\xff" * 8)
    assert load_picture(str(tmp_path / "a.bmp")).getpixel((0, 0)) == (255, 255, 255)


# ---- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "other"), [(torch.float32, torch.complex64), (torch.float64, torch.complex128)])
def test_complex_numbers_of_a_model_stay_complex(dtype: torch.dtype, other: torch.dtype) -> None:
    model: Any = convert(Net("complex"), CPU, dtype)
    assert (model.wave.dtype, model.phase.dtype, model.layer.weight.dtype) == (other, other, dtype)
    assert model.wave.tolist() == pytest.approx([1 + 0.5j, 0.2 - 1j, 0.5j], rel=1e-6)
    average: Any = Average(model, 0.9)
    average.update(model)
    with torch.no_grad():
        model.wave.add_(1j)
    average.update(model)
    share = average.module.wave.imag - torch.tensor([0.5, -1, 0.5])
    assert share.tolist() == pytest.approx([9 / 11] * 3, rel=1e-4)  # averaged as real ones: decay 2 / 11


def test_a_file_of_complex_numbers_is_not_loaded_into_real_ones(tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.float64):
        model: Any = convert(Net("complex"), CPU, dtype)
        other: Any = convert(Net("complex"), CPU, dtype)
        write_weights(weights_of(model, lambda _, tensor: tensor.detach().clone()), tmp_path / "model.safetensors")
        with torch.no_grad():
            other.wave.zero_()
        load_weights(tmp_path / "model.safetensors", other)
        assert torch.equal(other.wave, model.wave)
        other.phase = torch.zeros(3, dtype=dtype)
        with pytest.raises(UsageError, match="phase is complex there, and real here"):
            load_weights(tmp_path / "model.safetensors", other)


def test_weights_alone_leave_extra_state_and_extra_state_needs_its_module(tmp_path: Path) -> None:
    module: Any = nn.ModuleDict({"state": State(), "layer": nn.Linear(2, 2)})
    file = tmp_path / "model.safetensors"
    write_weights(weights_of(module, lambda _, tensor: tensor.detach().clone()), file)
    module["state"].seen = 7
    load_weights(file, module)
    assert module["state"].seen == 7
    torch.save({"state._extra_state": {"seen": 3, "history": torch.ones(2)}}, tmp_path / "model.extra.pt")
    torch.save({"other": 1}, tmp_path / "model.pt")  # of somebody else
    load_weights(file, module)
    assert module["state"].seen == 3
    with pytest.raises(UsageError, match=r"state\._extra_state is there only"):
        load_weights(file, nn.ModuleDict({"layer": nn.Linear(2, 2)}))


# ---- names -----------------------------------------------------------------------------------------------------------


def test_names_of_sums_and_metrics_are_texts_that_are_free() -> None:
    check_names("metrics", {"correct": 1, "step": 2})
    check_names("summary", {"loss": 1, "weight": 2, "gradient_norm": 3})
    for method, values, says in (
        ("metrics", {"loss": 1}, r"'loss' is a name.* loss, weight, samples.*'own_loss'"),
        ("summary", {"kind": 1}, r"'kind' is a name.*kind, step, epoch, attempt, time, samples"),
        ("summary", {3: 1}, r"the name 3 is a int"),
        ("metrics", [1], r"must return a dict"),
        ("summary", None, r"must return a dict"),
    ):
        with pytest.raises(UsageError, match=rf"task\.{method}\(\).*{says}"):
            check_names(method, values)  # type: ignore[arg-type]
