"""ViT, Swin, ConvNeXt and what they share, against definitions in float64 NumPy; `tests/parity` has whole networks."""

import inspect
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from wkd_jax.models import convnext, functional, swin, transformer, vit
from wkd_jax.models.layers import LayerNorm
from wkd_jax.weights import keys

VIT, SWIN, CONVNEXT = "deit_tiny_patch16_224", "swin_pico_patch4_window7_224", "convnext_tiny"
REGISTER = {**vit.REGISTER, **swin.REGISTER, **convnext.REGISTER}
# A size of images for each family that strides and windows do not divide, as far as the family takes such.
SIZES = {VIT: (32, 48), SWIN: (60, 36), CONVNEXT: (70, 45)}
SETTINGS = {VIT: {"image_size": SIZES[VIT]}, SWIN: {}, CONVNEXT: {}}


def rngs(seed=0):
    return nnx.Rngs(jax.random.key(seed, impl="rbg"))  # compiles in a fraction of the time of the default


def build(name, num_classes=5, **settings):
    return lambda: REGISTER[name](num_classes, rngs=rngs(), **SETTINGS.get(name, {}), **settings)


def compiled(function, *arguments):
    return jax.jit(function)(*arguments)


def applied(module, *arguments, **settings):
    """module(*arguments, **settings), compiled as a whole."""
    structure, params, _, _ = functional.split(module)
    return compiled(lambda params, *arguments: structure.merge(params)(*arguments, **settings), params, *arguments)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.fixture
def narrow(monkeypatch):
    """Networks of every part in use, few blocks and hardly any channels."""
    monkeypatch.setattr(vit, "DEPTH", 4)
    monkeypatch.setattr(vit, "PARTS", {f"stage{i + 1}": (i, i + 1) for i in range(4)})
    monkeypatch.setitem(vit.SPECS, VIT, vit.Spec(24, 3))
    monkeypatch.setitem(swin.SPECS, SWIN, swin.Spec(12, (2, 1, 1, 1), (1, 2, 2, 4)))
    monkeypatch.setitem(convnext.SPECS, CONVNEXT, convnext.Spec((8, 12, 16, 24), (1, 1, 2, 1)))


# What the families share


def test_gelu_is_exact():
    x = np.linspace(-5, 5, 101)
    want = [value * 0.5 * (1 + math.erf(value / math.sqrt(2))) for value in x]
    np.testing.assert_allclose(transformer.gelu(jnp.asarray(x, jnp.float32)), want, atol=1e-6)


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


