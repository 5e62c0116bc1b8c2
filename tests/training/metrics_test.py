import collections
import itertools
import json
import math
import os
import resource
import struct
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from wkd_jax.training import metrics
from wkd_jax.training.metrics import FILE, TIME_KEYS, MetricWriter, read


def clock():
    return itertools.count(1000.0, 0.5).__next__


def rows(directory):
    return [{key: value for key, value in row.items() if key not in TIME_KEYS} for row in read(directory / FILE)]


def events(file):
    """Events of one file: uint64 length, crc, bytes, crc. A record cut off at the end is where readers stop."""
    raw, at = file.read_bytes(), 0
    while at + 12 <= len(raw):
        (length,) = struct.unpack("<Q", raw[at : at + 8])
        if at + 16 + length > len(raw):
            return
        yield Event.FromString(raw[at + 12 : at + 12 + length])
        at += 16 + length


def tensorboard(directory):
    """What TensorBoard shows, by its rule: files in order of name; a START drops what is at its step or later."""
    shown = collections.defaultdict(list)
    for file in sorted((directory / metrics.TENSORBOARD).iterdir()):
        for event in events(file):
            if event.session_log.status == SessionLog.START:
                for tag, points in shown.items():
                    shown[tag] = [point for point in points if point[0] < event.step]
            for value in event.summary.value:
                shown[value.tag].append((event.step, value.simple_value))
    return {tag: points for tag, points in shown.items() if points}


def write_steps(writer, steps):
    for step in steps:
        writer.write(step, "train", {"loss": np.float32(1) / np.float32(step), "seconds": 0.1 * step})
        if step % 5 == 0:
            writer.write(step, "eval", {"top1": 10.0 * step})


def test_values_come_back_exactly(tmp_path):
    values = {
        "float": 0.1,
        "float32": np.float32(0.1),
        "bfloat16": np.asarray(0.1, jnp.bfloat16)[()],
        "array": np.float32([0.1, np.inf]),
        "scalar": np.array(3),
        "int": 2**53 + 1,
        "bool": True,
        "none": None,
        "text": 'a "line"\n\u2028ü',
        "nested": {"classes": [1, math.nan, {"x": -math.inf}]},
        "tiny": 5e-324,
        "nan": math.nan,
        "inf": np.float32(np.inf),
        "minus": -math.inf,
    }
    with MetricWriter(tmp_path, resume_step=0) as writer:
        writer.write(7, "eval", values)
    (row,) = read(tmp_path / FILE)
    assert (row["step"], row["kind"]) == (7, "eval")
    np.testing.assert_equal(row["nested"], values["nested"])
    assert row["array"] == values["array"].tolist() and row["scalar"] == 3
    for name in values.keys() - {"nested", "array", "scalar"}:
        expected = values[name].item() if isinstance(values[name], np.generic) else values[name]
        assert type(row[name]) is type(expected)
        np.testing.assert_equal(row[name], expected)


def test_every_line_is_strict_json(tmp_path):
    with MetricWriter(tmp_path, resume_step=0) as writer:
        writer.write(1, "train", {"a": math.nan, "b": [math.inf]})

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    text = (tmp_path / FILE).read_text()
    assert text.count("\n") == 1 and text.endswith("\n")
    assert json.loads(text, parse_constant=refuse)["b"] == ["Infinity"]


def test_numbers_are_shown_by_tensorboard(tmp_path):
    with MetricWriter(tmp_path, resume_step=0) as writer:
        writer.write(1, "train", {"term/loss": 1.5, "note": "text", "list": [1.0], "count": 3})
        writer.write(2, "train", {"term/loss": math.inf})
    assert tensorboard(tmp_path) == {"train/term/loss": [(1, 1.5), (2, math.inf)], "train/count": [(1, 3.0)]}


@pytest.mark.parametrize("stopped, resumed", [(7, 5), (5, 5), (12, 5), (3, 0), (19, 15)])
@pytest.mark.parametrize("tail", [b"", b'{"step": 99, "ki', b"\x00\x00\x00", b'{"step": 99}\n', b"{\n\xff\n"])
def test_a_resumed_file_equals_an_uninterrupted_one(tmp_path, stopped, resumed, tail):
    with MetricWriter(tmp_path / "straight", resume_step=0, now=clock()) as writer:
        write_steps(writer, range(1, 21))

    writer = MetricWriter(tmp_path / "run", resume_step=0, now=clock())
    write_steps(writer, range(1, stopped + 1))
    writer.close()
    with (tmp_path / "run" / FILE).open("ab") as file:  # what a kill may leave
        file.write(tail)
    (event_file,) = (tmp_path / "run" / metrics.TENSORBOARD).iterdir()
    event_file.write_bytes(event_file.read_bytes()[:-3])
    with MetricWriter(tmp_path / "run", resume_step=resumed, now=clock()) as writer:
        assert [row["step"] for row in rows(tmp_path / "run")] == [
            row["step"] for row in rows(tmp_path / "straight") if row["step"] <= resumed
        ]
        write_steps(writer, range(resumed + 1, 21))

    assert rows(tmp_path / "run") == rows(tmp_path / "straight")
    shown, expected = tensorboard(tmp_path / "run"), tensorboard(tmp_path / "straight")
    for tag, points in shown.items():
        steps = [step for step, _ in points]
        assert steps == sorted(set(steps)), "a step shows twice"
        assert set(points) <= set(expected[tag])
    if stopped > resumed:  # else the cut-off record is one that is not written again
        assert shown == expected
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [FILE, metrics.TENSORBOARD]


