"""The whole detector against torchvision's, from the same random weights: pyramid, proposals, detections, losses."""

import types

import harness  # makes torchvision importable
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchvision
from flax import nnx
from safetensors.torch import load_file
from torchvision.models.detection.backbone_utils import BackboneWithFPN, resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

from wkd_jax import weights
from wkd_jax.models import functional
from wkd_jax.models.detection.faster_rcnn import TRUNKS, FasterRCNN
from wkd_jax.models.detection.trunks import MobileNetV2Trunk
from wkd_jax.tasks.detection import Detection
from wkd_jax.training.step import weigh
from wkd_jax.types import Batch, Context
from wkd_jax.weights import export, match
from wkd_jax.weights.state import BUFFERS

CLASSES = 6


def nms(boxes, scores, threshold):
    """Greedy, from the definition; indices by falling score."""
    order, kept = np.argsort(-scores, kind="stable"), []
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    for i in order:
        if kept:
            low, high = np.maximum(boxes[i, :2], boxes[kept, :2]), np.minimum(boxes[i, 2:], boxes[kept, 2:])
            inner = np.prod(np.maximum(high - low, 0), axis=1)
            if np.any(inner / (area[i] + area[kept] - inner) > np.float32(threshold)):
                continue
        kept.append(i)
    return np.array(kept, np.int64)


def batched_nms(boxes, scores, groups, threshold):
    boxes, scores, groups = (x.detach().numpy() for x in (boxes, scores, groups))
    members = [np.nonzero(groups == group)[0] for group in np.unique(groups)]
    kept = [where[nms(boxes[where], scores[where], threshold)] for where in members]
    kept = np.concatenate(kept) if kept else np.zeros(0, np.int64)
    return torch.tensor(kept[np.argsort(-scores[kept], kind="stable")])


def axis_weights(start, length, cells, size):
    """[K, cells, size] of the two samples a cell that torchvision's detector has, boxes not aligned."""
    weights = torch.zeros(len(start), cells, size)
    length = torch.clamp(length, min=1.0)
    for sample in (0.25, 0.75):
        y = start[:, None] + (torch.arange(cells) + sample) * length[:, None] / cells
        inside = (y >= -1) & (y <= size)
        y = y.clamp(0, size - 1)
        weights += torch.clamp(1 - (y[..., None] - torch.arange(size)).abs(), min=0) * inside[..., None] / 2
    return weights


def roi_align(x, boxes, output_size, spatial_scale, sampling_ratio):
    assert sampling_ratio == 2
    corners = boxes[:, 1:] * spatial_scale
    columns = axis_weights(corners[:, 0], corners[:, 2] - corners[:, 0], output_size[1], x.shape[3])
    rows = axis_weights(corners[:, 1], corners[:, 3] - corners[:, 1], output_size[0], x.shape[2])
    regions = zip(boxes[:, 0].long(), rows, columns, strict=True)  # one by one: all at once are gigabytes
    pooled = [row @ x[image] @ column.T for image, row, column in regions]
    return torch.stack(pooled) if pooled else torch.zeros(0, x.shape[1], *output_size)


@pytest.fixture(autouse=True)
def operators(monkeypatch):
    """torchvision's compiled ones do not load beside a CPU torch; each was compared with ours in detection_ops_test."""
    monkeypatch.setattr(torchvision.ops.boxes, "batched_nms", batched_nms)
    monkeypatch.setattr(torchvision.ops.poolers, "roi_align", roi_align)


def theirs(**settings):
    """torchvision's detector with weights that make it find something."""
    torch.manual_seed(0)
    net = torchvision.models.detection.fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=CLASSES + 1, min_size=192, max_size=256, **settings
    )
    with torch.no_grad():
        for module in net.modules():
            if hasattr(module, "running_var"):
                module.running_mean.uniform_(-0.5, 0.5)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.uniform_(0.3, 0.7)
        net.roi_heads.box_predictor.cls_score.weight *= 30
        net.rpn.head.cls_logits.weight *= 10
        net.rpn.head.bbox_pred.weight *= 10
    return net


def images():
    rng = np.random.default_rng(1)
    return [torch.tensor(rng.random((3, *size), np.float32)) for size in ((150, 200), (200, 170), (160, 256))]


