"""Class similarities against their formulas in float64, CKA against the authors' distance too; ground cost."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wkd_jax.losses import similarity as module
from wkd_jax.losses.similarity import (
    cka,
    confusion_similarity,
    cosine_similarity,
    gaussian_similarity,
    ground_cost,
    logit_correlation,
)

SHARED = pathlib.Path(__file__).parents[2] / "../shared"
KERNELS = [("linear", {}), ("polynomial", {"degree": 3}), ("rbf", {"bandwidth": 0.4})]

# (C, N, D): one block of samples; three with a remainder; more than one block, and N so large that features are used
SHAPES = [(5, 9, 40), (4, 300, 40), (5, 300, 3)]


def features(shape, seed=0):
    """Correlated channels, classes of different spread, and a mean far from 0."""
    rng = np.random.default_rng(seed)
    classes, _, channels = shape
    mixing = rng.normal(size=(classes, channels, channels))
    return (np.einsum("cnd,cde->cne", rng.normal(size=shape), mixing) + 3).astype(np.float32)


def gram_oracle(x, kernel, degree=None, bandwidth=None):
    """tr(K_i H K_j H) normalised, every matrix written out, float64."""
    x = np.asarray(x, np.float64)
    samples = x.shape[1]
    H = np.eye(samples) - 1 / samples
    centred = []
    for rows in x:
        K = rows @ rows.T
        if kernel == "polynomial":
            K = (K + 1) ** degree
        if kernel == "rbf":
            D = np.sum((rows[:, None] - rows[None]) ** 2, axis=-1)
            K = np.exp(-D / (2 * bandwidth**2 * np.median(D)))
        centred.append(H @ K @ H)
    hsic = np.array([[np.trace(a @ b) for b in centred] for a in centred])
    return hsic / np.sqrt(np.outer(np.diag(hsic), np.diag(hsic)))


def released_distance(x):
    """1 - |Y^T X|_F^2 / (|X^T X|_F |Y^T Y|_F) with X, Y centred over samples: the authors' code, in float64."""
    x = np.asarray(x, np.float64)
    x = x - x.mean(axis=1, keepdims=True)
    norm = [np.linalg.norm(rows.T @ rows) for rows in x]
    return np.array(
        [[1 - np.sum((y.T @ z) ** 2) / (norm[i] * norm[j]) for j, z in enumerate(x)] for i, y in enumerate(x)]
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("kernel", "parameters"), KERNELS)
def test_cka_matches_centred_gram_matrices(shape, kernel, parameters):
    x = features(shape)
    result = cka(x, kernel=kernel, **parameters)
    np.testing.assert_allclose(result, gram_oracle(x, kernel, **parameters), atol=2e-6)
    assert result.dtype == jnp.float32
    np.testing.assert_array_equal(result, result.T)
    np.testing.assert_array_equal(np.diag(result), 1)
    assert (np.asarray(result) >= 0).all() and (np.asarray(result) <= 1).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_linear_cka_is_the_authors_distance(shape):
    x = features(shape)
    np.testing.assert_allclose(1 - cka(x), released_distance(x), atol=1e-6)


def test_every_way_to_divide_the_work_agrees(monkeypatch):
    """Blocks of one class, of all; both forms of the linear kernel; remainders in classes and in samples."""
    x = features((7, 50, 6))
    expected = gram_oracle(x, "linear")
    shift = module._shift(jnp.asarray(x), "linear")
    for workspace, rows in ((2**28, 128), (4 * 50 * 6 * 3, 16), (1, 7)):
        monkeypatch.setattr(module, "_WORKSPACE", workspace)
        monkeypatch.setattr(module, "_ROWS", rows)
        for products in (
            module._products_of_features(jnp.asarray(x), shift),
            module._products_of_samples(jnp.asarray(x), shift, "linear", 0.0),
        ):
            np.testing.assert_allclose(module._normalised(products, lowest=0.0), expected, atol=1e-6)


