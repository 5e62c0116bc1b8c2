"""Detectors in and out: detectron2's and torchvision's keys, ImageNet trunks, bundles of a student and its teacher."""

import dataclasses
import functools
import pickle
import struct
import types

import files
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from wkd_jax import weights
from wkd_jax.models import cost, functional
from wkd_jax.models.__main__ import main as models_main
from wkd_jax.training import build
from wkd_jax.types import Normalisation
from wkd_jax.weights import WeightsError, detectron, export, keys, match, public
from wkd_jax.weights.__main__ import main
from wkd_jax.weights.state import State

SMALL = {"features": 8, "hidden": 16}
NAMES = ("faster_rcnn_r18", "faster_rcnn_r50", "faster_rcnn_r101", "faster_rcnn_mobilenetv2")
STYLES = ("detectron2", "detectron2_rgb", "torchvision", "torchvision_0_12")
MOVED = ["left out the box deltas of the background", "moved the background from the first class to the last"]
TURNED = "turned the first convolution from channels B, G, R to R, G, B"
NOTES = {"detectron2": [TURNED], "detectron2_rgb": [], "torchvision": MOVED, "torchvision_0_12": MOVED}
DEPTHS = {"faster_rcnn_r18": (2, 2, 2, 2), "faster_rcnn_r50": (3, 4, 6, 3), "faster_rcnn_r101": (3, 4, 23, 3)}
PIXEL_MEAN = np.array([103.53, 116.28, 123.675])  # B, G, R


@functools.cache
def abstract(name="faster_rcnn_r18", classes=4, **settings):
    return files.abstract(name, classes, **{**SMALL, **settings})


@functools.cache
def random_arrays(model):
    """All different; variances positive."""
    arrays = files.random_arrays(model)
    return {name: np.abs(value) + 0.5 if name.endswith("/var") else value for name, value in arrays.items()}


def saved(path, state):
    """A state dict as detectron2's model zoo has it."""
    path.write_bytes(pickle.dumps({"model": dict(state), "__author__": "Detectron2 Model Zoo"}, protocol=2))
    return path


def zeros(model, style):
    """A state dict that takes no memory."""
    entries = keys.layout(match.shapes_of(model), type(model).KEY_STYLES[style])
    return {entry.key: np.broadcast_to(np.float32(0), entry.shape) for entry in entries.values()}


def without(state, *parts):
    return {key: value for key, value in state.items() if not key.startswith(parts)}


# Names and shapes, written down a second time.


def norm(channels):
    return dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (channels,))


def resnet(name, stem, block, shortcut):
    """(key, shape) of a ResNet trunk: `stem` and `shortcut` are (convolution, norm), `block` functions of a number."""
    wide = name != "faster_rcnn_r18"
    found = {f"{stem[0]}.weight": (64, 3, 7, 7)} | {f"{stem[1]}.{leaf}": shape for leaf, shape in norm(64).items()}
    before = 64
    for stage, (width, depth) in enumerate(zip((64, 128, 256, 512), DEPTHS[name], strict=True)):
        out = 4 * width if wide else width
        for i in range(depth):
            sizes = (
                [(width, before, 1), (width, width, 3), (out, width, 1)]
                if wide
                else [(width, before, 3), (out, width, 3)]
            )
            layers = [(*block(stage, i, number), size) for number, size in enumerate(sizes, 1)]
            if before != out:
                layers.append((*shortcut(stage, i), (out, before, 1)))
            for conv, bn, (rows, columns, size) in layers:
                found[f"{conv}.weight"] = (rows, columns, size, size)
                found |= {f"{bn}.{leaf}": shape for leaf, shape in norm(rows).items()}
            before = out
    return found


def mobilenetv2(start, places):
    """(key, shape); `places` gives (convolution, norm) of the layers of a block with and without expansion."""
    layers = [(f"{start}0.0", f"{start}0.1", (32, 3, 3, 3))]
    before, index = 32, 0
    for expansion, width, repeats in (
        (1, 16, 1),
        (6, 24, 2),
        (6, 32, 3),
        (6, 64, 4),
        (6, 96, 3),
        (6, 160, 3),
        (6, 320, 1),
    ):
        for _ in range(repeats):
            index, hidden = index + 1, expansion * before
            shapes = [(hidden, before, 1, 1), (hidden, 1, 3, 3), (width, hidden, 1, 1)][expansion == 1 :]
            for (conv, bn), shape in zip(places[expansion > 1], shapes, strict=True):
                layers.append((f"{start}{index}.conv.{conv}", f"{start}{index}.conv.{bn}", shape))
            before = width
    found = {}
    for conv, bn, shape in layers:
        found[f"{conv}.weight"] = shape
        found |= {f"{bn}.{leaf}": size for leaf, size in norm(shape[0]).items()}
    return found


