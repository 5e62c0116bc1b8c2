"""Values and gradients against the authors' code (goldens), against deletion of the target class, and at extremes.

`tests/goldens/wkd_logit_synthetic.npz` holds random inputs with the outputs and gradients of the public PyTorch code of
the paper's authors (float32, CPU): `case/name`, cost = max(1 - exp(-sharpen * distance_matrix), 0), or the distance
where sharpen is 0. Goldens on the released interrelations are outside the repository; their tests skip without them.
"""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from wkd_jax import losses

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
SHARED = pathlib.Path(__file__).parents[3] / "shared"
STATIC = ("num_iters", "gradient", "stabilizer", "exact_marginal", "threshold", "return_error")
wkd_logit = jax.jit(losses.wkd_logit, static_argnames=STATIC)
wkd_logit_unseparated = jax.jit(losses.wkd_logit_unseparated, static_argnames=STATIC)
wkd_feature = jax.jit(losses.wkd_feature, static_argnames=("grid", "ddof"))


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def golden(path):
    """{case: {name: array}} of a golden file; skips where it is not at hand."""
    if not path.exists():
        pytest.skip(f"{path.name} is not at hand")
    cases = {}
    with np.load(path) as file:
        for key in file:
            case, name = key.split("/")
            cases.setdefault(case, {})[name] = file[key]
    return cases


def assert_close_to_golden(loss, grad, expected_loss, expected_grad):
    """Loss to 1e-5 relative; gradient to 1e-4 of its largest entry, in every entry. float32 on both sides."""
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    np.testing.assert_allclose(grad, expected_grad, atol=1e-4 * np.abs(expected_grad).max(), rtol=0)


def random_logits(*shape, seed=0, scale=3.0):
    """(student, teacher, labels, cost), float64: a symmetric cost in [0, 1] with zero diagonal."""
    rng = np.random.default_rng(seed)
    student, teacher = scale * rng.standard_normal((2, *shape))
    points = rng.standard_normal((shape[-1], 3))
    similarity = np.exp(-np.square(points[:, None] - points).sum(-1))
    return student, teacher, rng.integers(0, shape[-1], shape[:-1]), 1 - np.exp(-(1 - similarity))


def deleting(student, teacher, labels, cost, temperature=2.0, epsilon=0.05, num_iters=10, stabilizer=1e-8):
    """The definition: delete the target class from logits and cost, [B, C-1, C-1], then iterate. Differentiable."""
    batch, classes = student.shape
    others = np.stack([np.delete(np.arange(classes), y) for y in np.asarray(labels)])
    rows = np.arange(batch)
    target = -(jax.nn.softmax(teacher)[rows, labels] * jax.nn.log_softmax(student)[rows, labels])
    a, b = (jax.nn.softmax(x[rows[:, None], others] / temperature) for x in (student, teacher))
    costs = jnp.asarray(cost)[others[:, :, None], others[:, None, :]]
    kernels, u = jnp.exp(-costs / epsilon), jnp.full_like(a, 1 / (classes - 1))
    for _ in range(num_iters):
        v = b / (jnp.einsum("bij,bi->bj", kernels, u) + stabilizer)
        u = a / (jnp.einsum("bij,bj->bi", kernels, v) + stabilizer)
    return target, jnp.einsum("bi,bij,bj->b", u, kernels * costs, v)


# --- WKD-L against the authors' code


def check_logit_golden(case, distance):
    sharpness = float(case["sharpen"])
    cost = np.maximum(1 - np.exp(-sharpness * distance) if sharpness else distance, 0)
    options = {"temperature": float(case["temperature"]), "epsilon": float(case["epsilon"])}
    options["num_iters"] = int(case["iterations"])

    def separated(student):
        terms = losses.wkd_logit(student, case["teacher_logits"], case["labels"], cost, **options)
        return (terms[0] + float(case["wd_weight"]) * terms[1]).mean()

    def unseparated(student):
        return losses.wkd_logit_unseparated(student, case["teacher_logits"], cost, **options).mean()

    for loss, prefix in ((separated, ""), (unseparated, "unseparated_")):
        if prefix + "loss" in case:
            value, grad = jax.jit(jax.value_and_grad(loss))(case["student_logits"])
            assert_close_to_golden(value, grad, case[prefix + "loss"], case[prefix + "grad"])


