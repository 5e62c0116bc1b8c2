"""Whole files: what torch saves is read here, what is written here torch loads with strict=True, the logits agree."""

import harness
import jax
import numpy as np
import pytest
import timm
import torch
import torchvision
from flax import nnx
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed

from wkd_jax import registry, weights
from wkd_jax.models import functional
from wkd_jax.types import ModelInfo, Tap
from wkd_jax.weights import export, google, position

CASES = {
    # our name: (torch network, settings of ours, key style or None for the first, (height, width) or None)
    "resnet50": (lambda: torchvision.models.resnet50(num_classes=5), {}, None, (32, 40)),
    "mobilenetv2": (lambda: torchvision.models.mobilenet_v2(num_classes=5), {}, "torchvision", (32, 40)),
    "vit_tiny_patch16_224": (
        lambda: timm.create_model("vit_tiny_patch16_224", num_classes=5, img_size=(32, 48)),
        {"image_size": (32, 48)},
        "timm",
        (32, 48),
    ),
    "swin_tiny_patch4_window7_224": (
        lambda: timm.create_model("swin_tiny_patch4_window7_224", num_classes=5),
        {},
        "timm",
        None,  # timm's takes 224 x 224 alone, which is slow here; swin_test.py compares the logits
    ),
    "swin_pico_patch4_window7_224": (
        lambda: torchvision.models.SwinTransformer([4, 4], 48, [2, 2, 2, 2], [2, 4, 8, 16], [7, 7], num_classes=5),
        {},
        "torchvision",
        (56, 64),
    ),
    "convnext_tiny": (lambda: timm.create_model("convnext_tiny", num_classes=5), {}, "timm", (32, 64)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_there_and_back(tmp_path, name, zipped):
    make, settings, style, size = CASES[name]
    net = harness.randomise(make()).eval()
    wrapped = {"state_dict": {f"module.{key}": value for key, value in net.state_dict().items()}, "epoch": 3}
    torch.save(wrapped, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    model = nnx.eval_shape(lambda: registry.get("models", name)(5, rngs=nnx.Rngs(0), **settings))
    arrays, notes = weights.open_file(tmp_path / "x.pth").arrays(model)
    assert "took module. off the keys" in notes
    export.to_torch(tmp_path / "x.safetensors", model, arrays, style=style)
    other = make()
    other.load_state_dict(load_file(tmp_path / "x.safetensors"), strict=True)
    for key, value in other.state_dict().items():
        assert torch.equal(value, net.state_dict()[key]) or key.endswith("num_batches_tracked"), key

    if zipped and size:
        image = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
        structure = functional.split(model)[0]
        got = jax.jit(lambda a, x: structure.merge(a)(x, train=False).logits)(arrays, image)
        with torch.no_grad():
            want = other.eval()(torch.tensor(image.transpose(0, 3, 1, 2)))
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("grid", [(7, 7), (24, 24), (10, 30)])
def test_position_embeddings_as_timm_resizes_them(grid):
    embedding = np.random.default_rng(0).normal(size=(1, 1 + 14 * 14, 8)).astype(np.float32)
    taps = {"stage4": Tap(8, 16, "tokens", prefix_tokens=1)}
    info = ModelInfo("vit", 5, taps, 8, "head/kernel", image_size=(16 * grid[0], 16 * grid[1]))
    want = resample_abs_pos_embed(torch.tensor(embedding), list(grid), num_prefix_tokens=1)
    np.testing.assert_allclose(position.resize(embedding, info, (14, 14)), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prefix", ["", "opt/target/"])
def test_googles_files_as_timm_reads_them(tmp_path, prefix):
    net = timm.create_model("vit_tiny_patch16_224", num_classes=5, img_size=32, depth=2)
    rng = np.random.default_rng(0)
    dim, heads = 192, 3

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    arrays = {
        "cls": draw(1, 1, dim),
        "embedding/kernel": draw(16, 16, 3, dim),
        "embedding/bias": draw(dim),
        "Transformer/posembed_input/pos_embedding": draw(1, 5, dim),
        "Transformer/encoder_norm/scale": draw(dim),
        "Transformer/encoder_norm/bias": draw(dim),
        "head/kernel": draw(dim, 5),
        "head/bias": draw(5),
    }
    for i in range(2):
        block = f"Transformer/encoderblock_{i}"
        for norm in ("LayerNorm_0", "LayerNorm_2"):
            arrays |= {f"{block}/{norm}/scale": draw(dim), f"{block}/{norm}/bias": draw(dim)}
        attention = f"{block}/MultiHeadDotProductAttention_1"
        for part in ("query", "key", "value"):
            arrays[f"{attention}/{part}/kernel"] = draw(dim, heads, dim // heads)
            arrays[f"{attention}/{part}/bias"] = draw(heads, dim // heads)
        arrays |= {f"{attention}/out/kernel": draw(heads, dim // heads, dim), f"{attention}/out/bias": draw(dim)}
        for dense, shape in (("Dense_0", (dim, 4 * dim)), ("Dense_1", (4 * dim, dim))):
            arrays[f"{block}/MlpBlock_3/{dense}/kernel"] = draw(*shape)
            arrays[f"{block}/MlpBlock_3/{dense}/bias"] = draw(shape[1])
    np.savez(tmp_path / "x.npz", **{prefix + key: value for key, value in arrays.items()})
    net.load_pretrained(str(tmp_path / "x.npz"))
    got = weights.open_file(tmp_path / "x.npz").state.arrays
    assert got.keys() == net.state_dict().keys()
    for key, value in net.state_dict().items():
        np.testing.assert_array_equal(got[key], value, err_msg=key)


def test_an_incomplete_google_file_is_reported_as_left_over():
    block = "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel"
    assert [*google.to_timm({block: np.ones((4, 2, 2))})] == [block]
