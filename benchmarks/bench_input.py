"""Images a second on a core: decoding and augmenting, against bare OpenCV; reading; the whole pipeline by workers.

    JAX_PLATFORMS=cpu python -m benchmarks.bench_input [--images 512 --rounds 15 --workers 0 1 2]

The images are JPEGs of 500 x 375 pixels, quality 92, each a different part of scikit-learn's two photographs, in a
temporary directory: as a tree of folders, and as TFDS's ArrayRecord files. Three comparisons, the variants of each in
turns, so that a busy machine slows all of them; the ratios are what to look at:

- one: from the encoded image in memory to 224 x 224 pixels, in one thread, in CPU time. The bare loop decodes, crops
  the same random box, resizes by `cv2.INTER_LINEAR` (which does not antialias: it skips pixels where the image shrinks)
  and flips. `bare, area` takes `cv2.INTER_AREA` where the image shrinks.
- read: encoded images and labels by the two data sets, in random order, without decoding, files in the system's cache.
- pipeline: batches of `training()`, wall time, after what was made ahead has been used up. `overhead` is the wall time
  an image beyond that of the loop `ours` over the same images, run in turns with it, in milliseconds.

Prints tables and writes JSON with hardware and versions.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import pathlib
import platform
import sys
import tempfile
import time
from collections.abc import Callable

import cv2
import grain
import numpy as np
import PIL
import tensorflow_datasets
from PIL import Image
from sklearn.datasets import load_sample_images

from wkd_jax import registry
from wkd_jax.data.image import decode, evaluation_image, random_box, training_image
from wkd_jax.data.randomness import Random

sys.path.append(str(pathlib.Path(__file__).parents[1] / "tests" / "data"))
from tfds_writer import prepare  # noqa: E402

SIZE, HEIGHT, WIDTH, CLASSES, BATCH = 224, 375, 500, 4, 64
CHUNK = 64  # images a round
NAMES = {"image_folder": "folder", "tfds_stream": "ArrayRecord"}


def write_images(directory: pathlib.Path, count: int) -> list[bytes]:
    """`count` different JPEGs under directory/folder/{train,val} and in ArrayRecord files under directory/tfds."""
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    encoded = []
    for index in range(count):
        random, photo = Random(0, 0, index), photos[index % len(photos)]
        top, left, height, width = random_box(photo.height, photo.width, random, scale=(0.5, 1.0))
        box = (left, top, left + width, top + height)
        file = io.BytesIO()
        photo.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC, box).save(file, "JPEG", quality=92)
        encoded.append(file.getvalue())
        for split in ("train", "val") if index < CLASSES else ("train",):
            folder = directory / "folder" / split / f"class{index % CLASSES}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{index:05d}.JPEG").write_bytes(encoded[-1])
    features = tensorflow_datasets.features
    examples = [{"image": image, "label": index % CLASSES} for index, image in enumerate(encoded)]
    prepare(
        directory / "tfds",
        "photos",
        {"train": examples, "validation": examples[:CLASSES]},
        {"image": features.Image(shape=(None, None, 3)), "label": features.ClassLabel(num_classes=CLASSES)},
    )
    return encoded


def bare(encoded: bytes, index: int, *, area: bool) -> np.ndarray:
    """What one would write with OpenCV alone; `BOXES` are drawn beforehand."""
    image = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR)
    top, left, height, width = BOXES[index % len(BOXES)]
    shrinks = area and height >= SIZE and width >= SIZE
    crop = cv2.resize(
        image[top : top + height, left : left + width],
        (SIZE, SIZE),
        interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR,
    )
    return cv2.flip(crop, 1) if index % 2 else crop


def ours(encoded: bytes, index: int, **settings: object) -> np.ndarray:
    """What a training image costs here: its random numbers, too."""
    return training_image(encoded, Random(0, 0, index), **settings)


BOXES = [random_box(HEIGHT, WIDTH, Random(0, 0, index)) for index in range(4096)]
ONE = {
    "ours": ours,
    "bare, linear": lambda encoded, index: bare(encoded, index, area=False),
    "bare, area": lambda encoded, index: bare(encoded, index, area=True),
    "ours, bicubic": lambda encoded, index: ours(encoded, index, interpolation="bicubic"),
    "ours, RandAugment": lambda encoded, index: ours(encoded, index, interpolation="random", rand_augment=9.0),
    "ours, evaluation": lambda encoded, index: evaluation_image(encoded),
    "decoding alone": lambda encoded, index: decode(encoded),
}


def summary(samples: list[float], reference: list[float]) -> dict[str, object]:
    """Milliseconds an image, and how the rate compares with a reference, round by round."""
    low, median, high = np.percentile(samples, [25, 50, 75])
    return {
        "median_ms": median,
        "quartiles_ms": [low, high],
        "images_per_second": 1e3 / median,
        "rate_to_reference": float(np.median(np.divide(reference, samples))),
    }


def measure(
    variants: dict[str, Callable[[int], int]], rounds: int, clock: Callable[[], float], reference: str
) -> dict[str, dict[str, object]]:
    """Times variants in turns; each is given the number of the round, and returns how many images it made."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(-1, rounds):  # the first is untimed: files, caches, processes
        for name, run in variants.items():
            start = clock()
            images = run(number + 1)
            if number >= 0:
                times[name].append(1e3 * (clock() - start) / images)
    return {name: summary(samples, times[reference]) for name, samples in times.items()}


