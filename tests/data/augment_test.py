"""Augmentation on the device against loops in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wkd_jax.data.augment import augment, normalise

BATCH, SIDE = 16, 6


def _images(batch=BATCH):
    return np.random.default_rng(0).integers(1, 256, (batch, SIDE, SIDE, 3), dtype=np.uint8)  # never black


def _candidates(image, pad, flip):
    """Every result that the definition allows, by (row, column, flipped)."""
    padded = np.zeros((SIDE + 2 * pad, SIDE + 2 * pad, 3), np.uint8)
    padded[pad : pad + SIDE, pad : pad + SIDE] = image
    for row in range(2 * pad + 1):
        for column in range(2 * pad + 1):
            crop = padded[row : row + SIDE, column : column + SIDE]
            yield (row, column, False), crop
            if flip:
                yield (row, column, True), crop[:, ::-1]


@pytest.mark.parametrize(("pad", "flip"), [(2, True), (1, False), (0, True)])
def test_results_are_crops_and_flips_drawn_uniformly(pad, flip):
    batch = 1024
    images = np.repeat(_images(1), batch, axis=0)
    out = jax.jit(augment, static_argnames=("pad", "flip"))(
        images, jnp.arange(batch), jax.random.key(1), pad=pad, flip=flip
    )
    assert out.dtype == jnp.uint8
    assert out.shape == images.shape
    names = {crop.tobytes(): name for name, crop in _candidates(images[0], pad, flip)}
    counts = dict.fromkeys(names.values(), 0)
    for image in np.asarray(out):
        counts[names[image.tobytes()]] += 1  # KeyError: not a crop of the padded image
    expected = batch / len(counts)
    chi_square = sum((count - expected) ** 2 for count in counts.values()) / expected
    freedom = len(counts) - 1
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom) + 5  # mean and spread of the chi-square distribution


def test_neither_is_the_identity():
    images = jnp.asarray(_images())
    out = augment(images, jnp.arange(BATCH), jax.random.key(0), pad=0, flip=False)
    np.testing.assert_array_equal(out, images)


def test_an_example_does_not_depend_on_its_row_or_batch():
    images, index, key = _images(), np.arange(100, 100 + BATCH), jax.random.key(5)
    whole = np.asarray(augment(jnp.asarray(images), jnp.asarray(index), key, pad=2, flip=True))
    order = np.random.default_rng(1).permutation(BATCH)
    shuffled = augment(jnp.asarray(images[order]), jnp.asarray(index[order]), key, pad=2, flip=True)
    np.testing.assert_array_equal(shuffled, whole[order])
    part = augment(jnp.asarray(images[3:5]), jnp.asarray(index[3:5]), key, pad=2, flip=True)
    np.testing.assert_array_equal(part, whole[3:5])


def test_key_and_index_both_matter():
    images = jnp.asarray(_images())
    base = augment(images, jnp.arange(BATCH), jax.random.key(0), pad=2, flip=True)
    for index, seed in ((jnp.arange(BATCH), 1), (jnp.arange(BATCH) + BATCH, 0)):
        other = augment(images, index, jax.random.key(seed), pad=2, flip=True)
        assert (np.asarray(base) != np.asarray(other)).any(axis=(1, 2, 3)).mean() > 0.5


def test_sharded_equals_one_device_without_communication():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.NamedSharding(mesh, jax.P("data"))
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)

    def prepare(images, index, key):
        return normalise(augment(images, index, key, pad=2, flip=True), mean, std)

    images, index, key = _images(), np.arange(BATCH), jax.random.key(0)
    alone = jax.jit(prepare)(images, index, key)
    arguments = jax.device_put(images, rows), jax.device_put(index, rows), key
    compiled = jax.jit(prepare, out_shardings=rows).lower(*arguments).compile()
    np.testing.assert_array_equal(compiled(*arguments), alone)
    text = compiled.as_text()
    assert not [op for op in ("all-gather", "all-reduce", "all-to-all", "collective-permute") if op in text]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_normalise_equals_float64(dtype):
    images = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    mean, std = np.array([0.507, 0.487, 0.441]), np.array([0.267, 0.256, 0.276])
    out = normalise(jnp.asarray(images), mean, std, dtype)
    assert out.dtype == dtype
    expected = (images / 255 - mean) / std
    # atol: the difference cancels near the mean; bfloat16 keeps 8 bits of values up to 2.2.
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if dtype == jnp.float32 else {"rtol": 2**-8, "atol": 1e-6}
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, **tolerance)


def test_refusals():
    images, index, key = jnp.asarray(_images()), jnp.arange(BATCH), jax.random.key(0)
    with pytest.raises(ValueError, match="pad=-1"):
        augment(images, index, key, pad=-1, flip=True)
    with pytest.raises(ValueError, match="need uint8 as loaded, got float32"):
        augment(images.astype(jnp.float32), index, key, pad=1, flip=True)
    with pytest.raises(ValueError, match="need uint8 as loaded, got float32"):
        normalise(images.astype(jnp.float32), 0.0, 1.0)
