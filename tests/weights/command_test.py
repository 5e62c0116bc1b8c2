"""python -m wkd_jax.weights and python -m wkd_jax.models: what they print, and what they refuse."""

import files
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from wkd_jax import weights
from wkd_jax.models.__main__ import main as models_main
from wkd_jax.weights import public
from wkd_jax.weights.__main__ import main


@pytest.fixture(name="file")
def _file(tmp_path):
    model = files.abstract("resnet8", 7)
    save_file(files.state_dict(model, files.random_arrays(model)), tmp_path / "r8.safetensors")
    return tmp_path / "r8.safetensors"


def test_import_then_export(tmp_path, file, capsys):
    assert (
        main(["import", str(file), "--model", "resnet8", "--out", str(tmp_path / "in"), "--normalisation", "cifar100"])
        == 0
    )
    printed = capsys.readouterr().out
    assert "keys of mdistiller" in printed and "resnet8, 7 classes" in printed
    for target, out in (("torch", "a.safetensors"), ("flax", "flax"), ("orbax", "orbax"), ("serving", "f.bin")):
        size = ["--image_size", "8", "8"] if target == "serving" else []
        assert main(["export", str(tmp_path / "in"), "--to", target, "--out", str(tmp_path / out), *size]) == 0
    before, after = load_file(file), load_file(tmp_path / "a.safetensors")
    assert before.keys() == after.keys()
    assert all(before[key].tobytes() == after[key].tobytes() for key in before)
    assert weights.open_file(tmp_path / "flax").model == {"name": "resnet8", "norm_group_size": None}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["import", "FILE", "--out", "OUT"], "does not say which network it is of: give --model"),
        (["import", "FILE", "--model", "resnet8x", "--out", "OUT"], "did you mean 'resnet8x4'"),
        (["import", "FILE", "--model", "resnet8", "--num_classes", "9", "--out", "OUT"], "has 7 classes and resnet8"),
        (["import", "FILE", "--model", "resnet8", "--set", "width=3", "--out", "OUT"], "unknown key 'width'"),
        (["import", "FILE", "--model", "resnet8", "--set", "width", "--out", "OUT"], "write --set width=VALUE"),
        (["import", "FILE", "--model", "resnet8", "--normalisation", "1,2", "--out", "OUT"], "or six numbers"),
        (["import", "FILE", "--model", "resnet8", "--normalisation", "1,2,3,nan,1,1", "--out", "OUT"], "six numbers"),
        (["import", "FILE", "--model", "resnet8", "--num_classes", "0", "--out", "OUT"], "must be 1 or more"),
        (["import", "FILE", "--model", "resnet14", "--out", "OUT"], "It looks like resnet8"),
        (["import", "FILE", "--model", "resnet8", "--out", "HERE"], "exists already: remove it"),
        (["export", "FILE", "--to", "torch", "--out", "OUT"], "is a file: import it first"),
        (["export", "HERE", "--to", "torch", "--out", "FILE"], "exists already: remove it"),
        (["export", "HERE", "--to", "torch", "--which", "best", "--out", "OUT"], "has a meaning with a run alone"),
        (["export", "HERE", "--to", "torch", "--image_size", "8", "8", "--out", "OUT"], "with --to serving alone"),
        (
            ["export", "HERE", "--to", "serving", "--image_size", "8", "8", "--out", "OUT"],
            "import with --normalisation",
        ),
        (["export", "OUT", "--to", "torch", "--out", "OUT"], "holds no run"),
        (["export", "OUT", "--to", "flax", "--style", "timm", "--out", "OUT"], "has a meaning with --to torch alone"),
    ],
)
def test_faults(tmp_path, file, capsys, arguments, message):
    if "HERE" in arguments:
        assert main(["import", str(file), "--model", "resnet8", "--out", str(tmp_path / "here")]) == 0
        assert "how the network wants its images is not known" in capsys.readouterr().out
    names = {"FILE": str(file), "OUT": str(tmp_path / "out"), "HERE": str(tmp_path / "here")}
    words = [names.get(word, word) for word in arguments]
    assert main(words) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and message in printed
    assert not (tmp_path / "out").exists()


def test_importing_an_import_keeps_what_it_says(tmp_path):
    """Settings and normalisation come along; what is given anew wins."""
    model = files.abstract("vit_tiny_patch16_224", 7, image_size=(112, 448))
    save_file(
        files.state_dict(model, files.random_arrays(model)), tmp_path / "vit.safetensors", {"image_size": "[112, 448]"}
    )
    words = ["--model", "vit_tiny_patch16_224", "--set", "image_size=(112, 448)", "--normalisation", "inception"]
    assert main(["import", str(tmp_path / "vit.safetensors"), *words, "--out", str(tmp_path / "one")]) == 0
    assert main(["import", str(tmp_path / "one"), "--out", str(tmp_path / "two")]) == 0
    one, two = (weights.open_file(tmp_path / name) for name in ("one", "two"))
    assert one.model == two.model and one.model["image_size"] == (112, 448)
    assert one.normalisation == two.normalisation == public.INCEPTION
    assert one.state.arrays["pos_embed"].tobytes() == two.state.arrays["pos_embed"].tobytes()
    assert (
        main(["import", str(tmp_path / "one"), "--set", "image_size=(32, 32)", "--out", str(tmp_path / "three")]) == 0
    )
    assert weights.open_file(tmp_path / "three").state.arrays["pos_embed"].shape == (1, 5, 192)


def test_serving_needs_a_size(tmp_path, file, capsys):
    where = str(tmp_path / "in")
    assert main(["import", str(file), "--model", "resnet8", "--out", where, "--normalisation", "imagenet"]) == 0
    assert main(["export", where, "--to", "serving", "--out", str(tmp_path / "f")]) == 1
    assert "give --image_size HEIGHT WIDTH" in capsys.readouterr().err


def test_list_of_weights(capsys):
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["name", "network"]
    assert any(line.startswith("resnet34.tv_in1k") and "73.31" in line for line in lines)


def test_list_of_networks(capsys):
    names = ["resnet18", "wrn_40_2", "vit_small_patch16_224", "swin_tiny_patch4_window7_224"]
    assert models_main(names) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split()[:4] == ["network", "classes", "parameters", "MACs"]
    rows = dict(zip(names, lines, strict=True))
    assert "11,689,512" in rows["resnet18"] and "1.8141 G" in rows["resnet18"] and "69.76 / 89.08" in rows["resnet18"]
    assert "stem 64/2 stage1 64/4" in rows["resnet18"]
    assert "2,255,156" in rows["wrn_40_2"] and "0.3276 G" in rows["wrn_40_2"] and "32x32" in rows["wrn_40_2"]
    assert "stage1 384/16t+-" in rows["vit_small_patch16_224"] and "4.59" in rows["vit_small_patch16_224"]
    assert models_main(["vit_small_patch16_224", "--image_size", "64", "32", "--num_classes", "5"]) == 0
    assert "64x32" in capsys.readouterr().out
    assert models_main(["resnet17"]) == 1
    assert "did you mean" in capsys.readouterr().err


def test_half_precision_files_export_as_float32(tmp_path, file):
    half = {key: value.astype(np.float16) for key, value in load_file(file).items()}
    save_file(half, tmp_path / "half.safetensors")
    words = ["--model", "resnet8", "--out", str(tmp_path / "in"), "--normalisation", "cifar100"]
    assert main(["import", str(tmp_path / "half.safetensors"), *words]) == 0
    assert {array.dtype.name for array in load_file(tmp_path / "in" / "weights.safetensors").values()} == {"float32"}
