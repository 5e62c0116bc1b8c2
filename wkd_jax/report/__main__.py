"""Command line: makes the report of a run again, or one page that compares several.

    python -m wkd_jax.report RUN
    python -m wkd_jax.report RUN RUN [RUN ...] [--out FILE]

RUN is the work directory of a run, finished or not. Nothing is run or changed, and JAX is not needed.

One run: `report.html` in its directory, as `wkd_jax.main` writes it when a run ends.

Several: one page with a table of what they reached, best first; mean and spread of those that differ in their seeds
alone; curves of evaluation and of shared training losses on top of each other; accuracy or average precision by class,
if the classes are the same; and the settings on which their configs differ. The runs need have nothing in common;
classifiers and detectors are compared each among themselves. Links to the runs' own reports are relative, so keep the
page where it is to them.

`python -m wkd_jax.compare` makes or collects the runs of one config file, several methods and seeds, and writes their
final numbers as a table (Markdown, CSV) with paired differences. This command looks at any runs that are there.

Exit codes: 0 done; 1 a directory holds no run, is given twice, or a file in it is damaged: the message names it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from wkd_jax import report
from wkd_jax.command import Parser


def main(argv: Sequence[str] | None = None, prog: str = "python -m wkd_jax.report") -> int:
    """Entry point; returns the exit code."""
    parser = Parser(prog=prog, description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="work directory of a run, such as runs/NAME-1a2b3c4d")
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="where the page goes, a name that ends in .html; default: report.html in the directory of a single run, "
        "and compare/N-runs-HASH.html for several, the same for the same directories",
    )
    args = parser.parse_args(argv)
    try:
        path = (
            report.write(args.runs[0], args.out)
            if len(args.runs) == 1
            else report.write_comparison(args.runs, args.out)
        )
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(f"{'report' if len(args.runs) == 1 else 'comparison'}: {path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
