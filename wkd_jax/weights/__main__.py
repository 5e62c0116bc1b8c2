"""Command line: weights in and out.

    python -m wkd_jax.weights list
    python -m wkd_jax.weights import SOURCE --out DIR [--model resnet34]
    python -m wkd_jax.weights export RUN --to torch --out student.safetensors

`import --help` and `export --help` have the arguments. Exit codes: 0 done; 1 an error, nothing was written; 2 the
command line is wrong. Environment: WKD_JAX_CACHE, where downloads are kept (~/.cache/wkd_jax).
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import math
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from wkd_jax import config as config_lib
from wkd_jax import registry, weights
from wkd_jax.command import Parser
from wkd_jax.training.teacher import read_run
from wkd_jax.types import Normalisation, Params
from wkd_jax.weights import export, match, public

NORMALISATIONS = {"imagenet": public.IMAGENET, "inception": public.INCEPTION, "cifar100": public.CIFAR100}
FORMATS = ("torch", "flax", "orbax", "serving")


_LIST = """Lists published weights by the names that `import` and configs (teacher.weights, init.weights) take.

    %(prog)s

A line each: name, network, what it was trained on, its publisher's top-1 / top-5 or box AP in %%, where it is."""

_IMPORT = """Turns somebody's file into a directory that configs take as teacher.weights or init.weights.

Reads PyTorch (.pth, .pt, .pkl), safetensors and Google's .npz files; nothing in them is run. Downloads are kept in
$WKD_JAX_CACHE.

    %(prog)s resnet34.tv_in1k --out teachers/resnet34
    %(prog)s mine.pth --model resnet18 --num_classes 37 --normalisation imagenet --out teachers/mine
    python -m wkd_jax.main --config imagenet_wkd --config.teacher.weights=teachers/resnet34

Exit codes: 0 done; 1 if the file cannot be read, does not fit, or --out is there already."""

_EXPORT = """Writes the student of a finished run, or imported weights, for others.

    %(prog)s runs/mine --to torch --out student.safetensors
    %(prog)s runs/mine --to serving --out student.bin --image_size 224 224

Exit codes: 0 done; 1 if the run is not finished, the network has no such form, or --out is there already."""


def main(argv: Sequence[str] | None = None, prog: str = "python -m wkd_jax.weights") -> int:
    """Entry point; returns the exit code."""
    args = _parser(prog).parse_args(argv)
    try:
        lines = args.run(args)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    return 0


def _parser(prog: str) -> Parser:
    parser = Parser(prog=prog, description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    listing = commands.add_parser(
        "list", help="list published weights by the names that import and configs take", description=_LIST
    )
    listing.set_defaults(run=_list)

    reading = commands.add_parser(
        "import",
        help="turn somebody's file into a directory that configs take as teacher.weights or init.weights",
        description=_IMPORT,
    )
    reading.add_argument("source", help="path, https or gs URL, or a name of the list")
    reading.add_argument(
        "--model", help="registered name of the network (python -m wkd_jax.models); default: as listed"
    )
    reading.add_argument("--out", required=True, type=pathlib.Path, help="directory to write")
    reading.add_argument("--num_classes", type=int, help="rows of the classifier; default: as many as the file has")
    reading.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an argument of the network, as in a config; may be given again; default: none",
    )
    reading.add_argument(
        "--normalisation",
        help=f"how the network wants its images: {', '.join(NORMALISATIONS)}, or six numbers, mean and std of r, g, b "
        "in units of the full range, with commas; default: as listed, or left open",
    )
    reading.set_defaults(run=_import)

    writing = commands.add_parser(
        "export", help="write the student of a finished run, or imported weights, for others", description=_EXPORT
    )
    writing.add_argument("source", type=pathlib.Path, help="work directory of a run, or a directory that import made")
    writing.add_argument(
        "--to",
        required=True,
        choices=FORMATS,
        help="torch: safetensors that load_state_dict takes; flax: safetensors of our names in Flax's layouts; orbax: "
        "the same as nested dicts; serving: a serialised function from uint8 images to logits (jax.export)",
    )
    writing.add_argument("--out", required=True, type=pathlib.Path, help="file (torch, serving) or directory to write")
    writing.add_argument("--style", help="whose keys, with --to torch; default: the first of the network's styles")
    writing.add_argument("--which", choices=("latest", "best"), help="checkpoint of the run; default: latest")
    writing.add_argument(
        "--image_size", type=int, nargs=2, metavar=("H", "W"), help="with --to serving; default: the run's"
    )
    writing.set_defaults(run=_export)
    return parser