@pytest.mark.parametrize(("dtype", "atol"), [(jnp.float32, 1e-5), (jnp.bfloat16, 0.03)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_attention(dtype, atol, with_bias):
    query, key, value = (
        jnp.asarray(normal(2, 3, count, 4, 8, seed=seed), dtype) for seed, count in enumerate((5, 6, 6))
    )
    bias = jnp.asarray(normal(3, 1, 5, 6), jnp.float32) if with_bias else None
    got = transformer.attention(query, key, value, bias)
    q, k, v = (np.asarray(x, np.float64) for x in (query, key, value))
    want = np.zeros((2, 3, 5, 4, 8))
    for batch, window, head in np.ndindex(2, 3, 4):
        scores = q[batch, window, :, head] @ k[batch, window, :, head].T / math.sqrt(8)
        if with_bias:
            scores = scores + np.asarray(bias)[window, 0]
        want[batch, window, :, head] = softmax(scores) @ v[batch, window, :, head]
    assert got.dtype == dtype
    np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=atol)


def test_attention_scores_are_float32():
    """Scores 400.0 and 400.5 are one number in bfloat16, whose softmax would be 0.5 each."""
    query = jnp.asarray([40.0, 2.0, 0.0, 0.0], jnp.bfloat16).reshape(1, 1, 4)
    key = jnp.asarray([[20.0, 0.0, 0.0, 0.0], [20.0, 0.5, 0.0, 0.0]], jnp.bfloat16).reshape(2, 1, 4)
    value = jnp.asarray([0.0, 1.0], jnp.bfloat16).reshape(2, 1, 1)
    got = transformer.attention(query, key, value)
    assert abs(float(got[0, 0, 0]) - 1 / (1 + math.exp(-0.5))) < 0.004


def test_self_attention_splits_queries_keys_values_then_heads(filled):
    module = filled(lambda: transformer.Attention(6, 2, rngs=rngs()))
    x = normal(2, 5, 6)
    qkv = x @ np.asarray(module.qkv.kernel[...], np.float64) + np.asarray(module.qkv.bias[...])
    heads = []
    for head in range(2):
        query, key, value = (qkv[..., 6 * part + 3 * head :][..., :3] for part in range(3))
        heads.append(softmax(query @ key.swapaxes(1, 2) / math.sqrt(3)) @ value)
    want = np.concatenate(heads, -1) @ np.asarray(module.proj.kernel[...]) + np.asarray(module.proj.bias[...])
    np.testing.assert_allclose(applied(module, jnp.asarray(x, jnp.float32), train=False), want, atol=1e-5)


def test_drop_path_rates():
    np.testing.assert_allclose(transformer.drop_path_rates(0.3, 12), np.linspace(0, 0.3, 12), rtol=1e-12)
    assert transformer.drop_path_rates(0.3, 1) == [0.0]
    assert all(type(rate) is float for rate in transformer.drop_path_rates(np.float64(0.1), 3))


# Swin's windows


def test_windows_row_by_row():
    x = np.arange(2 * 14 * 21).reshape(2, 14, 21, 1)
    windows = swin.to_windows(x)
    assert windows.shape == (2, 6, 49, 1)
    for row, column in np.ndindex(2, 3):
        want = x[:, 7 * row : 7 * row + 7, 7 * column : 7 * column + 7].reshape(2, 49, 1)
        np.testing.assert_array_equal(windows[:, 3 * row + column], want)
    np.testing.assert_array_equal(swin.from_windows(windows, (14, 21)), x)


def test_relative_index():
    for query, key in np.ndindex(49, 49):
        down, right = query // 7 - key // 7, query % 7 - key % 7
        assert swin.RELATIVE_INDEX[query, key] == (down + 6) * 13 + right + 6


@pytest.mark.parametrize(
    ("size", "shifted"), [((9, 14), True), ((14, 5), True), ((7, 6), True), ((21, 8), True), ((10, 14), False)]
)
def test_window_attention_from_its_definition(filled, size, shifted):
    """Every token looks at all of the padded map, less those of other windows or beyond the border."""
    module = filled(lambda: swin.WindowAttention(6, 2, shifted=shifted, rngs=rngs()))
    x = normal(2, *size, 6)
    got = applied(module, jnp.asarray(x, jnp.float32), train=False)
    weights = {path: np.asarray(value, np.float64) for path, value in functional.split(module)[1].items()}

    padded = [math.ceil(side / 7) * 7 for side in size]
    shift = [3 if shifted and side > 7 else 0 for side in padded]
    x = np.pad(x, ((0, 0), (0, padded[0] - size[0]), (0, padded[1] - size[1]), (0, 0))).reshape(2, -1, 6)
    position = np.stack(np.divmod(np.arange(x.shape[1]), padded[1]))  # [2, tokens]: row and column
    # Windows begin at `shift`; what lies before that is in pieces of windows of its own at the border.
    window = np.floor_divide(position - np.array(shift)[:, None], 7)
    together = np.all(window[:, :, None] == window[:, None, :], axis=0)
    down, right = position[:, :, None] - position[:, None, :]
    row = np.where(together, (down + 6) * 13 + right + 6, 0)

    qkv = x @ weights["qkv/kernel"] + weights["qkv/bias"]
    heads = []
    for head in range(2):
        query, key, value = (qkv[..., 6 * part + 3 * head :][..., :3] for part in range(3))
        scores = query @ key.swapaxes(1, 2) / math.sqrt(3) + weights["relative_position_bias_table"][row, head]
        heads.append(softmax(np.where(together, scores, -np.inf)) @ value)
    want = np.concatenate(heads, -1) @ weights["proj/kernel"] + weights["proj/bias"]
    want = want.reshape(2, *padded, 6)[:, : size[0], : size[1]]
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_shift_bias_adds_minus_100():
    bias = np.asarray(swin.shift_bias((14, 14), (3, 3)))
    assert bias.shape == (4, 1, 49, 49)
    assert {*np.unique(bias)} == {-100.0, 0.0}
    assert not bias[0].any()  # the first window does not reach the border


@pytest.mark.parametrize("size", [(4, 6), (3, 5)])
def test_merging_goes_down_columns(filled, size):
    module = filled(lambda: swin.PatchMerging(3, dtype=jnp.float32, rngs=rngs()))
    x = normal(2, *size, 3)
    padded = np.pad(x, ((0, 0), (0, size[0] % 2), (0, size[1] % 2), (0, 0)))
    four = [padded[:, row::2, column::2] for row, column in ((0, 0), (1, 0), (0, 1), (1, 1))]
    y = np.concatenate(four, -1)
    y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-5)
    y = y * np.asarray(module.norm.scale[...]) + np.asarray(module.norm.bias[...])
    want = y @ np.asarray(module.reduction.kernel[...], np.float64)
    np.testing.assert_allclose(applied(module, jnp.asarray(x, jnp.float32)), want, atol=1e-5)


