"""Measures of class similarities against searches, and closed forms, in float64; the released matrices."""

import pathlib

import numpy as np
import pytest

from configs import common
from wkd_jax.evaluation import structure
from wkd_jax.losses.similarity import cka

SHARED = pathlib.Path(__file__).parents[2] / "../shared"
RELEASED = {  # share of the variance that a_i a_j explains
    "cifar100_resnet32x4": 0.907,
    "cifar100_wrn_40_2": 0.920,
    "imagenet_resnet34": 0.841,
    "imagenet_resnet50": 0.809,
}


def released(name):
    path = SHARED / f"interrelations/{name}_linear_cka_distance.npy"
    if not path.exists():
        pytest.skip("reference documents are not here")
    return 1 - np.load(path).astype(np.float64)


def symmetric(values):
    values = (values + values.T) / 2
    np.fill_diagonal(values, 1)
    return values


def pairs(matrix):
    return np.asarray(matrix)[~np.eye(len(matrix), dtype=bool)]


def principal_factor(similarity, steps=2000):
    """The least squares of s_ij - a_i a_j, i != j: the diagonal becomes a_i^2 and the best rank one is taken again.

    Both halves of a step lower the sum of squares, so it ends in a minimum; another way than the one that is tested.
    """
    s = np.array(similarity, np.float64)
    np.fill_diagonal(s, np.abs(s - np.diag(np.diag(s))).max(axis=1))
    for _ in range(steps):
        values, vectors = np.linalg.eigh(s)
        a = np.sqrt(values[-1]) * vectors[:, -1]
        np.fill_diagonal(s, a**2)
    return a


def share_oracle(similarity, a):
    left, values = pairs(similarity - np.outer(a, a)), pairs(similarity)
    return 1 - np.sum(left**2) / np.sum((values - values.mean()) ** 2)


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.3])
def test_rank_one_share(noise):
    rng = np.random.default_rng(0)
    a = rng.uniform(0.2, 0.9, 15)
    s = symmetric(np.outer(a, a) + noise * rng.normal(size=(15, 15)))
    found = structure.rank_one(s)
    np.testing.assert_allclose(np.outer(found, found), np.outer(*[principal_factor(s)] * 2), atol=1e-5)
    share = structure.rank_one_share(s)
    np.testing.assert_allclose(share, share_oracle(s, principal_factor(s)), atol=1e-6)
    assert share > {0.0: 1 - 1e-9, 0.05: 0.9, 0.3: 0.3}[noise]
    left = structure.remainder(s)
    assert structure.measure(s, left) == structure.measure(s)
    np.testing.assert_array_equal(np.diag(left), 0)
    np.testing.assert_allclose(pairs(left), pairs(s - np.outer(found, found)), atol=1e-12)
    np.testing.assert_allclose(structure.rank_one_share(1e-3 * s), share, atol=1e-6)


def test_groups_are_not_one_number_a_class():
    """Of equal groups the constant is a saddle; the best picks one group, which explains one of G blocks."""
    groups, each = 4, 5
    s = np.kron(np.eye(groups), np.ones((each, each)))
    total = groups * each * (each - 1)  # ones off the diagonal
    mean = total / (groups * each * (groups * each - 1))
    expected = 1 - (total - each * (each - 1)) / (total * (1 - mean))
    np.testing.assert_allclose(structure.rank_one_share(s), expected, atol=1e-6)
    assert structure.rank_one_share(0.9 * s + 0.05) < 0.1


def test_where_no_share_is_defined():
    for s in (np.full((6, 6), 0.3), np.eye(5), 0.3 + 1e-8 * symmetric(np.random.default_rng(0).normal(size=(6, 6)))):
        assert np.isnan(structure.rank_one_share(s)) and structure.measure(s) == {"rank_one_share": None}
        assert structure.sentences(structure.measure(s), s) == ["All pairs of classes are equally alike."]
    three = symmetric(np.random.default_rng(0).uniform(size=(3, 3)))
    assert np.isnan(structure.rank_one_share(three)) and structure.sentences(structure.measure(three), three) == []
    for s in (np.ones((1, 1)), np.ones((2, 2))):
        assert structure.sentences(structure.measure(s), s) == []
    repelled = 1.1 * np.eye(12) - 0.1 + 0.001 * symmetric(np.random.default_rng(0).normal(size=(12, 12)))
    assert structure.rank_one_share(repelled) == 0  # no a_i a_j is below 0 for all pairs: worse than the constant


@pytest.mark.parametrize(("classes", "mean"), [(10, 0.0), (10, 3.0), (40, 0.0), (40, 3.0)])
def test_share_of_unrelated_numbers(classes, mean):
    """Between 2 / C and 4 / C, as the sentences say."""
    rng = np.random.default_rng(0)
    shares = [structure.rank_one_share(symmetric(mean + rng.normal(size=(classes, classes)))) for _ in range(8)]
    assert 1.7 / classes < np.mean(shares) < 4.1 / classes


def test_agreement():
    rng = np.random.default_rng(0)
    s, groups = symmetric(rng.uniform(size=(20, 20))), rng.choice(["a", "b", "c"], 20).tolist() + []
    count = 0
    for i in range(20):
        others = [j for j in range(20) if j != i]
        count += groups[max(others, key=lambda j: s[i, j])] == groups[i]
    chance = sum((groups.count(name) - 1) / 19 for name in groups)
    np.testing.assert_allclose(structure.agreement(s, groups), (count, chance))
    np.testing.assert_allclose(*structure.agreement(np.eye(20), groups), rtol=1e-12)  # all equally near: chance itself
    assert structure.agreement(np.eye(3), ["a", "b", "c"]) == (0, 0)


