"""What wraps a state dict is taken off, whose keys it has is found out, what does not fit is said in one message."""

import files
import numpy as np
import pytest

from wkd_jax import registry
from wkd_jax.weights import WeightsError, match


@pytest.fixture(scope="module")
def network():
    return files.abstract("resnet18")


@pytest.fixture(scope="module")
def arrays(network):
    return files.random_arrays(network)


def read(state, model, *, reset_head=False, native=False):
    return match.convert(match.best(state, model, native=native), model, "FILE", reset_head=reset_head)


def prefixed(state, prefix):
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize(
    "prefix",
    ["", "module.", "_orig_mod.", "model.", "backbone.", "student.", "module._orig_mod.", "_orig_mod.module.model."],
)
def test_prefixes(network, arrays, prefix):
    got, notes = read(prefixed(files.state_dict(network, arrays), prefix), network)
    assert {*got} == {*arrays}
    for name, value in arrays.items():
        np.testing.assert_array_equal(got[name], value)
    assert (notes == []) == (prefix == "")


@pytest.mark.parametrize("outer", ["", "module."])
def test_the_student_of_a_distillers_file(network, arrays, outer):
    state = prefixed(files.state_dict(network, arrays), f"{outer}student._orig_mod.")
    others = {f"{outer}teacher.fc.weight": np.ones((3, 3)), f"{outer}conv_reg.0.weight": np.ones((3, 3))}
    got, _ = read({**others, **state}, network)
    np.testing.assert_array_equal(got["conv1/kernel"], arrays["conv1/kernel"])


def test_mobilenetv1_keeps_its_own_model_prefix():
    """Its real keys begin with "model.", and its classifier's do not."""
    model = files.abstract("mobilenetv1")
    arrays = files.random_arrays(model)
    for prefix in ("", "module.", "model."):
        got, _ = read(prefixed(files.state_dict(model, arrays), prefix), model)
        np.testing.assert_array_equal(got["fc/kernel"], arrays["fc/kernel"])


@pytest.mark.parametrize(
    ("name", "style"),
    [
        ("resnet18", "mmclassification"),
        ("mobilenetv2", "timm"),
        ("swin_pico_patch4_window7_224", "microsoft"),
        ("swin_pico_patch4_window7_224", "torchvision"),
        ("convnext_tiny", "facebook"),
        ("convnext_tiny", "torchvision"),
    ],
)
def test_styles_are_recognised(name, style):
    model = files.abstract(name)
    arrays = files.random_arrays(model)
    state = files.state_dict(model, arrays, style)
    fit = match.best(prefixed(state, "module."), model)
    assert (fit.style, fit.problems) == (style, 0)
    got, _ = match.convert(fit, model, "FILE", reset_head=False)
    for name, value in arrays.items():
        np.testing.assert_array_equal(got[name], value)


def test_another_network(network):
    other = files.abstract("resnet34")
    state = files.state_dict(other, files.random_arrays(other))
    with pytest.raises(WeightsError) as error:
        read(state, network)
    text = str(error.value)
    assert "FILE: does not fit resnet18 (read in the keys of torchvision)" in text
    assert "left over 80: layer1.2.bn1.bias" in text and "and 76 more" in text
    assert text.endswith("It looks like resnet34")


def test_missing_left_over_and_shapes_in_one_message(network, arrays):
    state = files.state_dict(network, arrays)
    del state["layer4.1.conv2.weight"], state["bn1.bias"]
    state["extra.weight"] = np.ones(3)
    state["conv1.weight"] = np.ones((64, 3, 3, 3))
    with pytest.raises(WeightsError) as error:
        read(state, network)
    text = str(error.value)
    assert "missing 2 of 102: " in text and "bn1.bias" in text and "layer4.1.conv2.weight" in text
    assert "left over 1: extra.weight" in text
    assert "of another shape 1: conv1.weight (64, 3, 3, 3) instead of (64, 3, 7, 7)" in text
    assert text.endswith("Most of it fits, so the file is of a changed resnet18 or not whole")


@pytest.fixture(name="few")
def _few(monkeypatch):
    """Few networks to look a file up in, since each takes a moment."""
    found = {name: registry.get("models", name) for name in ("resnet18", "resnet34", "vgg8")}
    monkeypatch.setattr(registry, "entries", lambda kind: found)


@pytest.mark.usefixtures("few")
def test_no_network_at_all(network):
    with pytest.raises(WeightsError, match="missing 102 of 102: .* left over 1: bias. It fits no network of this pack"):
        read({"bias": np.ones(3)}, network)


