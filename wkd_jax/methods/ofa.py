"""OFA-KD: classifiers on all of the student's stages follow the teacher's logits (Hao et al., 2023).

Between architectures, features differ too much to be compared; class distributions do not.
"""

from __future__ import annotations

import functools
import itertools
import math
import numbers
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx

from wkd_jax import losses
from wkd_jax.methods import checks, schedule
from wkd_jax.methods.taps import find_tap, map_of
from wkd_jax.models import connectors, swin
from wkd_jax.models.layers import BatchNorm, Conv, LayerNorm, he_fan_out, mean_over_positions, widen
from wkd_jax.models.transformer import Attention, Block, gelu, linear
from wkd_jax.types import Array, Context, Setup, Tap, Term, Terms

GRID = 7  # positions along a side of the map that a token exit attends over
HEADS = 4
EPS = 1e-5
BEFORE_RELU = ("mobilenetv1",)  # networks whose exits, in the authors' code, start before the stages' last ReLU


class OFA(nnx.Module):
    """weight * OFA(final logits) + exit_weight * sum over exits of OFA(exit); the loss is `losses.ofa`.

    An exit reads one tap of the student, in training only, and its gradient reaches the backbone. It is convolutional
    (`ConvExit`), or for tokens and Swin's maps a transformer (`TokenExit`), and the deeper, the earlier its tap. Exits
    start at the taps that the models publish, after the ReLU where there is one; those of MobileNetV1, as in the
    authors' code, before it.

    Defaults are those of the authors' code, and of its README for CIFAR-100 (ImageNet, DeiT-T -> ResNet-18: power 1.5).
    Their own CIFAR-100 runs had exit_weight 0.1; for transformer students powers of 1.1 to 1.4 are tuned pair by pair.
    The label weight is the task's: 1, with label smoothing 0.1 for CNNs.

    The authors' networks have four stages. Where there are fewer (CIFAR ResNets), the last tap has the last exit and
    each tap before it one level more, as it is with four.

    References:
      Hao et al., "One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge Distillation",
      NeurIPS 2023, arXiv 2310.19444.
    """

    DEFAULTS: ClassVar[dict[str, Any]] = {
        "weight": 1.0,  # of the final logits' term; follows `schedule`
        "exit_weight": 1.0,  # of each exit's term; follows `schedule`
        "power": (1.0,),  # one for all terms, or one for each exit and then one for the final logits
        "temperature": 1.0,
        "form": "code",  # code, or the paper's: see losses.ofa
        "stages": (),  # student's taps that get an exit; (): all but the stem
        "schedule": schedule.DEFAULTS,
    }
    NEEDS_TEACHER = True

    def __init__(self, config: Any, setup: Setup, *, rngs: nnx.Rngs) -> None:
        schedule.check("ofa", config["weight"], config["schedule"], setup.epochs)
        checks.not_negative("ofa", config, "exit_weight")
        checks.positive("ofa", config, "temperature")
        checks.one_of("ofa", config, "form", ("code", "paper"))
        self.config = config
        student, every = setup.student, list(setup.student.taps)
        stages = config["stages"] or tuple(name for name in every if name != "stem")
        self.powers = _powers(config["power"], len(stages) + 1)
        self.before_relu = student.name in BEFORE_RELU
        self.exits = nnx.Dict()  # merging a split module sorts its keys: the order is that of `stages`
        for stage in stages:
            name, tap = find_tap(student, stage, "methods.ofa.stages")
            if name in self.exits:
                raise ValueError(f"methods.ofa.stages={stages}: {name} is there twice")
            later = len(every) - 1 - every.index(name)
            if tap.layout == "tokens" or student.name in swin.SPECS:
                self.exits[name] = TokenExit(
                    tap, later, student.pooled, student.num_classes, image_size=setup.image_size, rngs=rngs
                )
            else:
                width = max(student.pooled, setup.teacher.pooled)
                self.exits[name] = ConvExit(tap.channels, later, width, student.num_classes, rngs=rngs)
        self.stages = tuple(self.exits)

    def terms(self, context: Context) -> Terms:
        """A term for each exit, by the name of its tap, and `logits`."""
        student, config = context.student, self.config
        features = student.preactivations if self.before_relu else student.taps
        logits = {name: self.exits[name](features[name], train=True) for name in self.stages}
        terms = {}
        for (name, rows), power in zip([*logits.items(), ("logits", student.logits)], self.powers, strict=True):
            value = losses.ofa(
                rows,
                context.teacher.logits,
                context.labels,
                power=power,
                temperature=config["temperature"],
                form=config["form"],
            )
            base = config["weight" if name == "logits" else "exit_weight"]
            weight = schedule.weight(base, config["schedule"], context.progress)
            terms[name] = Term(value, weight, where=student.valid)
        return terms