@pytest.mark.parametrize("name", ["c10", "c37", "c100_raw"])
def test_logit_golden_synthetic(name):
    case = golden(GOLDENS / "wkd_logit_synthetic.npz")[name]
    assert "unseparated_loss" in case
    check_logit_golden(case, case["distance_matrix"])


@pytest.mark.parametrize("name", ["cifar_a", "cifar_b", "cifar_noSharpen", "imagenet_a"])
def test_logit_golden_on_released_interrelations(name):
    case = golden(SHARED / "goldens/wkd_logit.npz")[name]
    distance = np.load(SHARED / "interrelations" / f"{case['distance']}_linear_cka_distance.npy")
    check_logit_golden(case, distance)


# --- WKD-L against its definition


def test_masking_the_target_equals_deleting_it(x64):
    """To rounding, at every position of the target, value and gradients."""
    student, teacher, _, cost = random_logits(6, 6)
    labels = np.arange(6)

    def total(student, cost, function):
        terms = function(student, teacher, labels, cost)
        return (terms[0] + 30 * terms[1] * np.arange(1, 7)).sum(), terms

    (ours, expected) = (
        jax.jit(functools.partial(jax.value_and_grad(total, argnums=(0, 1), has_aux=True), function=f))(student, cost)
        for f in (losses.wkd_logit, deleting)
    )
    np.testing.assert_allclose(ours[0][1], expected[0][1], rtol=1e-10)
    for one, other in zip(ours[1], expected[1], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-8 * np.abs(other).max())


def test_whose_marginal_is_exact(x64):
    """The paper's rows are the teacher's: the same updates with the two exchanged, and another number."""
    student, teacher, *_ = random_logits(6, 7)
    cost = np.random.default_rng(2).uniform(0.3, 1, (7, 7)) * (1 - np.eye(7))  # not symmetric
    labels = np.arange(6)
    _, by_student = wkd_logit(student, teacher, labels, cost)
    value = functools.partial(wkd_logit, labels=labels, ground_cost=cost, exact_marginal="teacher")
    by_teacher = value(student, teacher)[1]

    def oracle(row):
        kept = np.arange(7) != labels[row]
        p, q = (np.exp(x[row][kept] / 2) / np.exp(x[row][kept] / 2).sum() for x in (teacher, student))
        kernel = np.exp(-cost[np.ix_(kept, kept)].T / 0.05)
        u = np.full(6, 1 / 6)
        for _ in range(10):
            v = q / (kernel.T @ u + 1e-8)
            u = p / (kernel @ v + 1e-8)
        return np.sum(u[:, None] * kernel * v * cost[np.ix_(kept, kept)].T)

    np.testing.assert_allclose(by_teacher, [oracle(row) for row in range(6)], rtol=1e-9)
    assert np.all(np.abs(by_teacher - by_student) > 1e-6)
    check_grads(lambda s: value(s, teacher)[1].sum(), (jnp.asarray(student),), order=1, modes=["rev"], rtol=1e-4)
    with pytest.raises(ValueError, match="exact_marginal='both'"):
        losses.wkd_logit(student, teacher, labels, cost, exact_marginal="both")


