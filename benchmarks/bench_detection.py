"""Faster R-CNN's training step and inference, whole and part by part, in turns with torchvision's on one device.

    python -m benchmarks.bench_detection --batch 16 --dtype bfloat16        # an accelerator
    taskset -c 1 python -m benchmarks.bench_detection --device cpu --rounds 3
    python -m benchmarks.bench_detection --device cpu --quick               # does it run?

Training is one update on canvases that are on the device: normalisation, network, proposals, samples, losses,
gradients, SGD. Inference ends with the detections. Both sides have the same boxes to learn, a trunk that is fixed up to
its first stage, random weights with a classifier sharp enough to find something, and no image to decode or to resize.
PyTorch runs eagerly, as its users run it, in its faster layout (channels last), with autocast for bfloat16.

With `--preset tv` ours is torchvision's network. With `d2`, the one that is trained here, it has another pooling and
other proposals, and is timed alone, as a MobileNet is. Where torchvision's compiled operators do not load, what needs
them has the error in its row; they load beside PyTorch's builds for CUDA, also where there is no GPU.

A part's time in training is that of its value and its gradient. Each is compiled alone, and the whole has targets,
losses and an update besides: parts do not add up to it.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import importlib.util
import os
import pathlib
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks import imagenet_step, timing
from wkd_jax.models import functional
from wkd_jax.models.detection import proposals
from wkd_jax.models.detection.anchors import pyramid_anchors
from wkd_jax.models.detection.faster_rcnn import POOLED, REGION_SIZE, FasterRCNN
from wkd_jax.tasks.detection import Detection
from wkd_jax.training.step import weigh
from wkd_jax.types import Batch, Context, Normalisation, Outputs

TRUNKS = ("r18", "r50", "r101", "mobilenetv2")
PARTS = ("trunk", "pyramid", "proposal head", "proposals", "pooling", "box head", "detections")
OBJECTS, SLOTS = 7, 100  # boxes of an image, about COCO's average, and those that a batch has room for
REGIONS = 512  # sampled from an image's proposals in training
SHARPER = 1000  # times the classifier's initial kernel: the regions have a class each, to be suppressed among its own
DAMPING = 0.5  # scale of the trunk's normalisation, which has no statistics and would let its blocks' sums grow
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 1e-8, 0.9, 1e-4  # so small that the last round has the first one's work
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
QUICK = {"trunk": "r18", "canvas": (64, 96), "features": 16, "hidden": 32, "classes": 3, "rounds": 1}


@dataclasses.dataclass(frozen=True)
class Case:
    """What is measured, the same on both sides.

    Attributes:
      trunk: Of `TRUNKS`.
      preset: "tv" or "d2".
      canvas: (height, width), pixels.
      batch: Images.
      dtype: Of the convolutions.
      classes: Of objects, without the background.
      features: Channels of the pyramid.
      hidden: Width of the box head.
    """

    trunk: str
    preset: str
    canvas: tuple[int, int]
    batch: int
    dtype: str
    classes: int
    features: int
    hidden: int

    def data(self) -> dict[str, np.ndarray]:
        """Noise, with boxes of a tenth to half of the canvas's sides and their classes."""
        rng = np.random.default_rng(0)
        corner, sides = rng.random((2, self.batch, OBJECTS, 2))
        corner, sides = 0.5 * corner, 0.1 + 0.4 * sides
        boxes = np.concatenate([corner, corner + sides], axis=-1) * np.tile(self.canvas[::-1], 2)
        return {
            "image": rng.integers(0, 256, (self.batch, *self.canvas, 3), np.uint8),
            "boxes": boxes.astype(np.float32),
            "labels": rng.integers(0, self.classes, (self.batch, OBJECTS)).astype(np.int32),
        }


@dataclasses.dataclass
class Variant:
    """Something to time.

    Attributes:
      run: Returns once its work is done on the device.
      facts: What the report says of it besides.
    """

    run: Callable[[], object]
    facts: dict[str, Any]


# ------------------------------------------------------------------------------------------------------------- ours


