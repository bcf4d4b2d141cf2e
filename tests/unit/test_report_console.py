"""Progress: its rate, and the time that is left."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from pipeline.report.console import Display, unit_of
from pipeline.report.pace import Pace, shown_rate, shown_time


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_steady_work_ends_when_it_was_said_to_from_the_first_step_on() -> None:
    clock = Clock()
    pace = Pace(50, clock=clock)
    assert pace.rate is None and pace.eta is None
    for done in range(1, 51):
        clock.now += 2.0
        pace.advance(1)
        assert pace.rate == pytest.approx(0.5)
        assert pace.eta == pytest.approx(2.0 * (50 - done))
    assert pace.share == 1.0


def test_the_start_of_workers_is_no_part_of_the_rate() -> None:
    clock = Clock()
    pace = Pace(10, clock=clock)
    clock.now += 30.0  # workers start
    clock.now += 1.0
    pace.advance(1, took=1.0)
    assert pace.rate == pytest.approx(1.0)
    assert pace.eta == pytest.approx(9.0)
    clock.now += 0.5  # it counts down between two steps, and stays at 0
    assert pace.eta == pytest.approx(8.5)
    clock.now += 60.0
    assert pace.eta == 0.0


def test_steps_that_are_more_work_than_others_count_for_more() -> None:
    clock = Clock()
    pieces = [300] * 10 + [100] * 10  # images of an epoch, a hundred a second
    pace = Pace(sum(pieces), clock=clock)
    for number, images in enumerate(pieces, 1):
        clock.now += images / 100
        pace.advance(images)
        assert pace.eta == pytest.approx(sum(pieces[number:]) / 100, abs=1e-6)


def test_what_was_there_already_does_not_make_the_rest_look_quick() -> None:
    clock = Clock()
    pace = Pace(100, clock=clock)
    pace.advance(60, took=0.0)
    clock.now += 5.0
    pace.advance(1, took=2.0)
    assert pace.rate == pytest.approx(0.5)
    assert pace.eta == pytest.approx(78.0)
    assert pace.share == pytest.approx(1 / 40)


@pytest.mark.parametrize("workers", [2, 4])
def test_what_workers_have_in_hand_counts_half(workers: int) -> None:
    clock = Clock()
    count, each = 40, 4.0  # workers that take turns: one is done every each / workers seconds
    pace = Pace(count, workers, clock=clock)
    began = clock.now + each * (1 - 1 / workers)  # the first one brings its piece after `each`
    clock.now = began
    ends = began + each / workers * count
    for done in range(1, count + 1):
        clock.now = began + each / workers * done
        pace.advance(1, took=each if done == 1 else None)
        if done >= count / 10:
            told = clock.now + (pace.eta or 0.0)
            assert abs(told - ends) <= 0.25 * (ends - began)
    assert pace.eta == 0.0


def test_rates_and_times_are_short() -> None:
    assert shown_rate(5210.4, "images") == "5,210 images/s"
    assert shown_rate(3.14159, "images") == "3.14 images/s"
    assert shown_rate(0.5, "teachers") == "2.0 s/teacher"
    assert [unit_of(title) for title in ("trials", "calibration", "teachers on paper")] == ["trials", "steps", "steps"]
    assert shown_rate(1 / 700, "trials") == "11:40/trial"
    assert [shown_time(seconds) for seconds in (4.6, 80, 3723)] == ["0:05", "1:20", "1:02:03"]


def test_lines_in_a_log_tell_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, out = Clock(), io.StringIO()
    monkeypatch.setattr("time.monotonic", clock)
    display = Display(Console(file=out, width=100))
    with display.bar("epochs", 8, "images", work=8_000) as advance:
        advance(0, "starting 2 workers")
        for epoch in range(1, 9):
            clock.now += 20.0 + 5.0 * (epoch == 1)
            advance(1, f"faculty, epoch {epoch}", 1_000, 20.0)
    lines = out.getvalue().splitlines()
    assert lines[0] == "  epochs 0/8  starting 2 workers"
    assert lines[1] == "  epochs 1/8  50 images/s  ETA 2:20  faculty, epoch 1"
    assert lines[-1] == "  epochs 8/8  50 images/s  faculty, epoch 8"


@pytest.mark.parametrize("kind", ["xterm", "dumb"])
def test_a_bar_on_a_terminal_tells_rate_and_time_left(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    clock, out = Clock(), io.StringIO()
    monkeypatch.setattr("time.monotonic", clock)
    monkeypatch.setenv("TERM", kind)  # a dumb one can't go back to move a bar: it gets lines
    console = Console(file=out, width=120, force_terminal=True, color_system=None, get_time=clock)
    with Display(console).bar("teachers", 4, at_once=1) as advance:
        for name in ("a[1]", "b"):
            clock.now += 3.0 if name == "a[1]" or kind == "xterm" else 11.0
            advance(1, name)
    shown = out.getvalue()
    if kind == "dumb":
        assert shown == "  teachers 1/4  3.0 s/teacher  ETA 0:09  a[1]\n  teachers 2/4  7.0 s/teacher  ETA 0:14  b\n"
    else:
        assert "3.0 s/teacher  ETA 0:06  b" in shown and "2/4" in shown