def build(net, **settings):
    settings = {"preset": "tv", "ignore_padding": False, "pooling": "einsum", **settings}
    ours = nnx.eval_shape(lambda: FasterRCNN("faster_rcnn_r50", CLASSES + 1, **settings, rngs=nnx.Rngs(0)))
    state = {key: value.numpy() for key, value in net.state_dict().items() if not key.endswith(BUFFERS)}
    fit = match.best(state, ours)
    assert (fit.style, fit.problems) == ("torchvision", 0)
    arrays, _ = match.convert(fit, ours, "torchvision", reset_head=False)
    return functional.split(ours)[0], jax.tree.map(jnp.asarray, arrays)


def share_found(boxes, others, *, within):
    """Of the boxes, how many have one of the others no corner further away, pixels."""
    return np.mean(np.abs(boxes[:, None] - others).max(-1).min(1) <= within)


def test_detections():
    """Stage by stage, each from torchvision's input to it, as a tie in one may fall the other way; then as a whole."""
    net = theirs().eval()
    with torch.no_grad():
        batch, _ = net.transform(images())
        features = net.backbone(batch.tensors)
        proposals, _ = net.rpn(batch, features)
        expected, _ = net.roi_heads(features, proposals, batch.image_sizes)
        classes, deltas = net.roi_heads.box_predictor(
            net.roi_heads.box_head(net.roi_heads.box_roi_pool(features, proposals, batch.image_sizes))
        )
    structure, arrays = build(net)
    size = jnp.array(batch.image_sizes)
    counts = [len(boxes) for boxes in proposals]
    regions = np.zeros((len(counts), 1000, 4), np.float32)
    for i, boxes in enumerate(proposals):
        regions[i, : counts[i]] = boxes.numpy()

    @jax.jit
    def run(arrays, image, regions):
        network = structure.merge(arrays)
        return network(image, train=False, size=size), network(image, train=False, regions=regions)

    with jax.default_matmul_precision("highest"):
        image = jnp.asarray(batch.tensors.numpy().transpose(0, 2, 3, 1))
        whole, given = jax.device_get(run(arrays, image, regions))
    for level, name in zip(("p2", "p3", "p4", "p5", "p6"), features, strict=True):
        reference = features[name].numpy().transpose(0, 2, 3, 1)
        np.testing.assert_allclose(whole.taps[level], reference, atol=1e-4 * np.abs(reference).max(), err_msg=level)
    for i, reference in enumerate(proposals):
        got = whole.extra["regions"][i][whole.valid[i]]
        assert share_found(reference.numpy(), got, within=0.01) > 0.99
        assert share_found(got, reference.numpy(), within=0.01) > 0.99
    logits = np.concatenate([given.logits[i, :count] for i, count in enumerate(counts)])
    np.testing.assert_allclose(np.roll(logits, 1, axis=1), classes.numpy(), atol=1e-4 * np.abs(logits).max())
    offsets = np.concatenate([given.extra["deltas"][i, :count] for i, count in enumerate(counts)])
    np.testing.assert_allclose(offsets.reshape(len(offsets), -1), deltas.numpy()[:, 4:], atol=1e-4)
    found, total = whole.extra["detections"], 0
    for i, reference in enumerate(expected):
        keep = found.valid[i]
        label, boxes, scores = (reference[key].numpy() for key in ("labels", "boxes", "scores"))
        # One row a detection; classes and scores in units in which 0.01 is what they may be apart.
        ours = np.column_stack([found.boxes[i][keep], 100 * found.classes[i][keep], 100 * found.scores[i][keep]])
        others = np.column_stack([boxes, 100 * (label - 1), 100 * scores])
        assert share_found(ours, others, within=0.01) > 0.97 and share_found(others, ours, within=0.01) > 0.97
        total += keep.sum()
    assert total > 30


def small(name):
    """torchvision's detector with fixed normalisation and the trunk of ours."""
    if name == "faster_rcnn_mobilenetv2":
        features = torchvision.models.mobilenet_v2(weights=None, norm_layer=FrozenBatchNorm2d).features
        layers = {str(index): str(level) for level, index in enumerate(MobileNetV2Trunk.LAST)}
        backbone = BackboneWithFPN(features, layers, list(MobileNetV2Trunk.channels), 256)
    else:
        backbone = resnet_fpn_backbone(backbone_name=TRUNKS[name], weights=None)
    return harness.randomise(torchvision.models.detection.FasterRCNN(backbone, CLASSES + 1))


