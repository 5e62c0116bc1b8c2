"""Functions on boxes against torchvision's: anchors, code, overlaps, matching, levels, RoIAlign and suppression.

Suppression and RoIAlign are compiled operators of torchvision, which many installations cannot load. What they return,
for inputs that are drawn here, is in `tests/goldens/torchvision_detection.npz`, written by this file run as a program
where they load (torchvision 0.28.0, torch 2.13.0, on the CPU).
"""

import functools
import pathlib
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

if __name__ != "__main__":  # which declares the operator, and where it loads it must not be declared again
    import torchvision_cpu  # noqa: F401  (makes torchvision importable beside a CPU build of torch)
from torchvision import ops
from torchvision.models.detection import _utils, anchor_utils, image_list
from torchvision.ops import poolers

from wkd_jax.models import detection

GOLDEN = pathlib.Path(__file__).parents[1] / "goldens" / "torchvision_detection.npz"


def tensors(*arrays):
    return [torch.from_numpy(np.array(x)) for x in arrays]


def draw_boxes(rng, *shape, side=500.0):
    corner, sides = rng.random((2, *shape, 2), np.float32) * np.float32(side)
    return np.concatenate([corner, corner + sides], axis=-1)


# ------------------------------------------------------------------------------------------------ anchors and boxes


@pytest.mark.parametrize("canvas", [(800, 1344), (256, 320), (224, 352)])
def test_anchors(canvas):
    maker = anchor_utils.AnchorGenerator(tuple((s,) for s in (32, 64, 128, 256, 512)), ((0.5, 1.0, 2.0),) * 5)
    maps = [torch.zeros(1, 1, -(-canvas[0] // s), -(-canvas[1] // s)) for s in (4, 8, 16, 32, 64)]
    (expected,) = maker(image_list.ImageList(torch.zeros(1, 1, *canvas), [canvas]), maps)
    np.testing.assert_array_equal(np.concatenate(detection.pyramid_anchors(canvas, preset="tv")), expected)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)])
def test_code(weights):
    rng = np.random.default_rng(0)
    boxes, anchors = (draw_boxes(rng, 10_000) + np.float32([0, 0, 1, 1]) for _ in range(2))
    deltas = (rng.normal(0, 3, (10_000, 4)) * weights).astype(np.float32)
    coder = _utils.BoxCoder(weights)
    encode, decode = (
        jax.jit(functools.partial(f, weights=weights)) for f in (detection.encode_boxes, detection.decode_boxes)
    )
    expected = coder.encode_single(*tensors(boxes, anchors)).numpy()
    np.testing.assert_allclose(encode(boxes, anchors), expected, rtol=1e-4, atol=1e-4)
    expected = coder.decode_single(*tensors(deltas, anchors)).numpy()
    scale = np.abs(expected).max(axis=1, keepdims=True)
    np.testing.assert_allclose(decode(deltas, anchors) / scale, expected / scale, atol=1e-5)
    assert np.sum(deltas[:, 2:] / weights[2] > np.log(62.5)) > 500