def _powers(given: tuple[float, ...], count: int) -> tuple[float, ...]:
    """One power a term."""
    if len(given) not in (1, count):
        raise ValueError(
            f"methods.ofa.power={given}: needs one number, or {count}: one for each exit and one for the final logits"
        )
    if not all(isinstance(power, numbers.Real) and power >= 1 for power in given):
        raise ValueError(f"methods.ofa.power={given}: must be 1 or more")
    return given if len(given) == count else given * count


class ConvExit(nnx.Module):
    """`later` separable blocks, each of which halves the map and doubles the channels, mean over positions, classifier.

    The last block has `width` channels. The last tap, with no block, has one 1x1 convolution in their place. Computes
    in the dtype of its input, the classifier in float32.

    Args:
      features: Channels of the tap.
      later: Taps of the network after this one.
      width: Channels that the classifier sees.
      num_classes: C.
      rngs: Source of the initial values: He fan-out for convolutions, N(0, 0.02) for the classifier.

    Example:
      >>> def run(x):
      ...     return ConvExit(8, 2, 24, 10, rngs=nnx.Rngs(0))(x, train=True)
      >>> nnx.eval_shape(run, jnp.zeros((2, 9, 8, 8))).shape
      (2, 10)
    """

    def __init__(self, features: int, later: int, width: int, num_classes: int, *, rngs: nnx.Rngs) -> None:
        widths = [*(features << block for block in range(later)), width]
        self.blocks = nnx.List(Separable(*pair, rngs=rngs) for pair in itertools.pairwise(widths))
        self.conv = None if later else Conv(features, width, 1, kernel_init=he_fan_out, dtype=None, rngs=rngs)
        self.fc = linear(width, num_classes, rngs=rngs)

    def __call__(self, x: Array, *, train: bool) -> Array:
        """Maps [B, H, W, features] to logits [B, C]."""
        for block in self.blocks:
            x = block(x, train=train)
        if self.conv is not None:
            x = self.conv(x)
        return self.fc(mean_over_positions(x))


class Separable(nnx.Module):
    """Twice: depthwise 3x3 and 1x1 convolution, BatchNorm, ReLU. The first halves the map, the second widens it."""

    def __init__(self, in_features: int, features: int, *, rngs: nnx.Rngs) -> None:
        conv = functools.partial(Conv, in_features, use_bias=False, kernel_init=he_fan_out, dtype=None, rngs=rngs)
        self.depthwise1 = conv(in_features, 3, stride=2, padding=1, groups=in_features)
        self.pointwise1 = conv(in_features, 1)
        self.bn1 = BatchNorm(in_features)
        self.depthwise2 = conv(in_features, 3, padding=1, groups=in_features)
        self.pointwise2 = conv(features, 1)
        self.bn2 = BatchNorm(features)

    def __call__(self, x: Array, *, train: bool) -> Array:
        """Maps [B, H, W, in_features] to [B, ceil(H / 2), ceil(W / 2), features]."""
        x = self.bn1(self.pointwise1(self.depthwise1(x)), train=train, relu=True)
        return self.bn2(self.pointwise2(self.depthwise2(x)), train=train, relu=True)


