"""benchmarks/bench_detection.py: its parts are the network's, and both sides are one network with the same inputs."""

import json
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torchvision_cpu")  # beside a CPU build of torch torchvision needs it
torchvision = pytest.importorskip("torchvision")

from benchmarks import bench_detection  # noqa: E402

CASE = bench_detection.Case("r18", "tv", (64, 96), 1, "float32", 3, 16, 32)


@pytest.fixture(name="ours", scope="module")
def _ours():
    return bench_detection.Ours(CASE)


@pytest.fixture(name="theirs", scope="module")
def _theirs():
    return bench_detection.Theirs(CASE)


@pytest.fixture(name="inputs", scope="module")
def _inputs(ours):
    return ours.inputs(train=False)


def test_both_sides_train_the_same_number_of_parameters(ours, theirs):
    trained = sum(x.numel() for x in theirs.net.parameters() if x.requires_grad)
    background = 4 * (CASE.hidden + 1)  # a box that torchvision has and never uses
    assert trained - background == sum(x.size for x in ours.params.values())


def test_parts_make_the_whole(ours, inputs):
    whole = ours.infer().run()
    last = ours.part("detections", False, *inputs["detections"]).run()
    assert whole.valid.sum() > 10
    for name, value in whole._asdict().items():
        np.testing.assert_allclose(getattr(last, name), value, atol=1e-3, err_msg=name)


def test_training_times_gradients(ours, inputs):
    arrays, maps = ours.part("pyramid", True, *inputs["pyramid"]).run()
    assert {name.split("/")[0] for name in arrays} == {"fpn"}
    assert all(np.any(x) for x in [*arrays.values(), *maps])
    value = ours.part("pyramid", False, *inputs["pyramid"]).run()
    assert [*value] == ["p2", "p3", "p4", "p5", "p6"]


def test_both_sides_are_given_the_same(ours, theirs, inputs, monkeypatch):
    """Where no array is involved both make the same of it. Suppression is the test's: torchvision's may not load."""

    def batched_nms(boxes, scores, groups, threshold):
        kept = []
        for i in torch.argsort(-scores, stable=True).tolist():
            others = [j for j in kept if groups[j] == groups[i]]
            if not others or torchvision.ops.box_iou(boxes[i : i + 1], boxes[others]).max() <= threshold:
                kept.append(i)
        return torch.tensor(kept)

    monkeypatch.setattr(torchvision.ops.boxes, "batched_nms", batched_nms)
    monkeypatch.setattr(theirs, "operators", True)
    regions, valid = ours.part("proposals", False, *inputs["proposals"]).run()
    other = theirs.part("proposals", False, *inputs["proposals"]).run()[0][0]
    assert valid.sum() > 100
    np.testing.assert_allclose(regions[0][valid[0]], other, atol=1e-3)

    found = ours.part("detections", False, *inputs["detections"]).run()
    boxes, scores, labels = (x[0] for x in theirs.part("detections", False, *inputs["detections"]).run())
    np.testing.assert_allclose(found.boxes[0][found.valid[0]], boxes, atol=1e-3)
    np.testing.assert_allclose(found.scores[0][found.valid[0]], scores, atol=1e-5)
    np.testing.assert_array_equal(found.classes[0][found.valid[0]], labels - 1)


def test_growth_is_what_a_call_takes():
    kept = []
    growths = [bench_detection.growth_mb(lambda: kept.append(np.ones(10_000_000))) for _ in range(3)]
    if growths[0] is not None:  # the system may take unused pages away meanwhile
        assert 75 < max(growths) < 100
        assert bench_detection.growth_mb(lambda: None) < 10


@pytest.mark.slow
def test_training_step(ours):
    step = ours.train()
    losses = []
    for _ in range(2):
        step.run()
        losses.append(step.facts["loss"])
    assert np.all(np.isfinite(losses)) and losses[0] != losses[1]  # other samples


class Side:
    """Stands for both."""

    def __init__(self, case):
        self.facts = {"memory_mb": 1.0}

    def inputs(self, train):
        return {"pyramid": ((), ()), "pooling": ((), ())} | ({} if train else {"detections": ((), ())})

    def train(self):
        return bench_detection.Variant(lambda: None, self.facts)

    infer = train

    def part(self, name, train, given, constants):
        return self.train()


class WithoutOperators(Side):
    def part(self, name, train, given, constants):
        if name == "pooling":
            raise RuntimeError("none here | of them\nmore")
        return self.train()


def test_report(monkeypatch, tmp_path, capsys):
    """In the order of the parts; one that torchvision cannot do has the reason."""
    monkeypatch.setattr(bench_detection, "Ours", Side)
    monkeypatch.setattr(bench_detection, "Theirs", WithoutOperators)
    out = tmp_path / "detection.json"
    for more, missing in (([], {"pooling"}), (["--preset", "d2"], {"whole", "pyramid", "pooling", "detections"})):
        arguments = ["--device", "cpu", "--quick", "--canvas", "32", "64", *more, "--out", str(out)]
        monkeypatch.setattr(sys, "argv", ["bench_detection", *arguments])
        bench_detection.main()
        report, lines = json.loads(out.read_text()), capsys.readouterr().out
        assert report["canvas"] == [32, 64] and report["trunk"] == "r18"
        assert [*report["results"]["train"]] == ["whole", "pyramid", "pooling"]
        assert [*report["results"]["infer"]] == ["whole", "pyramid", "pooling", "detections"]
        for mode, parts in report["results"].items():
            assert {name for name, rows in parts.items() if "failed" in rows["torchvision"]} == missing & {*parts}
            assert all(rows["wkd_jax"]["memory_mb"] == 1 for rows in parts.values())
            assert all(f"| {mode}, {name} | " in lines for name in parts)
    assert "no such network" in lines and "none here" not in lines