def test_overlaps():
    rng = np.random.default_rng(1)
    whole = rng.integers(0, 8, (200, 2)).astype(np.float32)
    a = np.concatenate([draw_boxes(rng, 300, side=100), np.tile(whole, 2) + np.float32([0, 0, 3, 5])])
    b = np.concatenate([draw_boxes(rng, 100, side=100), np.tile(whole[:100], 2) + np.float32([1, 1, 4, 6])])
    expected = ops.box_iou(*tensors(a, b)).numpy()
    ours = np.asarray(jax.jit(detection.pairwise_iou)(a, b))
    np.testing.assert_allclose(ours, expected, atol=1e-6)
    np.testing.assert_array_equal(ours == 0, expected == 0)
    sizes = np.array([60, 90])
    np.testing.assert_array_equal(detection.clip_boxes(a, sizes), ops.clip_boxes_to_image(tensors(a)[0], (60, 90)))
    x, y = (t.requires_grad_() for t in tensors(a[:200], draw_boxes(rng, 200, side=100)))
    loss = ops.distance_box_iou_loss(x, y)
    loss.sum().backward()
    ours, gradients = jax.jit(jax.value_and_grad(lambda *z: detection.distance_iou_loss(*z).sum(), argnums=(0, 1)))(
        *(t.detach().numpy() for t in (x, y))
    )
    np.testing.assert_allclose(ours, loss.sum().item(), rtol=1e-6)
    for gradient, t in zip(gradients, (x, y), strict=True):
        np.testing.assert_allclose(gradient, t.grad, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- matching


@pytest.mark.parametrize("whole", [True, False])
def test_matching(whole):
    """Whole numbers make ties. Each box overlaps an anchor: torchvision gives all anchors to one that overlaps none."""
    cases, count, rows, padding = 20, 300, 8, 5
    rng = np.random.default_rng(2)
    corner, sides = (rng.integers(0, 14, (2, cases, count + rows, 2)) + np.array([0, 1])[:, None, None, None]).astype(
        float
    )
    noise = 0 if whole else rng.random((cases, count + rows, 4))
    boxes = (np.concatenate([corner, corner + sides], axis=-1) + noise).astype(np.float32)
    anchors, truth = boxes[:, :count], np.pad(boxes[:, count:], ((0, 0), (0, padding), (0, 0)))
    valid = np.tile(np.arange(rows + padding) < rows, (cases, 1))
    ours = jax.jit(jax.vmap(detection.match_anchors))(anchors, truth, valid)
    proposals = jax.jit(jax.vmap(detection.match_proposals))(anchors, truth, valid)
    matchers = (_utils.Matcher(0.7, 0.3, allow_low_quality_matches=True), _utils.Matcher(0.5, 0.5))
    for i in range(cases):
        iou = ops.box_iou(*tensors(truth[i, :rows], anchors[i]))
        assert (iou.max(dim=1).values > 0).all()
        for matcher, (labels, matches) in zip(matchers, (ours, proposals), strict=True):
            expected = matcher(iou).numpy()
            labels = np.asarray(labels[i])
            np.testing.assert_array_equal(labels, np.where(expected >= 0, 1, np.where(expected == -1, 0, -1)))
            np.testing.assert_array_equal(np.asarray(matches[i])[labels == 1], expected[labels == 1])
            assert (labels == 1).any()


# --------------------------------------------------------------------------------------------------------- RoIAlign


def test_levels():
    area = np.concatenate(
        [(np.float32(s**2).view(np.int32) + np.arange(-5, 6, dtype=np.int32)).view(np.float32) for s in (112, 224, 448)]
    )
    boxes = np.concatenate(
        [np.stack([0 * area, 0 * area, area, 0 * area + 1], 1), draw_boxes(np.random.default_rng(3), 2000, side=900)]
    )
    expected = poolers.LevelMapper(2, 5)(tensors(boxes)).numpy()
    np.testing.assert_array_equal(detection.assign_levels(boxes, preset="tv"), expected)
    assert set(expected) == {0, 1, 2, 3}


SIZES, REGIONS = ((40, 56), (20, 28)), 24


def draw_pyramid():
    rng = np.random.default_rng(4)
    maps = [rng.normal(size=(*size, 2)).astype(np.float32) for size in SIZES]
    boxes = np.concatenate([rng.random((REGIONS, 2)) * 150 - 20, rng.random((REGIONS, 2)) ** 2 * 150 + 1], axis=1)
    boxes[:, 2:] += boxes[:, :2]
    boxes[:5] = [[3, 20, 3.3, 150], [20, 9, 220, 9.5], [50, 30, 50, 30], [-90, -80, -60, -45], [0, 0, 84, 112]]
    cotangent = rng.normal(size=(REGIONS, 7, 7, 2)).astype(np.float32)
    return maps, boxes.astype(np.float32), rng.integers(0, 2, REGIONS).astype(np.int32), cotangent


def torch_roi_align(ratio, aligned):
    """The pooled regions, and the gradient of each map."""
    maps, boxes, levels, cotangent = draw_pyramid()
    result = {"pooled": np.zeros_like(cotangent)}
    for level, (x, stride) in enumerate(zip(maps, (4, 8), strict=True)):
        here = levels == level
        x, seed = tensors(x.transpose(2, 0, 1)[None], cotangent[here].transpose(0, 3, 1, 2))
        x.requires_grad_()
        pooled = ops.roi_align(x, tensors(boxes[here]), 7, 1 / stride, ratio, aligned)
        (pooled * seed).sum().backward()
        result["pooled"][here] = pooled.detach().numpy().transpose(0, 2, 3, 1)
        result[f"map{level}"] = x.grad.numpy()[0].transpose(1, 2, 0)
    return result


@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("aligned", [True, False])
def test_roi_align(ratio, aligned):
    """Values and gradients, on a pyramid of two maps."""
    maps, boxes, levels, cotangent = draw_pyramid()
    expected = {name: golden()[f"{name}_{ratio}_{aligned}"] for name in ("pooled", "map0", "map1")}
    for form in (detection.roi_align_einsum, *([detection.roi_align_gather] if ratio else [])):
        settings = {"strides": (4, 8), "sampling_ratio": ratio, "aligned": aligned, "chunk": REGIONS // 2}

        def run(maps, form=form, settings=settings):
            pooled = form(maps, boxes, levels, **settings)
            return jnp.sum(pooled * cotangent), pooled

        gradients, pooled = jax.jit(jax.grad(run, has_aux=True))(maps)
        np.testing.assert_allclose(pooled, expected["pooled"], atol=1e-4)
        for number, gradient in enumerate(gradients):
            np.testing.assert_allclose(gradient, expected[f"map{number}"], atol=1e-4)


# ------------------------------------------------------------------------------------------------------ suppression

THRESHOLDS = (0.3, 0.5, 0.7)
SETS, SET_SIZE = 1000, 64
LARGE = (0, 1, 7, 1000, 2000)


def draw_sets(rng, sets, count):
    """Boxes anywhere, in clusters, with whole corners and many of them equal, and in chains; scores differ."""
    corner, sides = rng.random((2, sets, count, 2), np.float32) * np.float32(200)
    kind = np.arange(sets)[:, None, None] % 4
    clusters = rng.integers(0, 6, (sets, count, 1)).astype(np.float32) * 40
    corner = np.where(kind == 1, clusters + corner / 16, corner)
    sides = np.where(kind == 1, 30 + sides / 16, sides)
    corner, sides = (np.where(kind == 2, np.floor(x / 16), x) for x in (corner, sides))
    shift = np.float32([6, 4, 2])[np.arange(sets) // 4 % 3, None]  # of 16: beyond 0.3, 0.5 and 0.7 with the next alone
    link = np.stack([np.arange(count, dtype=np.float32) * shift, np.zeros((sets, count), np.float32)], axis=-1)
    corner, sides = np.where(kind == 3, link, corner), np.where(kind == 3, np.float32([16, 9]) + sides / 64, sides)
    scores = rng.permuted(np.tile(np.arange(count, dtype=np.float32) / max(count, 1), (sets, 1)), axis=1)
    return np.concatenate([corner, corner + sides], axis=-1).astype(np.float32), scores


def draw_all():
    rng = np.random.default_rng(6)
    return [draw_sets(rng, SETS, SET_SIZE), *(draw_sets(rng, 4, count) for count in LARGE)]


def draw_groups():
    boxes, scores = draw_sets(np.random.default_rng(7), 2, 1200)
    return boxes[1], scores[1], np.random.default_rng(8).integers(0, 5, 1200)


def torch_nms(boxes, scores, threshold, groups=None):
    boxes, scores = tensors(boxes, scores)
    if groups is None:
        kept = ops.nms(boxes, scores, threshold)
    else:
        kept = ops.boxes._batched_nms_vanilla(boxes, scores, torch.from_numpy(groups), threshold)
    return np.isin(np.arange(len(boxes)), kept.numpy())


def torchvision_returns():
    """What the operators return, and a checksum of what they were given."""
    drawn, grouped = draw_all(), draw_groups()
    result = {"checksum": np.array(checksum())}
    for ratio, aligned in ((0, True), (0, False), (2, True), (2, False)):
        result |= {f"{name}_{ratio}_{aligned}": value for name, value in torch_roi_align(ratio, aligned).items()}
    for threshold in THRESHOLDS:
        for number, (boxes, scores) in enumerate(drawn):
            keep = [torch_nms(b, s, threshold) for b, s in zip(boxes, scores, strict=True)]
            result[f"{number}_{threshold}"] = np.packbits(np.array(keep, bool).reshape(len(boxes), -1), axis=1)
    result["groups_0.5"] = np.packbits(torch_nms(*grouped[:2], 0.5, grouped[2]))
    return result


def checksum():
    return zlib.crc32(b"".join(x.tobytes() for x in jax.tree.leaves((draw_all(), draw_groups(), draw_pyramid()))))


@functools.cache
def golden():
    stored = dict(np.load(GOLDEN))
    assert stored["checksum"] == checksum(), "NumPy draws other sets: write the file anew"
    return stored


def at_most(threshold):
    """The largest float32 up to the threshold.

    torchvision's operator for the CPU compares a float32 IoU with the float64 threshold, and 0.3 in float32 is above
    0.3: an IoU of exactly 3/10 counts as more. Its operator for the GPU compares in float32, as ours does. That only
    tells apart IoU which equal the threshold, of which sets with whole corners have many.
    """
    rounded = np.float32(threshold)
    return float(rounded if float(rounded) <= threshold else np.nextafter(rounded, np.float32(0)))


def ours(boxes, scores, threshold):
    run = jax.vmap(lambda b, s: detection.nms_mask(b, s, jnp.ones(len(s), bool), threshold=at_most(threshold)))
    return np.asarray(jax.jit(run)(boxes, scores))


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_nms(threshold):
    boxes, scores = draw_all()[0]
    keep = ours(boxes, scores, threshold)
    np.testing.assert_array_equal(np.packbits(keep, axis=1), golden()[f"0_{threshold}"])
    assert all(0.02 < keep[kind::4].mean() < 0.995 for kind in range(4))


@pytest.mark.slow
@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_nms_of_other_sizes(threshold):
    for number, (boxes, scores) in enumerate(draw_all()[1:], 1):
        keep = ours(boxes, scores, threshold)
        np.testing.assert_array_equal(np.packbits(keep, axis=1), golden()[f"{number}_{threshold}"])


def test_nms_in_groups():
    boxes, scores, groups = draw_groups()
    keep = jax.jit(functools.partial(detection.nms_mask, threshold=0.5))(
        boxes, scores, np.ones(1200, bool), groups=groups
    )
    np.testing.assert_array_equal(np.packbits(keep), golden()["groups_0.5"])


if __name__ == "__main__":
    np.savez_compressed(GOLDEN, **torchvision_returns())