def test_groups_must_be_those_of_the_classes():
    structure.check_groups((), ["ant", "bee"])
    structure.check_groups(["x", "x"], ["ant", "bee"])
    with pytest.raises(
        ValueError, match=r"interrelation.groups has 3 names and there are 2 classes \('ant' to 'bee'\)"
    ):
        structure.check_groups(["x"] * 3, ["ant", "bee"])


def test_stability_of_a_pairing_and_of_halves():
    """Unrelated images in pairs: the ranks of the classes are stable, what is left of them is not."""
    rng = np.random.default_rng(0)
    scale = 1 / np.arange(1, 33) ** rng.uniform(0.2, 2, (24, 1))  # spectra of different rank
    x = (rng.normal(size=(24, 120, 32)) * scale[:, None]).astype(np.float32)
    similarity = np.asarray(cka(x), np.float64)
    before = x.copy()
    found = structure.stability(lambda x: np.asarray(cka(x)), x, similarity, samples=120, paired=True)
    np.testing.assert_array_equal(np.sort(x, axis=1), np.sort(before, axis=1))  # of each class, the same samples
    assert found["of"] == "pairing" and found["all"] > 0.9 and abs(found["rest"]) < 0.35
    again = {"samples": 120, "paired": True, "left": structure.remainder(similarity)}
    assert structure.stability(lambda x: np.asarray(cka(x)), before.copy(), similarity, **again) == found
    assert structure.rank_one_share(similarity) > 0.8
    other = np.asarray(cka(x), np.float64)
    np.testing.assert_allclose(found["all"], np.corrcoef(pairs(similarity), pairs(other))[0, 1], atol=1e-9)
    left = [pairs(s - np.outer(*[principal_factor(s)] * 2)) for s in (similarity, other)]
    np.testing.assert_allclose(found["rest"], np.corrcoef(*left)[0, 1], atol=1e-3)

    means = rng.normal(size=(12, 6))
    x = (means[:, None] + rng.normal(size=(12, 41, 6))).astype(np.float32)

    def near(x):
        assert x.shape[1] == 20  # the last image is in neither half
        means = x.mean(axis=1)
        return -np.linalg.norm(means[:, None] - means, axis=-1)

    found = structure.stability(near, x, None, samples=41, paired=False)
    assert found["of"] == "halves" and found["all"] > 0.9 and found["rest"] > 0.8


def test_positions_of_an_image_stay_together():
    seen = []
    x = np.arange(2 * 5 * 3, dtype=np.float32).reshape(2, 15, 1)  # five images of three positions
    structure.stability(lambda x: seen.append(x.copy()) or np.eye(2), x, np.eye(2), samples=5, paired=True)
    images = seen[0].reshape(2, 5, 3)
    np.testing.assert_array_equal(images % 3, np.broadcast_to([0, 1, 2], (2, 5, 3)))
    assert (np.sort(images[..., 0]) == np.arange(0, 30, 3).reshape(2, 5)).all()
    assert (images[0, :, 0] != images[1, :, 0] - 15).any()  # each class in an order of its own


def test_what_does_not_vary_has_no_correlation():
    x = np.ones((5, 4, 2), np.float32)
    found = structure.stability(lambda x: np.eye(5), x, np.eye(5), samples=4, paired=True)
    assert found == {"of": "pairing", "all": None, "rest": None}
    assert structure.sentences({"rank_one_share": None, "stability": found}, np.eye(5)) == [
        "All pairs of classes are equally alike."
    ]


def test_sentences():
    a = np.linspace(0.2, 0.9, 8)
    s = np.outer(a, a)
    measured = structure.measure(s) | {"stability": {"of": "pairing", "all": 0.931, "rest": -0.052}}
    assert structure.sentences(measured, s, ["x"] * 4 + ["y"] * 4) == [
        "This matrix mostly says one number a class, not which classes belong together.",
        "One number a class, s_ij = a_i a_j, explains 100 % of the variance over pairs (of unrelated numbers 25 to "
        "50 %).",
        "Neighbours agree with the groups in 4 of 8 classes, by chance in 3.4.",
        "The images paired in another order give a matrix that correlates 0.93 with this one, and -0.05 in what "
        "a_i a_j leaves.",
    ]
    halves = {"stability": {"of": "halves", "all": 0.5, "rest": None}}
    assert structure.sentences(halves, s)[-1] == "Two halves of the images give matrices that correlate 0.50."


@pytest.mark.parametrize("name", RELEASED)
def test_released_matrices_are_mostly_one_number_a_class(name):
    similarity = released(name)
    np.testing.assert_allclose(structure.rank_one_share(similarity), RELEASED[name], atol=1e-3)


@pytest.mark.parametrize(("name", "count"), [("cifar100_resnet32x4", 10), ("cifar100_wrn_40_2", 4)])
def test_neighbours_in_the_released_matrices_are_of_the_same_superclass_by_chance(name, count):
    found, chance = structure.agreement(released(name), common.CIFAR100_GROUPS)
    assert found == count
    np.testing.assert_allclose(chance, 400 / 99)
