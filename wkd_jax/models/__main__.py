"""Command line: lists the networks.

    python -m wkd_jax.models
    python -m wkd_jax.models resnet18 mobilenetv2 --num_classes 10 --image_size 64 64

A line each: trained parameters, multiply-adds of one image, taps as name channels/stride (a tap of tokens has t after
it, a signed one +-), and what publishers of weights report: top-1 / top-5, or box AP of detectors, whose classes
include the background. A config takes the names as student.name, and their other arguments beside it.

Exit codes: 0 done; 1 if there is no such network, or not of that size.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence

from flax import nnx

from wkd_jax import registry
from wkd_jax.command import Parser
from wkd_jax.models import cost
from wkd_jax.types import ModelInfo
from wkd_jax.weights.public import PUBLIC

WIDTHS = (28, 7, 11, 11, 7, 43, 0)  # of the columns


def main(argv: Sequence[str] | None = None, prog: str = "python -m wkd_jax.models") -> int:
    """Entry point; returns the exit code."""
    parser = Parser(prog=prog, description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="networks to list; default: all")
    parser.add_argument(
        "--num_classes",
        type=int,
        metavar="C",
        help="rows of the classifier; default: those of the published weights, 81 of detectors, or 100",
    )
    parser.add_argument(
        "--image_size",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        help="pixels; default: 224 x 224, 32 x 32 of CIFAR nets, 800 x 1344 of detectors",
    )
    args = parser.parse_args(argv)
    try:
        show("network", "classes", "parameters", "MACs", "image", "published, %", "taps")
        for name in args.names or registry.entries("models"):
            show(*row(name, args.num_classes, args.image_size and tuple(args.image_size)))
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def show(*cells: str) -> None:
    """Prints a line at once, since each network takes a moment."""
    sys.stdout.write("  ".join(map(str.ljust, cells, WIDTHS)).rstrip() + "\n")
    sys.stdout.flush()


def row(name: str, num_classes: int | None, image_size: tuple[int, int] | None) -> tuple[str, ...]:
    """The cells of one network."""
    public = [entry for entry in PUBLIC.values() if entry.model == name]
    factory = registry.get("models", name)
    designed_for = factory.family.IMAGE_SIZE
    image_size = image_size or designed_for
    num_classes = num_classes or (public[0].num_classes if public else {224: 1000, 800: 81}.get(designed_for[0], 100))
    takes_size = "image_size" in inspect.signature(factory).parameters
    settings = {"image_size": image_size} if takes_size else {}
    model = nnx.eval_shape(lambda: factory(num_classes, rngs=nnx.Rngs(0), **settings))
    accuracies = [entry.accuracy for entry in public if entry.num_classes]
    return (
        name,
        str(num_classes),
        f"{cost.parameters(model):,}",
        f"{cost.macs(model, image_size) / 1e9:.4f} G",
        f"{image_size[0]}x{image_size[1]}",
        ", ".join(accuracies) or "-",
        " ".join(taps(model.info)),
    )


def taps(info: ModelInfo) -> list[str]:
    """A word a tap."""
    return [
        f"{name} {tap.channels}/{tap.stride}{'t' if tap.layout == 'tokens' else ''}{'+-' if tap.signed else ''}"
        for name, tap in info.taps.items()
    ]


if __name__ == "__main__":
    sys.exit(main())
