"""The tables of docs/scaling.md: what `bench_scaling` counted, and the time it takes by published figures of chips.

    python -m benchmarks.scaling_times

Arithmetic, not measurement: peak rates times an assumed utilisation, ring collectives at the links' full rate.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib

RESULTS = pathlib.Path(__file__).parent / "results" / "scaling_hlo.json"


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of one accelerator; the sources are in docs/scaling.md and docs/performance.md.

    Attributes:
      tflops: Peak, bfloat16, dense.
      float32_tflops: Peak of products in full float32: on a TPU six passes of bfloat16.
      memory: Bytes a second of its memory.
      fabric: Bytes a second that it sends to others of its slice or server, one direction, all links together.
      network: The same between slices or servers, its share of the host's.
      host_chips: Chips of one host.
      host_cores: Physical cores of that host: half of its virtual CPUs, which are hardware threads.
    """

    tflops: float
    float32_tflops: float
    memory: float
    fabric: float
    network: float
    host_chips: int
    host_cores: int


CHIPS = {
    "TPU v5e": Chip(197, 197 / 6, 0.819e12, 200e9, 3.125e9, 4, 56),
    "TPU v5p": Chip(459, 459 / 6, 2.765e12, 600e9, 6.25e9, 4, 104),
    "TPU v6e": Chip(918, 918 / 6, 1.64e12, 400e9, 12.5e9, 4, 90),
    "H100 SXM": Chip(989, 67, 3.35e12, 450e9, 50e9, 8, 112),
}
UTILISATION = 0.4  # of the peak; an assumption
DECODED = 600  # images a second and core
HOP = 1e-6  # seconds that one hop of a torus adds to a collective
TORUS_HOPS = {8: 6, 64: 16, 256: 32}  # of an all-reduce on 2 x 4, 8 x 8 and 16 x 16 chips: the sides added up


def sent(kind: str, size: float, group: int) -> float:
    """Bytes that each device of a ring sends for a result of `size` bytes.

    Example:
      >>> sent("all-reduce", 100.0, 4), sent("all-gather", 100.0, 4), sent("reduce-scatter", 25.0, 4)
      (150.0, 75.0, 75.0)
    """
    share = (group - 1) / group
    factor = {"all-reduce": 2 * share, "reduce-scatter": group - 1, "collective-permute": 1}
    return size * factor.get(kind, share)


def total(row: dict, key: str, *sources: str) -> float:
    """Sum over a row's collectives, all or those of some sources."""
    return sum(c[key] for c in row["emitted"] if not sources or c["source"] in sources)


def tables(rows: list[dict]) -> str:
    """The tables of docs/scaling.md, from the measured rows and the published figures."""
    parts = (_traffic_table, _time_table, _latency_table, _input_table, _network_table)
    return "\n\n".join("\n".join(part(rows)) for part in parts)


def _traffic_table(rows: list[dict]) -> list[str]:
    """What was counted; rows that differ in the number of devices alone are one."""
    lines: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        gradients = total(row, "bytes", "gradients")
        norm = total(row, "bytes", "BatchNorm, forward", "BatchNorm, backward")
        weak = row["global_batch_size"] == 32 * row["devices"]
        cells = (
            f"{row['norm_group_size'] or 'all'}",
            f"{gradients / 1e6:.1f} MB",
            f"{norm / 1e3:.0f} kB",
            _size(total(row, "bytes") - gradients - norm),
            f"{row['launched']}",
            f"{row['gflop_a_device']:.0f}",
        )
        key = (_name(row), "32 a device" if weak else f"{row['global_batch_size']}", *cells)
        lines.setdefault(key, []).append(f"{row['devices']}")
    head = "| run | batch | BatchNorm over | gradients | BatchNorm | other | launches | GFLOP a device | devices |"
    return [head, "|---" * 9 + "|", *(f"| {' | '.join(key)} | {', '.join(found)} |" for key, found in lines.items())]


def _time_table(rows: list[dict]) -> list[str]:
    """Compute and traffic of one step, as if all devices were on one fabric."""
    lines = ["| run | images a device | devices | " + " | ".join(CHIPS) + " |", "|---" * (3 + len(CHIPS)) + "|"]
    for row in rows:
        if row["norm_group_size"] or row["dtype"] != "bfloat16":
            continue
        cells = []
        for chip in CHIPS.values():
            compute = row["gflop_a_device"] / 1e3 / chip.tflops / UTILISATION
            cells.append(f"{1e3 * compute:.2f} + {1e3 * total(row, 'sent_bytes') / chip.fabric:.2f} ms")
        images = row["global_batch_size"] // row["devices"]
        lines.append(f"| {_name(row)} | {images} | {row['devices']} | " + " | ".join(cells) + " |")
    return lines


def _latency_table(rows: list[dict]) -> list[str]:
    """What collectives cost however small they are, if each waits for the one before."""
    lines = ["| | " + " | ".join(f"{size} chips" for size in TORUS_HOPS) + " |", "|---" * (1 + len(TORUS_HOPS)) + "|"]
    for label, group in (("global BatchNorm", None), ("groups of 32", 32)):
        row = next(row for row in rows if row["norm_group_size"] == group)
        cells = [
            f"{row['launched']} x {n} hops = {1e3 * row['launched'] * n * HOP:.2f} ms" for n in TORUS_HOPS.values()
        ]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return lines


def _input_table(rows: list[dict]) -> list[str]:
    """What a host has to decode to keep its chips busy."""
    lines = [
        "| run | chip | images/s a chip | images/s a host | cores for it | cores there |",
        "|---|---|---|---|---|---|",
    ]
    for pair in dict.fromkeys(row["pair"] for row in rows):
        row = next(row for row in rows if row["pair"] == pair)
        for name, chip in CHIPS.items():
            rate = chip.tflops * 1e3 * UTILISATION / row["gflop_a_device"] * row["global_batch_size"] / row["devices"]
            needed = rate * chip.host_chips
            lines.append(
                f"| {pair} | {name} | {_round(rate)} | {_round(needed)} | {needed / DECODED:.0f} | {chip.host_cores} |"
            )
    return lines


def _network_table(rows: list[dict]) -> list[str]:
    """Gradients between slices (or servers), after each has summed its own."""
    row, units = rows[0], {"TPU v5e": 256, "TPU v5p": 256, "TPU v6e": 256, "H100 SXM": 8}
    lines = ["| unit of devices | " + " | ".join(f"{n} units" for n in (2, 4, 128)) + " |", "|---|---|---|---|"]
    for name, size in units.items():
        times = [sent("all-reduce", total(row, "bytes") / size, n) / CHIPS[name].network for n in (2, 4, 128)]
        lines.append(f"| {size} x {name} | " + " | ".join(f"{1e3 * time:.3f} ms" for time in times) + " |")
    return lines


def _name(row: dict) -> str:
    name = row["pair"] + ("" if row["dtype"] == "bfloat16" else ", " + row["dtype"])
    return name + (f", model axis {row['mesh']['model']}" if row["mesh"]["model"] > 1 else "")


def _round(value: float) -> str:
    return f"{round(value, -2):,.0f}"


def _size(size: float) -> str:
    return f"{size / 1e6:.0f} MB" if size > 1e6 else f"{size:.0f} B"


def main() -> None:
    """Prints every table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    print(tables(json.loads(parser.parse_args().results.read_text())["cases"]))


if __name__ == "__main__":
    main()