@pytest.mark.parametrize(
    ("name", "style"),
    [
        ("faster_rcnn_r18", "torchvision_0_12"),
        ("faster_rcnn_r50", "torchvision"),
        ("faster_rcnn_mobilenetv2", "torchvision"),
    ],
)
def test_files(tmp_path, name, style):
    """What torch saves is read; what is written torchvision loads with strict=True, also as old versions wrote it."""
    net = small(name)
    torch.save(net.state_dict(), tmp_path / "x.pth")
    model = nnx.eval_shape(lambda: FasterRCNN(name, CLASSES + 1, preset="tv", rngs=nnx.Rngs(0)))
    file = weights.open_file(tmp_path / "x.pth")
    arrays, notes = file.arrays(model)
    assert notes[0] == "keys of torchvision" and file.normalisation == weights.public.IMAGENET
    export.to_torch(tmp_path / "x.safetensors", model, arrays, style=style)
    other = small(name)
    other.load_state_dict(load_file(tmp_path / "x.safetensors"), strict=True)
    before = net.state_dict()
    for part in ("weight", "bias"):
        before[f"roi_heads.box_predictor.bbox_pred.{part}"][:4] = 0  # of the background
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())


def ground_truth():
    boxes = [[[20, 30, 90, 120], [100, 40, 180, 100], [5, 5, 30, 30]], [[40, 40, 150, 160]], []]
    labels = [[0, 4, 2], [3], []]
    return boxes, labels


def test_losses():
    """Every candidate is sampled on both sides, so that nothing is drawn."""
    many = 20_000
    net = theirs(rpn_batch_size_per_image=many, box_batch_size_per_image=4000, box_positive_fraction=0.5).train()
    boxes, labels = ground_truth()
    targets = [
        {"boxes": torch.tensor(b, dtype=torch.float32).reshape(-1, 4), "labels": torch.tensor(c, dtype=torch.int64) + 1}
        for b, c in zip(boxes, labels, strict=True)
    ]
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()  # fixed statistics, as in ours
    with torch.no_grad():
        batch, targets = net.transform(images(), targets)
        features = net.backbone(batch.tensors)
        proposals, rpn_losses = net.rpn(batch, features, targets)
        _, roi_losses = net.roi_heads(features, proposals, batch.image_sizes, targets)
    structure, arrays = build(net, anchor_samples=many, region_samples=4000)
    extra = {"boxes": np.zeros((3, 4, 4), np.float32), "box_valid": np.zeros((3, 4), bool)}
    extra["size"] = jnp.array(batch.image_sizes)
    label = np.full((3, 4), -1, np.int32)
    for i, target in enumerate(targets):
        count = len(target["labels"])
        extra["boxes"][i, :count] = target["boxes"].numpy()
        extra["box_valid"][i, :count] = True
        label[i, :count] = target["labels"].numpy() - 1
    settings = {"label_weight": 1.0, "smooth_l1_beta": 1 / 9, "sampled_mean": True}
    task = Detection(settings, types.SimpleNamespace(class_names=tuple("abcdef")))
    image = jnp.asarray(batch.tensors.numpy().transpose(0, 2, 3, 1))
    given = Batch(image, jnp.asarray(label), jnp.arange(3), jnp.ones(3, bool), extra)

    @jax.jit
    def run(arrays):
        inputs = task.student_inputs(given, train=True)
        student = structure.merge(arrays)(image, train=True, rngs=nnx.Rngs(0), **inputs)
        terms = task.terms(Context(given, None, task.labels(given, student), student, None, None, None, None, None))
        return weigh({"label": terms}, given.valid)[1]

    with jax.default_matmul_precision("highest"):
        metrics = jax.device_get(run(arrays))
    for ours, name in (
        ("rpn_objectness", "loss_objectness"),
        ("rpn_box", "loss_rpn_box_reg"),
        ("roi_class", "loss_classifier"),
        ("roi_box", "loss_box_reg"),
    ):
        reference = {**rpn_losses, **roi_losses}[name].item()
        assert reference > 0
        np.testing.assert_allclose(metrics[f"label/{ours}"], reference, rtol=1e-4, err_msg=ours)
