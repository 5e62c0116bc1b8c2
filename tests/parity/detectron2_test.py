"""The detector's "d2" preset against `torch_detectron2`, from the same random weights: every stage, and as a whole."""

import functools
import re
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_detectron2 as reference
from flax import nnx

from wkd_jax.models import functional
from wkd_jax.models.detection.faster_rcnn import FasterRCNN
from wkd_jax.tasks.detection import Detection
from wkd_jax.training.step import weigh
from wkd_jax.types import Batch, Context, Normalisation

CLASSES = 5  # and the background
FEATURES, HIDDEN = 48, 96
EMPTY = 2  # a class whose boxes are moved out of the image
TRUNKS = {"faster_rcnn_r18": ((2, 2, 2, 2), False), "faster_rcnn_r50": ((3, 4, 6, 3), True)}
# Ours is given RGB from 0 to 1; detectron2 BGR from 0 to 255, with deviations of 1.
NORMALISATION = Normalisation((123.675 / 255, 116.28 / 255, 103.53 / 255), (1 / 255,) * 3)
TASK = Detection(dict(Detection.DEFAULTS), types.SimpleNamespace(class_names=tuple("abcde")))
LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
# Our names of arrays, as detectron2 calls them.
RENAMES = (
    (r"bn(\d)\.", r"conv\1.norm."),
    (r"downsample\.0\.", "shortcut."),
    (r"downsample\.1\.", "shortcut.norm."),
    (r"^trunk\.conv", "backbone.bottom_up.stem.conv"),
    (r"^trunk\.layer(\d)", lambda found: f"backbone.bottom_up.res{int(found[1]) + 1}"),
    (r"^fpn\.(\w+)\.(\d)", lambda found: f"backbone.fpn_{found[1]}{int(found[2]) + 2}"),
    (r"^rpn\.conv", "proposal_generator.rpn_head.conv"),
    (r"^rpn\.objectness", "proposal_generator.rpn_head.objectness_logits"),
    (r"^rpn\.deltas", "proposal_generator.rpn_head.anchor_deltas"),
    (r"^box_head\.fc", "roi_heads.box_head.fc"),
    (r"^box_head\.", "roi_heads.box_predictor."),
)


def theirs(name):
    """A reference whose weights make it find something, of some classes few and of one only empty boxes."""
    torch.manual_seed(0)
    net = reference.Detector(*TRUNKS[name], CLASSES, FEATURES, HIDDEN)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, reference.FixedNorm):
                module.running_mean.uniform_(-0.5, 0.5)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.uniform_(0.3, 0.7)
                module.bias.uniform_(-0.2, 0.2)
            if isinstance(module, reference.NormConv):
                torch.nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        net.backbone.bottom_up.stem["conv1"].weight /= 58  # as published ones have it, in place of a deviation
        head, predictor = net.proposal_generator["rpn_head"], net.roi_heads["box_predictor"]
        head["objectness_logits"].weight *= 300  # beyond what a sigmoid tells apart
        head["anchor_deltas"].weight *= 10
        predictor["cls_score"].weight *= 100
        predictor["cls_score"].bias += torch.tensor([0.0, 0.0, -1.0, 0.0, 0.0, 0.5])
        predictor["bbox_pred"].weight *= 10
        predictor["bbox_pred"].bias[4 * EMPTY] += 100
    return net


def convert(state, shapes):
    """Those of the reference's arrays that `shapes` names, by our names and in our layouts."""
    arrays = {}
    for name, shape in shapes.items():
        key = name.replace("/", ".")
        for leaf, other in LEAVES.items():
            key = re.sub(rf"\.{leaf}$", f".{other}", key)
        for pattern, replacement in RENAMES:
            key = re.sub(pattern, replacement, key)
        array = state[key].numpy()
        if name == "trunk/conv1/kernel":
            array = array[:, ::-1]
        if name == "box_head/fc1/kernel":
            array = array.reshape(len(array), -1, 7, 7)
        if name.endswith("kernel"):
            array = array.transpose((2, 3, 1, 0) if array.ndim == 4 else (1, 0))
        assert array.shape == shape, name
        arrays[name] = jnp.asarray(array)
    return arrays