def test_a_whole_last_line_without_its_end_is_kept(tmp_path):
    (tmp_path / FILE).write_text('{"step": 1, "kind": "train"}\n{"step": 2, "kind": "train"}')
    with MetricWriter(tmp_path, resume_step=2) as writer:
        writer.write(3, "train", {})
    assert [row["step"] for row in read(tmp_path / FILE)] == [1, 2, 3]


def test_lines_can_be_read_while_the_run_goes_on(tmp_path):
    with MetricWriter(tmp_path, resume_step=0) as writer:
        write_steps(writer, [1, 2])
        assert [row["step"] for row in read(tmp_path / FILE)] == [1, 2]


def test_sessions_within_one_second_keep_their_events_apart(tmp_path, monkeypatch):
    monkeypatch.setattr("tensorboardX.event_file_writer.time.time", lambda: 1_700_000_000.0)
    for step in (1, 2, 3):
        with MetricWriter(tmp_path, resume_step=step - 1) as writer:
            writer.write(step, "train", {"loss": step})
    assert tensorboard(tmp_path) == {"train/loss": [(1, 1.0), (2, 2.0), (3, 3.0)]}


def test_a_damaged_line_before_one_to_keep_is_named(tmp_path):
    lines = ['{"step": 1, "kind": "train"}', '{"step": 2, "ki', '{"step": 3, "kind": "train"}']
    (tmp_path / FILE).write_text("\n".join(lines) + "\n")
    for act in (lambda: MetricWriter(tmp_path, resume_step=3), lambda: read(tmp_path / FILE)):
        with pytest.raises(ValueError, match=f"{FILE}, line 2 is damaged"):
            act()
    assert (tmp_path / FILE).read_text().splitlines() == lines
    MetricWriter(tmp_path, resume_step=1).close()
    assert [row["step"] for row in read(tmp_path / FILE)] == [1]


@pytest.mark.parametrize("line", ["[]", '{"step": "1", "kind": "x"}', '{"step": 1}', "\u00ff", ""])
def test_read_tolerates_nothing(tmp_path, line):
    (tmp_path / FILE).write_text(f'{{"step": 1, "kind": "a"}}\n{line}\n', encoding="latin-1")
    with pytest.raises(ValueError, match=f"{FILE}, line 2 is damaged"):
        read(tmp_path / FILE)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none")


@pytest.mark.parametrize(
    "values, error, message",
    [
        ({"step": 1}, ValueError, "'step' is a field"),
        ({"kind": 1}, ValueError, "'kind' is a field"),
        ({"time": 1}, ValueError, "'time' is a field"),
        ({"loss": jnp.float32(1)}, TypeError, "metric 'loss' is ArrayImpl.*device_get"),
        ({"a": {"b": [object()]}}, TypeError, "metric 'a/b/0' is object"),
    ],
)
def test_refuses_what_is_no_metric(tmp_path, values, error, message):
    with MetricWriter(tmp_path, resume_step=0) as writer, pytest.raises(error, match=message):
        writer.write(1, "train", values)
    assert (tmp_path / FILE).read_text() == ""


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with MetricWriter(tmp_path / "run", resume_step=0) as writer:
        write_steps(writer, [1])
        writer.flush()
    assert not (tmp_path / "run").exists()


@pytest.fixture
def small_files():
    """Files may hold 4000 bytes, as on a disk that is full then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_a_clear_error_and_a_resume_repairs_the_file(tmp_path, small_files):
    writer = MetricWriter(tmp_path, resume_step=0)
    message = f"metrics cannot be written to {tmp_path}: File too large. Free space"
    with pytest.raises(OSError, match=message):
        write_steps(writer, range(1, 1000))
    with pytest.raises(OSError, match=message):
        writer.close()
    with MetricWriter(tmp_path, resume_step=10):
        assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 10, 10]


def test_a_full_disk_is_noticed_by_the_events_too(tmp_path, small_files):
    writer = MetricWriter(tmp_path, resume_step=0)
    with pytest.raises(OSError, match="metrics cannot be written"):
        for step in range(1, 1000):  # a line is shorter than its nine events
            writer.write(step, "t", {str(name): 0 for name in range(9)})
            writer.flush()
    assert (tmp_path / FILE).stat().st_size < 4000
    with pytest.raises(OSError, match="metrics cannot be written"):
        writer.close()


def test_an_unwritable_directory_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=f"metrics cannot be written to {tmp_path / 'file'}"):
        MetricWriter(tmp_path / "file", resume_step=0)


def test_pytorch_is_not_taken_along():
    """TensorBoard's writer would load it where it is installed, but leaves it to others to import."""
    program = "import sys, wkd_jax.training.metrics; assert 'torch' not in sys.modules; import torch"
    pytest.importorskip("torch")
    subprocess.run([sys.executable, "-c", program], env={**os.environ, "JAX_PLATFORMS": "cpu"}, check=True)
