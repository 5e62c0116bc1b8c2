"""What is written for others: PyTorch's keys, nested dicts, and a function that serves any number of images."""

import pathlib

import files
import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from safetensors import safe_open

from wkd_jax import weights
from wkd_jax.models import functional
from wkd_jax.types import Normalisation
from wkd_jax.weights import export


@pytest.mark.parametrize(
    ("name", "style"),
    [
        ("resnet18", None),
        ("resnet18", "mmclassification"),
        ("mobilenetv2", "timm"),
        ("swin_pico_patch4_window7_224", "microsoft"),
        ("convnext_tiny", "torchvision"),
        ("shufflenetv1", None),
    ],
)
def test_import_after_export_is_bit_identical(tmp_path, name, style):
    model = files.abstract(name)
    arrays = files.random_arrays(model)
    export.to_torch(tmp_path / "x.safetensors", model, arrays, style=style)
    with safe_open(tmp_path / "x.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    got, _ = weights.open_file(tmp_path / "x.safetensors").arrays(model)
    assert got.keys() == arrays.keys()
    for key, value in arrays.items():
        assert got[key].tobytes() == value.tobytes()


def test_an_exported_vit_tells_its_grid(tmp_path):
    """196 patches that are 7 x 28 come back as they were."""
    model = files.abstract("vit_tiny_patch16_224", image_size=(112, 448))
    arrays = files.random_arrays(model)
    export.to_torch(tmp_path / "x.safetensors", model, arrays)
    got, notes = weights.open_file(tmp_path / "x.safetensors").arrays(model)
    assert got["pos_embed"].tobytes() == arrays["pos_embed"].tobytes() and len(notes) == 1


@pytest.mark.parametrize("kind", ["torch", "serving"])
def test_a_failed_export_leaves_nothing(tmp_path, monkeypatch, kind):
    model = files.abstract("resnet8")
    arrays = files.random_arrays(model)
    how = Normalisation((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))

    def write(path):
        if kind == "torch":
            export.to_torch(path, model, arrays)
        else:
            export.to_serving(path, model, arrays, how, (8, 8))

    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder is a folder: give the name of a file"):
        write(tmp_path / "folder")

    def fail(*arguments):
        raise OSError("No space left on device")

    monkeypatch.setattr(pathlib.Path, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "deep" / "x")
    assert not [*(tmp_path / "deep").iterdir()]


def test_unknown_style(tmp_path):
    model = files.abstract("resnet18")
    with pytest.raises(
        ValueError, match="unknown key style of resnet18 'tim'.*Valid: torchvision, timm, mmclassification"
    ):
        export.to_torch(tmp_path / "x", model, files.random_arrays(model), style="tim")


def test_orbax(tmp_path):
    model = files.abstract("resnet8")
    arrays = files.random_arrays(model)
    export.to_orbax(tmp_path / "x", model, arrays)
    tree = ocp.load(tmp_path / "x")
    np.testing.assert_array_equal(tree["params"]["layer1"]["0"]["conv1"]["kernel"], arrays["layer1/0/conv1/kernel"])
    np.testing.assert_array_equal(tree["batch_stats"]["bn1"]["var"], arrays["bn1/var"])
    assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == sum(value.size for value in arrays.values())
    with pytest.raises(ValueError, match="exists already"):
        export.to_orbax(tmp_path / "x", model, arrays)


@pytest.mark.parametrize(
    ("name", "size", "settings"),
    [
        ("resnet8", (16, 24), {}),
        ("vit_tiny_patch16_224", (32, 16), {"image_size": (32, 16)}),
        pytest.param("swin_pico_patch4_window7_224", (32, 36), {}, marks=pytest.mark.slow),
    ],
)
def test_serving(tmp_path, name, size, settings):
    """The function of the file gives the network's logits, at batch sizes that nobody told it."""
    model = files.abstract(name, **settings)
    arrays = files.random_arrays(model)
    # Random layers multiply; keep values in a range where float32 can be compared.
    arrays = {k: (abs(v) + 0.5 if k.endswith("/var") else v * 0.1 if v.ndim > 1 else v) for k, v in arrays.items()}
    how = Normalisation((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    export.to_serving(tmp_path / "x.bin", model, arrays, how, size)
    exported = jax.export.deserialize(bytearray((tmp_path / "x.bin").read_bytes()))
    assert {*exported.platforms} == {"cpu", "cuda", "tpu"}
    structure = functional.split(model)[0]
    rng = np.random.default_rng(0)
    for batch in (1, 3):
        image = rng.integers(0, 256, (batch, *size, 3)).astype(np.uint8)
        normalised = ((image / 255 - how.mean) / how.std).astype(np.float32)
        want = jax.jit(lambda a, x: structure.merge(a)(x, train=False).logits)(arrays, normalised)
        got = exported.call(image)
        assert got.shape == (batch, 10)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * float(np.abs(want).max()))
