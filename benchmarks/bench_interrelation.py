"""Time and memory of linear CKA between all classes, at the size of an ImageNet teacher (3 GB of features).

    JAX_PLATFORMS=cpu python -m benchmarks.bench_interrelation [--classes 1000 --samples 732 --channels 1000]

Against the pair-by-pair loop of the authors' code, written in NumPy without its repeated self-products: a product
[D, N] [N, D] for each pair of classes, timed on --pairs of them and extrapolated. `error_against_float64` is of ten
pairs. On CPU the features are in memory twice, as NumPy's and as JAX's. Prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import resource
import sys
import time

import jax
import numpy as np

from wkd_jax.losses import cka


def measure(classes: int, samples: int, channels: int, pairs: int) -> dict[str, object]:
    """One comparison. Features are a mean for each class plus noise that falls off over the channels."""
    rng = np.random.default_rng(0)
    spectrum = np.linspace(1.0, 0.02, channels, dtype=np.float32)
    features = np.empty((classes, samples, channels), np.float32)
    for row in features:
        row[:] = rng.standard_normal((samples, channels), np.float32) * spectrum + rng.standard_normal(channels)
    start = time.perf_counter()
    device = jax.block_until_ready(jax.device_put(features))
    transfer = time.perf_counter() - start
    before = _peak()  # the features, on CPU twice: NumPy's and the device's
    start = time.perf_counter()
    similarity = np.asarray(cka(device))
    first = time.perf_counter() - start
    start = time.perf_counter()
    similarity = np.asarray(cka(device))
    again = time.perf_counter() - start
    after = _peak()
    chosen = [tuple(rng.choice(classes, 2, replace=False)) for _ in range(pairs)]
    seconds, error = _loop(features, similarity, chosen)
    return {
        "benchmark": "linear CKA between all classes",
        "classes": classes,
        "samples": samples,
        "channels": channels,
        "features_gb": round(features.nbytes / 1e9, 2),
        "transfer_s": round(transfer, 3),
        "first_call_s": round(first, 2),
        "second_call_s": round(again, 2),
        "peak_gb": round(after, 2),
        "peak_above_features_gb": round(after - before, 2),
        "loop_pairs_timed": pairs,
        "loop_s_extrapolated": round(seconds / pairs * classes * (classes - 1) / 2, 1),
        "error_against_float64": error,
        "hardware": f"{_processor()}, {os.cpu_count()} cores, device {jax.devices()[0].device_kind}",
        "load_average": round(os.getloadavg()[0], 2),
        "versions": f"python {platform.python_version()}, jax {jax.__version__}, numpy {np.__version__}",
    }


def _loop(features: np.ndarray, similarity: np.ndarray, pairs: list[tuple[int, int]]) -> tuple[float, float]:
    """Seconds for the pairs' cross-products in float32, and how far the similarity is from ten of them in float64."""
    centred = {k: features[k] - features[k].mean(axis=0) for pair in pairs for k in pair}
    start = time.perf_counter()
    for i, j in pairs:
        np.sum((centred[i].T @ centred[j]) ** 2)
    seconds = time.perf_counter() - start
    errors = []
    for i, j in pairs[:10]:
        x, y = (features[k] - features[k].mean(axis=0, dtype=np.float64) for k in (i, j))
        value = np.sum((x.T @ y) ** 2) / (np.linalg.norm(x @ x.T) * np.linalg.norm(y @ y.T))
        errors.append(abs(value - similarity[i, j]))
    return seconds, float(max(errors))


def _peak() -> float:
    """Peak resident memory of this process, GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def _processor() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())


def main() -> None:
    """Runs the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=732)
    parser.add_argument("--channels", type=int, default=1000)
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument(
        "--out", type=pathlib.Path, default=None, help="JSON (default: results/interrelation_<platform>.json)"
    )
    args = parser.parse_args()
    result = measure(args.classes, args.samples, args.channels, args.pairs)
    print(f"| {'quantity':<22} | value |\n| {'-' * 22} | ----- |")
    for key, value in result.items():
        print(f"| {key:<22} | {value} |")
    out = args.out or pathlib.Path(__file__).parent / "results" / f"interrelation_{jax.default_backend()}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
