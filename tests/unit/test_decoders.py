"""data.args.decoder of image_folder: torchvision decodes JPEGs to PIL's pixels, and refuses what PIL refuses."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from distloop.config.settings import Data
from distloop.data import resizing
from distloop.data.datasets import load_data
from distloop.data.pictures import decode, load_picture
from distloop.data.seeding import seed_sample
from distloop.errors import UsageError
from tests.tools.image_files import write_pictures
from tests.tools.ranks import clean_environment


def picture(mode: str = "RGB") -> Image.Image:
    """Smooth, with noise."""
    generator = np.random.default_rng(0)
    small = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    smooth = np.asarray(small.resize((90, 61), Image.Resampling.BICUBIC)).astype(int)
    noisy = (smooth + generator.integers(-9, 10, smooth.shape)).clip(0, 255).astype(np.uint8)
    return Image.fromarray(noisy).convert(mode)


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees, which PIL's convert() does not do
    return exif


@pytest.mark.parametrize(
    ("mode", "name", "options"),
    [
        ("RGB", "a.jpg", {}),
        ("RGB", "a.jpg", {"subsampling": 0, "quality": 95}),
        ("RGB", "a.jpg", {"progressive": True, "quality": 20}),
        ("RGB", "a.jpg", {"exif": turned()}),
        ("L", "a.jpg", {}),
        ("CMYK", "a.jpg", {}),
        ("RGB", "a.png", {}),
        ("RGBA", "a.png", {}),
        ("P", "a.gif", {}),
        ("RGB", "really-a-png.jpg", {"format": "PNG"}),
    ],
)
def test_pixels_are_those_of_pil(tmp_path: Path, mode: str, name: str, options: dict[str, Any]) -> None:
    file = tmp_path / name
    picture(mode).save(file, **options)
    found = decode(str(file))
    assert (found.dtype, found.shape) == (torch.uint8, (3, 61, 90))
    assert torch.equal(found, v2.functional.pil_to_tensor(load_picture(str(file))))


def test_without_torchvisions_decoder_pil_gives_the_same_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture().save(tmp_path / "a.jpg")
    expected = decode(str(tmp_path / "a.jpg"))
    monkeypatch.delattr("torchvision.io.decode_jpeg")
    assert torch.equal(decode(str(tmp_path / "a.jpg")), expected)


def error_of(load: Any, file: Path) -> str:
    try:
        load(str(file))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_what_pil_refuses_is_refused_in_its_words(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.jpg", tmp_path / "cut.jpg"
    picture().save(whole)
    content = whole.read_bytes()
    for size in (0, 2, 3, 30, 300, len(content) // 2, *range(len(content) - 20, len(content))):
        cut.write_bytes(content[:size])
        assert error_of(decode, cut) == error_of(load_picture, cut)
        assert error_of(decode, cut) or size > len(content) - 20
    generator = np.random.default_rng(1)
    for _ in range(60):  # damaged in the header
        damaged = bytearray(content)
        damaged[generator.integers(0, 600)] = generator.integers(256)
        cut.write_bytes(damaged)
        assert error_of(decode, cut) == error_of(load_picture, cut)
    Image.fromarray(np.full((40, 40), 40_000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(UsageError, match=r"deep.png has values from 40000 to 40000 .*, and a folder of pictures has 8"):
        decode(str(tmp_path / "deep.png"))
    assert error_of(decode, tmp_path / "none.jpg").startswith("FileNotFoundError")


def test_samples_are_torchvisions_transforms_of_bytes_with_the_same_draws(tmp_path: Path) -> None:
    write_pictures(tmp_path, 3, 2)
    for half in ("train", "val"):
        picture().save(tmp_path / half / "cat" / "00.jpg", quality=95)

    def source(**args: Any) -> Any:
        return load_data(Data("image_folder", root=str(tmp_path), args={"crop": 40, "resize": 44, **args}))

    default, pil, fast = source(), source(decoder="pil"), source(decoder="torchvision")
    by_hand = v2.Compose([v2.RandomResizedCrop(40, antialias=True), v2.RandomHorizontalFlip()])
    for index, (path, label) in enumerate(fast.train.samples):
        samples = []
        for dataset in (default.train, pil.train, fast.train):
            seed_sample(1, 2, index)
            sample, found = dataset[index]
            assert (sample.dtype, sample.shape, found) == (torch.uint8, (3, 40, 40), label)
            samples.append(sample.int())
        assert torch.equal(samples[0], samples[1])
        # The same crop and flip: PIL and torch round otherwise, by a level at most.
        assert int((samples[2] - samples[0]).abs().max()) <= 1
        seed_sample(1, 2, index)
        assert int((samples[2] - by_hand(decode(path)).int()).abs().max()) <= 1
    expected = pil.validation[0][0].int()
    assert int((fast.validation[0][0].int() - expected).abs().max()) <= 1
    with pytest.raises(UsageError, match=r"data.args = .*: decoder is one of pil, torchvision, not 'turbo'"):
        source(decoder="turbo")


def digest() -> str:
    """Of bytes that are cropped and resized, up and down."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (61, 90, 3), dtype=torch.uint8, generator=generator).permute(2, 0, 1)
    torch.manual_seed(0)
    crops = [resizing.RandomResizedCrop(40)(pixels), resizing.Resize(40)(pixels), resizing.Resize(99)(pixels)]
    return hashlib.sha256(b"".join(each.contiguous().numpy().tobytes() for each in crops)).hexdigest()


def test_bytes_are_the_same_on_a_processor_without_avx() -> None:
    words = [sys.executable, "-c", "from tests.unit import test_decoders; print(test_decoders.digest())"]
    environment = {**clean_environment(), "ATEN_CPU_CAPABILITY": "default"}
    other = subprocess.run(words, env=environment, stdout=subprocess.PIPE, text=True, check=True, cwd=os.getcwd())
    assert other.stdout.split()[-1] == digest()