class TokenExit(nnx.Module):
    """Patches merged 2 x 2 until the map is about 7 x 7, max(later, 1) transformer blocks, classifier.

    Tokens in front (a class token) go past the merging; the classifier sees the first of them, or the mean of all
    tokens where there is none. A tap that needs no merging and is narrower than the network's last, which the authors'
    images of 224 pixels never lead to, gets a linear layer instead. Computes in float32.

    Args:
      tap: What the exit reads.
      later: Taps of the network after this one.
      width: Channels of the exit: those of the student's last feature.
      num_classes: C.
      image_size: (height, width) of the images, pixels.
      rngs: Source of the initial values: N(0, 0.02) for weights, biases 0.

    Raises:
      ValueError: If the heads do not divide the width, or the tokens in front do not have it.

    Example:
      >>> def run(x):
      ...     return TokenExit(Tap(16, 4), 2, 32, 10, image_size=(60, 64), rngs=nnx.Rngs(0))(x, train=True)
      >>> nnx.eval_shape(run, jnp.zeros((2, 15, 16, 16))).shape
      (2, 10)
    """

    def __init__(
        self, tap: Tap, later: int, width: int, num_classes: int, *, image_size: tuple[int, int], rngs: nnx.Rngs
    ) -> None:
        if width % HEADS or (tap.prefix_tokens and tap.channels != width):
            raise ValueError(
                f"methods.ofa.stages: an exit for tokens needs a student whose last feature ({width} channels) is a "
                f"multiple of {HEADS}, and as wide as its taps ({tap.channels}) where those have a class token"
            )
        self.tap, self.image_size = tap, tuple(image_size)
        merges = max(int(math.log2(min(connectors.spatial_size(tap, image_size)) / GRID)), 0)
        widths = tap.channels, *(width,) * merges
        self.merge = nnx.List(
            Merging(features, width, activate=index == 0 or index < merges - 1, rngs=rngs)
            for index, features in enumerate(widths[:merges])
        )
        self.widen = None if widths[-1] == width else linear(tap.channels, width, rngs=rngs)
        settings = {"eps": EPS, "dropout_rate": 0.0, "drop_path_rate": 0.0, "dtype": None, "rngs": rngs}
        self.blocks = nnx.List(Block(Unbiased(width, rngs=rngs), width, **settings) for _ in range(max(later, 1)))
        self.fc = linear(width, num_classes, rngs=rngs)

    def __call__(self, x: Array, *, train: bool) -> Array:
        """Maps the tap's feature to logits [B, C]."""
        x = widen(x)
        front = x[:, : self.tap.prefix_tokens] if self.tap.prefix_tokens else None
        x = map_of(x, self.tap, self.image_size)
        for merge in self.merge:
            x = merge(x)
        if self.widen is not None:
            x = self.widen(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        if front is not None:
            x = jnp.concatenate([front, x], axis=1)
        for block in self.blocks:
            x = block(x, train=train)
        return self.fc(x.mean(1) if front is None else x[:, 0])


class Merging(swin.PatchMerging):
    """Swin's merging of 2 x 2 positions, to any width, and then GELU where `activate` is set."""

    def __init__(self, features: int, width: int, *, activate: bool, rngs: nnx.Rngs) -> None:
        self.norm = LayerNorm(4 * features, eps=EPS)
        self.reduction = linear(4 * features, width, use_bias=False, rngs=rngs)
        self.activate = activate

    def __call__(self, x: Array) -> Array:
        """Maps [B, H, W, D] to [B, ceil(H / 2), ceil(W / 2), width]."""
        x = super().__call__(x)
        return gelu(x) if self.activate else x


class Unbiased(Attention):
    """Self-attention whose queries, keys and values have no bias."""

    def __init__(self, features: int, *, rngs: nnx.Rngs) -> None:
        super().__init__(features, HEADS, dtype=None, rngs=rngs)
        self.qkv = linear(features, 3 * features, use_bias=False, rngs=rngs)


REGISTER = {"ofa": OFA}