class Ours:
    """This package's detector."""

    def __init__(self, case: Case) -> None:
        def build() -> FasterRCNN:
            settings = {"preset": case.preset, "features": case.features, "hidden": case.hidden}
            dtype = jnp.dtype(case.dtype)
            return FasterRCNN(f"faster_rcnn_{case.trunk}", case.classes + 1, **settings, dtype=dtype, rngs=nnx.Rngs(0))

        self.structure = functional.split(nnx.eval_shape(build))[0]
        self.params, self.variables = jax.jit(lambda: functional.split(build())[1:3])()
        self.params["box_head/cls_score/kernel"] *= SHARPER
        self.variables |= {name: DAMPING * x for name, x in self.variables.items() if name.endswith("scale")}
        losses = {"smooth_l1_beta": 1 / 9, "sampled_mean": True} if case.preset == "tv" else {}
        names = types.SimpleNamespace(class_names=tuple(map(str, range(case.classes))))
        self.task = Detection({**Detection.DEFAULTS, **losses}, names)
        self.batch = self._batch(case)

    @staticmethod
    def _batch(case: Case) -> Batch:
        data, missing = case.data(), (0, SLOTS - OBJECTS)
        label = np.pad(data["labels"], ((0, 0), missing), constant_values=-1)
        extra = {
            "boxes": np.pad(data["boxes"], ((0, 0), missing, (0, 0))),
            "box_valid": label >= 0,
            "size": np.tile(np.array(case.canvas, np.int32), (case.batch, 1)),
        }
        index, valid = np.arange(case.batch, dtype=np.int32), np.ones(case.batch, bool)
        return jax.device_put(Batch(data["image"], label, index, valid, extra))

    def _normalised(self, batch: Batch) -> Batch:
        return self.task.normalise(batch, Normalisation(MEAN, STD))

    def train(self) -> Variant:
        """One update by SGD."""
        sgd = optax.sgd(LEARNING_RATE, momentum=MOMENTUM)
        optimizer = optax.chain(optax.add_decayed_weights(WEIGHT_DECAY), sgd)

        def loss(params: Any, variables: Any, batch: Batch, key: Any) -> Any:
            batch = self._normalised(batch)
            network, inputs = self.structure.merge(params, variables), self.task.student_inputs(batch, train=True)
            student = network(batch.image, train=True, rngs=nnx.Rngs(key), **inputs)
            labels = self.task.labels(batch, student)
            terms = self.task.terms(Context(batch, None, labels, student, None, None, None, None, None))
            return weigh({"label": terms}, batch.valid)

        def step(state: Any, variables: Any, batch: Batch) -> Any:
            params, moments, key = state
            key, draw = jax.random.split(key)
            (total, _), gradients = jax.value_and_grad(loss, has_aux=True)(params, variables, batch, draw)
            updates, moments = optimizer.update(gradients, moments, params)
            return (optax.apply_updates(params, updates), moments, key), total

        params = jax.tree.map(jnp.copy, self.params)  # the state is donated
        state = params, optimizer.init(params), jax.random.key(0)
        compiled, facts = _compiled(jax.jit(step, donate_argnums=0), state, self.variables, self.batch)

        def run() -> None:
            nonlocal state
            state, total = compiled(state, self.variables, self.batch)
            facts["loss"] = float(jax.block_until_ready((state, total))[1])

        return Variant(run, facts)

    def infer(self) -> Variant:
        """From canvases to detections."""

        def detect(arrays: Any, batch: Batch) -> Any:
            batch = self._normalised(batch)
            inputs = self.task.student_inputs(batch, train=False)
            return self.structure.merge(arrays)(batch.image, train=False, **inputs).extra["detections"]

        compiled, facts = _compiled(jax.jit(detect), self.params | self.variables, self.batch)

        def run() -> Any:
            found = jax.block_until_ready(compiled(self.params | self.variables, self.batch))
            facts["detections"] = int(found.valid.sum())
            return found

        return Variant(run, facts)

    def inputs(self, train: bool) -> dict[str, tuple[Any, Any]]:
        """What each part is given: what it has a gradient in, and what it has none in."""

        @jax.jit
        def run(arrays: Any, batch: Batch) -> dict[str, tuple[Any, Any]]:
            network = self.structure.merge(arrays)
            image = self._normalised(batch).image.astype(network.dtype)
            maps = network.trunk(image)
            levels = network.fpn(maps)
            scored = network.rpn(list(levels.values()))
            regions, valid = self._propose(network, scored, train)
            regions, valid = (x[:, :REGIONS] if train else x for x in (regions, valid))
            pooled = network.pool(levels, regions, REGION_SIZE, exact=not train)
            hidden, logits, deltas = network.box_head(pooled)
            outputs = Outputs(logits, {}, hidden, valid=valid, extra={"regions": regions, "deltas": deltas})
            made = {
                "trunk": ((), image),
                "pyramid": (maps, ()),
                "proposal head": (levels, ()),
                "proposals": ((), scored),
            }
            made |= {"pooling": ({level: levels[level] for level in POOLED}, regions), "box head": (pooled, ())}
            return made if train else made | {"detections": ((), outputs)}

        return run(self.params | self.variables, self.batch)

    def part(self, name: str, train: bool, given: Any, constants: Any) -> Variant:
        """One of `PARTS` alone; in training its value and its gradient, where it has one."""
        size = self.batch.extra["size"]
        # The prefix of the arrays that it trains, and what it does; None: it has no gradient.
        parts: dict[str, tuple[str | None, Callable[..., Any]]] = {
            "trunk": ("trunk/", lambda network, _, image: network.trunk(image)),
            "pyramid": ("fpn/", lambda network, maps, _: network.fpn(maps)),
            "proposal head": ("rpn/", lambda network, levels, _: network.rpn(list(levels.values()))),
            "proposals": (None, lambda network, _, scored: self._propose(network, scored, train)),
            "pooling": (
                "none/",
                lambda network, levels, regions: network.pool(levels, regions, REGION_SIZE, exact=not train),
            ),
            "box head": ("box_head/", lambda network, pooled, _: network.box_head(pooled)),
            "detections": (None, lambda network, _, outputs: network._detect(outputs, size)),
        }
        prefix, function = parts[name]
        arrays = self.params | self.variables
        trained = {key: value for key, value in self.params.items() if prefix and key.startswith(prefix)}
        fixed = {key: value for key, value in arrays.items() if key not in trained}

        def run(trained: Any, fixed: Any, given: Any, constants: Any) -> Any:
            def value(trained: Any, given: Any) -> Any:
                return function(self.structure.merge(trained, fixed), given, constants)

            if not train or prefix is None:
                return value(trained, given)
            result, pull = jax.vjp(value, trained, given)
            return pull(result)

        compiled, facts = _compiled(jax.jit(run), trained, fixed, given, constants)
        return Variant(lambda: jax.block_until_ready(compiled(trained, fixed, given, constants)), facts)

    def _propose(self, network: FasterRCNN, scored: Any, train: bool) -> Any:
        """As the network does."""
        propose = functools.partial(
            proposals.propose,
            anchors=pyramid_anchors(
                self.batch.image.shape[1:3], sizes=network.anchor_sizes, preset=network.preset.anchors
            ),
            pre_nms=network.pre_nms[not train],
            post_nms=network.post_nms[not train],
            min_side=network.preset.min_side[0],
        )
        return jax.vmap(lambda logits, deltas, size: propose(logits, deltas, size=size))(
            *scored, self.batch.extra["size"]
        )


