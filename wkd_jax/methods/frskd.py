"""FRSKD: a network refined by a small pyramid on top of itself, which teaches it (Ji et al., CVPR 2021)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx

from wkd_jax import losses
from wkd_jax.methods import checks, schedule
from wkd_jax.methods.taps import find_tap
from wkd_jax.models import connectors
from wkd_jax.models.layers import BatchNorm, Conv, ConvNorms, Linear, conv_norm, max_pool, mean_over_positions
from wkd_jax.types import Array, Context, ModelInfo, Setup, Term, Terms

WIDENING = 2  # channels of the self-teacher's maps, in those of the network's


class FRSKD(nnx.Module):
    """weight * T^2 * KL(self-teacher || student) + attention_weight * attention transfer + the teacher's cross-entropy.

    The self-teacher is a pyramid (`SelfTeacher`) on the student's maps with a classifier of its own. Its cross-entropy
    with the labels (not smoothed) has weight 1 and trains pyramid and network alike; the two distillation terms take
    its logits and its maps as constants. `task.label_weight` is 1 as well. Defaults are those of CIFAR-100, ResNet-18;
    the ImageNet weights are not published. The authors refine maps behind a ReLU; taps that are not are taken as is.
    """

    DEFAULTS: ClassVar[dict[str, Any]] = {
        "weight": 2.0,  # of the divergence
        "attention_weight": 100.0,
        "temperature": 4.0,
        "taps": None,  # at least two maps, each half as large as the one before; None: the last stage of each size
        "schedule": schedule.DEFAULTS,  # of both weights
    }
    NEEDS_TEACHER = False

    def __init__(self, config: Any, setup: Setup, *, rngs: nnx.Rngs) -> None:
        checks.positive("frskd", config, "temperature")
        checks.not_negative("frskd", config, "attention_weight")
        schedule.check("frskd", config["weight"], config["schedule"], setup.epochs)
        self.config = config
        self.taps = _levels(setup.student, config["taps"], setup.image_size)
        channels = [setup.student.taps[name].channels for name in self.taps]
        self.teacher = SelfTeacher(channels, setup.student.num_classes, rngs=rngs)

    def terms(self, context: Context) -> Terms:
        """Terms `teacher_cross_entropy`, `kl` and `attention`."""
        config, student = self.config, context.student
        maps = [student.taps[name] for name in self.taps]
        refined, logits = self.teacher(maps)
        attention = sum(losses.attention_transfer(*pair) for pair in zip(maps, refined, strict=True))
        weights = [
            schedule.weight(config[name], config["schedule"], context.progress)
            for name in ("weight", "attention_weight")
        ]
        return {
            "teacher_cross_entropy": Term(losses.cross_entropy(logits, context.batch.label)),
            "kl": Term(losses.kd(student.logits, logits, temperature=config["temperature"]), weights[0]),
            "attention": Term(attention, weights[1]),
        }


class SelfTeacher(nnx.Module):
    """A bidirectional feature pyramid and a classifier, always in training mode.

    Top down, then bottom up. Every map is widened by 1x1 convolutions; each node adds up, with learned weights, its own
    level and the neighbour that was refined before it (`Fusion`).

    Args:
      channels: Of the maps, from fine to coarse.
      num_classes: Rows of the classifier.
      rngs: Source of the initial values, torch's defaults.

    Example:
      >>> def run(*maps):
      ...     return SelfTeacher([4, 8], 5, rngs=nnx.Rngs(0))(maps)
      >>> refined, logits = nnx.eval_shape(run, jnp.ones((2, 6, 6, 4)), jnp.ones((2, 3, 3, 8)))  # shapes
      >>> [x.shape for x in refined], logits.shape
      ([(2, 6, 6, 8), (2, 3, 3, 16)], (2, 5))
    """

    def __init__(self, channels: Sequence[int], num_classes: int, *, rngs: nnx.Rngs) -> None:
        widths = [WIDENING * features for features in channels]
        pairs = list(zip(channels, widths, strict=True))
        self.lateral = nnx.List([_pointwise(*pair, rngs) for pair in pairs])
        self.lateral_again = nnx.List([_pointwise(*pair, rngs) for pair in pairs[1:]])
        self.down = nnx.List([Fusion(coarse, fine, 2, rngs=rngs) for fine, coarse in itertools.pairwise(widths)])
        inputs = [*[3] * (len(widths) - 2), 2]  # the coarsest level has no node of the way down
        self.up = nnx.List(
            [
                Fusion(fine, coarse, count, rngs=rngs)
                for (fine, coarse), count in zip(itertools.pairwise(widths), inputs, strict=True)
            ]
        )
        self.head = Linear(widths[-1], num_classes, rngs=rngs)

    def __call__(self, maps: Sequence[Array]) -> tuple[list[Array], Array]:
        """Refines maps [B, H, W, D], fine to coarse, each half the size of the one before (rounded up).

        Returns:
          (maps [B, H, W, 2 D] after a ReLU, logits [B, C] float32).
        """
        lateral = [conv(x, train=True) for conv, x in zip(self.lateral, maps, strict=True)]
        down = [lateral[-1]]
        for node, x in zip(reversed(self.down), reversed(lateral[:-1]), strict=True):
            # Enlarged after the convolution: the same as before it, at a quarter of the work.
            down.insert(0, node([x, _enlarge(node.adapt(down[0], train=True), x)]))
        refined = [down[0]]
        again = [conv(x, train=True) for conv, x in zip(self.lateral_again, maps[1:], strict=True)]
        same_level = [*zip(again[:-1], down[1:-1], strict=True), (again[-1],)]
        for node, inputs in zip(self.up, same_level, strict=True):
            refined.append(node([*inputs, node.adapt(_halve(refined[-1]), train=True)]))
        return refined, self.head(mean_over_positions(refined[-1]))


class Fusion(nnx.Module):
    """A node: positive weights of sum 1 on its inputs, two depthwise separable convolutions, a ReLU.

    Args:
      neighbour: Channels of the neighbouring level.
      features: Channels of the node.
      inputs: How many maps it adds up.
      rngs: Source of the initial values.
    """

    def __init__(self, neighbour: int, features: int, inputs: int, *, rngs: nnx.Rngs) -> None:
        self.adapt = _pointwise(neighbour, features, rngs)
        self.weights = nnx.Param(jnp.ones(inputs, jnp.float32))
        self.convs = nnx.List([Separable(features, rngs=rngs) for _ in range(2)])

    def __call__(self, maps: Sequence[Array]) -> Array:
        """Maps of one shape [B, H, W, D] to one."""
        weights = nnx.relu(self.weights[...])
        weights = weights / (jnp.sum(weights) + 1e-6)
        x = sum(weight.astype(x.dtype) * x for weight, x in zip(weights, maps, strict=True))
        for conv in self.convs:
            x = conv(x)
        return x


class Separable(nnx.Module):
    """3x3 convolution of each channel, 1x1 convolution, BatchNorm, ReLU."""

    def __init__(self, features: int, *, rngs: nnx.Rngs) -> None:
        settings = {"use_bias": False, "dtype": None, "rngs": rngs}
        self.depthwise = Conv(features, features, 3, padding=1, groups=features, **settings)
        self.pointwise = Conv(features, features, 1, **settings)
        self.bn = BatchNorm(features)

    def __call__(self, x: Array) -> Array:
        """Maps [B, H, W, D]."""
        return conv_norm(self.depthwise(x), self.pointwise, self.bn, train=True, relu=True)


def _pointwise(in_features: int, features: int, rngs: nnx.Rngs) -> ConvNorms:
    return ConvNorms([Conv(in_features, features, 1, use_bias=False, dtype=None, rngs=rngs)], norm_group_size=None)


def _enlarge(x: Array, like: Array) -> Array:
    """Each position twice along both axes, cut to the size of `like` where that is odd."""
    height, width = like.shape[1:3]
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)[:, :height, :width]


def _halve(x: Array) -> Array:
    """Largest of 3x3 at every other position, [B, ceil(H / 2), ceil(W / 2), D]; x is after a ReLU, so zeros never win.

    An even side is padded at its end only, as the "same" padding of other frameworks does.
    """
    borders = [(side % 2, 1) for side in x.shape[1:3]]
    return max_pool(jnp.pad(x, ((0, 0), *borders, (0, 0))), 3, stride=2)


def _levels(student: ModelInfo, names: Sequence[str] | None, image_size: tuple[int, int]) -> tuple[str, ...]:
    """The taps to refine, from fine to coarse."""

    def size(name: str) -> tuple[int, int]:
        tap = student.taps[name]
        if tap.layout != "NHWC":
            raise ValueError(
                f"methods.frskd.taps: needs maps, and {name} of {student.name} is tokens of one size; choose a "
                "convolutional student, or a Swin"
            )
        return connectors.spatial_size(tap, image_size)

    if names is None:
        names = list({size(name): name for name in student.taps if name != "stem"}.values())
    names = tuple(find_tap(student, name, "methods.frskd.taps")[0] for name in names)
    sizes = [size(name) for name in names]
    halves = [tuple(-(-side // 2) for side in larger) for larger in sizes[:-1]]
    if len(names) < 2 or halves != sizes[1:]:
        raise ValueError(
            f"methods.frskd.taps={names}: needs two maps or more, each half as large as the one before (rounded "
            f"up), and at images of {image_size} these are {sizes}"
        )
    return names


REGISTER = {"frskd": FRSKD}
