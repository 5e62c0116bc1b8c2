"""Collecting features by class from a stream of batches."""

import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wkd_jax.interrelation import check_name, collect, count_samples, select
from wkd_jax.types import Batch, ModelInfo, Outputs, Samples, Tap

C, D = 3, 4
NAMES = ["ant", "bee", "cat"]
INFO = ModelInfo(
    "net", C, {"stage3": Tap(2, 8), "block2": Tap(2, 16, layout="tokens", prefix_tokens=1)}, 5, "fc/kernel"
)


def images(labels):
    return Samples(labels, np.arange(len(labels)))


class Source:
    """Images that hold their own index, some of which cannot be read; batches are padded with what would be noticed."""

    def __init__(self, labels, size=4, bad=()):
        self.labels, self.size, self.bad = np.asarray(labels), size, bad
        self.passes = []

    def __call__(self, rows):
        self.passes.append(rows.tolist())
        for start in range(0, len(rows), self.size):
            index = np.full(self.size, 0)
            part = rows[start : start + self.size]
            index[: len(part)] = part
            valid = (np.arange(self.size) < len(part)) & ~np.isin(index, self.bad)
            pixels = np.where(valid, index, 999).astype(np.float32)
            image = np.broadcast_to(pixels[:, None, None, None], (self.size, 2, 2, 3))
            yield Batch(image, np.where(valid, self.labels[index], 0), index.astype(np.int32), valid)


def vectors(batch):
    """[B, D]: image number + 0, 10, 20, 30."""
    return batch.image[:, 0, 0, :1] + 10.0 * jnp.arange(D), batch.index, batch.valid


def expected(labels, count, bad=()):
    good = [np.flatnonzero((np.asarray(labels) == c) & ~np.isin(np.arange(len(labels)), bad)) for c in range(C)]
    chosen = np.stack([own[:count] for own in good])
    return (chosen[:, :, None] + 10.0 * np.arange(D)).astype(np.float32)


@pytest.mark.parametrize("size", [1, 4, 64])
def test_first_examples_of_each_class_in_data_order(size):
    labels = np.random.default_rng(0).integers(0, C, 50)
    count = int(np.bincount(labels).min())
    for asked, wanted in ((2, 2), (count, count), (0, count)):
        source = Source(labels, size)
        result, _ = collect(jax.jit(vectors), source, images(labels), NAMES, asked)
        assert result.dtype == np.float32 and result.flags.c_contiguous
        np.testing.assert_array_equal(result, expected(labels, wanted))
        (rows,) = source.passes  # one pass, over what is wanted alone, in data order
        assert len(rows) == C * wanted and rows == sorted(rows)


def test_jax_computes_with_the_result_where_it_lies():
    labels = np.array([0, 1, 2, 0, 1, 2])
    result, _ = collect(vectors, Source(labels), images(labels), NAMES, 2)
    assert jax.device_put(result).unsafe_buffer_pointer() == result.ctypes.data


def test_what_cannot_be_read_is_replaced_by_the_next_of_its_class():
    labels = np.tile([0, 1, 2], 6)
    source = Source(labels, bad=[3, 4, 7, 10])  # of class 0 the second, of class 1 the second to fourth
    result, unreadable = collect(vectors, source, images(labels), NAMES, 2)
    assert source.passes == [[0, 1, 2, 3, 4, 5], [6, 7], [10], [13]]
    np.testing.assert_array_equal(result, expected(labels, 2, bad=source.bad))
    assert unreadable == [3, 4, 7, 10]


def test_the_place_of_the_first_is_taken_by_the_next_unused():
    labels = np.tile([0, 1, 2], 4)
    result, _ = collect(vectors, Source(labels, bad=[0]), images(labels), NAMES, 2)
    np.testing.assert_array_equal(result[0, :, 0], [6, 3])
    np.testing.assert_array_equal(result[1:], expected(labels, 2)[1:])


def test_too_few_that_can_be_read():
    labels = np.tile([0, 1, 2], 3)
    with pytest.raises(ValueError, match=r"'bee' \(label 1\) has 3 training samples, and fewer than 2 .*example 7"):
        collect(vectors, Source(labels, bad=[1, 7]), images(labels), NAMES, 2)