@pytest.mark.parametrize("shape", [(1000, 732, 1000), (100, 32000, 256)], ids=["imagenet", "cifar100"])
def test_memory_at_full_size_is_bounded(shape):
    """Compiled, not run: what is needed besides the 3 GB of features."""
    compiled = module._cka.lower(jax.ShapeDtypeStruct(shape, jnp.float32), kernel="linear", parameter=0.0).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.7e9


@pytest.mark.parametrize(("kernel", "parameters"), KERNELS)
def test_class_without_variance_is_like_no_other(kernel, parameters):
    x = features((4, 23, 5))
    x[2] = x[2, 0]  # the mean of equal numbers is not always that number: rounding must not pass for a direction
    result = np.asarray(cka(x, kernel=kernel, **parameters))
    np.testing.assert_array_equal(result[2], np.eye(4)[2])
    np.testing.assert_allclose(
        result[[0, 1, 3]][:, [0, 1, 3]], cka(x[[0, 1, 3]], kernel=kernel, **parameters), atol=1e-6
    )
    np.testing.assert_array_equal(cka(x[:, :1], kernel=kernel, **parameters), np.eye(4))


def test_rbf_when_most_samples_are_equal():
    """The median distance is 0: the kernel's limit tells equal samples from distinct ones, and no more."""
    x = np.zeros((2, 6, 2), np.float32)
    x[0, 0], x[1, 1] = (3.0, 0.0), (0.0, 5.0)
    K = np.array([[[float((a == b).all()) for b in rows] for a in rows] for rows in x])
    H = np.eye(6) - 1 / 6
    first, second = H @ K[0] @ H, H @ K[1] @ H
    expected = np.sum(first * second) / (np.linalg.norm(first) * np.linalg.norm(second))
    np.testing.assert_allclose(cka(x, kernel="rbf")[0, 1], expected, atol=1e-6)


@pytest.mark.parametrize("samples", [3, 4, 7])
def test_median_counts_the_zero_diagonal(samples):
    x = features((2, samples, 3))
    distance = np.sum((x[0][:, None].astype(np.float64) - x[0][None]) ** 2, axis=-1)
    np.testing.assert_allclose(module._median(jnp.asarray(distance, jnp.float32)), np.median(distance), rtol=1e-6)


def test_invariances():
    x = features((3, 30, 4))
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(4, 4)))[0].astype(np.float32)
    order = np.random.default_rng(2).permutation(30)
    for other in (x @ rotation, 1e3 * x, 1e-12 * x, x + 7, x[:, order]):
        for kernel in ("linear", "rbf"):
            np.testing.assert_allclose(cka(other, kernel=kernel), cka(x, kernel=kernel), atol=1e-5)
    # Re-pairing the samples of one class does change it: the order is part of the data.
    repaired = np.concatenate([x[:1, order], x[1:]])
    assert abs(cka(repaired)[0, 1] - cka(x)[0, 1]) > 1e-2


def test_defaults_and_dtypes():
    x = features((3, 10, 4))
    np.testing.assert_array_equal(cka(x, kernel="polynomial"), cka(x, kernel="polynomial", degree=2))
    np.testing.assert_array_equal(cka(x, kernel="rbf"), cka(x, kernel="rbf", bandwidth=0.4))
    low = jnp.asarray(x, jnp.bfloat16)
    np.testing.assert_array_equal(cka(low), cka(low.astype(jnp.float32)))
    np.testing.assert_allclose(jax.jit(cka)(x), cka(x), atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel": "gauss"}, "kernel='gauss': valid are linear, polynomial and rbf"),
        ({"degree": 2}, "degree=2: the linear kernel has no degree, only the polynomial"),
        ({"kernel": "polynomial", "bandwidth": 0.4}, "bandwidth=0.4: the polynomial kernel has no bandwidth"),
        ({"kernel": "rbf", "bandwidth": 0.0}, "bandwidth=0.0: must be above 0"),
        ({"kernel": "polynomial", "degree": 1.5}, "degree=1.5: must be an integer"),
    ],
)
def test_cka_arguments_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        cka(np.ones((2, 3, 4), np.float32), **arguments)


@pytest.mark.parametrize("shape", [(3, 4), (2, 0, 4)])
def test_cka_shapes_that_do_not_fit(shape):
    with pytest.raises(ValueError, match="features must be"):
        cka(np.ones(shape, np.float32))


