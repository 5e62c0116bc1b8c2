"""Command line: what a class similarity says, by its measures and by the classes it finds the most alike.

    python -m wkd_jax.interrelation runs/mine
    python -m wkd_jax.interrelation distance.npy --groups groups.json

Exit codes: 0 done; 1 a file is not there, or is not such a matrix.
"""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Sequence

import numpy as np

from wkd_jax.command import Parser
from wkd_jax.evaluation import structure
from wkd_jax.interrelation.store import Interrelation, load, load_distance

NEAREST = 3


def main(argv: Sequence[str] | None = None, prog: str = "python -m wkd_jax.interrelation") -> int:
    """Entry point; returns the exit code."""
    parser = Parser(prog=prog, description=__doc__)
    parser.add_argument(
        "file",
        type=pathlib.Path,
        help="a run's directory or its interrelation.npz, a file of the cache, or a .npy distance matrix such as the "
        "authors' (0 on the diagonal), whose classes are then numbers",
    )
    parser.add_argument(
        "--groups",
        type=pathlib.Path,
        metavar="FILE.json",
        help="a JSON list of names, one for each class in their order: do the most similar classes share a group?",
    )
    chosen = parser.parse_args(argv)
    try:
        print_structure(chosen.file, chosen.groups)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def print_structure(path: pathlib.Path, groups_path: pathlib.Path | None) -> None:
    """Prints measures and neighbours of the matrix in a file, or in a run's directory.

    Raises:
      OSError: If a file is not there.
      ValueError: If the file is not such a matrix, or the groups are not one name a class.
    """
    if path.suffix == ".npy":
        similarity = load_distance(path)
        names, measured = tuple(str(number) for number in range(len(similarity))), {}
    else:
        remedy = "give a run's directory, its interrelation.npz, or a distance matrix that ends in .npy"
        found = _of_run(path) if path.is_dir() else load(path, remedy=remedy)
        similarity, names, measured = found.similarity, found.class_names, found.structure
    groups = _groups(groups_path) if groups_path else []
    structure.check_groups(groups, names)
    lines = structure.sentences(measured or structure.measure(similarity), similarity, groups)
    others = np.array(similarity, np.float64)
    np.fill_diagonal(others, -np.inf)
    lines += ["", f"The most similar other classes, {NEAREST} of each:"]
    for name, row in zip(names, others, strict=True):
        nearest = np.argsort(-row, kind="stable")[: min(NEAREST, len(names) - 1)]
        lines.append(f"{name}: {', '.join(f'{names[i]} {row[i]:.4f}' for i in nearest)}")
    sys.stdout.write("\n".join(lines) + "\n")


def _of_run(directory: pathlib.Path) -> Interrelation:
    path = directory / "interrelation.npz"
    if not path.exists():
        raise FileNotFoundError(
            f"{directory} has no interrelation.npz: give the directory of a run that uses a class similarity, once it "
            "has begun"
        )
    return load(path)


def _groups(path: pathlib.Path) -> list[str]:
    try:
        groups = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(groups, list) or not all(isinstance(name, str) for name in groups):
        raise ValueError(f"{path}: needs a list of names, one a class")
    return groups


if __name__ == "__main__":
    sys.exit(main())