def test_only_who_keeps_holds_the_result():
    labels, progress = np.array([0, 1, 2, 2, 1, 0]), []
    report = lambda done, total: progress.append((done, total))  # noqa: E731
    assert collect(vectors, Source(labels), images(labels), NAMES, 2, keep=False, progress=report) == (None, [])
    assert progress == [(4, 6), (6, 6)]


def test_positions_are_samples_paired_by_position():
    labels = np.array([0, 1, 2, 2, 1, 0])
    apply = lambda batch: (vectors(batch)[0][:, None] + 100.0 * jnp.arange(2)[:, None], *vectors(batch)[1:])  # noqa: E731
    result, _ = collect(apply, Source(labels), images(labels), NAMES, 2)
    np.testing.assert_array_equal(result[1], np.array([1, 101, 4, 104])[:, None] + 10.0 * np.arange(D))


def test_bfloat16():
    labels = np.array([0, 1, 2, 0, 1, 2])
    apply = lambda batch: (vectors(batch)[0].astype(jnp.bfloat16), *vectors(batch)[1:])  # noqa: E731
    result, _ = collect(apply, Source(labels), images(labels), NAMES, 2)
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, expected(labels, 2))


def test_no_more_than_two_batches_are_alive():
    labels = np.tile([0, 1, 2], 10)
    alive, most = set(), []

    def apply(batch):
        features, *rest = vectors(batch)
        alive.add(id(features))
        weakref.finalize(features, alive.discard, id(features))
        most.append(len(alive))
        return features, *rest

    collect(apply, Source(labels), images(labels), NAMES, 10)
    assert max(most) == 2


def test_other_examples_than_were_asked_for():
    labels = np.array([0, 1, 2, 0, 1, 2, 0, 1, 2])
    source = Source(labels)
    with pytest.raises(ValueError, match="other examples than"):
        collect(vectors, lambda rows: source(rows + 1), images(labels), NAMES, 2)


def test_features_that_cannot_be_used():
    labels = np.array([0, 1, 2, 0, 1, 2])
    with pytest.raises(ValueError, match=r"\[B, D\], \[B, P, D\]"):
        collect(
            lambda batch: (batch.image, *vectors(batch)[1:]),
            Source(labels),
            images(labels),
            NAMES,
            2,
        )

    def broken(batch):
        features, *rest = vectors(batch)
        return jnp.where(features == 14, jnp.nan, features), *rest

    with pytest.raises(ValueError, match=r"training sample 4 \(class 1\) is not finite"):
        collect(broken, Source(labels), images(labels), NAMES, 2)
    # What padding and unreadable images become does not matter.
    collect(broken, Source([*labels, 1], bad=[4]), images(np.array([*labels, 1])), NAMES, 2)


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
    with pytest.raises(ValueError, match=r"'dog' \(label 3\) has 0 training samples"):
        count_samples(0, labels, [*names, "dog"])
    with pytest.raises(ValueError, match=r"training example 3 has label 2, outside 0..1"):
        count_samples(0, labels, names[:2])


def test_rows_of_an_example_are_samples():
    """As a detector's: boxes of an image, of which one is not there and is replaced by the next of its class."""
    rng = np.random.default_rng(0)
    of = Samples(np.array([0, 1, 0, 1, 0, 1, 0]), np.array([0, 0, 1, 2, 2, 2, 3]), np.array([0, 1, 0, 2, 0, 1, 1]))
    features = rng.normal(size=(4, 3, 2)).astype(np.float32)
    valid = np.ones((4, 3), bool)
    valid[1, 0] = False
    asked = []

    def read(rows):
        asked.append(rows.tolist())
        for part in (rows[1:], rows[:1]):  # in any order, as canvas by canvas
            yield Batch(None, None, part, np.ones(len(part), bool))

    found, lost = collect(
        lambda batch: (features[batch.index], batch.index, valid[batch.index]), read, of, ("a", "b"), 2
    )
    assert asked == [[0, 1, 2], [2]] and lost == [2]
    np.testing.assert_array_equal(found, [[features[0, 0], features[2, 0]], [features[0, 1], features[2, 2]]])