def build(name, net):
    """(structure, params, variables) of ours with the reference's arrays."""
    settings = {"features": FEATURES, "hidden": HIDDEN, "ignore_padding": False, "pooling": "einsum"}
    ours = nnx.eval_shape(lambda: FasterRCNN(name, CLASSES + 1, **settings, rngs=nnx.Rngs(0)))
    structure, *trees, _ = functional.split(ours)
    state = net.state_dict()
    assert len(state) == sum(map(len, trees))
    return structure, *(convert(state, {name: x.shape for name, x in tree.items()}) for tree in trees)


def photographs(*sizes):
    """BGR uint8 [3, height, width] images, patches of 16 pixels with noise."""
    rng = np.random.default_rng(1)
    images = []
    for height, width in sizes:
        patches = rng.integers(0, 200, (3, -(-height // 16), -(-width // 16)))
        image = np.kron(patches, np.ones((16, 16), int))[:, :height, :width] + rng.integers(0, 56, (3, height, width))
        images.append(torch.tensor(image.astype(np.uint8)))
    return images


def batch_of(images, truth=()):
    """RGB canvases as loaded, which may hold anything beyond the images, with boxes and their classes."""
    canvas = np.full((len(images), *reference.canvas_of(images).shape[2:], 3), 77, np.uint8)
    boxes, label = np.zeros((len(images), 4, 4), np.float32), np.full((len(images), 4), -1, np.int32)
    for place, image in zip(canvas, images, strict=True):
        place[: image.shape[1], : image.shape[2]] = image.numpy()[::-1].transpose(1, 2, 0)
    for i, (of_image, classes) in enumerate(truth):
        boxes[i, : len(classes)], label[i, : len(classes)] = of_image, classes
    size = np.array([image.shape[1:] for image in images], np.int32)
    extra = {"size": size, "boxes": boxes, "box_valid": label >= 0}
    return jax.tree.map(jnp.asarray, Batch(canvas, label, np.arange(len(images)), np.ones(len(images), bool), extra))


def regions_at_borders():
    """Boxes that rules of pooling turn on: at borders of levels, beyond the image, thin, empty, of whole cells."""
    below = 111.9999  # makes a square of 112 one of p2, and in torchvision's preset one of p3 still
    boxes = [[0, 0, side, side] for side in (112, 224, 448)]
    boxes += [[0, 0, 112, below], [-150, -90, 90, 150], [-400, -300, 500, 460], [60, 40, 400, 360], [3, 2, 3.2, 60]]
    boxes += [[5, 9, 90, 9.4], [20, 20, 20, 40], [-90, -80, -60, -45], [2, 2, 30, 30], [2, 2, 58, 86], [9, 9, 900, 800]]
    return torch.tensor(np.array(boxes, np.float32))


class Stages(NamedTuple):
    """What the reference makes of a batch on its way to detections; from `proposals` on a list of images."""

    trunk: list
    levels: list
    logits: list
    deltas: list
    proposals: list
    given: list  # regions: those of `regions_at_borders`, then the proposals
    pooled: list
    classes: list
    moves: list
    detections: list


@torch.no_grad()
def detect(net, images):
    trunk = net.backbone.bottom_up(reference.canvas_of(images))
    levels = net.backbone(trunk)
    logits, deltas = net.objectness(levels)
    made = Stages(trunk, levels, logits, deltas, *([] for _ in range(6)))
    anchors, borders = reference.anchors_of(levels), regions_at_borders()
    for i, image in enumerate(images):
        size = image.shape[1:]
        of_image = ([x[i] for x in part] for part in (logits, deltas))
        proposals, _ = reference.propose(*of_image, anchors, size, train=False)
        given = torch.cat([borders, proposals])
        pooled = reference.pool([x[i] for x in levels[:4]], given)
        classes, moves = net.classify(pooled)
        detections = reference.detect(proposals, classes[len(borders) :], moves[len(borders) :], size)
        for part, value in zip(made[4:], (proposals, given, pooled, classes, moves, detections), strict=True):
            part.append(value)
    return made


def nhwc(x):
    return x.numpy().transpose(0, 2, 3, 1)


def close(ours, expected, name):
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4 * np.abs(expected).max(), err_msg=name)


def share_found(rows, others, *, within):
    """Of the rows, how many have one of the others no entry further away."""
    return np.mean(np.abs(rows[:, None] - others).max(-1).min(1) <= within)


def check_detections(name, sizes):
    """Each stage from the reference's input to it, as a tie in one may fall the other way; then as a whole.

    Returns:
      The reference's stages.
    """
    net, images = theirs(name), photographs(*sizes)
    expected = detect(net, images)
    structure, params, variables = build(name, net)
    counts = [len(boxes) for boxes in expected.given]
    regions = np.stack([np.pad(x.numpy(), ((0, max(counts) - len(x)), (0, 0))) for x in expected.given])
    levels = {f"p{level}": nhwc(x) for level, x in enumerate(expected.levels, 2)}

    @jax.jit
    def run(arrays, batch, levels, regions):
        network, batch = structure.merge(arrays), TASK.normalise(batch, NORMALISATION)
        trunk = network.trunk(batch.image)
        whole = network(batch.image, train=False, **TASK.student_inputs(batch, train=False))
        objectness = network.rpn(list(levels.values()))
        pooled = network.pool(levels, regions, 7)
        return trunk, whole, objectness, pooled, network.forward_from("regions", pooled, train=False)

    with jax.default_matmul_precision("highest"):
        got = jax.device_get(run(params | variables, batch_of(images), levels, regions))
    trunk, whole, (logits, deltas), pooled, given = got
    for stage, (ours, other) in enumerate(zip(trunk, expected.trunk, strict=True), 2):
        close(ours, nhwc(other), f"res{stage}")
    for number, level in enumerate(levels):
        close(whole.taps[level], levels[level], level)
        close(logits[number], expected.logits[number].numpy(), f"objectness of {level}")
        close(deltas[number], expected.deltas[number].numpy(), f"deltas of {level}")
    for i, count in enumerate(counts):
        close(pooled[i, :count], nhwc(expected.pooled[i]), "pooled regions")
        close(given.logits[i, :count], expected.classes[i].numpy(), "logits of regions")
        close(given.extra["deltas"][i, :count], expected.moves[i].numpy(), "deltas of regions")
        # Proposals with their place in the order, which a few ties may shift.
        ours, other = whole.extra["regions"][i][whole.valid[i]], expected.proposals[i].numpy()
        ours, other = (np.column_stack([x, 0.001 * np.arange(len(x))]) for x in (ours, other))
        assert share_found(ours, other, within=0.01) > 0.99 and share_found(other, ours, within=0.01) > 0.99
        # Classes and scores in units in which 0.01 is what they may be apart.
        found, (boxes, scores, classes) = whole.extra["detections"], (x.numpy() for x in expected.detections[i])
        ours = np.column_stack([found.boxes[i], 100 * found.classes[i], 100 * found.scores[i]])[found.valid[i]]
        kept = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)  # detectron2 drops the others when it scales them
        other = np.column_stack([boxes, 100 * classes, 100 * scores])[kept]
        assert share_found(ours, other, within=0.01) > 0.97 and share_found(other, ours, within=0.01) > 0.97
    return expected


def test_detections():
    """Bottlenecks. The threshold of the scores ends the detections, some of which are empty."""
    detections = check_detections("faster_rcnn_r50", ((96, 120), (70, 128))).detections
    assert all(20 < len(boxes) < 100 for boxes, _, _ in detections)
    assert all(scores.min() < 0.055 for _, scores, _ in detections)
    assert all(torch.any(boxes[:, 0] == boxes[:, 2]) for boxes, _, _ in detections)


def test_detections_up_to_the_limit():
    """Basic blocks. There are more detections than slots, and the best proposals all have a sigmoid of 1."""
    expected = check_detections("faster_rcnn_r18", ((64, 90), (50, 96)))
    assert all(len(boxes) == 100 for boxes, _, _ in expected.detections)
    assert (torch.sigmoid(torch.cat(expected.logits, dim=1)) == 1).sum() > 20


@pytest.mark.slow
def test_detections_of_large_images():
    """Proposals reach their limit, and regions from every level lie within the image."""
    expected = check_detections("faster_rcnn_r18", ((448, 600), (520, 480)))
    assert all(len(boxes) == reference.POST_NMS for boxes in expected.proposals)
    assert {reference.level_of(box) for box in expected.given[0]} == {0, 1, 2, 3}


def check_sample(drawn, every, count, share):
    """Whether labels that were drawn are as many of 1 (positive) and 0 as the rule has, and none of -1."""
    positives, negatives = reference.sample_sizes(np.sum(every == 1), np.sum(every == 0), count, share)
    assert [np.sum(drawn == label) for label in (1, 0, -1)] == [positives, negatives, 0]


def check_losses(sizes, boxes, classes):
    """Ours draws samples; the reference says whether they are ones, and what their losses and gradients are.

    Args:
      sizes: (height, width) of images.
      boxes: Of the objects of each.
      classes: Likewise.

    Returns:
      For each image: proposals before their limit, sampled anchors, sampled regions.
    """
    name, images = "faster_rcnn_r18", photographs(*sizes)
    truth = [
        (torch.tensor(b, dtype=torch.float32).reshape(-1, 4), torch.tensor(c, dtype=torch.long))
        for b, c in zip(boxes, classes, strict=True)
    ]
    net = theirs(name)
    structure, params, variables = build(name, net)

    @functools.partial(jax.value_and_grad, has_aux=True)
    def run(params, variables, batch):
        batch = TASK.normalise(batch, NORMALISATION)
        inputs = TASK.student_inputs(batch, train=True)
        student = structure.merge(params, variables)(batch.image, train=True, rngs=nnx.Rngs(0), **inputs)
        labels = TASK.labels(batch, student)
        terms = TASK.terms(Context(batch, None, labels, student, None, None, None, None, None))
        total, metrics = weigh({"label": terms}, batch.valid)
        return total, (metrics, student.extra)

    with jax.default_matmul_precision("highest"):
        (_, (metrics, extra)), gradients = jax.device_get(jax.jit(run)(params, variables, batch_of(images, truth)))

    levels = net.backbone(net.backbone.bottom_up(reference.canvas_of(images)))
    logits, deltas = net.objectness(levels)
    anchors = reference.anchors_of(levels)
    samples, regions, proposed = [], [], []
    for i, (boxes, classes) in enumerate(truth):
        drawn = extra["anchors"]
        samples.append(torch.tensor(drawn.indices[i][drawn.valid[i]]).long())
        labels, _ = reference.label_anchors(torch.cat(anchors), boxes)
        assert len(set(samples[i].tolist())) == len(samples[i])
        check_sample(labels[samples[i]].numpy(), labels.numpy(), reference.ANCHOR_SAMPLES, 0.5)

        of_image = ([x[i].detach() for x in part] for part in (logits, deltas))
        proposals, before = reference.propose(*of_image, anchors, images[i].shape[1:], train=True)
        proposed.append(before)
        candidates = torch.cat([proposals, boxes])
        regions.append(torch.tensor(extra["regions"][i][extra["targets"].valid[i]]))
        assert share_found(regions[i].numpy(), candidates.numpy(), within=0.01) > 0.99
        found = (reference.label_regions(x, boxes, classes, CLASSES)[0] < CLASSES for x in (regions[i], candidates))
        check_sample(*(x.numpy() for x in found), reference.REGION_SAMPLES, 0.25)

    expected = reference.losses(net, levels, torch.cat(logits, 1), torch.cat(deltas, 1), truth, samples, regions)
    for key, value in expected.items():
        assert value > 0
        np.testing.assert_allclose(metrics[f"label/{key}"], value.item(), rtol=1e-4, err_msg=key)
    sum(expected.values()).backward()
    slopes = {key: value.grad for key, value in net.named_parameters()}
    for key, value in convert(slopes, {key: x.shape for key, x in gradients.items()}).items():
        close(gradients[key], value, key)
    return proposed, [len(x) for x in samples], [len(x) for x in regions]


def test_losses():
    """The proposals of one image reach their limit, one has fewer regions than slots, and one has no box."""
    boxes = [[[20, 30, 90, 120], [100, 40, 180, 100], [5, 5, 30, 30]], [[10, 4, 50, 36]], []]
    proposed, anchors, regions = check_losses(((128, 190), (40, 60), (100, 100)), boxes, [[0, 4, 2], [3], []])
    assert proposed[0] > reference.POST_NMS
    assert anchors == 3 * [reference.ANCHOR_SAMPLES]
    assert regions[0] == regions[2] == reference.REGION_SAMPLES > regions[1]


def test_losses_of_few_anchors():
    """Whose losses are still divided by the number of slots."""
    _, anchors, _ = check_losses(((32, 32),), [[[3, 4, 28, 30]]], [[1]])
    assert anchors[0] < reference.ANCHOR_SAMPLES
