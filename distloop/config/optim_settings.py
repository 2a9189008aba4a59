"""The settings of the optimizer, of groups of parameters, and of the learning rate. The rest: settings.py."""

from typing import Annotated, Literal

from annotated_types import Gt, Le, Lt

from distloop.config.fields import (
    Arguments,
    Float,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    OwnName,
    PositiveFloat,
    PositiveInt,
    no_arguments,
    section,
)


@section
class OptimizerOfGroup:
    name: str
    """As optim.name."""
    args: Arguments = no_arguments()
    """As optim.args; those of optim are not taken over."""


@section
class Group:
    match: str
    """A regular expression; the group has the parameters in whose names it is found."""
    lr_scale: PositiveFloat = 1.0
    """The learning rate as a share of the run's."""
    weight_decay: NonNegativeFloat | None = None
    """null: optim.weight_decay."""
    freeze: bool = False
    """Its parameters are not trained."""
    until_step: PositiveInt | None = None
    """Its parameters are frozen before this step, counted from 0."""
    optimizer: OptimizerOfGroup | None = None
    """An optimizer of its own."""


@section
class Optim:
    name: str = "adamw"
    """sgd | adam | adamw, another optimizer of torch.optim by its name in small letters, or module:callable."""
    args: Arguments = no_arguments()
    """Further arguments of the optimizer, such as {amsgrad: true}."""
    lr: PositiveFloat = 1e-3
    """Peak learning rate. It belongs to the global batch and never changes with the number of processes."""
    weight_decay: NonNegativeFloat = 0.05
    """Decay of weights; norms and biases are not decayed."""
    momentum: Fraction = 0.9
    """sgd only."""
    nesterov: bool = False
    """sgd only."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """adam and adamw only."""
    eps: PositiveFloat = 1e-8
    """adam and adamw only."""
    clip_norm: PositiveFloat | None = None
    """Largest norm of the whole step's gradient; null: no clipping."""
    ema_decay: Annotated[Float, Gt(0), Lt(1)] | None = None
    """Keep an exponential moving average of the weights with this decay, such as 0.999: it is what is
    validated, and saved as averaged.safetensors beside the weights. null: none."""
    groups: tuple[Group, ...] = ()
    """Parameters with settings of their own: [{match: ^head, lr_scale: 10}, …]; the first match counts. Keys: match,
    lr_scale, weight_decay, freeze, until_step, optimizer."""
    layer_decay: Annotated[Float, Gt(0), Le(1)] | None = None
    """The rate of each layer as a share of the next one's, such as 0.75: ResNet, ConvNeXt, ViT, Swin."""
    show: bool = False
    """Print each parameter's shape, group, rate and decay, and end."""


@section
class Schedule:
    name: Literal["constant", "linear", "cosine", "multi_step", "one_cycle", "warmup_stable_decay"] | OwnName = "cosine"
    """Shape of the learning rate after the warm-up. Your own: a function of (step, total_steps), without a warm-up,
    that returns the share of the peak rate."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear rise from 0; one_cycle: length of its rise (0: 30 % of the run)."""
    final_ratio: Fraction = 0.0
    """Last learning rate as a share of the peak: linear, cosine, warmup_stable_decay."""
    milestones: tuple[PositiveInt, ...] = ()
    """multi_step: the steps at which the rate is multiplied by gamma."""
    gamma: Annotated[Float, Gt(0), Lt(1)] = 0.1
    """multi_step only."""
    decay_steps: PositiveInt | None = None
    """warmup_stable_decay: length of the final descent (null: 20 % of the run)."""