def _list(args: argparse.Namespace) -> list[str]:
    del args
    rows = [("name", "network", "data set", "top-1 / top-5 or box AP", "url")]
    rows += [(name, entry.model, entry.data, entry.accuracy, entry.url) for name, entry in public.PUBLIC.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _import(args: argparse.Namespace) -> list[str]:
    _refuse_existing(args.out / weights.NATIVE_FILE)
    given = _normalisation(args.normalisation)
    if args.num_classes is not None and args.num_classes < 1:
        raise ValueError(f"--num_classes {args.num_classes}: must be 1 or more")
    file = weights.open_file(args.source)
    name = args.model or file.model.get("name")
    if not name:
        raise ValueError(f"{args.source}: does not say which network it is of: give --model")
    known = file.model if name == file.model.get("name") else {"name": name}
    model = config_lib.model_section({**known, **dict(_setting(text) for text in args.set)}, "model")
    classes = args.num_classes or file.num_classes(model)
    arrays, notes = file.arrays(match.abstract(model, classes or 2), whole=False)
    normalisation = given or file.normalisation
    if normalisation is None:
        notes.append(
            "how the network wants its images is not known: a config says it as teacher.normalisation, or import again "
            f"with --normalisation {', '.join(NORMALISATIONS)}, or six numbers"
        )
    path = weights.write(args.out, arrays, model, normalisation, source=args.source, sha256=file.sha256)
    count = sum(array.size for array in arrays.values())
    of = f"{classes} classes" if classes else "its trunk alone"
    return [*notes, f"{name}, {of}, {count:,} numbers in {len(arrays)} arrays: {path}"]


def _export(args: argparse.Namespace) -> list[str]:
    for flag, value, target in (("style", args.style, "torch"), ("image_size", args.image_size, "serving")):
        if value and args.to != target:
            raise ValueError(f"--{flag} {value}: has a meaning with --to {target} alone")
    _refuse_existing(args.out / weights.NATIVE_FILE if args.to == "flax" else args.out)
    source = _exportable(args.source, args.which)
    model, lines = match.abstract(source.model, source.num_classes), []
    if args.to == "torch":
        lines = export.to_torch(args.out, model, source.arrays, style=args.style, normalisation=source.normalisation)
    elif args.to == "flax":
        weights.write(args.out, source.arrays, source.model, source.normalisation, source=str(args.source))
    elif args.to == "orbax":
        export.to_orbax(args.out, model, source.arrays)
    else:
        size = args.image_size or source.image_size or model.info.image_size
        if not size:
            raise ValueError(f"{args.source}: does not say the size of its images: give --image_size HEIGHT WIDTH")
        if source.normalisation is None:
            raise ValueError(f"{args.source}: does not say how it wants its images: import with --normalisation")
        export.to_serving(args.out, model, source.arrays, source.normalisation, tuple(size))
    return [*lines, f"{model.info.name}, {source.num_classes} classes: {args.out}"]


@dataclasses.dataclass(frozen=True)
class _Exportable:
    """A network to write: section of a config, class count, size of its images (None if not known), and the rest."""

    model: Mapping[str, Any]
    num_classes: int
    image_size: tuple[int, int] | None
    normalisation: Normalisation | None
    arrays: Params


def _exportable(source: pathlib.Path, which: Literal["latest", "best"] | None) -> _Exportable:
    if source.is_file():
        raise ValueError(f"{source}: is a file: import it first, and export the directory that is made")
    if not (source / weights.NATIVE_FILE).exists():
        run = read_run(source, which or "latest")
        return _Exportable(run.config["student"], run.num_classes, run.image_size, run.normalisation, run.arrays)
    if which:
        raise ValueError(f"--which {which}: has a meaning with a run alone")
    file = weights.open_file(source)
    model = config_lib.model_section(file.model, str(source))
    classes = file.num_classes(model)
    if classes is None:
        raise ValueError(f"{source}: holds the trunk of {model['name']} alone, which is no network to export")
    arrays, _ = file.arrays(match.abstract(model, classes))
    return _Exportable(model, classes, None, file.normalisation, arrays)


def _refuse_existing(path: pathlib.Path) -> None:
    if path.exists():
        raise ValueError(f"{path} exists already: remove it, or give another --out")


def _setting(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set {text}: write --set {key}=VALUE")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def _normalisation(text: str | None) -> Normalisation | None:
    if text is None or text in NORMALISATIONS:
        return NORMALISATIONS.get(text or "")
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != 6 or not all(map(math.isfinite, numbers)) or min(numbers[3:]) <= 0:
        names = registry.unknown("normalisation", text, NORMALISATIONS)
        raise ValueError(f"--normalisation: {names}, or six numbers with commas (mean and std, std above 0)")
    return Normalisation(tuple(numbers[:3]), tuple(numbers[3:]))


if __name__ == "__main__":
    sys.exit(main())