def test_leading_axes_vmap_and_single_rows():
    student, teacher, labels, cost = random_logits(2, 3, 7)
    whole = wkd_logit(student, teacher, labels, cost)
    mapped = jax.jit(jax.vmap(losses.wkd_logit, in_axes=(0, 0, 0, None)))(student, teacher, labels, cost)
    for term, other in zip(whole, mapped, strict=True):
        assert term.shape == (2, 3)
        np.testing.assert_allclose(term, other, rtol=1e-5)
    one = wkd_logit(student[1, 2], teacher[1, 2], labels[1, 2], cost)
    np.testing.assert_allclose([x[1, 2] for x in whole], one, rtol=1e-5)
    np.testing.assert_allclose(
        wkd_logit_unseparated(student, teacher, cost)[1], wkd_logit_unseparated(student[1], teacher[1], cost), rtol=1e-5
    )


def test_permuting_classes_changes_nothing_but_the_order(x64):
    student, teacher, labels, cost = random_logits(4, 6)
    order = np.random.default_rng(1).permutation(6)
    inverse = np.argsort(order)

    def value_and_grad(student, teacher, labels, cost):
        def total(student):
            terms = losses.wkd_logit(student, teacher, labels, cost)
            return terms[0].sum() + terms[1].sum()

        return jax.value_and_grad(total)(student)

    run = jax.jit(value_and_grad)
    value, grad = run(student, teacher, labels, cost)
    moved, moved_grad = run(student[:, order], teacher[:, order], inverse[labels], cost[order][:, order])
    np.testing.assert_allclose(moved, value, rtol=1e-10)
    np.testing.assert_allclose(moved_grad, grad[:, order], rtol=1e-8, atol=1e-12)


def test_traced_temperature_and_one_per_example():
    student, teacher, labels, cost = random_logits(3, 5)
    traced = wkd_logit(student, teacher, labels, cost, temperature=4.0)
    constant = jax.jit(functools.partial(losses.wkd_logit, temperature=4.0))(student, teacher, labels, cost)
    each = wkd_logit(student, teacher, labels, cost, temperature=jnp.array([4.0, 1.0, 4.0]))
    np.testing.assert_allclose(constant, traced, rtol=1e-5)
    np.testing.assert_allclose(each[1][::2], traced[1][::2], rtol=1e-6)
    assert abs(each[1][1] - traced[1][1]) > 1e-3
    np.testing.assert_array_equal(each[0], traced[0])  # the target term is at temperature 1


@pytest.mark.parametrize("gradient", ["implicit", "envelope"])
def test_gradient_mode_threshold_and_error_reach_the_solver(gradient):
    student, teacher, labels, cost = random_logits(3, 5)
    options = {"epsilon": 0.2, "num_iters": 500, "gradient": gradient, "threshold": 1e-4, "return_error": True}
    _, cost_few, error = wkd_logit(student, teacher, labels, cost, **options)
    _, cost_all, no_error = wkd_logit(student, teacher, labels, cost, **{**options, "threshold": None})
    assert (no_error < 1e-5).all()
    assert (no_error < error).any()
    assert (error < 2e-4).all()
    np.testing.assert_allclose(cost_few, cost_all, atol=1e-3)
    target_mask = np.arange(5) == labels[:, None]
    a, b = (jax.nn.softmax(jnp.where(target_mask, -jnp.inf, x / 2)) for x in (student, teacher))
    solved = losses.sinkhorn(a, b, cost, epsilon=0.2, num_iters=500, gradient=gradient, stabilizer=1e-8)
    np.testing.assert_allclose(cost_all, solved.cost, rtol=1e-5)
    unseparated, error = wkd_logit_unseparated(student, teacher, cost, **options)
    assert unseparated.shape == error.shape == (3,)


def test_stabilizer_is_felt_on_a_sharp_cost(x64):
    """Sharpness 2 and confident logits: kernel entries near 1e-8, as the authors' stabilizer."""
    student, teacher, labels, _ = random_logits(8, 6, scale=12.0)
    cost = 1 - np.exp(-2 * 1.2 * (1 - np.eye(6)))
    with_it, without = (wkd_logit(student, teacher, labels, cost, stabilizer=s)[1] for s in (1e-8, 0.0))
    expected = jax.jit(lambda *x: deleting(*x[:2], labels, x[2])[1])(student, teacher, cost)
    np.testing.assert_allclose(with_it, expected, rtol=1e-8)
    assert (np.abs(with_it - without) > 1e-4 * without).any()