def test_window_attention_needs_no_communication():
    mesh = Mesh(jax.devices(), ("data",), axis_types=(AxisType.Auto,))
    structure, params, _, _ = functional.split(swin.WindowAttention(8, 2, shifted=True, rngs=rngs()))
    cut, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    run = jax.jit(lambda p, x: structure.merge(p)(x, train=False), in_shardings=(whole, cut), out_shardings=cut)
    program = run.lower(params, jax.ShapeDtypeStruct((8, 16, 14, 8), jnp.float32)).compile().as_text()
    assert not re.findall(r"all-gather|all-to-all|all-reduce|collective-permute", program)


# Randomness


@pytest.mark.parametrize("kind", ["block", "convnext"])
def test_stochastic_depth(filled, kind):
    """Whole examples, 1 / (1 - rate) as large, each branch by itself."""

    def make(rate):
        settings = {"drop_path_rate": rate, "dtype": jnp.float32, "rngs": rngs()}
        if kind == "convnext":
            return convnext.ConvNeXtBlock(4, **settings)
        return transformer.Block(transformer.Attention(4, 2, rngs=rngs()), 4, eps=1e-6, dropout_rate=0.0, **settings)

    count, shape = 2000, (3, 3, 4) if kind == "convnext" else (3, 4)
    block, plain = filled(lambda: make(0.75)), filled(lambda: make(0.0))
    structure, params, _, _ = functional.split(plain)

    def run(params, x):
        """What the block may give for one example."""
        block, results = structure.merge(params), [x]
        if kind == "convnext":
            branches = [lambda y: block(y, train=True) - y]
        else:
            branches = [
                lambda y: block.attn(block.norm1(y), train=True),
                lambda y: block.mlp(block.norm2(y), train=True),
            ]
        for branch in branches:
            results += [y + 4 * branch(y) for y in results]
        return jnp.stack(results)

    x = jnp.asarray(normal(1, *shape), jnp.float32)
    outcomes = compiled(run, params, x)
    got = compiled(lambda x: block(jnp.broadcast_to(x, (count, *shape)), train=True, rngs=rngs(1)), x)
    near = np.abs(np.asarray(got) - np.asarray(outcomes)).reshape(len(outcomes), count, -1).max(-1) < 1e-4
    assert near.sum(0).tolist() == [1] * count
    want = [0.75, 0.25] if kind == "convnext" else [0.5625, 0.1875, 0.1875, 0.0625]
    np.testing.assert_allclose(near.mean(1), want, atol=0.05)  # more than four standard errors

    still = applied(block, x, train=False)
    np.testing.assert_allclose(still, applied(plain, x, train=True), atol=1e-6)
    with pytest.raises(ValueError, match="rate 0.75 in training needs randomness: .*rngs"):
        jax.eval_shape(lambda x: block(x, train=True), x)


