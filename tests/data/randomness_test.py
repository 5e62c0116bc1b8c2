"""Random numbers of one example."""

import hashlib
import itertools
import math
import threading

import numpy as np
import pytest
from scipy import stats

from wkd_jax.data.randomness import Random


def test_golden_values():
    """Runs started by other versions go on with the same numbers."""
    random = Random(42, 7, 123456)
    assert [random.integer(2**32) for _ in range(4)] == [3638529917, 4273944705, 1756987403, 4020503177]
    assert random.uniform() == 0.4929442362263835
    assert random.uniform(-3.0, 5.0) == -1.5524836026311872
    assert random.normal(9.0, 0.5) == pytest.approx(9.040956794641332, rel=1e-14)  # cos and log are the C library's
    assert [random.coin(0.3) for _ in range(8)] == [False, False, False, False, False, False, True, False]


@pytest.mark.parametrize("place", [(0, 0, 0), (5, 3, 77), (2**64 - 1, 2**63, 2**64 - 1)])
def test_bits_are_hashes(place):
    """As documented: BLAKE2b of seed, epoch, index, counter; words from the last to the first."""
    words = []
    for counter in range(4):
        digest = hashlib.blake2b(b"".join(value.to_bytes(8, "little") for value in (*place, counter))).digest()
        words += [int.from_bytes(digest[start : start + 8], "little") for start in range(56, -1, -8)]
    random = Random(*place)
    assert [random.integer(2**53) for _ in range(32)] == [word >> 11 for word in words]


def test_neighbours_share_nothing():
    """Among 8 seeds x 8 epochs x 64 positions, each 20 numbers, no 53 bits come twice (chance: 1e-6)."""
    seen = set()
    for place in itertools.product(range(8), range(8), range(64)):
        random = Random(*place)
        seen.update(random.uniform() for _ in range(20))
    assert len(seen) == 8 * 8 * 64 * 20


def test_neighbours_are_uncorrelated():
    """The first number over positions, epochs and seeds: uniform, and each axis's neighbours independent."""
    first = np.array([Random(s, e, i).uniform() for s, e, i in itertools.product(range(5), range(20), range(100))])
    assert stats.kstest(first, "uniform").pvalue > 1e-3
    grid = first.reshape(5, 20, 100)
    for axis in range(3):
        left, right = np.delete(grid, -1, axis).ravel(), np.delete(grid, 0, axis).ravel()
        assert abs(np.corrcoef(left, right)[0, 1]) < 4 / math.sqrt(len(left))


def test_streams_do_not_disturb_each_other():
    """Drawing in turns, or in another thread, gives what drawing alone gives."""
    alone = [[random.uniform() for _ in range(40)] for random in (Random(0, 0, 1), Random(0, 0, 2))]
    first, second = Random(0, 0, 1), Random(0, 0, 2)
    turns = [(first.uniform(), second.uniform()) for _ in range(40)]
    assert [list(x) for x in zip(*turns, strict=True)] == alone

    results = {}

    def draw(index):
        results[index] = [[r.uniform() for _ in range(40)] for r in (Random(0, 0, index) for _ in range(100))]

    threads = [threading.Thread(target=draw, args=(index,)) for index in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(drawn == alone[index - 1] for index in (1, 2) for drawn in results[index])


def test_distributions():
    random = Random(1, 2, 3)
    uniform = [random.uniform(-2.0, 6.0) for _ in range(5000)]
    assert min(uniform) >= -2.0
    assert max(uniform) < 6.0
    assert stats.kstest(uniform, "uniform", (-2.0, 8.0)).pvalue > 1e-3
    assert stats.kstest([random.normal(9.0, 0.5) for _ in range(5000)], "norm", (9.0, 0.5)).pvalue > 1e-3
    counts = np.bincount([random.integer(15) for _ in range(15000)], minlength=15)
    assert len(counts) == 15
    assert stats.chisquare(counts).pvalue > 1e-3
    coins = sum(random.coin(0.25) for _ in range(10000))
    assert abs(coins - 2500) < 4 * math.sqrt(10000 * 0.25 * 0.75)
    assert {random.integer(1) for _ in range(10)} == {0}
    assert {random.coin(0.0) for _ in range(10)} == {False}
    assert {random.coin(1.0) for _ in range(10)} == {True}


@pytest.mark.parametrize("name", ["seed", "epoch", "index"])
@pytest.mark.parametrize("value", [-1, 2**64])
def test_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"{name}={value}"):
        Random(**({"seed": 0, "epoch": 0, "index": 0} | {name: value}))


@pytest.mark.parametrize("n", [0, -1, 2**53 + 1])
def test_integer_of_nothing(n):
    with pytest.raises(ValueError, match=f"n={n}"):
        Random(0, 0, 0).integer(n)
