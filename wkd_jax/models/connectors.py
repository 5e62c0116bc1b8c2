"""Learnable projectors from a student's feature to the shape of a teacher's, built from what the models publish.

A projector belongs to a method, trains with the student and never reaches the exported network. It computes in the
dtype of the feature it is given, which is the student's (statistics of BatchNorm in float32; multiplications of float32
at JAX's default precision for the device), and starts from torch's default values, as the reference code does.
"""

from __future__ import annotations

from collections.abc import Sequence

from flax import nnx

from wkd_jax import registry
from wkd_jax.models.layers import BatchNorm, Conv, ConvTranspose, Linear
from wkd_jax.types import Array, Tap

Size = tuple[int, int]

BOTTLENECK_WIDTH = 256


class ConvProjector(nnx.Module):
    """Convolutions with nothing between them, then BatchNorm and, unless left out, ReLU.

    The ReLU means that the result cannot follow a teacher's feature below 0 (a `Tap` with `signed=True`, such as those
    of a Wide ResNet): published results with such teachers carry that limit.
    """

    def __init__(self, convs: Sequence[nnx.Module], features: int, *, relu: bool = True) -> None:
        self.convs = nnx.List(convs)
        self.bn = BatchNorm(features)
        self.relu = relu

    def __call__(self, x: Array, *, train: bool) -> Array:
        """Maps [B, H, W, D] of the student to [B, H', W', D'] of the teacher."""
        for conv in self.convs:
            x = conv(x)
        return self.bn(x, train=train, relu=self.relu)


class LinearProjector(nnx.Module):
    """One linear map at each position, of maps or of tokens; the result may have either sign."""

    def __init__(self, in_features: int, features: int, *, rngs: nnx.Rngs) -> None:
        self.linear = Linear(in_features, features, rngs=rngs)

    def __call__(self, x: Array, *, train: bool) -> Array:
        """Maps [..., D] to [..., D']. Every position is kept: prefix tokens are the caller's to drop."""
        del train
        return x @ self.linear.kernel[...].astype(x.dtype) + self.linear.bias[...].astype(x.dtype)


class Identity(nnx.Module):
    """The student's feature itself."""

    def __call__(self, x: Array, *, train: bool) -> Array:
        """Returns `x`."""
        del train
        return x


