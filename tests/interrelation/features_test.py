"""Collecting features by class from a stream of batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wkd_jax.interrelation import check_name, collect, count_samples, select
from wkd_jax.types import Batch, ModelInfo, Outputs, Tap

C, D = 3, 4
INFO = ModelInfo(
    "net", C, {"stage3": Tap(2, 8), "block2": Tap(2, 16, layout="tokens", prefix_tokens=1)}, 5, "fc/kernel"
)


def stream(labels, size=4, pad=True):
    """Batches of images that hold their own index; the last one is padded with images that would be noticed."""
    for start in range(0, len(labels), size):
        index = np.arange(start, start + size)
        valid = index < len(labels)
        image = np.broadcast_to(np.where(valid, index, 999).astype(np.float32)[:, None, None, None], (size, 2, 2, 3))
        label = np.where(valid, np.take(labels, index, mode="clip"), 0).astype(np.int32)
        yield Batch(image, label, np.where(valid, index, 0).astype(np.int32), valid)


def vectors(image):
    """[B, D]: image number + 0, 10, 20, 30."""
    return image[:, 0, 0, :1] + 10.0 * jnp.arange(D)


def expected(labels, count):
    chosen = np.stack([np.flatnonzero(np.asarray(labels) == c)[:count] for c in range(C)])
    return (chosen[:, :, None] + 10.0 * np.arange(D)).astype(np.float32)


@pytest.mark.parametrize("size", [1, 4, 64])
def test_first_examples_of_each_class_in_data_order(size):
    labels = np.random.default_rng(0).integers(0, C, 50)
    count = int(np.bincount(labels).min())
    for wanted in (1, count):
        result = collect(jax.jit(vectors), stream(labels, size), num_classes=C, samples_per_class=wanted)
        assert result.dtype == np.float32 and result.flags.c_contiguous
        np.testing.assert_array_equal(result, expected(labels, wanted))


def test_positions_are_samples_paired_by_position():
    labels = [0, 1, 2, 2, 1, 0]
    apply = lambda image: vectors(image)[:, None] + 100.0 * jnp.arange(2)[:, None]  # noqa: E731  [B, 2, D]
    result = collect(apply, stream(labels), num_classes=C, samples_per_class=2)
    np.testing.assert_array_equal(result[1], np.array([1, 101, 4, 104])[:, None] + 10.0 * np.arange(D))


def test_bfloat16_and_jax_batches():
    labels = [0, 1, 2, 0, 1]
    batches = [jax.tree.map(jnp.asarray, batch) for batch in stream(labels)]
    apply = lambda image: vectors(image).astype(jnp.bfloat16)  # noqa: E731
    result = collect(apply, batches, num_classes=C, samples_per_class=1)
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, expected(labels, 1))


def test_runs_no_more_than_needed_and_reports_progress():
    labels = [0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 1, 2, 0, 1, 2, 0]
    ran, read, progress = [], [], []

    def batches():
        for batch in stream(labels):
            read.append(batch.index[0])
            yield batch

    def apply(image):
        ran.append(int(image[0, 0, 0, 0]))
        return vectors(image)

    report = lambda done, total: progress.append((done, total))  # noqa: E731
    collect(apply, batches(), num_classes=C, samples_per_class=2, progress=report)
    assert ran == [0, 8]  # the second batch has nothing new
    assert read == [0, 4, 8]  # the fourth is not needed
    assert progress == [(2, 6), (2, 6), (6, 6)]


def test_too_few_of_a_class():
    with pytest.raises(ValueError, match=r"class 1 has 1 of the 2 examples .*1 of 3 classes .*set it to 0"):
        collect(vectors, stream([0, 1, 2, 2, 0]), num_classes=C, samples_per_class=2)


def test_padding_is_no_example():
    with pytest.raises(ValueError, match="class 0 has 1 of the 2"):  # the padding is labelled 0
        collect(vectors, stream([1, 1, 2, 2, 0]), num_classes=C, samples_per_class=2)


def test_labels_that_cannot_be_used():
    with pytest.raises(ValueError, match="example 1 has label 7, outside 0..2"):
        collect(vectors, stream([0, 7, 2]), num_classes=C, samples_per_class=1)
    mixed = Batch(np.zeros((2, 2, 2, 3)), np.ones((2, C), np.float32) / C, np.arange(2), np.ones(2, bool))
    with pytest.raises(ValueError, match="without mixup"):
        collect(vectors, [mixed], num_classes=C, samples_per_class=1)


def test_features_that_cannot_be_used():
    labels = [0, 1, 2, 0]
    with pytest.raises(ValueError, match=r"\[B, D\] or \[B, P, D\]"):
        collect(lambda image: image, stream(labels), num_classes=C, samples_per_class=1)
    with pytest.raises(ValueError, match=r"features \(2, 4\) for a batch of 4 labels"):
        collect(lambda image: vectors(image)[:2], stream(labels), num_classes=C, samples_per_class=1)
    broken = lambda image: jnp.where(vectors(image) == 12, jnp.nan, vectors(image))  # noqa: E731
    with pytest.raises(ValueError, match=r"class 2 \(its sample number 0\) is not finite"):
        collect(broken, stream(labels), num_classes=C, samples_per_class=1)
    widths = iter([3, 4])
    with pytest.raises(ValueError, match=r"changed from \(1, 3\) to \(1, 4\)"):
        collect(lambda image: vectors(image)[:, : next(widths)], stream(labels, 2), num_classes=C, samples_per_class=1)


def test_select():
    outputs = Outputs(
        logits=jnp.ones((2, C)),
        pooled=jnp.ones((2, 5)),
        taps={"stage3": jnp.arange(24.0).reshape(2, 2, 3, 2), "block2": jnp.arange(12.0).reshape(2, 3, 2)},
    )
    assert select(outputs, "logits", INFO).shape == (2, C)
    assert select(outputs, "pooled", INFO).shape == (2, 5)
    np.testing.assert_array_equal(select(outputs, "stage3", INFO), np.arange(24.0).reshape(2, 6, 2))
    np.testing.assert_array_equal(select(outputs, "block2", INFO), np.arange(12.0).reshape(2, 3, 2)[:, 1:])
    with pytest.raises(ValueError, match="net has none"):
        select(Outputs(logits=jnp.ones((2, C))), "pooled", INFO)
    with pytest.raises(ValueError, match="did you mean 'stage3'"):
        check_name("stage4", INFO)


def test_count_samples():
    labels, names = np.array([0, 1, 1, 2, 2, 2, 0]), ["ant", "bee", "cat"]
    assert count_samples(0, labels, names) == 2
    assert count_samples(2, labels, names) == 2
    with pytest.raises(ValueError, match=r"'ant' \(label 0\) has 2 .*samples_per_class=3 .*at most 2"):
        count_samples(3, labels, names)
    with pytest.raises(ValueError, match=r"'dog' \(label 3\) has 0 training images"):
        count_samples(0, labels, [*names, "dog"])