def detectron2(name, classes=81, features=256, hidden=1024):
    bottom_up = "backbone.bottom_up."
    if name == "faster_rcnn_mobilenetv2":
        found = mobilenetv2(f"{bottom_up}features.", (("01", "34"), ("01", "34", "67")))
        widths = (24, 32, 96, 320)
    else:
        found = resnet(
            name,
            (f"{bottom_up}stem.conv1", f"{bottom_up}stem.conv1.norm"),
            lambda s, i, n: (f"{bottom_up}res{s + 2}.{i}.conv{n}", f"{bottom_up}res{s + 2}.{i}.conv{n}.norm"),
            lambda s, i: (f"{bottom_up}res{s + 2}.{i}.shortcut", f"{bottom_up}res{s + 2}.{i}.shortcut.norm"),
        )
        widths = tuple(width * (1 if name == "faster_rcnn_r18" else 4) for width in (64, 128, 256, 512))
    layers = {f"backbone.fpn_lateral{i}": (features, width, 1, 1) for i, width in enumerate(widths, 2)}
    layers |= {f"backbone.fpn_output{i}": (features, features, 3, 3) for i in (2, 3, 4, 5)}
    rpn, roi = "proposal_generator.rpn_head.", "roi_heads."
    layers[f"{rpn}conv"] = (features, features, 3, 3)
    layers[f"{rpn}objectness_logits"], layers[f"{rpn}anchor_deltas"] = (3, features, 1, 1), (12, features, 1, 1)
    layers[f"{roi}box_head.fc1"], layers[f"{roi}box_head.fc2"] = (hidden, features * 49), (hidden, hidden)
    layers[f"{roi}box_predictor.cls_score"] = (classes, hidden)
    layers[f"{roi}box_predictor.bbox_pred"] = (4 * (classes - 1), hidden)
    for layer, shape in layers.items():
        found |= {f"{layer}.weight": shape, f"{layer}.bias": shape[:1]}
    return found


@pytest.mark.parametrize(("name", "count"), [*zip(NAMES, (130, 295, 550, 285), strict=True)])
def test_detectron2_names(name, count):
    """What detectron2's networks of 80 classes hold."""
    model = abstract(name, 81, features=256, hidden=1024)
    entries = keys.layout(match.shapes_of(model), type(model).KEY_STYLES["detectron2"])
    assert {entry.key: entry.shape for entry in entries.values()} == detectron2(name)
    assert len(entries) == count


def test_torchvision_names():
    """The 295 of a ResNet-50; tests/parity loads all kinds of trunk into torchvision itself."""
    model = abstract("faster_rcnn_r50", 91, preset="tv", features=256, hidden=1024)
    body, roi = "backbone.body.", "roi_heads."
    found = resnet(
        "faster_rcnn_r50",
        (f"{body}conv1", f"{body}bn1"),
        lambda s, i, n: (f"{body}layer{s + 1}.{i}.conv{n}", f"{body}layer{s + 1}.{i}.bn{n}"),
        lambda s, i: (f"{body}layer{s + 1}.{i}.downsample.0", f"{body}layer{s + 1}.{i}.downsample.1"),
    )
    layers = {f"backbone.fpn.inner_blocks.{i}.0": (256, 256 << i, 1, 1) for i in range(4)}
    layers |= {f"backbone.fpn.layer_blocks.{i}.0": (256, 256, 3, 3) for i in range(4)}
    layers |= {"rpn.head.conv.0.0": (256, 256, 3, 3)}
    layers |= {"rpn.head.cls_logits": (3, 256, 1, 1), "rpn.head.bbox_pred": (12, 256, 1, 1)}
    layers |= {f"{roi}box_head.fc6": (1024, 12544), f"{roi}box_head.fc7": (1024, 1024)}
    layers |= {f"{roi}box_predictor.cls_score": (91, 1024), f"{roi}box_predictor.bbox_pred": (364, 1024)}
    for layer, shape in layers.items():
        found |= {f"{layer}.weight": shape, f"{layer}.bias": shape[:1]}
    entries = keys.layout(match.shapes_of(model), type(model).KEY_STYLES["torchvision"])
    assert {entry.key: entry.shape for entry in entries.values()} == found and len(found) == 295
    old = keys.layout(match.shapes_of(model), type(model).KEY_STYLES["torchvision_0_12"])
    changed = {entry.key for entry in entries.values()} - {entry.key for entry in old.values()}
    assert {*changed} == {key for key in found if ".fpn." in key or key.startswith("rpn.head.conv.")}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", ["faster_rcnn_r18", "faster_rcnn_mobilenetv2"])