def _compiled(function: Any, *arguments: Any) -> tuple[Any, dict[str, Any]]:
    """An executable, and what is known of it."""
    start = time.perf_counter()
    compiled = function.lower(*arguments).compile()
    facts = {"compile_s": time.perf_counter() - start, "memory_mb": imagenet_step.needed_mb(compiled)}
    return compiled, facts


# ------------------------------------------------------------------------------------------------------ torchvision


class Theirs:
    """torchvision's detector, of a ResNet; its transform is left out, since ours is given images of their size.

    Raises:
      ImportError: If PyTorch or torchvision is not there.
      RuntimeError: If torchvision does not load, as beside a PyTorch of another kind.
    """

    def __init__(self, case: Case) -> None:
        import torch
        from torchvision.extension import _has_ops
        from torchvision.models import resnet
        from torchvision.models.detection import FasterRCNN, faster_rcnn
        from torchvision.models.detection.backbone_utils import BackboneWithFPN
        from torchvision.models.detection.image_list import ImageList
        from torchvision.ops.misc import FrozenBatchNorm2d

        torch.set_flush_denormal(True)  # as XLA does
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        torch.backends.cudnn.benchmark = True
        torch.manual_seed(0)
        self.torch, self.dtype, self.image_list = torch, getattr(torch, case.dtype), ImageList
        self.operators = _has_ops()
        self.device = "cuda" if jax.default_backend() == "gpu" else "cpu"
        body = getattr(resnet, f"resnet{case.trunk[1:]}")(norm_layer=FrozenBatchNorm2d)
        for name, parameter in body.named_parameters():
            parameter.requires_grad_(not name.startswith(("conv1", "layer1")))
        channels = [body.fc.in_features >> shift for shift in (3, 2, 1, 0)]
        layers = {f"layer{number}": str(number - 1) for number in (1, 2, 3, 4)}
        net = FasterRCNN(
            BackboneWithFPN(body, layers, channels, case.features),
            rpn_anchor_generator=faster_rcnn._default_anchorgen(),
            box_head=faster_rcnn.TwoMLPHead(case.features * REGION_SIZE**2, case.hidden),
            box_predictor=faster_rcnn.FastRCNNPredictor(case.hidden, case.classes + 1),
        )
        with torch.no_grad():
            net.roi_heads.box_predictor.cls_score.weight *= SHARPER
            for module in body.modules():
                if isinstance(module, FrozenBatchNorm2d):
                    module.weight *= DAMPING
        self.net = net.to(self.device, memory_format=torch.channels_last)
        self.sizes, data = [case.canvas] * case.batch, case.data()
        self.image = self._tensor(data["image"])
        self.targets = [
            {"boxes": self._tensor(boxes), "labels": self._tensor(labels).long() + 1}
            for boxes, labels in zip(data["boxes"], data["labels"], strict=True)
        ]

    def _tensor(self, array: Any) -> Any:
        return self.torch.tensor(np.asarray(array), device=self.device)

    def _autocast(self) -> Any:
        return self.torch.autocast(self.device, self.dtype, enabled=self.dtype is not self.torch.float32)

    def _images(self) -> Any:
        mean, std = (self._tensor(np.float32(x))[:, None, None] for x in (MEAN, STD))
        return self.image_list((self.image.permute(0, 3, 1, 2) / 255 - mean) / std, self.sizes)

    def _need_operators(self) -> None:
        """Where there are none, RoIAlign would be one in Python, which PyTorch compiles for minutes."""
        if not self.operators:
            raise RuntimeError("the compiled operators do not load")

    def train(self) -> Variant:
        """One update by SGD."""
        self._need_operators()
        trained = [parameter for parameter in self.net.parameters() if parameter.requires_grad]
        optimizer = self.torch.optim.SGD(trained, LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
        facts: dict[str, Any] = {}

        def run() -> None:
            self.net.train()
            optimizer.zero_grad(set_to_none=True)
            with self._autocast():
                images = self._images()
                levels = self.net.backbone(images.tensors)
                regions, of_anchors = self.net.rpn(images, levels, self.targets)
                _, of_regions = self.net.roi_heads(levels, regions, self.sizes, self.targets)
                loss = sum([*of_anchors.values(), *of_regions.values()])
            loss.backward()
            optimizer.step()
            facts["loss"] = loss.item()

        return self._variant(run, facts)

    def infer(self) -> Variant:
        """From canvases to detections."""
        self._need_operators()
        facts: dict[str, Any] = {}

        def run() -> None:
            self.net.eval()
            with self._autocast(), self.torch.no_grad():
                images = self._images()
                levels = self.net.backbone(images.tensors)
                regions, _ = self.net.rpn(images, levels)
                found, _ = self.net.roi_heads(levels, regions, self.sizes)
            facts["detections"] = sum(len(image["boxes"]) for image in found)

        return self._variant(run, facts)

    def part(self, name: str, train: bool, given: Any, constants: Any) -> Variant:
        """As `Ours.part`, with the same inputs."""
        if name in ("proposals", "pooling", "detections"):
            self._need_operators()
        roi_heads, rpn = self.net.roi_heads, self.net.rpn
        functions: dict[str, Callable[[Any, Any], Any]] = {
            "trunk": lambda _, image: self.net.backbone.body(image),
            "pyramid": lambda maps, _: self.net.backbone.fpn(maps),
            "proposal head": lambda levels, _: dict(enumerate(sum(rpn.head(list(levels.values())), []))),
            "proposals": lambda _, scored: self._propose(*scored),
            "pooling": lambda levels, regions: {0: roi_heads.box_roi_pool(levels, regions, self.sizes)},
            "box head": lambda pooled, _: dict(enumerate(roi_heads.box_predictor(roi_heads.box_head(pooled["0"])))),
            "detections": lambda _, outputs: roi_heads.postprocess_detections(*outputs, self.sizes),
        }
        given, constants = self._converted(name, given, constants)
        differentiable = train and name not in ("proposals", "detections")

        def run() -> Any:
            self.net.train(train)
            self.net.zero_grad(set_to_none=True)
            leaves = {key: x.detach().requires_grad_(differentiable) for key, x in given.items()}
            with self._autocast(), self.torch.set_grad_enabled(differentiable):
                results = functions[name](leaves, constants)
            if differentiable:
                ends = [x for x in results.values() if x.requires_grad]  # not what a fixed stage makes
                self.torch.autograd.backward(ends, [x.detach() for x in ends])
            return results

        return self._variant(run)

    def _propose(self, logits: Any, deltas: Any) -> Any:
        """As its proposal network does behind its head."""
        from torchvision.models.detection.rpn import concat_box_prediction_layers

        rpn, images = self.net.rpn, self.image_list(self.image.permute(0, 3, 1, 2), self.sizes)
        anchors, counts = rpn.anchor_generator(images, logits), [x[0].numel() for x in logits]
        logits, deltas = concat_box_prediction_layers(logits, deltas)
        boxes = rpn.box_coder.decode(deltas, anchors).view(len(anchors), -1, 4)
        return rpn.filter_proposals(boxes, logits, self.sizes, counts)

    def _converted(self, name: str, given: Any, constants: Any) -> tuple[dict[str, Any], Any]:
        """Inputs of a part of ours in its layouts, maps by their numbers; its background is the first class."""

        def maps(x: Any) -> Any:
            return self._tensor(np.asarray(x, np.float32)).movedim(-1, -3)  # channels last

        given = {str(number): maps(x) for number, x in enumerate(jax.tree.leaves(given))}
        if name == "trunk":
            constants = maps(constants)
        if name == "box head":
            given = {key: x.flatten(0, 1).contiguous() for key, x in given.items()}
        if name == "pooling":
            constants = list(self._tensor(constants))
        if name == "proposals":
            height, width = self.sizes[0]
            shapes = [(len(self.sizes), -(-height // stride), -(-width // stride), -1) for stride in (4, 8, 16, 32, 64)]
            constants = [
                [maps(np.reshape(x, shape)) for x, shape in zip(part, shapes, strict=True)] for part in constants
            ]
        if name == "detections":
            logits, deltas = np.roll(constants.logits, 1, axis=-1), np.asarray(constants.extra["deltas"])
            deltas = np.pad(deltas, ((0, 0), (0, 0), (1, 0), (0, 0))).reshape(*deltas.shape[:2], -1)
            logits, deltas = (self._tensor(x).flatten(0, 1) for x in (logits, deltas))
            constants = logits, deltas, list(self._tensor(constants.extra["regions"]))
        return given, constants

    def _variant(self, run: Callable[[], Any], facts: dict[str, Any] | None = None) -> Variant:
        """After a first call, which may fail; `facts` are given the memory that it takes besides the arrays."""
        cuda = self.torch.cuda if self.device == "cuda" else None

        def done() -> Any:
            result = run()
            if cuda:
                cuda.synchronize()
            return result

        if facts is None:
            done()
        elif cuda:
            cuda.reset_peak_memory_stats()
            before = cuda.memory_allocated()
            done()
            facts["growth_mb"] = (cuda.max_memory_allocated() - before) / 1e6
        else:
            facts["growth_mb"] = growth_mb(done)
        return Variant(done, facts or {})


# -------------------------------------------------------------------------------------------------------- measuring


def measure(case: Case, rounds: int) -> Iterator[dict[str, Any]]:
    """Times everything, one after the other. Yields the rows so far: mode, part, side.

    What torchvision cannot do has the reason in its row.
    """
    ours, theirs, missing = Ours(case), None, "no such network"
    if case.preset == "tv" and case.trunk != "mobilenetv2":
        theirs, missing = attempt(lambda: Theirs(case))
    results: dict[str, Any] = {"train": {}, "infer": {}}
    for mode, rows in results.items():
        inputs = ours.inputs(mode == "train")
        for name in ("whole", *(part for part in PARTS if part in inputs)):
            prepare = functools.partial(prepared, mode=mode, name=name, inputs=inputs.get(name))
            variants = {"wkd_jax": prepare(ours)}
            other, failed = attempt(functools.partial(prepare, theirs)) if theirs else (None, missing)
            if other:
                variants["torchvision"] = other
            rows[name] = compare(variants, rounds, case.batch)
            if failed:
                rows[name]["torchvision"] = {"failed": failed}
            yield results
            del variants, other


def prepared(side: Any, *, mode: str, name: str, inputs: Any) -> Variant:
    """The whole or a part of one side."""
    return getattr(side, mode)() if name == "whole" else side.part(name, mode == "train", *inputs)


def attempt(make: Callable[[], Any]) -> tuple[Any, str]:
    """What a function of torchvision makes, or None and why there is nothing."""
    try:
        return make(), ""
    except (ImportError, RuntimeError, NotImplementedError) as error:  # no operators, no memory, no package
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        print(f"torchvision: {reason}", file=sys.stderr)
    gc.collect()  # what it had taken is free only now that the exception is gone
    return None, reason


def compare(variants: Mapping[str, Variant], rounds: int, images: int) -> dict[str, Any]:
    """A row for each side, timed in turns."""
    times = timing.interleaved({side: variant.run for side, variant in variants.items()}, rounds)
    rows: dict[str, Any] = {}
    for side, variant in variants.items():
        rows[side] = timing.summary(times[side]) | variant.facts
        rows[side]["images_per_s"] = 1e3 * images / rows[side]["median_ms"]
    if len(times) == 2:
        ratio = timing.summary(times["wkd_jax"], times["torchvision"])
        rows["torchvision"] |= {"ours_over_this": ratio["ratio"], "ours_over_this_quartiles": ratio["ratio_quartiles"]}
    return rows


def growth_mb(run: Callable[[], object]) -> float | None:
    """By how much the process's memory grows during a call; None where the system does not say."""
    status, reset = pathlib.Path("/proc/self/status"), pathlib.Path("/proc/self/clear_refs")
    if not os.access(reset, os.W_OK):
        run()
        return None

    def megabytes(key: str) -> float:
        lines = status.read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1e3

    reset.write_text("5")  # the highest is counted from here
    before = megabytes("VmRSS")
    run()
    return megabytes("VmHWM") - before


def table(results: Mapping[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| | wkd_jax, ms (quartiles) | torchvision, ms (quartiles) | ours / theirs (quartiles) |",
        "|---|---|---|---|",
    ]
    for mode, parts in results.items():
        for name, rows in parts.items():
            ours, theirs = rows["wkd_jax"], rows["torchvision"]
            low, high = ours["quartiles_ms"]
            line = f"| {mode}, {name} | {ours['median_ms']:.0f} ({low:.0f}-{high:.0f}) | "
            if "failed" in theirs:
                lines.append(line + f"{theirs['failed'].replace('|', '/')} | |")
                continue
            (low, high), (first, last) = theirs["quartiles_ms"], theirs["ours_over_this_quartiles"]
            line += f"{theirs['median_ms']:.0f} ({low:.0f}-{high:.0f}) | "
            lines.append(line + f"{theirs['ours_over_this']:.2f} ({first:.2f}-{last:.2f}) |")
    return "\n".join(lines)


def main() -> None:
    """Runs all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trunk", choices=TRUNKS, default="r50")
    parser.add_argument("--preset", choices=("tv", "d2"), default="tv")
    parser.add_argument("--canvas", type=int, nargs=2, default=(800, 1344), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32")
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--features", type=int, default=256, help="channels of the pyramid")
    parser.add_argument("--hidden", type=int, default=1024, help="width of the box head")
    parser.add_argument("--device", help="a platform of JAX's (default: its own choice)")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="a small trunk, canvas and heads, and one round")
    parser.add_argument("--out", type=pathlib.Path, help="JSON (default: results/detection_<platform>.json)")
    if "--quick" in sys.argv:
        parser.set_defaults(**QUICK)
    options = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # both share the GPU; read when JAX first uses it
    if options.device:
        jax.config.update("jax_platforms", options.device)
    settings = {field.name: getattr(options, field.name) for field in dataclasses.fields(Case)}
    case = Case(**settings | {"canvas": tuple(options.canvas)})
    out = options.out or timing.RESULTS / f"detection_{jax.default_backend()}.json"
    packages = [name for name in ("torch", "torchvision") if importlib.util.find_spec(name)]
    report = {
        "benchmark": "detection, whole and by part",
        "machine": timing.machine("jaxlib", "flax", "optax", *packages),
        **dataclasses.asdict(case),
        "rounds": options.rounds,
    }
    results: dict[str, Any] = {}
    for results in measure(case, options.rounds):
        timing.write(report | {"results": results}, out)
    print(table(results))


if __name__ == "__main__":
    main()