def test_cosine_similarity():
    x = np.random.default_rng(0).normal(size=(6, 9))
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    result = cosine_similarity(x)
    np.testing.assert_allclose(result, unit @ unit.T, atol=1e-6)
    np.testing.assert_array_equal(result, result.T)
    np.testing.assert_array_equal(np.diag(result), 1)
    np.testing.assert_allclose(cosine_similarity(x * np.logspace(-30, 30, 6)[:, None]), result, atol=1e-6)
    x[3] = 0
    np.testing.assert_array_equal(cosine_similarity(x)[3], np.eye(6)[3])
    opposite = np.array([[1.0, 2.0, 3.0], [-1.0, -2.0, -3.0]])
    assert np.min(cosine_similarity(opposite)) == -1
    with pytest.raises(ValueError, match="prototypes must be"):
        cosine_similarity(x[0])


def check_form(result):
    """What every similarity promises."""
    result = np.asarray(result)
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, result.T)
    np.testing.assert_array_equal(np.diag(result), 1)


def test_cosine_of_what_classes_do_not_share():
    x = np.random.default_rng(0).normal(size=(6, 9)) + 5
    centred = x - x.mean(axis=0)
    unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    result = cosine_similarity(x, centred=True)
    check_form(result)
    np.testing.assert_allclose(result, unit @ unit.T, atol=2e-6)
    np.testing.assert_allclose(cosine_similarity(1e15 * (x + 3), centred=True), result, atol=2e-6)
    np.testing.assert_allclose(cosine_similarity(x[:2], centred=True), [[1, -1], [-1, 1]], atol=1e-6)
    np.testing.assert_array_equal(cosine_similarity(np.tile(x[:1], (4, 1)), centred=True), np.eye(4))


def wasserstein(x):
    """2-Wasserstein distance of diagonal Gaussians, pair by pair, float64."""
    x = np.asarray(x, np.float64)
    mean, deviation = x.mean(axis=1), x.std(axis=1)
    return np.array(
        [[np.sqrt(np.sum((m - n) ** 2) + np.sum((s - t) ** 2)) for n, t in zip(mean, deviation, strict=True)]
         for m, s in zip(mean, deviation, strict=True)]
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(5, 9, 40), (2, 1, 3), (7, 300, 3)])
def test_gaussian_similarity(shape):
    x = features(shape)
    distance = wasserstein(x)
    result = gaussian_similarity(x)
    check_form(result)
    np.testing.assert_allclose(result, 1 - distance / distance.max(), atol=2e-6)
    order = np.random.default_rng(1).permutation(shape[1])
    for other in (1e15 * x, 1e-15 * x, x + 7, x[:, order]):
        np.testing.assert_allclose(gaussian_similarity(other), result, atol=1e-5)


def test_gaussian_distances_are_a_metric():
    """Equal classes are at distance 0, and no detour is shorter; with sharpness 0 the cost is that distance, scaled."""
    x = features((12, 20, 6))
    x[5] = x[2][::-1]
    cost = np.asarray(ground_cost(gaussian_similarity(x), sharpness=0.0), np.float64)
    assert cost[2, 5] < 1e-6 and np.max(cost) == 1
    assert np.sum(cost < 1e-3) == 12 + 2
    assert (cost[:, None, :] <= cost[:, :, None] + cost[None, :, :] + 1e-6).all()  # c_ik <= c_ij + c_jk
    np.testing.assert_array_equal(gaussian_similarity(np.ones((3, 4, 2))), 1)


