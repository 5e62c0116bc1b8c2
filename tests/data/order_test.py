"""The training order: permutations, their stability, subsets."""

import numpy as np
import pytest

from wkd_jax.data.order import epoch_permutation, process_share, stream, training_subset

PINNED = ([1, 4, 5, 6, 8, 2, 0, 3, 9, 7], [0, 8, 2, 1, 9, 5, 4, 3, 7, 6])


def test_permutation_bits_are_pinned():
    """Runs must resume to the same order in years: these numbers may never change."""
    assert epoch_permutation(0, 0, 10).tolist() == PINNED[0]
    assert epoch_permutation(42, 7, 10).tolist() == PINNED[1]


def test_permutations_are_permutations_and_differ():
    orders = [epoch_permutation(seed, epoch, 1000) for seed in (0, 1) for epoch in (0, 1, 2)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(1000))
    # Two independent permutations agree at about one place.
    assert max((a == b).sum() for i, a in enumerate(orders) for b in orders[:i]) < 10


def test_permutations_are_uniform():
    """Where element 0 of 5 lands over 5000 epochs: chi-square of 4 degrees of freedom, 0.999 quantile 18.5."""
    counts = np.bincount([np.flatnonzero(epoch_permutation(3, e, 5) == 0)[0] for e in range(5000)], minlength=5)
    assert ((counts - 1000) ** 2 / 1000).sum() < 18.5


def test_cached_permutation_cannot_be_changed():
    with pytest.raises(ValueError, match="read-only"):
        epoch_permutation(0, 0, 10)[0] = 1


def test_stream_is_the_epochs_end_to_end():
    whole = np.concatenate([epoch_permutation(5, epoch, 7) for epoch in range(5)])
    for start in range(0, 20, 3):
        for length in (1, 6, 7, 8, 15):
            np.testing.assert_array_equal(stream(start, start + length, size=7, seed=5), whole[start : start + length])


def test_stream_far_away_costs_nothing():
    assert stream(10**12, 10**12 + 3, size=7, seed=0).shape == (3,)


def test_process_shares_tile_the_batch():
    rows = np.concatenate([np.arange(24)[process_share(24, p, 4)] for p in range(4)])
    np.testing.assert_array_equal(rows, np.arange(24))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 0, 3), "global_batch_size=10: must be a positive multiple of process_count=3"),
        ((0, 0, 1), "global_batch_size=0"),
        ((4, 2, 2), r"process_index=2: must be in 0\.\.1"),
        ((4, -1, 2), "process_index=-1"),
    ],
)
def test_process_share_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        process_share(*arguments)


def test_negative_seed_is_refused():
    with pytest.raises(ValueError, match="seed=-1"):
        epoch_permutation(-1, 0, 3)


def test_subset_is_balanced_nested_and_in_file_order():
    labels = np.random.default_rng(0).integers(0, 7, 400)
    enough = 7 * np.bincount(labels).min()
    largest = training_subset(labels, 400)
    np.testing.assert_array_equal(np.sort(largest), np.arange(400))
    for n in range(1, enough + 1):
        counts = np.bincount(labels[training_subset(labels, n)], minlength=7)
        assert counts.max() - counts.min() <= 1
        np.testing.assert_array_equal(training_subset(labels, n), largest[:n])
    for c in range(7):
        np.testing.assert_array_equal(largest[labels[largest] == c], np.flatnonzero(labels == c))


def test_subset_of_labels_with_a_gap():
    np.testing.assert_array_equal(training_subset(np.array([5, 2, 5, 2, 2]), 4), [1, 0, 3, 2])


def test_subset_zero_is_everything_in_order():
    np.testing.assert_array_equal(training_subset(np.array([1, 0, 1]), 0), [0, 1, 2])


@pytest.mark.parametrize("n", [-1, 4])
def test_subset_refuses(n):
    with pytest.raises(ValueError, match=rf"train_images={n}: must be 0 \(all of them\) or 1\.\.3"):
        training_subset(np.array([1, 0, 1]), n)
