"""Box functions against float64 NumPy from the definitions, and finite gradients where boxes are empty."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wkd_jax.models.detection import boxes

WEIGHTS = (10.0, 10.0, 5.0, 5.0)
SPECIAL = np.array(
    [
        [0, 0, 4, 4],
        [4, 0, 8, 4],
        [1, 1, 3, 3],
        [0, 0, 4, 4],
        [2, 2, 2, 8],
        [5, 5, 5, 5],
        [6, 6, 2, 2],
        [0, 0, 1e4, 1e4],
    ],
    np.float32,
)


def draw(count, seed=0, side=500.0):
    corner, sides = np.random.default_rng(seed).random((2, count, 2), np.float32) * np.float32(side)
    return np.concatenate([corner, corner + sides + 10], axis=1)


def oracle_iou(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    sides = np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0)
    if not sides.prod():
        return 0.0
    return sides.prod() / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - sides.prod())


def oracle_encode(box, anchor, weights):
    box, anchor = np.asarray(box, np.float64), np.asarray(anchor, np.float64)
    sides, anchor_sides = box[..., 2:] - box[..., :2], anchor[..., 2:] - anchor[..., :2]
    shift = ((box[..., :2] + box[..., 2:]) / 2 - (anchor[..., :2] + anchor[..., 2:]) / 2) / anchor_sides
    return np.concatenate([shift, np.log(sides / anchor_sides)], axis=-1) * weights


def oracle_decode(deltas, anchor, weights):
    deltas, anchor = np.asarray(deltas, np.float64) / weights, np.asarray(anchor, np.float64)
    sides, centre = anchor[..., 2:] - anchor[..., :2], (anchor[..., :2] + anchor[..., 2:]) / 2
    centre, half = centre + deltas[..., :2] * sides, np.exp(np.minimum(deltas[..., 2:], np.log(62.5))) * sides / 2
    return np.concatenate([centre - half, centre + half], axis=-1)


def oracle_diou(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    around = np.maximum(a[2:], b[2:]) - np.minimum(a[:2], b[:2])
    apart = (a[:2] + a[2:] - b[:2] - b[2:]) / 2
    return 1 - oracle_iou(a, b) + (apart @ apart / (around @ around) if around.any() else 0)


def test_area_and_iou():
    a, b = np.concatenate([SPECIAL, draw(30)]), np.concatenate([SPECIAL, draw(20, seed=1, side=200)])
    expected = np.array([[oracle_iou(x, y) for y in b] for x in a])
    iou = np.asarray(jax.jit(boxes.pairwise_iou)(a, b))
    np.testing.assert_allclose(iou, expected, atol=1e-6)
    np.testing.assert_array_equal(iou == 0, expected == 0)
    assert 50 < np.sum(expected > 0) < expected.size - 50
    np.testing.assert_array_equal(iou[4:7], 0)  # an empty box overlaps nothing, not even itself
    assert iou[0, 1] == 0  # nor do neighbours that touch; sides are x2 - x1, without one more
    assert iou[0, 3] == 1
    assert iou[0, 2] == 0.25
    np.testing.assert_array_equal(boxes.box_area(SPECIAL), [16, 16, 4, 16, 0, 0, 0, 1e8])
    np.testing.assert_allclose(boxes.matched_iou(a[:20], b[:20]), np.diagonal(expected)[:20], atol=1e-6)


def test_leading_axes_are_a_batch():
    a, b = draw(12).reshape(3, 4, 4), draw(6, seed=1).reshape(3, 2, 4)
    one_by_one = np.stack([[[oracle_iou(x, y) for y in ys] for x in xs] for xs, ys in zip(a, b, strict=True)])
    np.testing.assert_allclose(boxes.pairwise_iou(a, b), one_by_one, atol=1e-6)
    sizes = np.array([[100, 200], [300, 50], [400, 400]], np.int32)
    clipped = boxes.clip_boxes(a, sizes)
    for x, (height, width), result in zip(a, sizes, clipped, strict=True):
        np.testing.assert_array_equal(result[:, 0::2], np.clip(x[:, 0::2], 0, width))
        np.testing.assert_array_equal(result[:, 1::2], np.clip(x[:, 1::2], 0, height))
    assert (np.asarray(clipped) != a).any()
    np.testing.assert_array_equal(boxes.clip_boxes(-a, sizes), 0)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), WEIGHTS])
def test_code(weights):
    box, anchor = draw(1000), draw(1000, seed=1)
    encode, decode = (
        jax.jit(lambda a, b, f=f: f(a, b, weights=weights)) for f in (boxes.encode_boxes, boxes.decode_boxes)
    )
    deltas = encode(box, anchor)
    np.testing.assert_allclose(deltas, oracle_encode(box, anchor, weights), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(decode(deltas, anchor), box, atol=1e-3)
    drawn = (np.random.default_rng(2).normal(0, 3, (1000, 4)) * weights).astype(np.float32)
    drawn[:10, 2:] = 1e4  # cut off, not infinite
    expected = oracle_decode(drawn, anchor, weights)
    scale = np.abs(expected).max(axis=1, keepdims=True)
    np.testing.assert_allclose(decode(drawn, anchor) / scale, expected / scale, atol=1e-5)
    assert np.sum(drawn[:, 2] / weights[2] > np.log(62.5)) > 20


def test_outputs_by_class():
    anchor, deltas = draw(5), np.random.default_rng(0).normal(size=(5, 3, 4)).astype(np.float32)
    by_class = boxes.decode_boxes(deltas, anchor[:, None], weights=WEIGHTS)
    for k in range(3):
        np.testing.assert_allclose(by_class[:, k], boxes.decode_boxes(deltas[:, k], anchor, weights=WEIGHTS), rtol=1e-6)
    half = boxes.decode_boxes(jnp.asarray(deltas[:, 0], jnp.bfloat16), anchor)
    np.testing.assert_allclose(half, boxes.decode_boxes(deltas[:, 0].astype(jnp.bfloat16), anchor), rtol=1e-6)
    assert half.dtype == jnp.float32


def test_distance_iou_loss_and_its_gradient():
    a, b = np.concatenate([draw(8, side=60), SPECIAL[:6]]), np.concatenate([draw(8, seed=1, side=60), SPECIAL[2:8]])
    with jax.enable_x64(True):
        a, b = a.astype(np.float64), b.astype(np.float64)
        value, gradient = jax.jit(jax.vmap(jax.value_and_grad(boxes.distance_iou_loss)))(a, b)
    np.testing.assert_allclose(value, [oracle_diou(x, y) for x, y in zip(a, b, strict=True)], atol=1e-12)
    for i in range(8):  # elsewhere sides coincide and the loss has a kink
        for k in range(4):
            shift = 1e-5 * np.eye(4)[k]
            slope = (oracle_diou(a[i] + shift, b[i]) - oracle_diou(a[i] - shift, b[i])) / 2e-5
            np.testing.assert_allclose(gradient[i, k], slope, rtol=1e-5, atol=1e-9)
    np.testing.assert_array_equal(boxes.distance_iou_loss(draw(5), draw(5)), 0)
    np.testing.assert_allclose(boxes.distance_iou_loss(draw(5), draw(5) + 1e6), 2, atol=1e-2)


def test_empty_boxes_have_finite_values_and_gradients():
    empty = np.concatenate([np.zeros((2, 4)), [[3, 3, 3, 3], [1, 1, 2, 2], [4, 4, 2, 2]]]).astype(np.float32)
    whole = draw(5)
    for function in (boxes.encode_boxes, boxes.distance_iou_loss, boxes.matched_iou):
        run = jax.jit(jax.value_and_grad(lambda a, b, f=function: jnp.sum(f(a, b)), argnums=(0, 1)))
        for pair in ((empty, whole), (whole, empty), (empty, empty)):
            value, gradients = run(*pair)
            assert np.isfinite(value)
            assert all(np.isfinite(g).all() for g in gradients)
    np.testing.assert_array_equal(np.asarray(boxes.encode_boxes(empty, whole))[[0, 1, 2, 4]], 0)
    np.testing.assert_array_equal(np.asarray(boxes.encode_boxes(whole, empty))[[0, 1, 2, 4]], 0)
    assert np.all(np.asarray(boxes.encode_boxes(whole, empty))[3] != 0)  # one pixel is a box


def test_errors():
    with pytest.raises(ValueError, match=r"b must be boxes \[..., N, 4\], got \(4,\)"):
        boxes.pairwise_iou(SPECIAL, SPECIAL[0])
    with pytest.raises(ValueError, match=r"size must be .*, got \(3,\)"):
        boxes.clip_boxes(SPECIAL, np.ones(3))
    with pytest.raises(ValueError, match=r"\(8, 4\) and \(7, 4\)"):
        boxes.distance_iou_loss(SPECIAL, SPECIAL[1:])