# --- WKD-L at the edges


def test_two_classes_transport_nothing():
    cost = 1 - jnp.eye(2)
    student, teacher = jnp.array([[1.0, -2.0], [0.5, 3.0]]), jnp.array([[-1.0, 2.0], [5.0, 0.0]])

    def total(student):
        target_term, wasserstein_term = losses.wkd_logit(student, teacher, jnp.array([0, 1]), cost)
        return wasserstein_term.sum(), target_term

    (wasserstein, _), grad = jax.jit(jax.value_and_grad(total, has_aux=True))(student)
    assert wasserstein == 0
    assert not grad.any()


EXTREMES = {  # name: (student, teacher), label 0
    "huge logits": ([1e4, -1e4, 0.0, 5e3], [-1e4, 1e4, 1e4, 0.0]),
    "one-hot teacher": ([1.0, 2.0, 0.0, -1.0], [0.0, 0.0, 1e4, 0.0]),
    "one-hot both, disjoint": ([0.0, 1e4, 0.0, 0.0], [0.0, 0.0, 1e4, 0.0]),
    "equal logits": ([0.3, 0.3, 0.3, 0.3], [0.3, 0.3, 0.3, 0.3]),
}


@pytest.mark.parametrize("stabilizer", [1e-8, 0.0])
@pytest.mark.parametrize("gradient", ["unrolled", "implicit", "envelope"])
def test_extremes_are_finite(gradient, stabilizer):
    student, teacher = (jnp.array(x) for x in zip(*EXTREMES.values(), strict=True))
    cost = 1 - jnp.exp(-2 * (1 - jnp.eye(4)))

    def total(student):
        options = {"gradient": gradient, "stabilizer": stabilizer}
        terms = losses.wkd_logit(student, teacher, jnp.zeros(4, int), cost, **options)
        return sum(terms).sum(), terms

    (_, (target_term, wasserstein_term)), grad = jax.jit(jax.value_and_grad(total, has_aux=True))(student)
    for name, *values in zip(EXTREMES, target_term, wasserstein_term, grad, strict=True):
        assert all(np.isfinite(value).all() for value in values), name
    if gradient != "envelope" and not stabilizer:  # all mass moves from class 1 to class 2
        np.testing.assert_allclose(wasserstein_term[2], cost[1, 2], rtol=1e-5)


def test_bfloat16_logits_are_computed_in_float32():
    student, teacher, labels, cost = random_logits(4, 9)
    student, teacher = jnp.asarray(student, jnp.bfloat16), jnp.asarray(teacher, jnp.bfloat16)
    narrow = wkd_logit(student, teacher, labels, jnp.asarray(cost, jnp.float32))
    wide = wkd_logit(student.astype(jnp.float32), teacher.astype(jnp.float32), labels, jnp.asarray(cost, jnp.float32))
    for one, other in zip(narrow, wide, strict=True):
        assert one.dtype == jnp.float32
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_teacher_is_a_constant_and_the_cost_is_not():
    student, teacher, labels, cost = (jnp.asarray(x) for x in random_logits(2, 5))

    def total(teacher, cost):
        terms = losses.wkd_logit(student, teacher, labels, cost)
        return (terms[0] + terms[1]).sum() + losses.wkd_logit_unseparated(student, teacher, cost).sum()

    teacher_grad, cost_grad = jax.jit(jax.grad(total, argnums=(0, 1)))(teacher, cost)
    assert not teacher_grad.any()
    assert cost_grad.any()


