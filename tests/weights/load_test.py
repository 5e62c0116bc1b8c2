"""From a path, a URL or a published name to a network's arrays, and our own files there and back."""

import functools
import http.server
import json
import pathlib
import threading

import files
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from wkd_jax import registry, weights
from wkd_jax.models import functional
from wkd_jax.types import Normalisation
from wkd_jax.weights import public

HOW = Normalisation((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_write_and_read_are_bit_identical(tmp_path):
    model = files.abstract("vit_tiny_patch16_224", image_size=(32, 48))
    arrays = files.random_arrays(model)
    weights.write(tmp_path, arrays, {"name": "vit_tiny_patch16_224", "image_size": (32, 48)}, HOW, note="mine")
    file = weights.open_file(tmp_path)
    assert file.model == {"name": "vit_tiny_patch16_224", "image_size": (32, 48)}
    assert file.normalisation == HOW
    assert json.loads(file.state.metadata["wkd_jax"])["note"] == "mine"
    assert file.num_classes(file.model) == 10
    got, notes = file.arrays(model)
    assert notes == ["keys of wkd_jax"]
    for name, value in arrays.items():
        np.testing.assert_array_equal(got[name], value)
    assert [path.name for path in tmp_path.iterdir()] == ["weights.safetensors"]  # nothing temporary is left


def test_restore_changes_a_network_in_place(tmp_path):
    one, two = (filled(classes, seed) for seed, classes in enumerate((10, 7)))
    save_file(files.state_dict(one, files.random_arrays(one)), tmp_path / "x.safetensors")
    before = np.asarray(two.fc.kernel[...])
    with pytest.raises(weights.WeightsError, match="has 10 classes"):
        weights.restore(two, tmp_path / "x.safetensors")
    weights.restore(two, tmp_path / "x.safetensors", reset_head=True)
    wanted = files.random_arrays(one)
    np.testing.assert_array_equal(two.conv1.kernel[...], wanted["conv1/kernel"])
    np.testing.assert_array_equal(two.layer1[0].bn1.var[...], wanted["layer1/0/bn1/var"])
    np.testing.assert_array_equal(two.fc.kernel[...], before)


def filled(num_classes, seed):
    """resnet8 with random values."""
    model = files.abstract("resnet8", num_classes)
    return functional.split(model)[0].merge(files.random_arrays(model, seed))


def test_names_of_published_weights():
    """Every one is of a registered network, and one that carries a hash is recognised by it, whatever its name."""
    for name, entry in public.PUBLIC.items():
        assert entry.model in registry.entries("models"), name
        assert entry.url.startswith(("https://", "http://", "gs://"))
        detector = entry.model.startswith("faster_rcnn")
        if entry.num_classes is None:  # a trunk
            assert detector and (entry.accuracy, entry.evaluation) == ("-", None)
        elif detector:
            assert entry.top1 is entry.top5 is None and 0 < entry.box_ap < 100 and entry.num_classes in (81, 91)
        else:
            assert entry.box_ap is None and 0 < entry.top1 < (entry.top5 or 100)
    assert public.by_hash("f37072fd" + 56 * "0") is public.PUBLIC["resnet18.tv_in1k"]
    assert public.by_hash("a" * 64) is None


def test_the_documents_list_them():
    """docs/weights.md has a row for every published file, and the styles of every network."""
    text = (pathlib.Path(__file__).parents[2] / "docs" / "weights.md").read_text()
    for name, entry in public.PUBLIC.items():
        assert f"| `{name}` | `{entry.model}` | {entry.accuracy} |" in text
        assert entry.url in text
    for name in registry.entries("models"):
        (row,) = [
            line
            for line in text.splitlines()
            if line.startswith("| `") and line.count("|") == 3 and f"`{name}`" in line
        ]
        styles = registry.get("models", name).family.KEY_STYLES
        assert row.endswith(f"| {', '.join(styles)} |")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nothing/here.pth", "nothing/here.pth: there is no such file"),
        ("here.safetensors", "here.safetensors: there is no such file"),
        ("resnet34.tv_in2k", "unknown weights .*did you mean 'resnet34.tv_in1k'"),
    ],
)
def test_not_there(source, message):
    with pytest.raises(OSError, match=message):
        weights.open_file(source)


def test_a_directory_without_weights(tmp_path):
    with pytest.raises(OSError, match="the directory has no weights.safetensors: give the file itself"):
        weights.open_file(tmp_path)


def test_a_url_and_a_published_name(tmp_path, monkeypatch):
    """A published file, served from here in the place of its own address, is downloaded once and knows its network."""
    model = files.abstract("resnet18", 1000)
    arrays = files.random_arrays(model)
    served = tmp_path / "served"
    served.mkdir()
    save_file(files.state_dict(model, arrays), served / "r18.safetensors")
    monkeypatch.setenv("WKD_JAX_CACHE", str(tmp_path / "cache"))
    handler = functools.partial(_Quiet, directory=served)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/r18.safetensors"
        entry = public.PUBLIC["resnet18.tv_in1k"]
        monkeypatch.setitem(public.PUBLIC, "mine", public.dataclasses.replace(entry, url=url))
        named = weights.open_file("mine")
        server.shutdown()
    assert (named.model, named.normalisation) == ({"name": "resnet18"}, public.IMAGENET)
    again = weights.open_file(url)  # of the cache: nobody serves any more; and its address is known
    assert again.sha256 == named.sha256 and again.model == named.model
    monkeypatch.delitem(public.PUBLIC, "mine")
    assert weights.open_file(url).model == {}
    np.testing.assert_array_equal(again.arrays(model)[0]["fc/kernel"], arrays["fc/kernel"])


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


def test_the_file_is_plain_safetensors(tmp_path):
    """Flax users read it without this package."""
    model = files.abstract("resnet8")
    arrays = files.random_arrays(model)
    path = weights.write(tmp_path / "deep" / "er", arrays, {"name": "resnet8"}, HOW)
    found = load_file(path)
    np.testing.assert_array_equal(found["layer1/0/conv1/kernel"], arrays["layer1/0/conv1/kernel"])
    assert found.keys() == arrays.keys()
