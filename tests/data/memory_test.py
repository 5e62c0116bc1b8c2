"""The in-memory training stream and the evaluation pass."""

import json

import numpy as np
import pytest

from wkd_jax.data.memory import MemoryInput, Split, evaluation_batches


def _split(n):
    """Images and labels that tell which example they are."""
    images = np.zeros((n, 2, 2, 3), np.uint8) + np.arange(1, n + 1, dtype=np.uint8)[:, None, None, None]
    return Split(images, np.arange(n, dtype=np.int32) % 3)


def _take(batches, n):
    return [next(batches) for _ in range(n)]


def _index(batches):
    return np.concatenate([batch.index for batch in batches])


@pytest.mark.parametrize("global_batch_size", [1, 4, 10, 12, 20, 23])
def test_every_epoch_holds_every_example_once(global_batch_size):
    n, epochs = 10, 6
    count = -(-n * epochs // global_batch_size)
    index = _index(_take(MemoryInput(_split(n), global_batch_size=global_batch_size, seed=1), count))
    seen = index[: n * epochs].reshape(epochs, n)
    np.testing.assert_array_equal(np.sort(seen, axis=1), np.tile(np.arange(n), (epochs, 1)))
    assert len({tuple(row) for row in seen}) == epochs


def test_batches_hold_the_examples_they_name():
    split = _split(10)
    for batch in _take(MemoryInput(split, global_batch_size=4, seed=0), 6):
        np.testing.assert_array_equal(batch.image, split.images[batch.index])
        np.testing.assert_array_equal(batch.label, split.labels[batch.index])
        assert (batch.image.dtype, batch.label.dtype, batch.index.dtype) == (np.uint8, np.int32, np.int32)
        assert batch.valid.dtype == bool
        assert batch.valid.all()


def test_order_depends_on_the_seed_and_on_nothing_else():
    def order(seed, size):
        return _index(_take(MemoryInput(_split(10), global_batch_size=size, seed=seed), 60 // size))

    np.testing.assert_array_equal(order(0, 4), order(0, 4))
    np.testing.assert_array_equal(order(0, 4), order(0, 12))
    assert not np.array_equal(order(0, 4), order(1, 4))


@pytest.mark.parametrize("process_count", [2, 3, 6])
def test_processes_together_give_the_single_process_batches(process_count):
    split = _split(10)
    alone = MemoryInput(split, global_batch_size=12, seed=3)
    together = [
        MemoryInput(split, global_batch_size=12, seed=3, process_index=p, process_count=process_count)
        for p in range(process_count)
    ]
    for _ in range(4):
        parts = [next(batches) for batches in together]
        whole = next(alone)
        for field in ("image", "label", "index", "valid"):
            np.testing.assert_array_equal(
                np.concatenate([getattr(part, field) for part in parts]), getattr(whole, field)
            )


def test_resume_after_json_and_with_other_processes():
    split = _split(10)
    batches = MemoryInput(split, global_batch_size=6, seed=2)
    _take(batches, 3)
    saved = json.loads(json.dumps(batches.get_state()))
    expected = _index(_take(batches, 5))

    again = MemoryInput(split, global_batch_size=6, seed=2)
    again.set_state(saved)
    np.testing.assert_array_equal(_index(_take(again, 5)), expected)
    assert again.get_state() == batches.get_state()

    halves = [MemoryInput(split, global_batch_size=6, seed=2, process_index=p, process_count=2) for p in (0, 1)]
    for half in halves:
        half.set_state(saved)
    resumed = np.concatenate([_index([next(half) for half in halves]) for _ in range(5)])
    np.testing.assert_array_equal(resumed, expected)


@pytest.mark.parametrize(
    ("size", "arguments", "named"),
    [
        (10, {"seed": 1}, "'seed': 1"),
        (10, {"global_batch_size": 5}, "'global_batch_size': 5"),
        (9, {}, "'num_examples': 9"),
    ],
)
def test_state_of_another_stream_is_refused(size, arguments, named):
    saved = MemoryInput(_split(10), global_batch_size=4, seed=0).get_state()
    batches = MemoryInput(_split(size), **({"global_batch_size": 4, "seed": 0} | arguments))
    with pytest.raises(ValueError, match="another training stream") as refused:
        batches.set_state(saved)
    assert named in str(refused.value)
    assert str(saved) in str(refused.value)
    assert (
        next(batches).index.tolist()
        == next(MemoryInput(_split(size), **({"global_batch_size": 4, "seed": 0} | arguments))).index.tolist()
    )


def test_state_of_another_kind_is_refused():
    batches = MemoryInput(_split(10), global_batch_size=4, seed=0)
    state = batches.get_state()
    with pytest.raises(ValueError, match="another training stream"):
        batches.set_state({key: value for key, value in state.items() if key != "next_batch"})
    with pytest.raises(ValueError, match="another training stream"):
        batches.set_state({**state, "workers": 3})


@pytest.mark.parametrize(("n", "size", "processes"), [(10, 4, 1), (10, 4, 2), (12, 4, 4), (3, 8, 2), (1, 4, 4)])
def test_evaluation_covers_each_example_once(n, size, processes):
    split = _split(n)
    parts = [
        list(evaluation_batches(split, global_batch_size=size, process_index=p, process_count=processes))
        for p in range(processes)
    ]
    assert {len(part) for part in parts} == {-(-n // size)}
    rows = [batch for step in zip(*parts, strict=True) for batch in step]
    valid = np.concatenate([batch.valid for batch in rows])
    assert all(batch.image.shape == (size // processes, 2, 2, 3) for batch in rows)
    assert valid.dtype == bool
    np.testing.assert_array_equal(_index(rows)[valid], np.arange(n))
    images = np.concatenate([batch.image for batch in rows])
    labels = np.concatenate([batch.label for batch in rows])
    np.testing.assert_array_equal(images[valid], split.images)
    np.testing.assert_array_equal(labels[valid], split.labels)
    assert valid.sum() == n
    assert not images[~valid].any()
    assert not labels[~valid].any()
    assert not _index(rows)[~valid].any()


def test_batches_own_their_memory():
    split = _split(10)
    before = split.images.copy(), split.labels.copy()
    for batch in [
        next(MemoryInput(split, global_batch_size=4, seed=0)),
        *evaluation_batches(split, global_batch_size=5),
    ]:
        batch.image[:] = 77
        batch.label[:] = 77
    np.testing.assert_array_equal(split.images, before[0])
    np.testing.assert_array_equal(split.labels, before[1])


def test_bad_sizes_are_refused_at_once():
    with pytest.raises(ValueError, match="global_batch_size=5: must be a positive multiple of process_count=2"):
        evaluation_batches(_split(10), global_batch_size=5, process_count=2)
    with pytest.raises(ValueError, match="global_batch_size=5"):
        MemoryInput(_split(10), global_batch_size=5, seed=0, process_count=2)
    with pytest.raises(ValueError, match="seed=-1"):
        MemoryInput(_split(10), global_batch_size=5, seed=-1)
