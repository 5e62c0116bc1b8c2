"""What the networks share: registry entries and keys of other code bases; the classifiers also parts that end in taps.

A family of classifiers is one file with a class derived from `Staged`. It builds its layers, publishes `info`, and says
what each part and the head compute; running the whole network, or its rest from a tap on, is the same for all of them.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
from flax import nnx

from wkd_jax import registry
from wkd_jax.types import Array, ModelInfo, Outputs


class Step(NamedTuple):
    """What a code base does with an array, in PyTorch's layout, before it stores it.

    Attributes:
      shape: Shape in PyTorch's layout -> shape as stored.
      store: Array in PyTorch's layout -> array as stored.
      load: The way back, up to the shape where `store` only changes that.
      note: What whoever loads should know of it.
    """

    shape: Callable[[tuple[int, ...]], tuple[int, ...]]
    store: Callable[[np.ndarray], np.ndarray]
    load: Callable[[np.ndarray], np.ndarray]
    note: str = ""


@dataclasses.dataclass(frozen=True)
class KeyStyle:
    """How a code base names the arrays of a network: rewritings of our own names.

    Our name of an array, "layer1/0/conv1/kernel", has the canonical key "layer1.0.conv1.weight"
    (`wkd_jax.weights.keys`); each rewriting is applied to that in turn.

    Attributes:
      renames: ((regular expression, replacement), ...) for `re.sub`, in order.
      columns: Regular expression of the canonical keys of vectors [D] that this style stores as [D, 1, 1]; "" for none.
      steps: ((regular expression of canonical keys, what is done with those arrays), ...), in order.
    """

    renames: tuple[tuple[str, str], ...] = ()
    columns: str = ""
    steps: tuple[tuple[str, Step], ...] = ()


class Network(nnx.Module):
    """What the listing of networks and `wkd_jax.weights` ask of every network.

    Attributes:
      IMAGE_SIZE: (height, width) of the images that the family was designed for, pixels.
      KEY_STYLES: Names of the arrays in other code bases, by code base; the first is what weights are exported in.
      trunk_of: Registered name of the network whose beginning this one has under "trunk/"; "" if it has none.
      norm_eps: Added to the variances where normalisation is fixed; None where it is not.
    """

    IMAGE_SIZE: ClassVar[tuple[int, int]] = (224, 224)
    KEY_STYLES: ClassVar[Mapping[str, KeyStyle]] = {"torchvision": KeyStyle()}
    trunk_of: str = ""
    norm_eps: float | None = None

    @property
    def info(self) -> ModelInfo:
        """Taps and sizes."""
        raise NotImplementedError

    @property
    def by_class(self) -> tuple[str, ...]:
        """Names of the arrays with entries for each class, the classifier's kernel and bias first."""
        kernel = self.info.classifier
        return kernel, kernel.removesuffix("kernel") + "bias"

    def buffers(self, style: str) -> dict[str, np.ndarray]:
        """What PyTorch's state dict of a style holds besides weights and insists on: tables that never change."""
        del style
        return {}

    def remarks(self, style: str, trunk: str, described: Mapping[str, Any]) -> list[str]:
        """In what the network of a file differs from this one though all arrays fit, a sentence each.

        Args:
          style: Whose keys the file has.
          trunk: Where it holds a trunk alone: the registered name of the network whose trunk it is; else "".
          described: What it says of its network, {"name": ..., settings}; empty if nothing.
        """
        del style, trunk, described
        return []