def test_padding_labels_leave_nothing_out():
    student, teacher, labels, cost = random_logits(2, 5)
    target_term, wasserstein_term = wkd_logit(student, teacher, np.array([-1, labels[1]]), cost)
    assert target_term[0] == 0
    np.testing.assert_allclose(wasserstein_term[0], wkd_logit_unseparated(student, teacher, cost)[0], rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student_logits": np.ones((3, 5))}, r"\(3, 5\)"),
        ({"labels": np.zeros(3, int)}, r"\(2,\)"),
        ({"labels": np.zeros(2)}, "integers"),
        ({"labels": np.ones((2, 4)) / 4}, "argmax"),
        ({"ground_cost": np.ones((5, 5))}, "ground_cost"),
        ({"temperature": 0.0}, "temperature"),
        ({"gradient": "implict"}, "did you mean 'implicit'"),
        ({"student_logits": np.ones((2, 1)), "teacher_logits": np.ones((2, 1)), "ground_cost": np.ones((1, 1))}, "two"),
    ],
)
def test_bad_logit_arguments_are_named(changes, message):
    arguments = {"student_logits": np.ones((2, 4)), "teacher_logits": np.ones((2, 4)), "labels": np.zeros(2, int)}
    with pytest.raises(ValueError, match=message):
        losses.wkd_logit(**{**arguments, "ground_cost": np.ones((4, 4)), **changes})


# --- WKD-L at scale

BATCH, CLASSES = 6, 50  # 6 * 50 * 50 = 15000: far above every honest buffer, the largest being [10, 6, 50] = 3000


def large_buffers(function, *arguments, size):
    """Shapes of `size` elements or more in the optimized program."""
    program = jax.jit(function).lower(*arguments).compile().as_text()
    shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", program)}
    assert (BATCH, CLASSES) in shapes  # the text is what it is taken for
    return sorted(shape for shape in shapes if np.prod(shape) >= size)


def test_no_buffer_of_batch_times_classes_squared():
    student, teacher, labels, cost = random_logits(BATCH, CLASSES)

    def step(loss, student, cost):
        target_term, wasserstein_term = loss(student, teacher, labels, cost)
        return (target_term + 30 * wasserstein_term).mean()

    ours = jax.value_and_grad(functools.partial(step, losses.wkd_logit), argnums=(0, 1))
    direct = jax.value_and_grad(functools.partial(step, deleting))
    size = BATCH * (CLASSES - 1) ** 2
    assert large_buffers(ours, student, cost, size=size) == []
    assert large_buffers(direct, student, cost, size=size)  # the checker can fail


def test_shard_map_equals_one_device():
    student, teacher, labels, cost = (jnp.asarray(x) for x in random_logits(8, 6))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def local(student, teacher, labels, cost):
        return sum(losses.wkd_logit(student, teacher, labels, cost)).mean()

    def sharded(*arguments):
        in_specs = (P("data"), P("data"), P("data"), P())
        mean = lambda *shards: jax.lax.pmean(local(*shards), "data")  # noqa: E731
        return jax.shard_map(mean, mesh=mesh, in_specs=in_specs, out_specs=P())(*arguments)

    whole, split = (jax.jit(jax.value_and_grad(f))(student, teacher, labels, cost) for f in (local, sharded))
    np.testing.assert_allclose(split[0], whole[0], rtol=1e-5)
    np.testing.assert_allclose(split[1], whole[1], atol=1e-6)


# --- WKD-F


