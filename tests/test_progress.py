"""How far long calls are, and how long they take: lines now and then, estimates that are honest."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from families import tiny
from sweep_helpers import fast, some_facts

import goldenlayers as gl
from goldenlayers import progress as progress_room
from goldenlayers.evaluation.metrics import metrics_of
from goldenlayers.progress import Pace, in_words, progress
from goldenlayers.shown import showing
from goldenlayers.sweeping import cells
from goldenlayers.sweeping.cells import Batch, Course, Job, Task


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(progress_room.time, "monotonic", lambda: self.now)

    def after(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_a_line_now_and_then_and_one_estimate(clock: Clock) -> None:
    lines: list[str] = []
    pace = Pace("editing: ", "facts", lines.append)
    pace(0, 100)
    for done in range(1, 101):
        clock.after(5)
        pace(done, 100)
    assert lines[0] == "editing: about 8 min on this machine for 100 facts (by the first 3)"
    assert lines[1] == "editing: 9 of 100 facts, 45 s so far, about 8 min left"
    counts = [int(line.split()[1]) for line in lines[1:]]
    assert counts == list(range(9, 100, 6))  # 30 s apart, and none at the end
    assert len([line for line in lines if "on this machine" in line]) == 1


def test_what_an_earlier_call_has_done_is_no_pace(clock: Clock) -> None:
    lines: list[str] = []
    pace = Pace("", "edits", lines.append)
    pace(900, 1000)
    clock.after(10)
    pace(910, 1000)
    assert lines == ["about 2 min on this machine for 100 edits (by the first 10)"]
    # The negative control: from nothing the same reports would say seconds.
    lines.clear()
    pace = Pace("", "edits", lines.append)
    pace(0, 1000)
    clock.after(10)
    pace(910, 1000)
    assert lines == []  # a second is left


def test_nothing_is_said_of_short_or_unmeasured_work(clock: Clock) -> None:
    lines: list[str] = []
    pace = Pace("", "facts", lines.append)
    pace(0, 10)
    clock.after(0.01)
    pace(1, 1_000_000)  # would be hours, by a hundredth of a second
    for done in range(2, 11):
        clock.after(1)
        pace(done, 10)
    assert lines == []
    silent = Pace("", "facts", lines.append, estimate=False)
    silent(0, 100)
    clock.after(20)
    silent(1, 100)
    assert lines == []
    clock.after(20)
    silent(2, 100)
    assert lines == ["2 of 100 facts, 40 s so far, about 33 min left"]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "1 s"), (89, "89 s"), (91, "2 min"), (5399, "90 min"), (9000, "2.5 h")],
)
def test_times_in_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words


def work(clock: Clock) -> None:
    with progress("locating", "facts") as tell:
        tell(0, 10)
        for done in (1, 2, 3):
            clock.after(40)
            tell(done, 10)


def test_lines_off_a_terminal_a_bar_on_one(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with showing():
        work(clock)
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines() == [
        "locating: about 7 min on this machine for 10 facts (by the first 1)",
        "locating: 2 of 10 facts, 80 s so far, about 5 min left",
        "locating: 3 of 10 facts, 2 min so far, about 5 min left",
    ]
    with showing(quiet=True):
        work(clock)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with showing():
        work(clock)
    err = capsys.readouterr().err
    assert "on this machine" in err and "so far" not in err and "3/10" in err
    out = sys.stdout
    with progress("asking", "prompts"):  # what is printed beside a bar goes where it was sent
        assert sys.stdout is out


def test_python_has_lines_too(
    clock: Clock, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    shown = gl.Progress.told("facts")
    logged = gl.Progress.told("facts", logging.getLogger("mine").info, every=1)
    assert shown.on_note is print and logged.chunk is None
    assert gl.Progress.told(chunk=3).chunk == 3
    with caplog.at_level(logging.INFO, "mine"):
        for one in (shown, logged):
            one.tell(0, 10)
            clock.after(60)
            one.tell(1, 10)
    line = "about 10 min on this machine for 10 facts (by the first 1)"
    assert capsys.readouterr().out == f"{line}\n"
    assert [record.getMessage() for record in caplog.records if record.name == "mine"] == [line]


CALLS: dict[str, Callable[[Any, list[Any], gl.Progress], Any]] = {
    "edit": lambda m, f, p: gl.edit(m, f, fast("ft-m"), layer=1, progress=p),
    "edit_each": lambda m, f, p: gl.edit_each(m, f, fast("ft-m"), layer=1, progress=p),
    "evaluate": lambda m, f, p: gl.evaluate(m, f, progress=p),
    "locate": lambda m, f, p: gl.locate(m, f, bootstrap=0, progress=p),
    "sweep": lambda m, f, p: gl.sweep(m, f, fast("ft-m"), layers=[0, 1], progress=p),
}


@pytest.mark.parametrize("call", CALLS)
def test_calls_report_before_they_begin_and_when_all_is_done(call: str) -> None:
    told: list[tuple[int, int]] = []
    facts = some_facts(3)
    CALLS[call](tiny("llama"), facts, gl.Progress(on_progress=lambda *one: told.append(one)))
    total = len(facts) * (2 if call == "sweep" else 1)
    assert told[0] == (0, total) and told[-1] == (total, total)
    assert told == sorted(told)


def test_a_sweep_foretells_by_its_first_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    tell = gl.Progress(on_note=notes.append, chunk=2)
    facts = some_facts(4)
    gl.sweep(tiny("llama"), facts, fast("ft-m"), layers=[0, 1], progress=tell)
    assert notes == []  # it takes no minute
    monkeypatch.setattr(cells, "WORTH_SAYING", 0.0)
    gl.sweep(tiny("llama"), facts, fast("ft-m"), layers=[0, 1], progress=tell)
    assert len(notes) == 1 and "for 8 edits, by the first 2" in notes[0]
    # Lower layers take longer: 12, 7 and 2 parts of ten layers.
    notes.clear()
    job = Job(tuple(facts), fast("ft-m"), metrics_of(["rewrite"]), 0, False)
    course = Course(job, [0, 5], replace(tell, on_note=notes.append))
    tasks = [Task(0, (0, 1), 0), Task(0, (0, 1), 5), Task(1, (2, 3), 0), Task(1, (2, 3), 5)]
    course.foretell(Batch(tasks[0], [], None, 120.0), tasks, 10, 1)
    assert seconds(notes[0]) == round(120 * (12 + 7 + 12 + 7) / 12 / 60)
    course.foretell(Batch(tasks[0], [], None, 120.0), tasks, 10, 2)
    assert seconds(notes[1]) == round(120 * (12 + 7 + 12 + 7) / 12 / 60 / 2)


def seconds(note: str) -> int:
    (found,) = re.findall(r"about (\d+) min", note)
    return int(found)
