"""The models: built-in ones, torchvision's classifiers by name, and your own as module:callable.

The callable is called with model.args and with those of `input_shape` (of one sample), `num_outputs` and `num_classes`
(if the data has classes) that its signature names.
"""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distloop.config.notes import way_out
from distloop.config.registry import call, import_callable
from distloop.config.settings import Config, Model
from distloop.data.batches import send
from distloop.data.datasets import DataSource
from distloop.data.download import download_lock
from distloop.data.fingerprint import refuse_short
from distloop.data.loader import offers_to_model
from distloop.data.look import example_batch
from distloop.data.seeding import Place, seed_building
from distloop.errors import UsageError, suggest
from distloop.ranks.places import Position
from distloop.run.module_state import check_tensors
from distloop.run.same import refuse_unlike_ranks
from distloop.training.compiling import compile_model, to_channels_last
from distloop.training.conversion import convert
from distloop.training.gpt import gpt
from distloop.training.recomputing import recompute
from distloop.training.tasks import Task
from distloop.training.trying import try_out
from distloop.training.untrained import refuse_parameters_of_task

Builder = Callable[..., nn.Module]


def linear(input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
    """One linear layer: [batch, *input_shape], flattened, to [batch, num_outputs]."""
    layer = nn.Linear(math.prod(input_shape), num_outputs)
    return layer if len(input_shape) == 1 else nn.Sequential(nn.Flatten(), layer)


def mlp(input_shape: tuple[int, ...], num_outputs: int, hidden: int = 128, layers: int = 2) -> nn.Module:
    """A multi-layer perceptron with `layers` hidden layers of `hidden` units."""
    sizes = [math.prod(input_shape)] + [hidden] * layers
    blocks: list[nn.Module] = [nn.Flatten()]
    for size, next_size in itertools.pairwise(sizes):
        blocks += [nn.Linear(size, next_size), nn.ReLU()]
    return nn.Sequential(*blocks, nn.Linear(sizes[-1], num_outputs))


def cnn(
    input_shape: tuple[int, int, int], num_outputs: int, width: int = 32, norm: str = "group", dropout: float = 0.0
) -> nn.Module:
    """A small convolutional network: two blocks of two 3 × 3 convolutions; each block halves the image.

    `norm`: group | batch | none. GroupNorm (Wu and He 2018) normalises each image alone, so that the division of a
    batch into micro-batches does not change training; BatchNorm normalises over a micro-batch.
    """
    kinds: dict[str, Builder] = {
        "group": lambda size: nn.GroupNorm(math.gcd(8, size), size),
        "batch": nn.BatchNorm2d,
        "none": nn.Identity,
    }
    if norm not in kinds:
        raise ValueError(f"norm is one of {', '.join(kinds)}, not {norm!r}")

    def convolution(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=norm == "none"), kinds[norm](outputs), nn.ReLU()]

    channels, height, columns = input_shape
    return nn.Sequential(
        *convolution(channels, width),
        *convolution(width, width),
        nn.MaxPool2d(2),
        *convolution(width, 2 * width),
        *convolution(2 * width, 2 * width),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(2 * width * (height // 4) * (columns // 4), num_outputs),
    )


def resnet18_small(num_classes: int) -> nn.Module:
    """ResNet-18 for 32-pixel images: a 3 × 3 first convolution of stride 1 and no max-pooling (He et al. 2016)."""
    from torchvision.models import resnet18

    model = resnet18(num_classes=num_classes)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


MODELS: dict[str, Builder] = {"linear": linear, "mlp": mlp, "cnn": cnn, "resnet18_small": resnet18_small, "gpt": gpt}


def build_model(
    config: Config, source: DataSource, task: Task, device: torch.device, position: Position | None = None
) -> nn.Module:
    """The config's model on `device`, in its dtype, with the same initial weights on all ranks. `position`: this
    rank's, by which one that hangs as it builds the model is named.

    Raises UsageError, also where the model does not fit to the task or the data, and where ranks differ in what they
    train. Collective.
    """
    dtype = getattr(torch, config.dtype)
    example = send(example_batch(source, config.data, config.seed, dtype, device=device), device)
    seed_building(Place.MODEL, config.seed)
    torch.manual_seed(config.seed)  # the initial weights, as they always were
    model = convert(make_model(config.model, offers_to_model(example, source)), device, dtype)
    if isinstance(task, nn.Module):
        convert(task, device, dtype, "task")
    refuse_unlike_ranks(config, source, device, task, model, position)
    refuse_short(source, config.data, device)
    refuse_parameters_of_task(task)
    try_out(task, model, example, source)
    check_tensors("The model's ", model)
    check_tensors("The task's ", task.as_module)
    if config.model.channels_last:
        to_channels_last(model)
    if config.model.checkpointing:
        recompute(model)
    compile_model(model, config.compile)  # before DDP wraps it
    return model


def make_model(config: Model, offered: dict[str, Any]) -> nn.Module:
    """The model that the config names, on the CPU in float32. Raises UsageError.

    `offered`: arguments for the model's callable, of which it gets those that its signature names.
    """
    if ":" not in config.name and config.name not in MODELS:
        return _torchvision_model(config, offered.get("num_classes"))
    if config.pretrained:
        raise UsageError(f"model.pretrained: there are no weights for {config.name!r}, only for torchvision's models.")
    build = import_callable("model.name", config.name) if ":" in config.name else MODELS[config.name]
    if isinstance(build, nn.Module):
        raise UsageError(
            f"model.name = {config.name!r} is a model already (a {type(build).__name__}), made before it could be "
            "seeded. Name the class, or a function that returns the model."
        )
    model = call("model.args", build, config.args, offered)
    if not isinstance(model, nn.Module):
        raise UsageError(f"model.name = {config.name!r} returned a {type(model).__name__}, not a torch.nn.Module.")
    return model


def _torchvision_model(config: Model, num_classes: int | None) -> nn.Module:
    from torchvision import models

    names = models.list_models(module=models)
    if config.name not in names:
        raise UsageError(f"model.name = {config.name!r} is not known.{suggest(config.name, [*MODELS, *names])}")
    arguments = {"num_classes": num_classes} if num_classes else {}
    try:
        model = models.get_model(config.name, weights=None, **{**arguments, **config.args})
    except TypeError as error:
        raise UsageError(f"model.args = {config.args}: {error}.{way_out('model.args', config.args)}") from None
    if config.pretrained:
        weights = models.get_model_weights(config.name).DEFAULT
        try:
            with download_lock(Path(torch.hub.get_dir())):  # one process of the machine downloads
                state = weights.get_state_dict(check_hash=True)
        except OSError as error:
            raise UsageError(
                f"model.pretrained: the weights of {config.name} could not be downloaded ({error}). "
                f"Put {weights.url} into $TORCH_HOME/hub/checkpoints/, or set model.pretrained: false."
            ) from None
        shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
        same_shape = {key: tensor for key, tensor in state.items() if shapes.get(key) == tensor.shape}
        model.load_state_dict(same_shape, strict=False)
    return model