def reordered(shape, classes=6):
    """The same samples for every class, each in an order of its own: float32 moments that differ by rounding alone."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=shape) * 10.0 ** rng.integers(-2, 3, shape[1]) + 5).astype(np.float32)
    return np.stack([rng.permutation(x) for _ in range(classes)])


@pytest.mark.parametrize("shape", [(100, 20), (20_000, 7)])
@pytest.mark.parametrize("factor", [1e-30, 1.0, 1e33])
def test_rounding_is_no_distance(shape, factor):
    x = reordered(shape) * np.float32(factor)
    np.testing.assert_array_equal(gaussian_similarity(x), 1)
    x[0] *= np.float32(1.001)  # far above rounding: one class is apart, the others are still the same
    np.testing.assert_array_equal(gaussian_similarity(x)[1:, 1:], 1)
    np.testing.assert_allclose(gaussian_similarity(x)[0, 1:], 0, atol=1e-3)


def test_rounding_is_no_direction():
    """Centred prototypes that are rounding are zero vectors, of all classes or of those that are the mean."""
    x = reordered((100, 20))
    assert np.ptp(x.mean(axis=1), axis=0).max() > 0
    for of in (x.mean(axis=1), 1e33 * x.mean(axis=1), x.mean(axis=1, dtype=np.float64)):
        np.testing.assert_array_equal(cosine_similarity(of, centred=True), np.eye(6))
    apart = np.array([[7.1, 0.3], [0.1, 0.3], [3.6, 0.3]]) + 1e-7 * np.arange(3)[:, None]
    np.testing.assert_allclose(cosine_similarity(apart, centred=True), [[1, -1, 0], [-1, 1, 0], [0, 0, 1]], atol=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_confusion_similarity(temperature):
    logits = 3 * np.random.default_rng(0).normal(size=(5, 7, 6))
    odds = np.exp(logits / temperature)
    belief = (odds / odds.sum(axis=-1, keepdims=True)).mean(axis=1)
    expected = [[np.sum(np.sqrt(p * q)) for q in belief] for p in belief]
    result = confusion_similarity(logits, temperature=temperature)
    check_form(result)
    np.testing.assert_allclose(result, expected, atol=1e-6)
    np.testing.assert_allclose(confusion_similarity(logits + 1e3, temperature=temperature), expected, atol=1e-3)


def test_confusion_of_certain_predictions():
    certain = 1e4 * np.eye(3)[:, None] * np.ones((1, 4, 1))
    np.testing.assert_array_equal(confusion_similarity(certain), np.eye(3))
    np.testing.assert_array_equal(confusion_similarity(np.concatenate([certain, certain[:1]]))[3], [1, 0, 0, 1])
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="temperature=.*above 0"):
            confusion_similarity(certain, temperature=temperature)
    traced = jax.jit(lambda t: confusion_similarity(certain, temperature=t))(2.0)
    np.testing.assert_allclose(traced, confusion_similarity(certain, temperature=2.0), atol=1e-6)


@pytest.mark.parametrize("shape", [(5, 9, 5), (40, 5), (3, 2, 9, 5)])
def test_logit_correlation(shape):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=shape) @ rng.normal(size=(5, 5)) + np.arange(5) + 10 * rng.normal(size=(*shape[:-1], 1))
    rows = logits.reshape(-1, 5)
    rows = rows - rows.mean(axis=1, keepdims=True)
    covariance = (rows - rows.mean(axis=0)).T @ (rows - rows.mean(axis=0))
    norm = np.sqrt(np.diag(covariance))
    result = logit_correlation(logits)
    check_form(result)
    np.testing.assert_allclose(result, covariance / np.outer(norm, norm), atol=3e-6)
    np.testing.assert_allclose(logit_correlation(1e15 * (logits + rng.normal(size=5))), result, atol=1e-5)
    largest = np.float32(2e38) * rows / np.abs(rows).max()
    np.testing.assert_allclose(logit_correlation(largest.astype(np.float32)), result, atol=1e-5)
    np.testing.assert_allclose(cka(rows.T[:, :, None]), np.square(result), atol=1e-5)  # CKA of columns: no sign


def test_logit_that_never_changes_goes_with_no_other():
    np.testing.assert_array_equal(logit_correlation(np.full((2, 6, 3), 0.1) * [1, 2, 3]), np.eye(3))
    rng = np.random.default_rng(0)
    for classes, spread in ((3, 10.0), (3, 1e3), (300, 1e37), (300, 1e-20)):
        shift = spread * rng.normal(size=(4, 50, 1))
        shift[0, 0] *= 10  # the first sample serves as the origin
        logits = (shift + spread * rng.normal(size=classes)).astype(np.float32)
        np.testing.assert_array_equal(logit_correlation(logits), np.eye(classes))
    some = rng.normal(size=(80, 1)) * [1.0, -1.0, 0.0, 0.0] + 10 * rng.normal(size=(80, 1)) + rng.normal(size=4)
    expected = [[1, -1, 0, 0], [-1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    np.testing.assert_allclose(logit_correlation(some), expected, atol=1e-5)
    two = logit_correlation(np.array([[1.0, 2.0], [2.0, 0.0], [5.0, 1.0]]))
    np.testing.assert_allclose(two, [[1, -1], [-1, 1]], atol=1e-6)


@pytest.mark.parametrize("of", [gaussian_similarity, confusion_similarity])
def test_shapes_that_do_not_fit_the_others(of):
    for shape in ((3, 4), (2, 0, 4)):
        with pytest.raises(ValueError, match="must be .C, N, D."):
            of(np.ones(shape, np.float32))
        with pytest.raises(ValueError, match="logits must be .*C"):
            logit_correlation(np.ones((2, 0, 4) if len(shape) == 3 else 4))


@pytest.mark.parametrize("of", [gaussian_similarity, confusion_similarity, logit_correlation])
def test_memory_of_the_others_at_full_size_is_bounded(of):
    """ImageNet's 3 GB of logits: neither a copy of them nor an array of all pairs and channels."""
    compiled = jax.jit(of).lower(jax.ShapeDtypeStruct((1000, 732, 1000), jnp.float32)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.1e9


@pytest.mark.parametrize("sharpness", [0.0, 0.5, 2.0])
def test_ground_cost(sharpness):
    similarity = np.array([[1.0, 0.3, -1.0], [0.3, 1.0, 0.99], [-1.0, 0.99, 1.0]])
    distance = 1 - similarity
    expected = 1 - np.exp(-sharpness * distance) if sharpness else distance
    cost = ground_cost(similarity, sharpness=sharpness)
    np.testing.assert_allclose(cost, expected, rtol=1e-5)
    np.testing.assert_array_equal(np.diag(cost), 0)
    np.testing.assert_allclose(jax.jit(ground_cost)(similarity, sharpness=sharpness), cost, rtol=1e-6)


def test_ground_cost_is_never_negative_and_exact_near_zero():
    similarity = jnp.array([[1.0, 1 + 1e-6], [1 - 1e-6, 1.0]])
    for sharpness in (0.0, 0.3):
        cost = np.asarray(ground_cost(similarity, sharpness=sharpness))
        assert cost[0, 1] == 0
        np.testing.assert_allclose(cost[1, 0], (sharpness or 1) * (1 - float(similarity[1, 0])), rtol=1e-5)


def test_ground_cost_errors():
    with pytest.raises(ValueError, match="must be .C, C."):
        ground_cost(np.ones((2, 3)), sharpness=1.0)
    for sharpness in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="sharpness=.*0 or more"):
            jax.jit(lambda s, k=sharpness: ground_cost(s, sharpness=k))(np.eye(2))


def test_ground_cost_of_a_released_matrix():
    """The statistics that the specification lists for ResNet-34 on ImageNet, sharpness 1."""
    path = SHARED / "interrelations/imagenet_resnet34_linear_cka_distance.npy"
    if not path.exists():
        pytest.skip("reference documents are not here")
    distance = np.load(path)
    cost = np.asarray(ground_cost(1 - distance, sharpness=1.0))
    off_diagonal = cost[~np.eye(len(cost), dtype=bool)]
    np.testing.assert_allclose(np.percentile(off_diagonal, [0, 50, 100]), [0.6114, 0.6193, 0.6276], atol=1e-4)
    np.testing.assert_array_equal(np.diag(cost), 0)


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_cka_within_shard_map(kernel):
    """Each device computes that of its own features."""
    x = jax.random.normal(jax.random.key(3), (8, 3, 5, 4))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    each = jax.shard_map(lambda x: cka(x[0], kernel=kernel)[None], mesh=mesh, in_specs=spec, out_specs=spec)
    np.testing.assert_allclose(jax.jit(each)(x)[5], cka(x[5], kernel=kernel), atol=1e-6)
