"""The live line: over itself where somebody watches, nothing where nobody does."""

from __future__ import annotations

import io

import pytest

from e2h.reporting import status_line
from e2h.reporting.status_line import WIDTH, StatusLine


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Notebook(io.StringIO):
    """As Jupyter's, it is no terminal, but shows a carriage return as one."""


Notebook.__module__ = "ipykernel.iostream"


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(status_line.time, "monotonic", lambda: now[0])
    return now


def watched(monkeypatch, clock, out) -> str:
    monkeypatch.setattr("sys.stdout", out)
    with StatusLine() as line:
        line("prepare", 0, 1)
        for step in range(1, 5):
            clock[0] += 2.0
            line("finetune", step, 4)
        line("done", 1, 1)
    return out.getvalue()


@pytest.mark.parametrize("kind", [Terminal, Notebook])
def test_a_line_is_written_over_itself_and_ended_once(monkeypatch, clock, kind):
    lines = watched(monkeypatch, clock, kind()).split("\r")
    assert [line.rstrip() for line in lines] == [
        "",
        "prepare    ...",
        "finetune   step 1/4 25%",
        "finetune   step 2/4 50% eta 4 s",
        "finetune   step 3/4 75% eta 2 s",
        "finetune   step 4/4 100% eta 0 s",
        "done       in 8 s",
    ]
    assert {len(line) for line in lines[1:-1]} == {WIDTH}
    assert lines[-1].endswith(" \n")


def test_nothing_is_written_to_a_file(monkeypatch, clock):
    assert watched(monkeypatch, clock, io.StringIO()) == ""


def test_steps_faster_than_the_eye_are_left_out_but_not_the_last(monkeypatch, clock):
    out = Terminal()
    monkeypatch.setattr("sys.stdout", out)
    with StatusLine() as line:
        for step in range(1, 101):
            clock[0] += 0.01
            line("warmup", step, 100)
    assert 4 <= out.getvalue().count("\r") <= 8
    assert "step 100/100 100%" in out.getvalue()
