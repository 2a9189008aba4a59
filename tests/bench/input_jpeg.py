"""CPU time of a training picture from JPEG files, beside torchvision's reference, interleaved.

    python -m tests.bench.input_jpeg [--rounds 9] [--pictures 48]

The pictures are 500 × 375 pixels, cropped at random to 224 and flipped. reference: torchvision's ImageFolder with PIL
and the transforms of its recipe, one by one, to normalised floats, in batches of default_collate. The others are
distloop's loader to the same batch on the CPU: with PIL, with torchvision's decoder, from a store of `distloop pack
--size 256`; uint8: without the normalisation, which a GPU does. All in one process with one thread. Prints the median
of each and of its ratios to the reference, and the sizes on the disk; --json: all values.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from distloop.commands import pack
from distloop.config.settings import Data
from distloop.data.datasets import IMAGENET_MEAN, IMAGENET_STD, load_data
from distloop.data.loader import make_loader
from distloop.data.order import MicroBatchSampler, Plan
from distloop.data.seeded import SeededDataset, collate_of, no_check

HEIGHT, WIDTH, QUALITY = 375, 500, 92  # about 60 kB a picture
BATCH = 16


def write_photographs(root: Path, pictures: int) -> None:
    """Pictures that are as smooth, and as large as files, as photographs: noise of several wavelengths."""
    generator = np.random.default_rng(0)
    for half, count in (("train", pictures), ("val", 1)):
        (root / half / "all").mkdir(parents=True)
        for number in range(count):
            sum_of = np.full((HEIGHT, WIDTH, 3), 120.0)
            for columns, strength in ((4, 60), (8, 40), (16, 30), (32, 20), (64, 16), (125, 12), (250, 9)):
                noise = torch.from_numpy(generator.normal(size=(1, 3, columns * HEIGHT // WIDTH + 1, columns)))
                mixed = 1.2 * noise.mean(1, keepdim=True) + 0.4 * noise
                large = torch.nn.functional.interpolate(mixed, (HEIGHT, WIDTH), mode="bicubic")
                sum_of += strength * large[0].permute(1, 2, 0).numpy()
            picture = Image.fromarray(sum_of.clip(0, 255).astype(np.uint8))
            picture.save(root / half / "all" / f"{number:04}.jpg", quality=QUALITY)


def reference(root: Path) -> Any:
    """Batches as torchvision's references/classification makes them, with PIL."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    steps = [v2.RandomResizedCrop(224, antialias=True), v2.RandomHorizontalFlip(), v2.PILToTensor()]
    steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    return DataLoader(ImageFolder(str(root / "train"), v2.Compose(steps)), BATCH, shuffle=True)


def ours(root: Path, name: str, **args: Any) -> Any:
    source = load_data(Data(name, root=str(root), args=args))
    plan = Plan(len(source.train), BATCH, total_steps=len(source.train) // BATCH)
    settings = Data(name, workers=0)
    sampler = MicroBatchSampler(plan, 0)
    return make_loader(settings, source, None, 0, torch.device("cpu"), torch.float32, source.train, sampler)


def as_bytes(root: Path, name: str, **args: Any) -> Iterator[Any]:
    """Our batches before they are normalised: what is sent to a GPU."""
    source = load_data(Data(name, root=str(root), args=args))
    plan = Plan(len(source.train), BATCH, total_steps=len(source.train) // BATCH)
    dataset = SeededDataset(source.train, 0, collate_of(Data()), no_check)
    return map(dataset.__getitems__, MicroBatchSampler(plan, 0))


def measure(batches: Callable[[], Any], pictures: int) -> float:
    """CPU time of a picture, in microseconds."""
    iterable = batches()
    begun = time.process_time()
    for images, _ in iterable:
        assert images.shape == (BATCH, 3, 224, 224)
    return 1e6 * (time.process_time() - begun) / pictures


def main() -> None:
    words = argparse.ArgumentParser()
    words.add_argument("--rounds", type=int, default=9)
    words.add_argument("--pictures", type=int, default=48)
    words.add_argument("--json", action="store_true")
    options = words.parse_args()
    pictures = options.pictures // BATCH * BATCH
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", DeprecationWarning)  # of torchvision's decoder
    with tempfile.TemporaryDirectory() as name:
        source, store = Path(name) / "source", Path(name) / "store"
        write_photographs(source, pictures)
        with contextlib.redirect_stdout(io.StringIO()):
            assert pack.main([str(source), str(store), "--size", "256", "--processes", "1"]) == 0
        sizes = {
            folder.name: sum(file.stat().st_size for file in (folder / "train").rglob("*.*")) / pictures / 1000
            for folder in (source, store)
        }
        contestants: dict[str, Callable[[], Any]] = {
            "reference": lambda: reference(source),
            "reference again": lambda: reference(source),
            "pil": lambda: ours(source, "image_folder"),
            "pil, uint8": lambda: as_bytes(source, "image_folder"),
            "torchvision": lambda: ours(source, "image_folder", decoder="torchvision"),
            "torchvision, uint8": lambda: as_bytes(source, "image_folder", decoder="torchvision"),
            "packed": lambda: ours(store, "packed"),
            "packed, uint8": lambda: as_bytes(store, "packed"),
        }
        times: dict[str, list[float]] = {name: [] for name in contestants}
        for number in range(-1, options.rounds):  # the first one warms up
            for name in contestants if number % 2 else reversed(contestants):
                seconds = measure(contestants[name], pictures)
                if number >= 0:
                    times[name].append(seconds)
    ratios = {
        name: statistics.median(one / other for one, other in zip(times["reference"], values, strict=True))
        for name, values in times.items()
    }
    if options.json:
        print(json.dumps({"microseconds": times, "times_the_reference": ratios, "kilobytes": sizes}))
        return
    for name, values in times.items():
        print(
            f"{name:20} {statistics.median(values):6.0f} us a picture ({min(values):.0f} to {max(values):.0f}), "
            f"{ratios[name]:5.2f} times the reference's speed"
        )
    print(f"on the disk: {sizes['source']:.0f} kB a picture; packed {sizes['store']:.0f} kB")


if __name__ == "__main__":
    main()
