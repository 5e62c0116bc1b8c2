"""ICD: the teacher's maps are imitated where a decoder looks that was taught to find instances in them.

Kang, Zhang, Zhang, Sun, Zheng, "Instance-Conditional Knowledge Distillation for Object Detection", NeurIPS 2021, arXiv
2110.12724.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wkd_jax import losses
from wkd_jax.methods import checks, schedule
from wkd_jax.models.detection.faster_rcnn import LEVELS
from wkd_jax.models.layers import Conv, LayerNorm, Linear, uniform_fan_in
from wkd_jax.types import Array, Context, Setup, Tap, Term, Terms

SCALES = 5  # bins of a side's length
# U(-sqrt(6 / 4D), sqrt(6 / 4D)) where D is kept: Xavier's form for queries, keys and values in one matrix [D, 3D].
xavier_packed = jax.nn.initializers.variance_scaling(0.5, "fan_avg", "uniform")
zeros = jax.nn.initializers.zeros


class Instances(NamedTuple):
    """What the decoder is asked about, in Q slots an image.

    Attributes:
      label: [B, Q] int32.
      box: [B, Q, 4] xyxy, fractions of the image's width and height.
      point: [B, Q, 2] (x, y) within the box, likewise: its centre, displaced.
      present: [B, Q] bool, slots that hold an instance.
      real: [B, Q] bool, slots that hold one of the image's own.
    """

    label: Array
    box: Array
    point: Array
    present: Array
    real: Array


def instances(
    key: Array, boxes: Array, labels: Array, box_valid: Array, size: Array, *, slots: int, fakes: float, jitter: float
) -> Instances:
    """The boxes of each image, and made-up ones in slots that are free.

    An image with n boxes gets min(fakes * n, slots - n) others. Class and sides of each are those of a box drawn from
    the whole batch, sides limited to 0.002 and 0.7 of the image, and its centre is uniform in [0.03, 0.97].

    Args:
      key: PRNG key.
      boxes: [B, M, 4] xyxy, pixels; padding may hold anything.
      labels: [B, M] int32.
      box_valid: [B, M] bool.
      size: [B, 2], (height, width) of the images, pixels.
      slots: Q; M where that is larger.
      fakes: For each box of the image.
      jitter: Points are displaced from the centre by up to so much of the box's sides.
    """
    batch, count = box_valid.shape
    free = max(slots - count, 0)
    where, displaced, chosen = jax.random.split(key, 3)
    box = jnp.where(box_valid[..., None], boxes, 0) / jnp.tile(size[:, None, ::-1], 2)
    real = box_valid & jnp.all(box[..., 2:] > box[..., :2], axis=-1)
    # The batch's boxes, the real ones first.
    order = jnp.argsort(~real.reshape(-1), stable=True)
    drawn = order[jax.random.randint(chosen, (batch, count + free), 0, jnp.maximum(jnp.sum(real), 1))]
    sides = jnp.clip((box[..., 2:] - box[..., :2]).reshape(-1, 2)[drawn], 0.002, 0.7)
    centre = jax.random.uniform(where, (batch, count + free, 2), minval=0.03, maxval=0.97)
    made = jnp.clip(jnp.concatenate([centre - sides / 2, centre + sides / 2], axis=-1), 0, 1)
    real, box, label = (jnp.pad(x, ((0, 0), (0, free), *((0, 0),) * (x.ndim - 2))) for x in (real, box, labels))
    number, own = jnp.cumsum(~real, axis=1), jnp.sum(real, axis=1, keepdims=True)
    fake = ~real & (number <= jnp.minimum(fakes * own, jnp.maximum(slots - own, 0)))
    box = jnp.where(real[..., None], box, made)
    label = jnp.where(real, label, labels.reshape(-1)[drawn])
    shift = jax.random.uniform(displaced, centre.shape, minval=-jitter, maxval=jitter)
    point = (box[..., :2] + box[..., 2:]) / 2 + shift * (box[..., 2:] - box[..., :2])
    return Instances(label, box, point, real | fake, real)


def sines(x: Array, count: int) -> Array:
    """[..., count] sines, then cosines, of x at wave lengths from 1 to 10000 (Vaswani et al., arXiv 1706.03762)."""
    rates = 2 * math.pi / 10000 ** (2 * np.arange(count // 2) / count)
    angles = x[..., None] * rates.astype(np.float32)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class Perceptron(nnx.Module):
    """Three linear layers with ReLU between them.

    Args:
      in_features: Channels of the input.
      width: Of the hidden layers.
      out_features: Channels of the output.
      rngs: Source of the initial values.
    """

    def __init__(self, in_features: int, width: int, out_features: int, *, rngs: nnx.Rngs) -> None:
        sizes = in_features, width, width, out_features
        self.layers = nnx.List(Linear(a, b, rngs=rngs) for a, b in zip(sizes, sizes[1:], strict=False))

    def __call__(self, x: Array) -> Array:
        """Maps [..., in_features]."""
        for layer in self.layers[:-1]:
            x = nnx.relu(layer(x))
        return self.layers[-1](x)


class Decoder(nnx.Module):
    """Looks for instances in the teacher's pyramid: descriptions of them attend to its positions.

    Args:
      classes: Of objects.
      channels: Of the pyramid.
      width: Of queries, keys and values together.
      heads: Of the attention.
      rngs: Source of the initial values.
    """

    def __init__(self, classes: int, channels: int, width: int, heads: int, *, rngs: nnx.Rngs) -> None:
        self.classes, self.width, self.heads = classes, width, heads
        packed = {"kernel_init": xavier_packed, "bias_init": zeros, "rngs": rngs}
        self.encoder = Perceptron(classes + width + 2 * SCALES, width, width, rngs=rngs)
        # One linear layer of an embedding whose halves depend on the row and on the column: a layer for each.
        half = {"kernel_init": uniform_fan_in(width), "bias_init": uniform_fan_in(width), "rngs": rngs}
        self.row = Linear(width // 2, channels, **half)
        self.column = Linear(width // 2, channels, use_bias=False, **half)
        self.query = Linear(width, width, **packed)
        self.key = Conv(channels, width, 1, dtype=None, **packed)
        self.value = Conv(channels, width, 1, dtype=None, **packed)
        self.out = Linear(width, width, bias_init=zeros, rngs=rngs)
        self.norm1, self.norm2 = (LayerNorm(width, eps=1e-5) for _ in range(2))
        self.fc1, self.fc2 = Linear(width, 4 * width, rngs=rngs), Linear(4 * width, width, rngs=rngs)
        self.head = Perceptron(width, width, 5, rngs=rngs)

    def __call__(
        self, levels: Mapping[str, tuple[Array, Tap]], size: Array, asked: Instances
    ) -> tuple[Array, Array, Array]:
        """What it finds, and where it looked.

        Args:
          levels: Maps [B, H, W, channels], and what they are.
          size: [B, 2], (height, width) of the images, pixels.
          asked: Q instances an image.

        Returns:
          (outputs [B, Q, 5], see `losses.icd_auxiliary`; values [B, N, heads, d] of all N positions; weights
          [B, heads, N], see `losses.instance_attention`).
        """
        keys, values, valid = [], [], []
        for x, tap in levels.values():
            count = -(-size // tap.stride)  # rows and columns that the image covers
            places = [(jnp.arange(side) + 1) / count[:, axis, None] for axis, side in enumerate(x.shape[1:3])]
            row, column = self.row(sines(places[0], self.width // 2)), self.column(sines(places[1], self.width // 2))
            position = row[:, :, None] + column[:, None]
            keys.append(self.key(x + position.astype(x.dtype)))
            values.append(self.value(x))
            valid.append((places[0] <= 1)[:, :, None] & (places[1] <= 1)[:, None])
        key, value = (per_head(maps, self.heads) for maps in (keys, values))
        valid = jnp.concatenate([mask.reshape(len(mask), -1) for mask in valid], axis=1)
        description = self.encoder(self.describe(asked, size))
        query = self.query(description)
        query = query.reshape(*query.shape[:2], self.heads, -1)
        attended, weights = losses.instance_attention(query, key, value, valid=valid, real=asked.real)
        x = self.norm1(description + self.out(attended.reshape(description.shape)))
        x = self.norm2(x + self.fc2(nnx.relu(self.fc1(x))))
        return self.head(x), value, weights

    def describe(self, asked: Instances, size: Array) -> Array:
        """[B, Q, classes + width + 10]: class, place of the point, and which of five scales each side has in pixels."""
        pixels = (asked.box[..., 2:] - asked.box[..., :2]) * size[:, None, ::-1]
        scale = jnp.clip(1.44 * jnp.log(pixels) - 5, 0, SCALES - 1).astype(jnp.int32)
        place = sines(asked.point, self.width // 2)
        parts = jax.nn.one_hot(asked.label, self.classes), place, jax.nn.one_hot(scale, SCALES)
        return jnp.concatenate([part.reshape(*asked.label.shape, -1) for part in parts], axis=-1)


def per_head(maps: list[Array], heads: int) -> Array:
    """Maps [B, H, W, D] of all levels as [B, N, heads, D / heads]."""
    return jnp.concatenate([x.reshape(len(x), -1, heads, x.shape[-1] // heads) for x in maps], axis=1)


class ICD(nnx.Module):
    """weight * `losses.icd`, and the auxiliary task that its attention is learned from, as in the PyTorch release.

    A decoder (`Decoder`) is asked about the image's boxes and made-up ones (`instances`), and learns from the teacher's
    maps which are real and where their sides are. How much its attention for the real ones looks at a position weighs
    the difference there between its values of the teacher's map and a trained projection of the student's. The decoder
    learns from its own task alone.

    What differs from the release: class and size of made-up boxes are those of boxes drawn from the batch, not from a
    file of COCO's statistics (class frequencies, and a normal distribution of sizes by class). All is trained by the
    run's one optimizer; the release trains the decoder and the projection by AdamW (1e-4, weight decay 1e-4, cosine)
    with gradients clipped to a norm of 0.01, and clips the student's gradients to 1 elementwise. The teacher's pyramid
    and heads are not copied into the student. The label weight is 1; the weight 3 is for Faster R-CNN, other detectors
    have 8.
    """

    DEFAULTS: ClassVar[dict[str, Any]] = {
        "weight": 3.0,
        "auxiliary_weight": 1.0,  # of both losses of the auxiliary task
        "width": 256,  # of queries, keys and values
        "heads": 8,  # of the attention
        "instances": 100,  # at most so many an image, real and made up, unless the real ones alone are more
        "fakes": 5,  # made-up instances for each real one
        "jitter": 0.3,  # by how much of a box's sides its point may be off the centre
        "delay": 1000,  # steps at the beginning of the run in which the student's projection alone learns to imitate
        "schedule": schedule.DEFAULTS,
    }
    NEEDS_TEACHER = True
    TASK = "detection"

    def __init__(self, config: Any, setup: Setup, *, rngs: nnx.Rngs) -> None:
        schedule.check("icd", config["weight"], config["schedule"], setup.epochs)
        checks.positive("icd", config, "width", "heads", "instances")
        checks.not_negative("icd", config, "auxiliary_weight", "fakes", "jitter", "delay")
        if config["jitter"] >= 0.5:
            raise ValueError(
                f"methods.icd.jitter={config['jitter']}: must be below 0.5, where points leave their boxes"
            )
        if config["width"] % 4 or config["width"] % config["heads"]:
            raise ValueError(
                f"methods.icd.width={config['width']}: must be a multiple of 4 and of heads={config['heads']}"
            )
        self.config = config
        self.levels = {level: setup.teacher.taps[level] for level in LEVELS}
        width = config["width"]
        classes, channels = setup.teacher.num_classes - 1, self.levels[LEVELS[0]].channels
        self.decoder = Decoder(classes, channels, width, config["heads"], rngs=rngs)
        self.student_value = Conv(
            setup.student.taps[LEVELS[0]].channels,
            width,
            1,
            kernel_init=xavier_packed,
            bias_init=zeros,
            dtype=None,
            rngs=rngs,
        )

    def terms(self, context: Context) -> Terms:
        """Terms `distillation`, and of the auxiliary task `identification` and `localisation`."""
        config, batch = self.config, context.batch
        extra = batch.extra
        settings = {"slots": config["instances"], "fakes": config["fakes"], "jitter": config["jitter"]}
        asked = instances(context.key, extra["boxes"], batch.label, extra["box_valid"], extra["size"], **settings)
        levels = {level: (context.teacher.taps[level], tap) for level, tap in self.levels.items()}
        outputs, teacher, weights = self.decoder(levels, extra["size"], asked)
        early = context.progress.step < config["delay"]
        maps = [context.student.taps[level] for level in LEVELS]
        maps = [self.student_value(jnp.where(early, jax.lax.stop_gradient(x), x)) for x in maps]
        distillation = losses.icd(per_head(maps, config["heads"]), teacher, weights)
        distances = jnp.concatenate([asked.point - asked.box[..., :2], asked.box[..., 2:] - asked.point], axis=-1)
        identification, localisation = losses.icd_auxiliary(outputs, distances, asked.real)
        return {
            "distillation": Term(distillation, schedule.weight(config["weight"], config["schedule"], context.progress)),
            "identification": Term(identification, config["auxiliary_weight"], asked.present),
            "localisation": Term(localisation, config["auxiliary_weight"], asked.real),
        }


REGISTER = {"icd": ICD}