def spatial_size(tap: Tap, image_size: Size) -> Size:
    """Positions (height, width) of a tap for images of a size: its own, or the image's by the stride.

    Example:
      >>> spatial_size(Tap(channels=512, stride=32), (224, 200))
      (7, 7)
    """
    if tap.size is not None:
        return tap.size
    height, width = image_size
    if tap.rounding == "down":
        return height // tap.stride, width // tap.stride
    return -(-height // tap.stride), -(-width // tap.stride)


def build(
    name: str, student: Tap, teacher: Tap, *, student_size: Size, teacher_size: Size, rngs: nnx.Rngs
) -> nnx.Module:
    """The projector called `name` from a tap of the student to a tap of the teacher.

    "conv1x1": one convolution, BatchNorm, ReLU (the regressor of FitNet, arXiv 1412.6550). Equal sizes: 1x1. Student
      half as large: transposed 4x4 of stride 2. Student twice as large: 3x3 of stride 2. Otherwise, where the student
      is no smaller, an unpadded convolution of size 1 + student - teacher.
    "bottleneck": 1x1 to 256 channels, 3x3, 1x1, each with a bias and nothing between them, then BatchNorm and ReLU
      (WKD, arXiv 2412.08139). Sizes must be equal.
    "conv3x3": 3x3 without a bias, BatchNorm: WKD's on pooled regions of a pyramid, which have either sign. Sizes must
      be equal.
    "linear": one linear map at each position, of maps or tokens. Keeps the size.
    "none": nothing; channels must be equal. Keeps the size.

    Args:
      name: One of the above.
      student: What the student's tap holds.
      teacher: What the teacher's tap holds.
      student_size: (height, width) of the student's tap, positions; see `spatial_size`.
      teacher_size: The same of the teacher's.
      rngs: Source of the initial values.

    Returns:
      A module, called as projector(x, *, train), that returns the dtype of x.

    Raises:
      ValueError: If there is no such projector, or it cannot serve these taps; the message names a remedy.

    Example:
      >>> import jax.numpy as jnp
      >>> student, teacher = Tap(channels=64, stride=4), Tap(channels=256, stride=4)
      >>> projector = build("conv1x1", student, teacher, student_size=(8, 8), teacher_size=(8, 8), rngs=nnx.Rngs(0))
      >>> projector(jnp.zeros((2, 8, 8, 64)), train=True).shape
      (2, 8, 8, 256)
    """
    if name not in BUILDERS:
        raise ValueError(registry.unknown("projector", name, BUILDERS))
    return BUILDERS[name](student, teacher, student_size, teacher_size, rngs)


def _conv1x1(student: Tap, teacher: Tap, student_size: Size, teacher_size: Size, rngs: nnx.Rngs) -> ConvProjector:
    _require_maps("conv1x1", student, teacher)
    channels = student.channels, teacher.channels
    conv: nnx.Module
    if student_size == _double(teacher_size):
        conv = Conv(*channels, 3, stride=2, padding=1, dtype=None, rngs=rngs)
    elif _double(student_size) == teacher_size:
        conv = ConvTranspose(*channels, 4, stride=2, padding=1, dtype=None, rngs=rngs)
    else:
        kernel = tuple(1 + s - t for s, t in zip(student_size, teacher_size, strict=True))
        if min(kernel) < 1:
            raise ValueError(
                f"projector 'conv1x1': the student's tap is {_text(student_size)} and the teacher's "
                f"{_text(teacher_size)}; it must be exactly half as large, or no smaller, along each side. Choose "
                "other taps, or 'linear' (which keeps the size) where the loss can compare unequal sizes"
            )
        conv = Conv(*channels, kernel, dtype=None, rngs=rngs)
    return ConvProjector([conv], teacher.channels)


def _bottleneck(student: Tap, teacher: Tap, student_size: Size, teacher_size: Size, rngs: nnx.Rngs) -> ConvProjector:
    _require_maps("bottleneck", student, teacher)
    _require_one_size("bottleneck", student_size, teacher_size)
    convs = [
        Conv(student.channels, BOTTLENECK_WIDTH, 1, dtype=None, rngs=rngs),
        Conv(BOTTLENECK_WIDTH, BOTTLENECK_WIDTH, 3, padding=1, dtype=None, rngs=rngs),
        Conv(BOTTLENECK_WIDTH, teacher.channels, 1, dtype=None, rngs=rngs),
    ]
    return ConvProjector(convs, teacher.channels)


def _conv3x3(student: Tap, teacher: Tap, student_size: Size, teacher_size: Size, rngs: nnx.Rngs) -> ConvProjector:
    _require_maps("conv3x3", student, teacher)
    _require_one_size("conv3x3", student_size, teacher_size)
    conv = Conv(student.channels, teacher.channels, 3, padding=1, use_bias=False, dtype=None, rngs=rngs)
    return ConvProjector([conv], teacher.channels, relu=False)


def _linear(student: Tap, teacher: Tap, student_size: Size, teacher_size: Size, rngs: nnx.Rngs) -> LinearProjector:
    del student_size, teacher_size
    return LinearProjector(student.channels, teacher.channels, rngs=rngs)


def _none(student: Tap, teacher: Tap, student_size: Size, teacher_size: Size, rngs: nnx.Rngs) -> Identity:
    del student_size, teacher_size, rngs
    if student.channels != teacher.channels:
        raise ValueError(
            f"projector 'none' changes nothing, and the student's tap has {student.channels} channels, the teacher's "
            f"{teacher.channels}: choose 'linear' or 'conv1x1', or taps of equal width"
        )
    return Identity()


BUILDERS = {"conv1x1": _conv1x1, "bottleneck": _bottleneck, "conv3x3": _conv3x3, "linear": _linear, "none": _none}


def _require_maps(name: str, student: Tap, teacher: Tap) -> None:
    for side, tap in (("student", student), ("teacher", teacher)):
        if tap.layout != "NHWC":
            raise ValueError(
                f"projector {name!r} needs maps, and the {side}'s tap has layout {tap.layout!r}: choose 'linear'"
            )


def _require_one_size(name: str, student_size: Size, teacher_size: Size) -> None:
    if student_size != teacher_size:
        raise ValueError(
            f"projector {name!r} keeps the size, and the student's tap is {_text(student_size)}, the teacher's "
            f"{_text(teacher_size)}: choose taps of equal size, or 'conv1x1', which resizes"
        )


def _double(size: Size) -> Size:
    return 2 * size[0], 2 * size[1]


def _text(size: Size) -> str:
    return f"{size[0]} x {size[1]}"