def test_dropout_of_the_mlp(filled):
    block, plain = (filled(lambda r=rate: transformer.Mlp(4, dropout_rate=r, rngs=rngs())) for rate in (0.5, 0.0))
    x = jnp.broadcast_to(jnp.asarray(normal(1, 4), jnp.float32), (20000, 4))
    got = compiled(lambda x: block(x, train=True, rngs=rngs()), x)
    want = applied(plain, x, train=True)
    np.testing.assert_allclose(jnp.mean(got == 0), 0.5, atol=0.02)
    np.testing.assert_allclose(np.mean(got, 0), want[0], atol=0.1)  # unbiased, through both dropouts
    assert len(np.unique(np.asarray(got[:, 0]))) > 1000  # the hidden layer is dropped from as well
    np.testing.assert_allclose(applied(block, x, train=False), want, atol=1e-6)


@pytest.mark.parametrize("name", [VIT, SWIN, CONVNEXT])
def test_randomness_of_the_networks(narrow, filled, name):
    settings = {"drop_path_rate": 0.5} if name == CONVNEXT else {"drop_path_rate": 0.5, "dropout_rate": 0.2}
    model = filled(build(name, **settings))
    image = jnp.asarray(normal(3, *SIZES[name], 3), jnp.float32)

    def run(key, image):
        return model(image, train=True, rngs=nnx.Rngs(key)).logits

    seeds = [jax.random.key(seed, impl="rbg") for seed in (0, 1)]
    program = jax.jit(run).lower(seeds[0], image).compile()
    one, again, two = (program(key, image) for key in (seeds[0], *seeds))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - two).max() > 1e-3
    with pytest.raises(ValueError, match="in training needs randomness"):
        jax.eval_shape(lambda image: model(image, train=True).logits, image)


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        (VIT, lambda model: model.blocks),
        (SWIN, lambda model: [block for stage in model.layers for block in stage.blocks]),
        (CONVNEXT, lambda model: [block for stage in model.stages for block in stage.blocks]),
    ],
)
def test_stochastic_depth_rises_over_all_blocks(narrow, name, blocks):
    rates = [block.drop_path_rate for block in blocks(nnx.eval_shape(build(name, drop_path_rate=0.4)))]
    np.testing.assert_allclose(rates, np.linspace(0, 0.4, len(rates)), rtol=1e-12)
    default = blocks(nnx.eval_shape(build(name)))[-1].drop_path_rate
    assert default == pytest.approx(0.1 if name == SWIN else 0.0)


@pytest.mark.parametrize("name", [VIT, SWIN])
def test_dropout_follows_the_embedding_too(narrow, filled, name):
    """A rate that leaves next to nothing of the embedding, and that the blocks do not have."""
    model = filled(build(name, drop_path_rate=0.0))
    image = jnp.asarray(normal(1, *SIZES[name], 3), jnp.float32)
    model.dropout_rate = 0.999
    for blocks in (model.blocks,) if name == VIT else (stage.blocks for stage in model.layers):
        while blocks:
            blocks.pop()
    tap = compiled(lambda image: model._part("stage1", image, train=True, rngs=rngs()), image)
    assert np.mean(np.asarray(tap) == 0) > 0.98


# Networks