def test_there_and_back(tmp_path, name, style):
    """Bit by bit; how images are fed follows from the keys, or is said by whoever exports."""
    model = abstract(name, preset="tv" if style.startswith("torchvision") else "d2")
    arrays, path = random_arrays(model), tmp_path / "x.safetensors"
    assert export.to_torch(path, model, arrays, style=style) == []
    file = weights.open_file(f"{path}#style={style}")
    got, notes = file.arrays(model)
    assert got.keys() == arrays.keys() and all(got[key].tobytes() == arrays[key].tobytes() for key in arrays)
    assert notes == [f"keys of {style}", *NOTES[style]]
    wanted = {"detectron2": public.DETECTRON2, "detectron2_rgb": None}.get(style, public.IMAGENET)
    assert file.normalisation == wanted
    how = Normalisation((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    (line,) = export.to_torch(path, model, arrays, style=style, normalisation=how) or [""]
    assert weights.open_file(path).normalisation == how
    if style == "detectron2":
        assert "'BGR', MODEL.PIXEL_MEAN [76.5, 51.0, 25.5], MODEL.PIXEL_STD [153.0, 127.5, 102.0]" in line


@pytest.mark.parametrize("style", STYLES)
def test_what_does_not_fit(style):
    model = abstract()
    state = zeros(model, style)
    fc1 = next(key for key, value in state.items() if value.shape == (16, 8 * 49))
    with pytest.raises(WeightsError, match=rf"missing 1 of 130: {fc1}"):
        convert(without(state, fc1), model)
    with pytest.raises(WeightsError, match=r"left over 1: backbone\.extra"):
        convert({**state, "backbone.extra": np.ones(1)}, model)
    with pytest.raises(WeightsError, match=rf"of another shape 1: {fc1} \(16, 8, 7, 7\) instead of \(16, 392\)"):
        convert({**state, fc1: np.zeros((16, 8, 7, 7))}, model)


def convert(state, model, **described):
    """As from a file that holds these arrays."""
    file = weights.WeightsFile("FILE", "", State(dict(state)), described, None, None)
    return file.arrays(model, whole=False)


def test_the_network_that_a_file_looks_like(monkeypatch):
    names = ("resnet18", "faster_rcnn_r18", "faster_rcnn_r50")  # few, since each takes a moment
    found = {name: match.registry.get("models", name) for name in names}
    monkeypatch.setattr(match.registry, "entries", lambda kind: found)
    full = {"features": 256, "hidden": 1024}
    state = zeros(abstract("faster_rcnn_r50", 81, **full), "detectron2")
    with pytest.raises(WeightsError, match="does not fit faster_rcnn_r18 .*It looks like faster_rcnn_r50"):
        convert(state, abstract("faster_rcnn_r18", 81, **full))


# Values: what the loaded network computes against NumPy, from the arrays of the file.


def head_in_numpy(state, pooled, names):
    """Logits and deltas of pooled [N, 7, 7, D] by the layers `names`, in the file's order of classes; float64."""
    x = pooled.astype(np.float64).transpose(0, 3, 1, 2).reshape(len(pooled), -1)  # PyTorch's flatten of [N, D, 7, 7]
    layers = [(state[f"roi_heads.{name}.weight"], state[f"roi_heads.{name}.bias"]) for name in names]
    for weight, bias in layers[:2]:
        x = np.maximum(x @ weight.astype(np.float64).T + bias, 0)
    return [x @ weight.astype(np.float64).T + bias for weight, bias in layers[2:]]


@pytest.mark.parametrize("style", ["detectron2", "torchvision"])
def test_the_box_head_of_a_file(style):
    """The order of the flattened region and of the classes, by what comes out."""
    model, rng = abstract(), np.random.default_rng(0)
    state = {key: rng.normal(size=value.shape).astype(np.float32) for key, value in zeros(model, style).items()}
    arrays, _ = convert(state, model)
    pooled = rng.normal(size=(5, 7, 7, 8)).astype(np.float32)
    _, logits, deltas = functional.split(model)[0].merge(arrays).box_head(pooled)
    fc = ("fc1", "fc2") if style == "detectron2" else ("fc6", "fc7")
    names = (*(f"box_head.{name}" for name in fc), "box_predictor.cls_score", "box_predictor.bbox_pred")
    classes, boxes = head_in_numpy(state, pooled, names)
    boxes = boxes.reshape(5, -1, 4)
    if style == "torchvision":
        classes, boxes = np.concatenate([classes[:, 1:], classes[:, :1]], axis=1), boxes[:, 1:]
    np.testing.assert_allclose(logits, classes, rtol=1e-5, atol=1e-5 * np.abs(classes).max())
    np.testing.assert_allclose(deltas, boxes, rtol=1e-5, atol=1e-5 * np.abs(boxes).max())


def test_the_background_has_no_boxes(tmp_path):
    """torchvision's four rows for it are not read, and are written as zeros."""
    model = abstract(preset="tv")
    arrays, key = random_arrays(model), "roi_heads.box_predictor.bbox_pred.weight"
    state = files.state_dict(model, arrays, "torchvision")
    assert state[key].shape == (16, 16) and not state[key][:4].any() and state[key][4:].all()
    got, _ = convert({**state, key: np.concatenate([np.ones((4, 16), np.float32), state[key][4:]])}, model)
    np.testing.assert_array_equal(got["box_head/bbox_pred/kernel"], arrays["box_head/bbox_pred/kernel"])


def of_stem(network, image):
    return {"stem": network.trunk.features[0](image, train=False)}


def of_pyramid(network, image):
    return network.pyramid(image, train=False)


@pytest.mark.parametrize(
    ("name", "run"), [("faster_rcnn_r18", of_pyramid), ("faster_rcnn_mobilenetv2", of_stem)], ids=["r18", "mobilenetv2"]
)
def test_images_as_detectron2_feeds_them(tmp_path, name, run):
    """R, G, B by the file's normalisation into the loaded network are B, G, R less a mean into the file's own stem."""
    model, rng = abstract(name), np.random.default_rng(0)
    state = files.state_dict(model, random_arrays(model))
    state = {key: value * value[0].size ** -0.5 if value.ndim == 4 else value for key, value in state.items()}
    file = weights.open_file(saved(tmp_path / "x.pkl", state))
    got, _ = file.arrays(model)
    stem = next(key for key, value in got.items() if value.ndim == 4 and value.shape[2] == 3)
    stored = next(value for value in state.values() if value.shape[1:2] == (3,))
    structure = functional.split(model)[0]
    outputs = jax.jit(lambda arrays, image: run(structure.merge(arrays), image))
    image = rng.integers(0, 256, (2, 64, 64, 3)).astype(np.float64)
    ours = outputs(got, ((image / 255 - file.normalisation.mean) / file.normalisation.std).astype(np.float32))
    fed = (image[..., ::-1] - PIXEL_MEAN).astype(np.float32)
    own = outputs({**got, stem: stored.transpose(2, 3, 1, 0)}, fed)
    turned = outputs(got, fed)
    for tap, value in own.items():
        largest = float(np.abs(value).max())
        assert np.isfinite(largest)
        np.testing.assert_allclose(ours[tap], value, rtol=0, atol=1e-5 * largest, err_msg=tap)
        assert np.abs(turned[tap] - value).max() > 0.01 * largest  # the order of channels is seen in it


def test_a_file_that_says_its_normalisation(tmp_path):
    """pixel_mean and pixel_std are in the order of its channels; anchors and counters are left out, and said to be."""
    stem = "backbone.bottom_up.stem.conv1."
    state = {f"{stem}weight": np.ones((64, 3, 7, 7), np.float32), f"{stem}norm.num_batches_tracked": np.full((), 3)}
    state |= {"pixel_mean": PIXEL_MEAN.astype(np.float32)[:, None, None], "pixel_std": np.float32([57.375, 57, 51])}
    state |= {f"proposal_generator.anchor_generator.cell_anchors.{i}": np.ones((3, 4), np.float32) for i in range(5)}
    path = saved(tmp_path / "x.pkl", state)
    file = weights.open_file(path)
    assert file.normalisation == Normalisation((0.485, 0.456, 0.406), (51 / 255, 57 / 255, 0.225))
    assert {*file.state.arrays} == {f"{stem}weight"}
    left = "num_batches_tracked (1), pixel_mean (1), pixel_std (1), anchor_generator.cell_anchors (5)"
    assert f"left out what is no weight: {left}" in file.state.notes
    file = weights.open_file(f"{path}#style=detectron2_rgb")
    assert file.normalisation == Normalisation((0.406, 0.456, 0.485), (0.225, 57 / 255, 51 / 255))


def test_normalisation_that_is_a_scale_and_a_shift():
    """Old files of detectron2 hold no statistics; some of them without others are an error."""
    model = abstract()
    state = files.state_dict(model, random_arrays(model))
    folded = {key: value for key, value in state.items() if "running_" not in key}
    got, notes = convert(folded, model)
    assert "its normalisation is a scale and a shift: mean 0, variance 1 less the eps" in notes
    assert not got["trunk/layer1/0/bn1/mean"].any()
    np.testing.assert_array_equal(got["trunk/layer1/0/bn1/var"] + np.float32(1e-5), np.ones(64, np.float32))
    key = "backbone.bottom_up.res2.0.conv1.norm.running_mean"
    with pytest.raises(WeightsError, match=f"missing 1 of 130: {key}"):
        convert(without(state, key), model)


# Trunks.


def python2(tree):
    """The pickle that Python 2 writes of a dict of float32 arrays with protocol 2: texts are bytes."""

    def text(value):
        return b"T" + struct.pack("<i", len(value)) + value

    parts = [b"\x80\x02}("]
    for key, array in tree.items():
        shape = b"(" + b"".join(b"J" + struct.pack("<i", n) for n in array.shape) + b"t"
        parts += [
            text(key.encode()),
            b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t" + text(b"b") + b"tR",
            b"(K\x01"
            + shape
            + b"cnumpy\ndtype\n("
            + text(b"f4")
            + b"K\x00K\x01tR(K\x03"
            + text(b"<")
            + b"NNNJ\xff\xff\xff\xff"
            b"J\xff\xff\xff\xffK\x00tb\x89" + text(array.tobytes()) + b"tb",
        ]
    return b"".join([*parts, b"u."])


BRANCHES = {"conv1": "branch2a", "conv2": "branch2b", "conv3": "branch2c", "shortcut": "branch1"}


def caffe2_name(key):
    """res2.0.conv1.norm.weight -> res2_0_branch2a_bn_s"""
    key = key.removeprefix("backbone.bottom_up.").replace("stem.conv1.norm", "res_conv1.norm")
    key = key.replace("stem.", "").replace("norm.weight", "bn.s").replace("norm.bias", "bn.b").replace("weight", "w")
    for ours, theirs in BRANCHES.items():
        key = key.replace(f".{ours}.", f".{theirs}.")
    return key.replace(".", "_")


def test_names_of_caffe2():
    """The trunk of R-50.pkl, whose normalisation has no statistics, and the other spelling of those that have them."""
    names = [key for key in detectron2("faster_rcnn_r50") if key.startswith("backbone.bottom_up.")]
    folded = [key for key in names if "running" not in key]
    arrays = dict.fromkeys(map(caffe2_name, folded), np.ones(1))
    assert {"conv1_w", "res_conv1_bn_s", "res2_0_branch1_w", "res5_2_branch2c_bn_b"} < {*arrays}
    arrays |= dict.fromkeys(["conv1_b", "fc1000_w", "fc1000_b", "res2_0_branch2a_w_momentum", "strange_w"], np.ones(1))
    assert detectron.is_caffe2(arrays)
    found, left_out = detectron.from_caffe2(arrays)
    assert {*found} == {*folded, "strange_w"}
    assert left_out == ["conv1_b", "fc1000_w", "fc1000_b", "res2_0_branch2a_w_momentum"]
    for leaves in (("gamma", "beta", "rm", "riv"), ("s", "b", "running_mean", "running_var")):
        found, _ = detectron.from_caffe2({f"res3_1_branch2b_bn_{leaf}": np.ones(1) for leaf in leaves})
        assert [*found] == [f"backbone.bottom_up.res3.1.conv2.norm.{leaf}" for leaf in norm(1)]


def trunk_only(state):
    return {key: value for key, value in state.items() if key.startswith(("backbone.bottom_up.", "backbone.body."))}


def test_msra_trunk(tmp_path):
    """A pickle of Python 2 in Caffe2's names: B, G, R, no statistics, with a classifier; the rest stays as it is."""
    model = abstract()
    arrays = random_arrays(model)
    state = {k: v for k, v in trunk_only(files.state_dict(model, arrays)).items() if "running_" not in k}
    blobs = {caffe2_name(key): value for key, value in state.items()}
    blobs |= {"conv1_b": np.zeros(64, np.float32), "fc1000_w": np.ones((9, 9), np.float32)}
    (tmp_path / "R-18.pkl").write_bytes(python2(blobs))
    file = weights.open_file(tmp_path / "R-18.pkl")
    assert file.normalisation == public.DETECTRON2
    got, notes = file.arrays(model, whole=False)
    assert {*arrays} - {*got} == {name for name in arrays if not name.startswith("trunk/")}
    for name, value in got.items():
        if name.endswith(("/mean", "/var")):
            np.testing.assert_allclose(value, 0 if name.endswith("mean") else 1 - 1e-5, rtol=1e-7)
        else:
            np.testing.assert_array_equal(value, arrays[name])
    assert notes == [
        "read Caffe2's names and left out conv1_b, fc1000_w",
        "keys of detectron2",
        TURNED,
        "its normalisation is a scale and a shift: mean 0, variance 1 less the eps",
        "holds a trunk alone: box_head, fpn, rpn start anew",
    ]
    np.testing.assert_array_equal(got["trunk/conv1/kernel"][:, :, ::-1], blobs["conv1_w"].transpose(2, 3, 1, 0))
    with pytest.raises(WeightsError, match="holds the trunk of faster_rcnn_r18 alone. It serves as init.weights"):
        file.arrays(model)
    with pytest.raises(
        WeightsError, match=r"the trunk of faster_rcnn_r18 alone\). missing 1 of 100: .*stem.conv1.weight"
    ):
        convert({k: v for k, v in file.state.arrays.items() if "stem.conv1.weight" not in k}, model)


@pytest.mark.parametrize(
    ("name", "source", "style", "spare"),
    [
        ("faster_rcnn_r18", "resnet18", "torchvision", "fc.weight, fc.bias|fc.bias, fc.weight"),
        (
            "faster_rcnn_r18",
            "resnet18",
            "mmclassification",
            "head.fc.weight, head.fc.bias|head.fc.bias, head.fc.weight",
        ),
        ("faster_rcnn_mobilenetv2", "mobilenetv2", "torchvision", "and 3 more"),
        ("faster_rcnn_mobilenetv2", "mobilenetv2", "timm", "and 3 more"),
        ("faster_rcnn_r18", "resnet18", "wkd_jax", "fc/kernel, fc/bias|fc/bias, fc/kernel"),
    ],
)
def test_trunks_of_image_classifiers(tmp_path, name, source, style, spare):
    model, classifier = abstract(name), files.abstract(source, 7)
    arrays = files.random_arrays(classifier)
    if style == "wkd_jax":
        path = weights.write(tmp_path, arrays, {"name": source}, public.IMAGENET)
    else:
        save_file(files.state_dict(classifier, arrays, style), path := tmp_path / "x.safetensors")
    got, notes = weights.open_file(path).arrays(model, whole=False)
    assert {*match.shapes_of(model)} - {*got} == {n for n in match.shapes_of(model) if not n.startswith("trunk/")}
    for key, value in got.items():
        np.testing.assert_array_equal(value, arrays[key.removeprefix("trunk/")])
    left_out, alone = notes[-2:]
    assert any(part in left_out for part in spare.split("|")) and left_out.endswith(": not of the trunk")
    assert (notes[0], alone) == (f"keys of {style}", f"holds a trunk of {source} alone: box_head, fpn, rpn start anew")


@pytest.mark.parametrize(
    ("state", "preset", "note"),
    [
        (
            "resnet50",
            "d2",
            "its bottlenecks had their stride in the 3 x 3 convolution, and this network has it in the 1 x 1",
        ),
        ("resnet50", "tv", ""),
        ("detectron2", "d2", ""),
        (
            "detectron2",
            "tv",
            "its bottlenecks had their stride in the 1 x 1 convolution, and this network has it in the 3",
        ),
        ("torchvision", "d2", "had their stride in the 3 x 3"),
    ],
)
def test_where_a_trunks_stride_was(state, preset, note):
    model = abstract("faster_rcnn_r50", preset=preset)
    if state == "resnet50":
        state = zeros(files.abstract("resnet50"), "torchvision")
    else:
        state = trunk_only(zeros(model, state))
        state = {key.removeprefix("backbone.bottom_up."): value for key, value in state.items()}  # also without it
    notes = convert(state, model)[1]
    assert (note in notes[-1]) if note else notes[-1].endswith("start anew")


def test_a_detector_of_the_other_preset():
    """By what the file says of itself, else by its keys."""
    model = abstract("faster_rcnn_r18", preset="tv")
    note = "its network has preset='d2', and this one another: they compute different things"
    state = zeros(model, "detectron2")
    assert note in convert(state, model)[1]
    assert note not in convert(state, model, preset="tv")[1]
    state = zeros(model, "torchvision")
    assert note not in convert(state, model)[1]
    assert note in convert(state, model, preset="d2")[1]


def test_the_start_of_a_student(tmp_path):
    """`init.weights` with a trunk: what is outside of it keeps its random values."""
    model, source = abstract("faster_rcnn_mobilenetv2"), files.abstract("mobilenetv2", 7)
    student = functional.split(model)[0].merge(random_arrays(model))
    before = random_arrays(model)
    path = weights.write(tmp_path, files.random_arrays(source, 1), {"name": "mobilenetv2"}, public.IMAGENET)
    config = {"init": {"weights": str(path), "reset_head": False}}
    data = types.SimpleNamespace(mean=public.IMAGENET.mean, std=public.IMAGENET.std)
    arrays, notes = build._initial(config, data, student)
    assert "holds a trunk of mobilenetv2 alone: box_head, fpn, rpn start anew" in notes
    functional.update(student, arrays)
    _, params, variables, _ = functional.split(student)
    for name, value in {**params, **variables}.items():
        assert np.array_equal(value, before[name]) != name.startswith("trunk/"), name


# Two networks in one file.


def test_bundles(tmp_path):
    """The student is read unless the teacher is asked for; a student that is a trunk alone serves as a start."""
    student, teacher = (abstract("faster_rcnn_mobilenetv2", hidden=hidden) for hidden in (16, 20))
    of_student, of_teacher = (random_arrays(model) for model in (student, teacher))
    state = files.state_dict(student, of_student)
    state |= {f"teacher.{key}": value for key, value in files.state_dict(teacher, of_teacher).items()}
    state |= {"kd_trans.abfs.0.conv1.0.weight": np.ones((3, 3), np.float32)}
    path = saved(tmp_path / "bundle.pth", state)
    got, notes = weights.open_file(path).arrays(student)
    assert "read the arrays of the student and left out: teacher (285), kd_trans (1)" in notes
    assert all(np.array_equal(got[name], value) for name, value in of_student.items())
    got, notes = weights.open_file(f"{path}#teacher").arrays(teacher)
    assert "read the arrays of the teacher and left out: student (285), kd_trans (1)" in notes
    assert all(np.array_equal(got[name], value) for name, value in of_teacher.items())
    saved(path, {key: value for key, value in state.items() if key.startswith(("teacher.", "backbone.bottom_up."))})
    got, notes = weights.open_file(f"{path}#style=detectron2_rgb").arrays(student, whole=False)
    assert {name.split("/")[0] for name in got} == {"trunk"}
    stem = "trunk/features/0/0/kernel"
    np.testing.assert_array_equal(got[stem], of_student[stem][:, :, ::-1])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("teacher", "x.pkl#teacher: holds no teacher: no key in it begins with teacher."),
        ("coco80", "x.pkl#coco80: has no classifier of torchvision's 91 classes"),
        ("style=detectron3", "unknown key style of faster_rcnn_r18 'detectron3'"),
        ("techer", "unknown word after # 'techer': did you mean 'teacher'"),
        ("style=", "unknown word after # 'style='"),
    ],
)
def test_words_that_do_not_fit(tmp_path, words, message):
    path = saved(tmp_path / "x.pkl", {"backbone.bottom_up.stem.conv1.weight": np.ones((64, 3, 7, 7), np.float32)})
    with pytest.raises(ValueError) as error:
        weights.open_file(f"{path}#{words}").arrays(abstract())
    assert message in str(error.value)


