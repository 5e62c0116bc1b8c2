"""Class interrelations at the size of an ImageNet teacher: time and memory of the CKA, and of the whole pass before it.

    JAX_PLATFORMS=cpu python -m benchmarks.bench_interrelation [--only logits] [--classes 1000 --samples 732]

`cka`: linear CKA between all classes, against the pair-by-pair loop of the authors' code, written in NumPy without its
repeated self-products: a product [D, N] [N, D] for each pair of classes, timed on --pairs of them and extrapolated.
`error_against_float64` is of ten pairs. On CPU the features are in memory twice, as NumPy's and as JAX's.

`logits`, `positions`: `Teacher.similarity` from the first image to the file it leaves, in a process of its own, with a
network that costs nothing and images of a few pixels, so that what is left is the collecting and the CKA. `logits` has
the sizes given; `positions` is the CIFAR-100 setting, 500 images a class, 8 x 8 positions of 256 channels each (21
TFLOP of CKA: minutes, so only when asked for). How much memory the process has taken at most is the claim: no more than
8 GB. On CPU the CKA uses the host's copy of the features; an accelerator holds one of its own.

Prints tables and writes JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import pathlib
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

from wkd_jax import config as config_lib
from wkd_jax.data.memory import MemoryDataSet, Split
from wkd_jax.losses import cka
from wkd_jax.models import functional
from wkd_jax.training.build import Network
from wkd_jax.training.teacher import Teacher
from wkd_jax.types import ModelInfo, Normalisation, Outputs, Tap


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
        **_where(),
    }


class StandIn(nnx.Module):
    """One linear layer: of the whole image for logits, of each pixel for a tap."""

    def __init__(self, classes: int, side: int, channels: int, rngs: nnx.Rngs) -> None:
        self.fc = nnx.Linear(3 * side * side, classes, rngs=rngs)
        self.tap = nnx.Linear(3, channels, rngs=rngs)
        self.info = ModelInfo("stand-in", classes, {"tap": Tap(channels, 1)}, 3 * side * side, "fc/kernel")

    def __call__(self, image: jax.Array, *, train: bool, rngs: Any = None) -> Outputs:
        """Runs it; there is nothing to train."""
        del train, rngs
        return Outputs(self.fc(image.reshape(len(image), -1)), {"tap": nnx.relu(self.tap(image))})


def whole_pass(name: str, classes: int, samples: int, channels: int, side: int, batch: int) -> dict[str, object]:
    """One pass of `Teacher.similarity`: logits of `channels` classes, or a tap of so many channels at side^2 positions.

    There are 5 % more images of each class than samples are wanted, in random order.
    """
    started = _peak()
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(classes, dtype=np.int32), samples + samples // 20))
    train = Split(rng.integers(0, 256, (len(labels), side, side, 3), np.uint8), labels)
    test = Split(train.images[:1], train.labels[:1])
    names = tuple(f"class {number}" for number in range(classes))
    data = MemoryDataSet("noise", names, train, test, (0.5,) * 3, (0.3,) * 3)
    spec = {"samples_per_class": samples, "features": "logits" if name == "logits" else "tap"}
    section = {"data": {"name": "digits"}, "student": {"name": "resnet8"}}  # not looked at
    config = config_lib.resolve({**section, "global_batch_size": batch, "interrelation": spec})
    structure, params, _, _ = functional.split(StandIn(classes, side, channels, nnx.Rngs(0)))
    network = Network(structure, params, structure.merge(params).info, Normalisation((0.5,) * 3, (0.3,) * 3))
    marks = [time.perf_counter()]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["WKD_JAX_CACHE"] = folder
        teacher = Teacher(network, config, "stand-in")
        similarity = teacher.similarity(
            config, data, pathlib.Path(folder), between_batches=lambda: marks.append(time.perf_counter())
        )
    end = time.perf_counter()
    assert similarity.shape == (classes, classes) and np.isfinite(similarity).all()
    positions = 1 if name == "logits" else side * side
    return {
        "benchmark": f"class similarity from {name}, the whole pass",
        "classes": classes,
        "samples": samples,
        "positions": positions,
        "channels": channels,
        "global_batch_size": batch,
        "features_gb": round(4 * classes * samples * positions * channels / 1e9, 2),
        "collecting_s": round(marks[-1] - marks[0], 1),
        "images_per_s": round((len(marks) - 2) * batch / (marks[-1] - marks[1])),
        "cka_s": round(end - marks[-1], 1),
        "imports_gb": round(started, 2),
        "peak_gb": round(_peak(), 2),
        "limit_gb": 8,
        **_where(),
    }


def _where() -> dict[str, object]:
    return {
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
    """Runs the parts, each in a process of its own: what one has taken does not count for the next."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("cka", "logits", "positions"), help="one part; default cka and logits")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=732)
    parser.add_argument("--channels", type=int, default=1000)
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results", help="folder of the JSON files"
    )
    args = parser.parse_args()
    parts: dict[str, tuple[Callable[..., dict[str, object]], tuple[Any, ...]]] = {
        "cka": (measure, (args.classes, args.samples, args.channels, args.pairs)),
        "logits": (whole_pass, ("logits", args.classes, args.samples, args.classes, 4, 1024)),
        "positions": (whole_pass, ("positions", 100, 500, 256, 8, 256)),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    for name in [args.only] if args.only else ["cka", "logits"]:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            result = pool.apply(*parts[name])
        print(f"| {'quantity':<22} | value |\n| {'-' * 22} | ----- |")
        for key, value in result.items():
            print(f"| {key:<22} | {value} |")
        part = "" if name == "cka" else f"_{name}"
        out = args.out / f"interrelation{part}_{jax.default_backend()}.json"
        out.write_text(json.dumps(result, indent=2) + "\n")
        print(f"written to {out}")


if __name__ == "__main__":
    main()