@pytest.mark.parametrize(
    ("name", "thousand", "hundred"),
    [
        ("vit_small_patch16_224", 22_050_664, 21_704_164),
        ("deit_tiny_patch16_224", 5_717_416, 5_543_716),
        ("swin_tiny_patch4_window7_224", 28_288_354, 27_596_254),
        ("swin_pico_patch4_window7_224", 5_506_996, 5_160_496),
        ("convnext_tiny", 28_589_128, 27_897_028),
    ],
)
def test_parameter_counts(name, thousand, hundred):
    model = nnx.eval_shape(lambda: REGISTER[name](1000, rngs=rngs()))
    count = sum(value.size for value in functional.split(model)[1].values())
    assert count == thousand
    assert count - 900 * (model.info.pooled + 1) == hundred  # the classifier is all that differs


def test_registered_names_and_signatures():
    assert {"vit_small_patch16_224", "swin_nano_patch4_window7_224", VIT, SWIN, CONVNEXT} < {*REGISTER}
    common = ["num_classes", "dtype", "drop_path_rate", "rngs"]
    for name, more in ((VIT, {"image_size", "dropout_rate"}), (SWIN, {"dropout_rate"}), (CONVNEXT, set())):
        assert {*inspect.signature(REGISTER[name]).parameters} == {*common, *more}


@pytest.mark.parametrize(("name", "eps"), [(VIT, 1e-6), (SWIN, 1e-5), (CONVNEXT, 1e-6)])
def test_normalisations(name, eps):
    """Where the families differ by less than what is seen in outputs of ordinary size; the last one is in float32."""
    model = nnx.eval_shape(build(name, dtype=jnp.bfloat16))
    norms = {path: module for path, module in nnx.iter_modules(model) if isinstance(module, LayerNorm)}
    assert {norm.epsilon for norm in norms.values()} == {eps}
    last = model.head.norm if name == CONVNEXT else model.norm
    assert {norm.output_dtype for norm in norms.values() if norm is not last} == {jnp.bfloat16}
    assert last.output_dtype is None


