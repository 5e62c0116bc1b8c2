"""The bucketed orders: pure batches, no example lost or favoured, any process count, any start."""

import itertools

import numpy as np
import pytest

from wkd_jax.data.buckets import InOrder, Shuffled
from wkd_jax.data.order import epoch_permutation, process_share

BUCKETS = np.random.default_rng(0).choice(4, 203, p=[0.6, 0.25, 0.1, 0.05])
BUCKETS[BUCKETS == 2] = 0  # one that no example is in
SIZES = np.bincount(BUCKETS)


def shuffled(batch=8, seed=3, buckets=BUCKETS, process=0, processes=1):
    return Shuffled(buckets, seed, batch, process_share(batch, process, processes))


def test_order_is_pinned():
    """Runs must resume to the same order in years: these numbers may never change."""
    order = shuffled(batch=4, seed=0, buckets=np.arange(11) % 2)
    got = [(bucket, *places.index.tolist()) for bucket, places in map(order, range(5))]
    assert got == PINNED


PINNED = [(1, 1, 5, 3, 9), (0, 10, 4, 6, 8), (0, 2, 0, 10, 8), (0, 6, 2, 0, 4), (1, 7, 7, 9, 3)]


@pytest.mark.parametrize("batch", [1, 8, 30, 300])
def test_batches_are_those_of_the_definition(batch):
    """Queues, one a bucket, that each epoch adds to and from which full batches are taken, which are then shuffled."""
    queues = {bucket: [] for bucket in range(len(SIZES))}
    expected = []
    for epoch in range(7):
        for index in epoch_permutation(3, epoch, len(BUCKETS)):
            queues[BUCKETS[index]].append((int(index), epoch))
        full = []
        for bucket, queue in queues.items():
            while len(queue) >= batch:
                full.append((bucket, queue[:batch]))
                del queue[:batch]
        places = epoch_permutation(3 + 2**64, epoch, len(full)) if full else []
        kinds = [full[place][0] for place in places]
        # Which of a bucket's batches comes at its places: in the order in which they were filled.
        ready = {bucket: iter([rows for kind, rows in full if kind == bucket]) for bucket in queues}
        expected += [(bucket, next(ready[bucket])) for bucket in kinds]
    assert len(expected) > 1
    for number, (bucket, rows) in enumerate(expected):
        got, places = shuffled(batch)(number)
        assert got == bucket
        assert list(zip(places.index.tolist(), places.epoch.tolist(), strict=True)) == rows
        assert places.valid.all()


@pytest.mark.parametrize("batch", [1, 8, 30, 300])
def test_every_example_is_seen_equally_often(batch):
    """A batch of 300 exceeds all examples: they recur within it, and still none is ahead of another of its bucket."""
    order, seen = shuffled(batch), np.zeros(len(BUCKETS), int)
    for number in range(7 * len(BUCKETS) // batch):
        bucket, places = order(number)
        assert {bucket} == set(BUCKETS[places.index])
        for index, epoch in zip(places.index, places.epoch, strict=True):
            assert seen[index] == epoch  # how often it was seen before: what its augmentation is drawn from
            seen[index] += 1
        own = seen[bucket == BUCKETS]
        assert own.max() - own.min() <= 1
    for bucket in np.unique(BUCKETS):  # and no bucket falls behind for long
        assert abs(seen[bucket == BUCKETS].sum() - 7 * SIZES[bucket]) <= 2 * len(SIZES) * batch


def test_an_epochs_batches_are_in_random_order():
    order = shuffled(batch=4)
    ends = [int(order.full(epoch).sum()) for epoch in range(6)]
    kinds = [[order(number)[0] for number in range(*ends[epoch : epoch + 2])] for epoch in range(5)]
    for epoch, each in enumerate(kinds):
        np.testing.assert_array_equal(
            np.bincount(each, minlength=len(SIZES)), (epoch + 1) * SIZES // 4 - epoch * SIZES // 4
        )
        assert each != sorted(each)
    assert kinds[0][:10] != kinds[1][:10]


def test_within_an_epoch_examples_are_shuffled_anew():
    firsts = []
    for seed, epoch in itertools.product((0, 1), (0, 1)):
        order = shuffled(batch=1, seed=seed)
        numbers = range(epoch * len(BUCKETS), (epoch + 1) * len(BUCKETS))
        indices = np.concatenate([order(number)[1].index for number in numbers])
        np.testing.assert_array_equal(np.sort(indices), np.arange(len(BUCKETS)))
        firsts.append(indices)
    for a, b in itertools.combinations(firsts, 2):
        assert (a == b).sum() < 12  # two independent permutations agree at about one place


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_hold_the_parts_of_the_same_batches(processes):
    parts = [shuffled(process=p, processes=processes) for p in range(processes)]
    for number in (0, 5, 1000):
        bucket, whole = shuffled()(number)
        got = [part(number) for part in parts]
        assert {kind for kind, _ in got} == {bucket}
        for field in ("index", "epoch", "valid"):
            joined = np.concatenate([getattr(places, field) for _, places in got])
            np.testing.assert_array_equal(joined, getattr(whole, field))


def test_a_batch_is_a_function_of_its_number_alone():
    order = shuffled()
    backwards = {number: shuffled()(number) for number in (400, 12, 0)}
    for number in range(401):
        bucket, places = order(number)
        if number in backwards:
            assert bucket == backwards[number][0]
            np.testing.assert_array_equal(places.index, backwards[number][1].index)


def test_a_batch_far_away_costs_nothing():
    assert len(shuffled()(10**11)[1].index) == 8


@pytest.mark.parametrize("rows", [None, np.array([40, 3, 200, 17, 5, 6, 7, 8, 9])])
@pytest.mark.parametrize("processes", [1, 2])
def test_evaluation_visits_each_row_once_bucket_by_bucket(rows, processes):
    wanted = np.arange(len(BUCKETS)) if rows is None else rows
    orders = [InOrder(BUCKETS, wanted, 8, process_share(8, p, processes)) for p in range(processes)]
    counts = np.bincount(BUCKETS[wanted], minlength=4)
    assert {len(order) for order in orders} == {int(np.ceil(counts / 8).sum())}
    visited = []
    for number in range(len(orders[0])):
        parts = [order(number) for order in orders]
        assert len({bucket for bucket, _ in parts}) == 1
        index, valid = (np.concatenate([getattr(p, name) for _, p in parts]) for name in ("index", "valid"))
        assert len(index) == 8 and valid.any() and not index[~valid].any()
        assert set(BUCKETS[index[valid]]) == {parts[0][0]}
        visited.append(index[valid])
    visited = np.concatenate(visited)
    np.testing.assert_array_equal(np.sort(visited), np.sort(wanted))
    np.testing.assert_array_equal(visited, wanted[np.argsort(BUCKETS[wanted], kind="stable")])