def one_images(encoded: list[bytes], rounds: int) -> dict[str, dict[str, object]]:
    """The comparison "one"."""

    def over_chunk(function):
        def run(number):
            for index in range(number * CHUNK, (number + 1) * CHUNK):
                function(encoded[index % len(encoded)], index)
            return CHUNK

        return run

    variants = {name: over_chunk(function) for name, function in ONE.items()}
    return measure(variants, rounds, time.process_time, "bare, linear")


def data_set(kind: str, directory: pathlib.Path, workers: int):
    """One of the two registered data sets."""
    where = {"data_dir": str(directory / ("folder" if kind == "image_folder" else "tfds"))}
    return registry.get("data", kind)(
        **where, **({"dataset": "photos"} if kind == "tfds_stream" else {}), workers=workers
    )


def reading(directory: pathlib.Path, rounds: int) -> dict[str, dict[str, object]]:
    """The comparison "read"."""

    def by(kind):
        records = data_set(kind, directory, 0).train.records

        def run(number):
            rows = np.random.default_rng(number).permutation(len(records))
            for start in range(0, len(rows), BATCH):
                found = records.fetch(rows[start : start + BATCH].tolist())
                assert all(isinstance(item, tuple) for item in found)
            return len(rows)

        return run

    return measure({name: by(kind) for kind, name in NAMES.items()}, rounds, time.perf_counter, "folder")


def pipelines(
    directory: pathlib.Path, encoded: list[bytes], workers: list[int], rounds: int
) -> dict[str, dict[str, object]]:
    """The comparison "pipeline"."""
    batches = 16  # timed in a round

    def loop(number):
        for index in range(len(encoded)):
            ours(encoded[index % len(encoded)], index)
        return len(encoded)

    results = {}
    for count in workers:
        for kind, name in NAMES.items():  # one at a time: workers of another stream would take cores while they fill up
            stream = data_set(kind, directory, count).training(global_batch_size=BATCH, seed=0)
            alone, times = [], []
            for number in range(-1, rounds):
                start = time.perf_counter()
                images = loop(number)
                own = 1e3 * (time.perf_counter() - start) / images
                for _ in range(2 * count + 4):  # made ahead while the loop ran
                    next(stream)
                start = time.perf_counter()
                for _ in range(batches):
                    next(stream)
                if number >= 0:
                    alone.append(own)
                    times.append(1e3 * (time.perf_counter() - start) / (batches * BATCH))
            stream.close()
            overhead = np.subtract(times, np.divide(alone, max(count, 1)))
            results[f"{name}, {count} workers"] = summary(times, alone) | {"overhead_ms": float(np.median(overhead))}
    return results


def machine() -> dict[str, object]:
    """What the numbers depend on."""
    cpu = platform.processor() or platform.machine()
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), cpu)
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "numpy": np.__version__,
        "opencv": cv2.__version__,
        "pillow": PIL.__version__,
        "grain": grain.__version__,
    }


def main() -> None:
    """Runs the three comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--out", type=pathlib.Path, default=None, help="JSON (default: results/input_cpu.json)")
    options = parser.parse_args()
    report: dict[str, object] = {"benchmark": "input", "machine": machine()}
    report |= {key: getattr(options, key) for key in ("images", "rounds", "workers")}
    with tempfile.TemporaryDirectory() as name:
        directory = pathlib.Path(name)
        encoded = write_images(directory, options.images)
        report["mean_bytes"] = sum(map(len, encoded)) // len(encoded)
        results = {
            "one": one_images(encoded, options.rounds),
            "read": reading(directory, options.rounds),
            "pipeline": pipelines(directory, encoded, options.workers, max(1, options.rounds // 3)),
        }
    for comparison, rows in results.items():
        print(
            f"\n{comparison:24} {'an image':>10} {'quartiles':>17} {'rate':>11} {'to reference':>13} {'overhead':>10}"
        )
        for row, r in rows.items():
            low, high = r["quartiles_ms"]
            overhead = f"{r['overhead_ms']:7.3f} ms" if "overhead_ms" in r else ""
            print(
                f"{row:24} {r['median_ms']:7.3f} ms {low:7.3f}-{high:6.3f} ms {r['images_per_second']:7.0f} im/s "
                f"{r['rate_to_reference']:12.2f} {overhead:>10}"
            )
    report["cases"] = results
    out = options.out or pathlib.Path(__file__).parent / "results" / "input_cpu.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=2) + "\n")
    print(f"\nwritten to {out}")


if __name__ == "__main__":
    main()