def test_a_hash_in_a_name(tmp_path):
    """A file whose own name has the mark is that file."""
    assert {*weights.open_file(saved(tmp_path / "x#teacher", {"a": np.ones(1)})).state.arrays} == {"a"}
    url = "https://example.org/r18.pth#sha256=0123456789"
    assert weights.select.split(f"{url}&teacher") == (url, weights.select.Selection(teacher=True))


def test_hostile_pickle(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (exec, ("raise SystemExit('was run')",))

    state = {"backbone.bottom_up.stem.conv1.weight": np.ones((64, 3, 7, 7), np.float32)}
    for tree in ({"model": state, "__author__": Bomb()}, {"model": {**state, "x": np.array([Bomb()], object)}}):
        (tmp_path / "x.pkl").write_bytes(pickle.dumps(tree, protocol=2))
        with pytest.raises(WeightsError, match="nothing in a file is run"):
            weights.open_file(tmp_path / "x.pkl")


# torchvision's published detector: 91 classes, eps 0.


def published(tmp_path, monkeypatch):
    model = abstract("faster_rcnn_mobilenetv2", 91, preset="tv", norm_eps=0.0)
    state = files.state_dict(model, random_arrays(model), "torchvision_0_12")
    save_file(state, path := tmp_path / "tv.safetensors")
    entry = dataclasses.replace(public.PUBLIC["faster_rcnn_r50.tv_coco"], model="faster_rcnn_mobilenetv2")
    monkeypatch.setattr(weights.load, "by_hash", lambda sha256: entry)
    return model, state, path


def test_eps_of_the_published_detector(tmp_path, monkeypatch):
    """The file says that its network has eps 0, and is not read into one that has not."""
    model, _, path = published(tmp_path, monkeypatch)
    file = weights.open_file(path)
    assert file.model == {"name": "faster_rcnn_mobilenetv2", "preset": "tv", "norm_eps": 0.0}
    assert file.normalisation == public.IMAGENET
    assert file.arrays(model)[1] == ["keys of torchvision_0_12", *MOVED]
    with pytest.raises(
        WeightsError, match="was made with norm_eps=0.0, and .* is built with norm_eps=1e-05.*set norm_eps=0"
    ):
        file.arrays(abstract("faster_rcnn_mobilenetv2", 91, preset="tv"))
    assert "eps=0.0" in export.to_torch(tmp_path / "out", model, random_arrays(model), style="torchvision")[0]


def test_91_classes(tmp_path, monkeypatch):
    """The count is an error that says what to do; COCO's 80 are those whose ids are in use, in the order of the ids."""
    large, state, path = published(tmp_path, monkeypatch)
    model = abstract("faster_rcnn_mobilenetv2", 81, preset="tv", norm_eps=0.0)
    with pytest.raises(WeightsError, match=r"has 91 classes \(the background is one\) and .* wanted with 81.*#coco80"):
        weights.open_file(path).arrays(model)
    file = weights.open_file(f"{path}#coco80")
    assert file.num_classes({"name": "faster_rcnn_mobilenetv2", **SMALL}) == 81
    got, notes = file.arrays(model)
    assert any("kept COCO's 80 classes and the background of 91" in note for note in notes)
    pooled = np.random.default_rng(0).normal(size=(3, 7, 7, 8)).astype(np.float32)
    _, logits, deltas = functional.split(model)[0].merge(got).box_head(pooled)
    names = ("box_head.fc6", "box_head.fc7", "box_predictor.cls_score", "box_predictor.bbox_pred")
    classes, boxes = head_in_numpy(state, pooled, names)
    unused = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
    ids = [i for i in range(1, 91) if i not in unused]
    assert len(ids) == 80
    np.testing.assert_allclose(logits, classes[:, [*ids, 0]], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(deltas, boxes.reshape(3, 91, 4)[:, ids], rtol=1e-4, atol=1e-4)


def test_another_class_count_and_a_new_head():
    model = abstract(classes=6)
    state = files.state_dict(abstract(), random_arrays(abstract()))
    with pytest.raises(WeightsError, match="has 4 classes .* wanted with 6"):
        convert(state, model)
    got, notes = match.convert(match.best(state, model), model, "FILE", reset_head=True)
    layers = ("box_head/cls_score", "box_head/bbox_pred")
    assert {*match.shapes_of(model)} - {*got} == {f"{layer}/{leaf}" for layer in layers for leaf in ("kernel", "bias")}
    assert "the classifier starts anew" in notes


# On the command line.


def test_import_and_export(tmp_path, capsys):
    model = abstract()
    path = saved(tmp_path / "x.pkl", files.state_dict(model, random_arrays(model)))
    words = ["--model", "faster_rcnn_r18", "--set", "features=8", "--set", "hidden=16"]
    assert main(["import", str(path), *words, "--out", str(tmp_path / "in")]) == 0
    assert f"keys of detectron2\n{TURNED}\nfaster_rcnn_r18, 4 classes, " in capsys.readouterr().out
    assert weights.open_file(tmp_path / "in").normalisation == public.DETECTRON2
    assert main(["export", str(tmp_path / "in"), "--to", "torch", "--out", str(tmp_path / "out.safetensors")]) == 0
    assert "MODEL.PIXEL_MEAN [103.53, 116.28, 123.675], MODEL.PIXEL_STD [1.0, 1.0, 1.0]" in capsys.readouterr().out
    after = load_file(tmp_path / "out.safetensors")
    before = files.state_dict(model, random_arrays(model))
    assert before.keys() == after.keys() and all(before[key].tobytes() == after[key].tobytes() for key in before)
    with pytest.raises(ValueError, match="gives logits, and a detection network has more to say"):
        export.to_serving("x", model, random_arrays(model), public.IMAGENET, (64, 64))
    saved(path, trunk_only(before))
    assert main(["import", str(path), *words, "--out", str(tmp_path / "trunk")]) == 0
    assert "faster_rcnn_r18, its trunk alone, " in capsys.readouterr().out
    got, _ = weights.open_file(tmp_path / "trunk").arrays(model, whole=False)
    assert {name.split("/")[0] for name in got} == {"trunk"}
    assert main(["export", str(tmp_path / "trunk"), "--to", "torch", "--out", "x"]) == 1
    assert "holds the trunk of faster_rcnn_r18 alone" in capsys.readouterr().err


def test_lists(capsys):
    assert main(["list"]) == 0
    listed = capsys.readouterr().out
    assert "faster_rcnn_r101.d2_3x_coco" in listed and "42.0 AP" in listed and "MSRA/R-50.pkl" in listed
    assert models_main(["faster_rcnn_r50"]) == 0
    row = capsys.readouterr().out.splitlines()[1]
    assert row.split()[1] == "81" and "800x1344" in row and "40.2 AP, 37.9 AP, 37.0 AP  " in row
    assert row.endswith("p2 256/4+- p3 256/8+- p4 256/16+- p5 256/32+- p6 256/64+-")


def test_multiply_adds():
    """At 800 x 1344: those of ResNet-18 without its classifier, then by hand, one a weight and position."""
    cells = [200 * 336, 100 * 168, 50 * 84, 25 * 42, 13 * 21]
    trunk = cost.macs(files.abstract("resnet18", 1), (800, 1344)) - 512
    pyramid = sum(n * 256 * (width + 9 * 256) for n, width in zip(cells, (64, 128, 256, 512), strict=False))
    proposals = sum(cells) * 256 * (9 * 256 + 3 + 12)
    head = 1000 * (12544 * 1024 + 1024 * 1024 + 1024 * (81 + 320))
    model = abstract("faster_rcnn_r18", 81, features=256, hidden=1024)
    assert cost.macs(model, (800, 1344)) == trunk + pyramid + proposals + head
