import io
import re

import jax
import pytest

from wkd_jax.training.progress import Progress, duration, number


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setenv("LINES", "40")
    return Terminal()


def without_codes(text):
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_plain_lines_are_apart_by_seconds_and_end_with_the_last_step():
    clock, stream = Clock(), io.StringIO()
    with Progress(100, description="run", stream=stream, clock=clock) as progress:
        for step in range(1, 101):
            clock.now += 0.5
            progress.update(step, {"loss": 1 / step})
    lines = stream.getvalue().splitlines()
    assert lines[0] == "run: step 1/100 (1%), 0:00:50 left, 2.000 steps/s, loss 1.000"
    assert [int(re.search(r"step (\d+)/", line).group(1)) for line in lines] == [
        1,
        11,
        21,
        31,
        41,
        51,
        61,
        71,
        81,
        91,
        100,
    ]
    assert lines[-1] == "run: step 100/100 (100%), 0:00:00 left, 2.000 steps/s, loss 0.01000"
    assert "\r" not in stream.getvalue() and "\x1b" not in stream.getvalue()


def test_the_speed_follows_the_last_minute():
    clock, stream = Clock(), io.StringIO()
    with Progress(10_000, description="run", stream=stream, clock=clock) as progress:
        for step in range(10, 200, 10):  # 1 step/s
            clock.now += 10
            progress.update(step, {})
        for step in range(300, 1300, 100):  # 10 steps/s, for 100 s
            clock.now += 10
            progress.update(step, {})
    first, last = stream.getvalue().splitlines()[0], stream.getvalue().splitlines()[-1]
    assert "2:46:30 left, 1.000 steps/s" in first
    assert "0:14:40 left, 10.00 steps/s" in last


def test_a_resumed_run_counts_its_own_steps_for_the_speed():
    clock, stream = Clock(), io.StringIO()
    with Progress(1000, description="run", start_step=900, stream=stream, clock=clock) as progress:
        clock.now += 10
        progress.update(910, {})
    assert stream.getvalue() == "run: step 910/1000 (91%), 0:01:30 left, 1.000 steps/s\n"


def test_no_speed_before_there_is_one():
    stream = io.StringIO()
    with Progress(10, description="run", stream=stream, clock=Clock()) as progress:
        progress.update(0, {"loss": 2})
    assert stream.getvalue() == "run: step 0/10 (0%), loss 2\n"


def test_notes_are_always_printed():
    stream = io.StringIO()
    with Progress(10, description="run", stream=stream, clock=Clock()) as progress:
        for message in ("checkpoint [bold]3[/bold] is damaged", "two\nlines"):
            progress.note(message)
    assert stream.getvalue() == "checkpoint [bold]3[/bold] is damaged\ntwo\nlines\n"


def test_a_terminal_gets_a_bar_and_notes_above_it(terminal):
    clock = Clock()
    with Progress(200, description="kd [cifar]", stream=terminal, clock=clock) as progress:
        clock.now += 10
        progress.update(50, {"loss": 1.23456, "top1": 71.25})
        progress.note("checkpoint [bold]/run/3[/bold] is damaged " + 30 * "long ")
    text = without_codes(terminal.getvalue())
    last = text.splitlines()[-1]
    for part in ("kd [cifar]", "50/200", "25%", "0:00:30 left, 5.000 steps/s", "loss 1.235", "top1 71.25"):
        assert part in last
    assert "checkpoint [bold]/run/3[/bold] is damaged " + 30 * "long " in text


def test_many_metrics_stay_on_one_line_of_a_terminal(terminal):
    with Progress(200, description="run", stream=terminal, clock=Clock()) as progress:
        progress.update(50, {f"a/long/name/{i}": i + 0.5 for i in range(30)})
    lines = without_codes(terminal.getvalue()).splitlines()
    assert "50/200" in lines[-1] and "a/long/name/0 0.5000" in lines[-1]
    assert all(len(line) <= 140 for line in lines)
    assert not any("a/long" in line and "50/200" not in line for line in lines)


def test_the_bar_is_gone_after_an_error(terminal):
    with pytest.raises(RuntimeError), Progress(5, description="run", stream=terminal, clock=Clock()) as progress:
        raise RuntimeError
    assert not progress._bar.live.is_started


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_only_the_first_process_shows_it(monkeypatch, stream):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    stream = stream()
    with Progress(5, description="run", stream=stream, clock=Clock()) as progress:
        progress.update(5, {"loss": 1.0})
        progress.note("hello")
    assert stream.getvalue() == ""


@pytest.mark.parametrize("start, total", [(-1, 5), (6, 5), (0, 0)])
def test_refuses_impossible_steps(start, total):
    with pytest.raises(ValueError, match=f"start_step={start}, total_steps={total}"):
        Progress(total, description="run", start_step=start)


def test_a_finished_run_can_be_shown():
    stream = io.StringIO()
    with Progress(5, description="run", start_step=5, stream=stream, clock=Clock()) as progress:
        progress.update(5, {})
    assert stream.getvalue() == "run: step 5/5 (100%)\n"


@pytest.mark.parametrize("value", [1e-8, 3.14159e-4, 0.0123456, 9.99951, 999.949, 54321.6, 6.5e6, 2.5e8, -123.456])
def test_four_significant_digits_are_kept(value):
    assert float(number(value)) == pytest.approx(value, rel=5.1e-4)
    assert len(number(value)) <= 10


def test_durations_round_to_whole_seconds():
    assert [duration(x) for x in (0, 0.4, 59.5, 3599.7, 86400)] == [
        "0:00:00",
        "0:00:00",
        "0:01:00",
        "1:00:00",
        "24:00:00",
    ]