class Staged(Network):
    """A network of parts, one after the other, each ending in the tap of its name, then a head.

    A family defines `info`, whose taps name the parts in order, `_part` and `_head`. `pooled` and `logits` are float32;
    taps have the compute dtype.

    Attributes:
      remat: Whether training keeps the parts' results alone and computes what is inside them again for the gradient:
        less memory, a second forward pass.

    Args:
      name: Registered name of the network.
      num_classes: Rows of the classifier.
      dtype: Compute dtype; parameters and statistics stay float32.
    """

    def __init__(self, name: str, num_classes: int, dtype: Any) -> None:
        self.name = name
        self.num_classes = num_classes
        self.dtype = dtype
        self.remat = False

    def _part(self, name: str, x: Array, *, train: bool, rngs: nnx.Rngs | None) -> Array | tuple[Array, Array]:
        """The part that ends in the tap `name`, from the tap before it (or the image).

        Returns:
          The tap; where its `preactivation` is set, (tap, the same before the last ReLU).
        """
        raise NotImplementedError

    def _head(self, x: Array, *, train: bool, rngs: nnx.Rngs | None) -> tuple[Array | None, Array, Array]:
        """(positions, pooled, logits) of `Outputs` from the last tap; pooled and logits float32."""
        raise NotImplementedError

    def __call__(self, image: Array, *, train: bool, rngs: nnx.Rngs | None = None) -> Outputs:
        """Runs the whole network on [B, H, W, 3] normalised images.

        Args:
          image: Any float dtype.
          train: Whether to use batch statistics, dropout and stochastic depth.
          rngs: Source of dropout and stochastic depth; only networks that have either need it, in training.

        Raises:
          ValueError: If the network does not take images of this size.
        """
        info, size = self.info, image.shape[1:3]
        if info.image_size not in (None, size):
            raise ValueError(
                f"{self.name} was built for images of {info.image_size} and was given {size}: build it with "
                f"image_size={size}"
            )
        return self._run(image, list(info.taps), train=train, rngs=rngs)

    def forward_from(self, tap: str, x: Array, *, train: bool, rngs: nnx.Rngs | None = None) -> Outputs:
        """Continues from `x` in the place of the feature named `tap`; the outputs hold the taps after it.

        Raises:
          ValueError: If there is no such tap.
        """
        taps = list(self.info.taps)
        if tap not in taps:
            raise ValueError(registry.unknown(f"tap of {self.name}", tap, taps))
        return self._run(x, taps[taps.index(tap) + 1 :], train=train, rngs=rngs)

    def _run(self, x: Array, parts: Sequence[str], *, train: bool, rngs: nnx.Rngs | None) -> Outputs:
        """The named parts, then the head."""
        x, given = x.astype(self.dtype), x.shape
        taps: dict[str, Array] = {}
        preactivations: dict[str, Array] = {}
        for part in parts:
            run = _runner(part, train)
            x = (nnx.remat(run) if self.remat and train else run)(self, x, rngs)
            if isinstance(x, tuple):
                x, preactivations[part] = x
            taps[part] = x
            if 0 in x.shape:
                raise ValueError(f"{self.name}: an input of {given} is too small, {part} would have shape {x.shape}")
        positions, pooled, logits = self._head(x, train=train, rngs=rngs)
        return Outputs(logits, taps, pooled, positions, preactivations)


def _runner(part: str, train: bool) -> Callable[[Staged, Array, nnx.Rngs | None], Any]:
    """A part as a function of everything it reads and changes, as `nnx.remat` needs it."""

    def run(network: Staged, x: Array, rngs: nnx.Rngs | None) -> Any:
        return network._part(part, x, train=train, rngs=rngs)

    return run


def factories(family: type[Network], names: Iterable[str]) -> dict[str, Callable[..., Network]]:
    """Registry entries of a family: a function for each name, called as factory(num_classes, *, rngs, ...).

    Configs are checked against the signatures of factories, and that of an NNX class is (*args, **kwargs); these have
    the one of its `__init__`, less the name. Their attribute `family` is the class.
    """

    def factory(name: str) -> Callable[..., Network]:
        def build(*args: Any, **kwargs: Any) -> Network:
            return family(name, *args, **kwargs)

        signature = inspect.signature(family.__init__)
        build.__signature__ = signature.replace(parameters=list(signature.parameters.values())[2:])  # type: ignore[attr-defined]
        build.__doc__ = family.__doc__
        build.family = family  # type: ignore[attr-defined]
        return build

    return {name: factory(name) for name in names}
