"""Command line: makes the report of a run again.

python -m wkd_jax.report WORKDIR
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from wkd_jax import report


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m wkd_jax.report", description="Make the report of a run again.")
    parser.add_argument("workdir", help="the run's work directory")
    args = parser.parse_args(argv)
    try:
        path = report.write(args.workdir)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(f"report: {path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
