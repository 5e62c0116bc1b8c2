"""Command line: lists the networks.

python -m wkd_jax.models [NAME ...] [--num_classes C] [--image_size H W]
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Sequence

from flax import nnx

from wkd_jax import registry
from wkd_jax.models import cost
from wkd_jax.types import ModelInfo
from wkd_jax.weights.public import PUBLIC

WIDTHS = (28, 7, 11, 11, 7, 43, 0)  # of the columns


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m wkd_jax.models",
        description="List the networks: parameters, multiply-adds of one image, taps as name channels/stride (a tap of "
        "tokens has t after it, a signed one +-), and the accuracy that the publishers of weights report.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="networks to list; default: all")
    parser.add_argument("--num_classes", type=int, help="default: that of the published weights, or 100")
    parser.add_argument("--image_size", type=int, nargs=2, metavar=("H", "W"), help="default: 224, or 32 of CIFAR nets")
    args = parser.parse_args(argv)
    try:
        show("network", "classes", "parameters", "MACs", "image", "published top-1 / top-5, %", "taps")
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
    image_size = image_size or factory.family.IMAGE_SIZE
    num_classes = num_classes or (public[0].num_classes if public else 1000 if image_size[0] == 224 else 100)
    takes_size = "image_size" in inspect.signature(factory).parameters
    settings = {"image_size": image_size} if takes_size else {}
    model = nnx.eval_shape(lambda: factory(num_classes, rngs=nnx.Rngs(0), **settings))
    accuracies = [f"{e.top1:.2f}" + (f" / {e.top5:.2f}" if e.top5 else "") for e in public]
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