def test_another_class_count(network):
    other = files.abstract("resnet18", 7)
    arrays = files.random_arrays(other)
    state = files.state_dict(other, arrays)
    with pytest.raises(
        WeightsError, match=r"its classifier has 7 classes and resnet18 is wanted with 10\. .*reset_head"
    ):
        read(state, network)
    with pytest.raises(WeightsError, match="has 7 classes"):
        read(arrays, network, native=True)
    got, notes = read(state, network, reset_head=True)
    assert {*arrays} - {*got} == {"fc/kernel", "fc/bias"}
    assert "the classifier starts anew" in notes
    del state["fc.weight"], state["fc.bias"]  # a file without any classifier serves too
    assert {*read(state, network, reset_head=True)[0]} == {*got}
    with pytest.raises(WeightsError, match=r"missing 2 of 102: fc\.(weight|bias)"):
        read(state, network)


def test_reset_head_excuses_nothing_else(network, arrays):
    state = files.state_dict(network, arrays)
    del state["bn1.bias"]
    with pytest.raises(WeightsError, match="missing 1 of 102: bn1.bias"):
        read(state, network, reset_head=True)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite(network, arrays, value):
    state = files.state_dict(network, arrays)
    state["layer2.0.conv1.weight"] = np.full_like(state["layer2.0.conv1.weight"], value)
    with pytest.raises(WeightsError, match=r"layer2\.0\.conv1\.weight has values that are not finite"):
        read(state, network)


def test_integers_are_refused(network, arrays):
    state = files.state_dict(network, arrays)
    state["conv1.weight"] = state["conv1.weight"].astype(np.int8)
    with pytest.raises(WeightsError, match=r"conv1\.weight holds int8, not floating-point numbers"):
        read(state, network)


def test_half_precision_becomes_float32(network, arrays):
    import ml_dtypes

    state = files.state_dict(network, arrays)
    for dtype in (np.float16, ml_dtypes.bfloat16, np.float64):
        got, _ = read({key: value.astype(dtype) for key, value in state.items()}, network)
        assert got["fc/kernel"].dtype == np.float32
        np.testing.assert_array_equal(got["fc/kernel"], arrays["fc/kernel"].astype(dtype).astype(np.float32))


@pytest.mark.parametrize("size", [(32, 48), (384, 384)])
def test_position_embeddings_are_resized(size):
    large = files.abstract("vit_tiny_patch16_224")
    arrays = files.random_arrays(large)
    model = files.abstract("vit_tiny_patch16_224", image_size=size)
    got, notes = read(files.state_dict(large, arrays), model)
    assert got["pos_embed"].shape == match.shapes_of(model)["pos_embed"]
    np.testing.assert_array_equal(got["pos_embed"][:, 0], arrays["pos_embed"][:, 0])  # the class token's
    assert any("resized pos_embed from 14 x 14 patches to" in note for note in notes)


def test_as_many_patches_in_another_grid():
    """7 x 28 patches are 196, as 14 x 14 are, and in another order."""
    square = files.abstract("vit_tiny_patch16_224")
    arrays = files.random_arrays(square)
    model = files.abstract("vit_tiny_patch16_224", image_size=(112, 448))
    state = files.state_dict(square, arrays)
    got, notes = read(state, model)
    assert "resized pos_embed from 14 x 14 patches to 7 x 28" in notes
    assert np.abs(got["pos_embed"] - arrays["pos_embed"]).max() > 0.1
    # A file that says what it is for is believed.
    fit = match.best(state, model)
    got, notes = match.convert(fit, model, "FILE", reset_head=False, grid=(7, 28))
    np.testing.assert_array_equal(got["pos_embed"], arrays["pos_embed"])
    got, notes = match.convert(match.best(state, square), square, "FILE", reset_head=False, grid=(7, 28))
    assert "resized pos_embed from 7 x 28 patches to 14 x 14" in notes


def test_a_grid_that_is_not_told():
    """2 x 3 patches, in a file that does not say so: read where as many are wanted, refused elsewhere."""
    arrays = files.random_arrays(source := files.abstract("vit_tiny_patch16_224", image_size=(32, 48)))
    state = files.state_dict(source, arrays)
    np.testing.assert_array_equal(read(state, source)[0]["pos_embed"], arrays["pos_embed"])
    with pytest.raises(WeightsError, match=r"of another shape 1: pos_embed \(1, 7, 192\) instead of \(1, 17, 192\)"):
        read(state, files.abstract("vit_tiny_patch16_224", image_size=(64, 64)))


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("key", ["module." * 3000 + "x", "x" * 5000])
def test_keys_out_of_all_proportion(network, key):
    with pytest.raises(WeightsError, match="does not fit resnet18"):
        match.check(match.best({key: np.ones(1)}, network), network, "FILE", without_head=True)


def test_keys_of_mmclassification(network, arrays):
    state = files.state_dict(network, arrays, "mmclassification")
    assert {"backbone.conv1.weight", "backbone.layer1.0.bn2.running_var", "head.fc.weight", "head.fc.bias"} < {*state}
    assert all(key.startswith(("backbone.", "head.fc.")) for key in state)