def cells(size, grid):
    return [slice(i * size // grid, int(np.ceil((i + 1) * size / grid))) for i in range(grid)]


def feature_oracle(student, teacher, grid=1, ddof=1, eps=1e-5):
    mean_term = cov_term = 0.0
    for i in range(grid):
        for j in range(grid):
            parts = [x[:, cells(x.shape[1], grid)[i], cells(x.shape[2], grid)[j]] for x in (student, teacher)]
            means = [x.mean((1, 2)) for x in parts]
            variances = [
                np.square(x - m[:, None, None]).sum((1, 2)) / max(x[0, ..., 0].size - ddof, 1)
                for x, m in zip(parts, means, strict=True)
            ]
            mean_term += np.square(means[0] - means[1]).sum(-1)
            cov_term += np.square(np.sqrt(variances[0] + eps) - np.sqrt(variances[1] + eps)).sum(-1)
    return mean_term / grid**2, cov_term / grid**2


def waves(*shape):
    """The student and teacher maps of the published golden table, as NHWC."""
    k = np.arange(np.prod(shape))
    return (np.moveaxis(f(k).reshape(shape), 1, -1) for f in (lambda k: np.sin(0.37 * k), lambda k: np.cos(0.23 * k)))


@pytest.mark.parametrize(
    ("side", "grid", "mean_term", "cov_term"),
    [
        (7, 1, 0.011824, 0.002068),
        (7, 2, 0.069760, 0.020867),
        (7, 4, 0.365865, 0.301764),
        (8, 1, 0.033173, 0.000230),
        (8, 2, 0.048975, 0.112383),
        (8, 4, 0.541727, 0.599086),
    ],
)
def test_feature_golden_table(side, grid, mean_term, cov_term):
    terms = wkd_feature(*waves(2, 3, side, side), grid=grid)
    np.testing.assert_allclose([term.mean() for term in terms], [mean_term, cov_term], atol=6e-7)


def test_feature_golden_of_the_biased_variance():
    np.testing.assert_allclose(wkd_feature(*waves(2, 3, 7, 7), ddof=0)[1].mean(), 0.002026, atol=6e-7)


@pytest.mark.parametrize("name", ["grid1", "grid2", "grid4_7x7"])
def test_feature_golden(name):
    case = golden(SHARED / "goldens/wkd_feature.npz")[name]
    student, teacher = (np.moveaxis(case[f"{side}_nchw"], 1, -1) for side in ("student", "teacher"))

    def loss(student):
        terms = losses.wkd_feature(student, teacher, grid=int(case["grid"]), eps=float(case["eps"]))
        mean_term, cov_term = (term.mean() for term in terms)
        return float(case["mean_cov_ratio"]) * mean_term + cov_term, (mean_term, cov_term)

    (value, terms), grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(student)
    np.testing.assert_allclose(terms, [case["mean_loss"], case["cov_loss"]], rtol=1e-5)
    assert_close_to_golden(value, grad, case["loss"], np.moveaxis(case["grad_nchw"], 1, -1))


@pytest.mark.parametrize(("grid", "ddof"), [(1, 0), (2, 1), (3, 0), (5, 1)])
def test_feature_on_maps_of_different_sizes(grid, ddof):
    """Overlapping cells, cells of one position, sides that differ."""
    rng = np.random.default_rng(0)
    student, teacher = rng.standard_normal((2, 7, 6, 3)), 2 * rng.standard_normal((2, 5, 9, 3))
    expected = feature_oracle(student, teacher, grid=grid, ddof=ddof)
    np.testing.assert_allclose(wkd_feature(student, teacher, grid=grid, ddof=ddof), expected, rtol=1e-5)


def test_feature_gradient_against_autodiff_of_the_definition(x64):
    rng = np.random.default_rng(0)
    student, teacher = rng.standard_normal((2, 2, 7, 7, 3))

    def definition(student):
        total = 0.0
        for i in cells(7, 4):
            for j in cells(7, 4):
                x, y = student[:, i, j], teacher[:, i, j]
                total += jnp.square(x.mean((1, 2)) - y.mean((1, 2))).sum()
                stds = [jnp.sqrt(jnp.var(z, axis=(1, 2), ddof=1) + 1e-5) for z in (x, y)]
                total += jnp.square(stds[0] - stds[1]).sum()
        return total / 16

    def ours(student):
        return sum(term.sum() for term in losses.wkd_feature(student, teacher, grid=4))

    for one, other in zip(*(jax.jit(jax.value_and_grad(f))(student) for f in (ours, definition)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)


def test_feature_tokens_are_a_map_of_one_row():
    rng = np.random.default_rng(0)
    student, teacher = rng.standard_normal((2, 2, 3, 4, 5))
    whole = wkd_feature(student, teacher)
    tokens = wkd_feature(student.reshape(2, 12, 5), teacher.reshape(2, 12, 5))
    mixed = wkd_feature(student, teacher.reshape(2, 12, 5))
    for other in (tokens, mixed):
        np.testing.assert_allclose(other, whole, rtol=1e-5)


@pytest.mark.parametrize("grid", [1, 2])
def test_feature_of_constant_or_single_positions_is_finite(grid):
    """Zero variance: std = sqrt(eps), gradient finite; one position has no variance whatever ddof says."""
    student, teacher = jnp.ones((1, 2, 2, 3)), jnp.zeros((1, 2, 2, 3))

    def total(student, teacher):
        mean_term, cov_term = losses.wkd_feature(student, teacher, grid=grid)
        return (mean_term + cov_term).sum()

    for s, t in ((student, teacher), (student[:, :1, :1], teacher[:, :1, :1])):
        value, grad = jax.jit(jax.value_and_grad(total))(s, t)
        np.testing.assert_allclose(value, 3.0, rtol=1e-6)
        assert np.isfinite(grad).all()


@pytest.mark.parametrize("grid", [1, 4])
def test_feature_does_not_cancel_at_a_large_offset(grid):
    """E[x^2] - E[x]^2 in float32 would be off by 1e3 * 1e3 * 6e-8 = 0.06 in each variance."""
    rng = np.random.default_rng(0)
    student, teacher = (rng.standard_normal((2, 2, 7, 7, 3)) * [[[[[1.0]]]], [[[[0.5]]]]]).astype(np.float32)
    far = wkd_feature(np.round(student * 64) / 64 + 1000, np.round(teacher * 64) / 64, grid=grid)[1]
    near = wkd_feature(np.round(student * 64) / 64, np.round(teacher * 64) / 64, grid=grid)[1]
    np.testing.assert_allclose(far, near, rtol=1e-3)


def test_feature_translation_moves_only_the_mean_term():
    student, teacher = waves(2, 3, 7, 7)
    mean_term, cov_term = wkd_feature(student + 2.0, teacher, grid=4)
    assert (mean_term > 3.0).all()
    np.testing.assert_allclose(cov_term, wkd_feature(student, teacher, grid=4)[1], rtol=1e-4)


def test_feature_is_per_example_float32_and_the_teacher_a_constant():
    student, teacher = (jnp.asarray(x, jnp.bfloat16) for x in waves(3, 4, 7, 7))
    terms = wkd_feature(student, teacher, grid=2)
    wide = wkd_feature(student[1:2].astype(jnp.float32), teacher[1:2].astype(jnp.float32), grid=2)
    for term, expected in zip(terms, wide, strict=True):
        assert term.shape == (3,)
        assert term.dtype == jnp.float32
        np.testing.assert_allclose(term[1], expected[0], rtol=1e-5)
    grad = jax.jit(jax.grad(lambda t: sum(term.sum() for term in losses.wkd_feature(student, t))))(teacher)
    assert not grad.any()


@pytest.mark.parametrize(
    ("student", "teacher", "grid", "message"),
    [
        ((2, 7, 7, 3), (2, 7, 7, 4), 1, "connector"),
        ((2, 7, 7, 3), (3, 7, 7, 3), 1, "agree in B"),
        ((2, 49, 3), (2, 7, 7, 3), 2, "student .* tokens"),
        ((2, 7, 7, 3), (2, 49, 3), 2, "teacher .* tokens"),
        ((2, 3), (2, 3), 1, "map"),
        ((2, 7, 7, 3), (2, 7, 7, 3), 0, "grid"),
        ((2, 0, 7, 3), (2, 7, 7, 3), 1, "student"),
    ],
)
def test_bad_feature_arguments_are_named(student, teacher, grid, message):
    with pytest.raises(ValueError, match=message):
        losses.wkd_feature(np.ones(student), np.ones(teacher), grid=grid)