@pytest.mark.parametrize("name", [VIT, SWIN, CONVNEXT])
def test_initial_values(narrow, monkeypatch, name):
    monkeypatch.setitem(swin.SPECS, SWIN, swin.Spec(12, (1, 1, 1, 1), (1, 2, 2, 4)))
    monkeypatch.setitem(convnext.SPECS, CONVNEXT, convnext.Spec((12, 12, 12, 12), (1, 1, 1, 1)))
    params = functional.split(build(name, 40)())[1]
    for path, value in params.items():
        leaf = path.rsplit("/", 1)[-1]
        if path.startswith("patch_embed/proj"):
            bound = (3 * (vit.PATCH if name == VIT else swin.PATCH) ** 2) ** -0.5
            assert 0.7 * bound < np.abs(value).max() <= bound
        elif leaf in ("kernel", "pos_embed", "relative_position_bias_table"):
            error = 4 / math.sqrt(2 * value.size)
            np.testing.assert_allclose(np.std(value), 0.02, rtol=error, err_msg=path)
        elif leaf == "cls_token":
            np.testing.assert_allclose(np.std(value), 1e-6, rtol=0.5)
        else:
            want = {"bias": 0.0, "scale": 1.0, "gamma": np.float32(1e-6)}[leaf]
            assert {*np.unique(value)} == {want}, path
    assert {value.dtype for value in params.values()} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(
    ("name", "size"),
    [
        (VIT, SIZES[VIT]),
        ("vit_small_patch16_224", (224, 224)),
        (SWIN, SIZES[SWIN]),
        (SWIN, (4, 4)),
        (SWIN, (100, 232)),
        ("swin_nano_patch4_window7_224", (32, 28)),
        ("swin_tiny_patch4_window7_224", (224, 224)),
        (CONVNEXT, SIZES[CONVNEXT]),
        (CONVNEXT, (63, 32)),
    ],
)
def test_info_tells_the_shapes(name, size):
    model = nnx.eval_shape(build(name, 7, dtype=jnp.bfloat16))
    structure, params, variables, constants = functional.split(model)
    assert not {**variables, **constants}
    outputs = jax.eval_shape(lambda p, x: structure.merge(p)(x, train=False), params, jnp.zeros((2, *size, 3)))
    info = model.info
    assert (info.name, info.num_classes) == (name, 7)
    assert list(info.taps) == ["stage1", "stage2", "stage3", "stage4"]
    assert {*outputs.taps} == {*info.taps}
    for tap_name, tap in info.taps.items():
        height, width = ((side if tap.rounding == "down" else side + tap.stride - 1) // tap.stride for side in size)
        positions = (tap.prefix_tokens + height * width,) if tap.layout == "tokens" else (height, width)
        got = outputs.taps[tap_name]
        assert (got.shape, got.dtype, tap.signed) == ((2, *positions, tap.channels), jnp.bfloat16, True)
    assert (outputs.pooled.shape, outputs.pooled.dtype) == ((2, info.pooled), jnp.float32)
    assert (outputs.logits.shape, outputs.logits.dtype) == ((2, 7), jnp.float32)
    assert params[info.classifier].shape == (info.pooled, 7)
    assert info.image_size == (size if isinstance(model, vit.ViT) else None)


@pytest.mark.parametrize("name", [VIT, SWIN, CONVNEXT])
def test_forward_from_continues_and_bfloat16_is_near(narrow, filled, name):
    model, half_model = (filled(build(name, dtype=dtype)) for dtype in (jnp.float32, jnp.bfloat16))
    image = jnp.asarray(normal(3, *SIZES[name], 3), jnp.float32)
    taps = list(model.info.taps)

    def run(image):
        whole = model(image, train=False)
        return whole, [model.forward_from(tap, whole.taps[tap], train=False) for tap in taps]

    whole, parts = compiled(run, image)
    for index, part in enumerate(parts):
        assert {*part.taps} == {*taps[index + 1 :]}
        for after, got in part.taps.items():
            np.testing.assert_allclose(got, whole.taps[after], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(part.pooled, whole.pooled, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(part.logits, whole.logits, rtol=1e-5, atol=1e-5)

    half = compiled(lambda image: half_model(image, train=False), image)
    assert {tap.dtype for tap in half.taps.values()} == {jnp.dtype(jnp.bfloat16)}
    assert (half.pooled.dtype, half.logits.dtype) == (jnp.float32, jnp.float32)
    for tap, want in whole.taps.items():
        # 8 bits of mantissa, through several residual sums.
        np.testing.assert_allclose(np.asarray(half.taps[tap], np.float32), want, atol=0.05 * np.abs(want).max())
    np.testing.assert_allclose(half.logits, whole.logits, atol=0.1 * np.abs(whole.logits).max())


def test_unknown_tap():
    model = nnx.eval_shape(build(SWIN))
    with pytest.raises(ValueError, match="unknown tap of swin_pico.* 'stem': .*Valid: stage1, stage2"):
        model.forward_from("stem", jnp.zeros((1, 8, 8, 48)), train=False)


# Bad input


@pytest.mark.parametrize("rate", [-0.1, 1.0, math.nan, "0.1", None])
@pytest.mark.parametrize(
    ("name", "setting"),
    [(name, "drop_path_rate") for name in (VIT, SWIN, CONVNEXT)] + [(name, "dropout_rate") for name in (VIT, SWIN)],
)
def test_wrong_rates(name, setting, rate):
    with pytest.raises(ValueError, match=rf"{setting}={rate!r}: must be a number from 0"):
        build(name, **{setting: rate})()


@pytest.mark.parametrize("image_size", [(224, 220), (0, 16), (224,), 224, (32.0, 32.0), (16, 16, 3), "224", (-16, 16)])
def test_wrong_image_size_of_a_vit(image_size):
    with pytest.raises(ValueError, match=r"image_size=.*\(height, width\), both multiples of 16"):
        vit.REGISTER[VIT](5, image_size=image_size, rngs=rngs())


def test_vit_given_another_size():
    model = nnx.eval_shape(build(VIT))
    with pytest.raises(ValueError, match=r"built for images of \(32, 48\) and was given \(48, 32\)"):
        model(jnp.zeros((1, 48, 32, 3)), train=False)
    model = nnx.eval_shape(lambda: vit.REGISTER[VIT](5, image_size=[32, 64], rngs=rngs()))
    assert model.info.image_size == (32, 64)


@pytest.mark.parametrize("size", [(30, 32), (32, 30)])
def test_swin_given_another_size(size):
    model = nnx.eval_shape(build(SWIN))
    with pytest.raises(ValueError, match=rf"multiples of 4 and was given \({size[0]}, {size[1]}\)"):
        model(jnp.zeros((1, *size, 3)), train=False)


def test_convnext_given_a_small_image():
    with pytest.raises(ValueError, match="is too small, stage4"):
        jax.eval_shape(lambda image: build(CONVNEXT)()(image, train=False), jnp.zeros((1, 31, 64, 3)))


@pytest.mark.parametrize(("family", "what"), [(vit.ViT, "ViT"), (swin.Swin, "Swin"), (convnext.ConvNeXt, "ConvNeXt")])
def test_unknown_network(family, what):
    with pytest.raises(ValueError, match=f"unknown {what} 'huge': .*Valid: "):
        family("huge", 5, rngs=rngs())


# Keys of other code bases that are not installed; `tests/parity` has the others


def entries(name, style):
    """Where each array stands in a state dict of the style."""
    model = nnx.eval_shape(build(name))
    arrays = {path: value.shape for path, value in functional.split(model)[1].items()}
    return keys.layout(arrays, type(model).KEY_STYLES[style])


def pairs(*modules, bias=True):
    return {f"{module}.{leaf}" for module in modules for leaf in (("weight", "bias") if bias else ("weight",))}


def test_microsoft_keys_of_swin():
    want = pairs("patch_embed.proj", "patch_embed.norm", "norm", "head")
    for stage, block in np.ndindex(4, 2):
        prefix = f"layers.{stage}.blocks.{block}"
        want |= {f"{prefix}.attn.relative_position_bias_table"}
        want |= pairs(*(f"{prefix}.{m}" for m in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")))
    for stage in (0, 1, 2):
        want |= pairs(f"layers.{stage}.downsample.norm")
        want |= pairs(f"layers.{stage}.downsample.reduction", bias=False)
    got = entries(SWIN, "microsoft")
    assert {entry.key for entry in got.values()} == want
    for stage in (1, 2, 3):  # merging ends the stage before
        want = keys.Entry(f"layers.{stage - 1}.downsample.reduction.weight", (48 << stage, 2 * 48 << stage))
        assert got[f"layers/{stage}/downsample/reduction/kernel"] == want


def test_facebook_keys_of_convnext():
    want = pairs("norm", "head", "downsample_layers.0.0", "downsample_layers.0.1")
    for stage, depth in enumerate((3, 3, 9, 3)):
        for block in range(depth):
            prefix = f"stages.{stage}.{block}"
            want |= pairs(*(f"{prefix}.{module}" for module in ("dwconv", "norm", "pwconv1", "pwconv2")))
            want |= {f"{prefix}.gamma"}
        if stage:
            want |= pairs(f"downsample_layers.{stage}.0", f"downsample_layers.{stage}.1")
    got = entries(CONVNEXT, "facebook")
    assert {entry.key for entry in got.values()} == want
    assert got["stages/2/downsample/1/kernel"] == keys.Entry("downsample_layers.2.1.weight", (384, 192, 2, 2))
    assert got["stages/2/blocks/8/mlp/fc2/kernel"] == keys.Entry("stages.2.8.pwconv2.weight", (384, 1536))
    assert got["stages/1/blocks/0/gamma"] == keys.Entry("stages.1.0.gamma", (192,))
