"""The live line of a job: over itself on a terminal, now and then in a log, never among the lines that stay."""

from __future__ import annotations

import io
import json
import re
import threading
import time
from contextlib import redirect_stdout

import pytest

from e2h.distributed import console
from e2h.distributed.console import say, training_status, working
from e2h.settings import compose


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def often(monkeypatch):
    monkeypatch.setattr(console, "POLL_S", 0.01)
    monkeypatch.setenv("COLUMNS", "60")


def shown_on(terminal: io.StringIO) -> list[str]:
    return [text.rstrip() for text in terminal.getvalue().replace("\n", "\r").split("\r") if text.strip()]


def left_on(written: str) -> str:
    """What is seen after carriage returns were obeyed."""
    lines = []
    for line in written.split("\n"):
        cells = ""
        for text in line.split("\r"):
            cells = text + cells[len(text) :]
        lines.append(cells.rstrip())
    return "\n".join(lines)


def until(holds) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_parts_that_are_told_give_share_and_time_left_and_nothing_stays():
    with redirect_stdout(Terminal()) as terminal:
        with working("sample") as tell:
            until(lambda: re.fullmatch(r"sample     \d+s", shown_on(terminal)[-1] if shown_on(terminal) else ""))
            tell(8, 32)
            until(lambda: any(text.startswith("sample     part 8/32 25% eta ") for text in shown_on(terminal)))
            tell(32, 32)  # what follows the last part has no known end
            until(lambda: re.fullmatch(r"sample     \d+s", shown_on(terminal)[-1]))
        say("sample", "2000 synthetic images")
        assert left_on(terminal.getvalue()) == "sample     2000 synthetic images\n"


def test_a_line_said_meanwhile_stays_and_the_live_one_goes_on_below():
    with redirect_stdout(Terminal()) as terminal:
        with working("prepare"):
            until(lambda: shown_on(terminal))
            say("wait", "room for 2 workers")
            written = len(terminal.getvalue())
            until(lambda: "prepare" in terminal.getvalue()[written:])
        assert left_on(terminal.getvalue()) == "wait       room for 2 workers\n"


def test_lines_said_from_elsewhere_stay_whole(monkeypatch):
    monkeypatch.setattr(console, "POLL_S", 0.0001)
    with redirect_stdout(Terminal()) as terminal:
        with working("prepare"):
            threads = [threading.Thread(target=lambda: [say("wait", "room") for _ in range(300)]) for _ in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert set(left_on(terminal.getvalue()).splitlines()) == {"wait       room"}


def test_what_the_line_can_not_say_ends_nothing():
    with redirect_stdout(Terminal()) as terminal:
        with console._live(lambda: str(1 / 0)):
            time.sleep(0.05)
        assert terminal.getvalue() == ""


def test_a_terminal_that_was_closed_ends_nothing():
    terminal = Terminal()
    with redirect_stdout(terminal), working("prepare"):
        until(lambda: shown_on(terminal))
        terminal.close()
    assert console._Line.shown == []


def test_of_two_the_inner_is_seen():
    with redirect_stdout(Terminal()) as terminal:
        with working("search", "trials"):
            until(lambda: shown_on(terminal))
            with working("central"):
                until(lambda: shown_on(terminal)[-1].startswith("central"))
                written = len(terminal.getvalue())
                until(lambda: terminal.getvalue()[written:].count("\r") > 5)
                assert "search" not in terminal.getvalue()[written:]
            written = len(terminal.getvalue())
            until(lambda: "search     trials" in terminal.getvalue()[written:])
        assert left_on(terminal.getvalue()) == ""


def test_a_line_is_never_wider_than_the_terminal():
    with redirect_stdout(Terminal()) as terminal:
        with working("evaluate", "x" * 200):
            until(lambda: shown_on(terminal))
        assert max(map(len, terminal.getvalue().split("\r"))) == 59


def refused_after(seen) -> None:
    with working("prepare"):
        until(seen)
        _ = 1 / 0


def test_the_line_of_a_block_that_fails_is_gone():
    with redirect_stdout(Terminal()) as terminal:
        with pytest.raises(ZeroDivisionError):
            refused_after(lambda: shown_on(terminal))
        assert left_on(terminal.getvalue()) == ""


def test_a_log_has_no_line_of_what_is_soon_over():
    with redirect_stdout(io.StringIO()) as log:
        with working("prepare"):
            time.sleep(0.1)
        assert log.getvalue() == ""


def test_a_log_has_whole_lines_ever_further_apart(monkeypatch):
    with redirect_stdout(io.StringIO()) as log:
        monkeypatch.setattr(console, "LOG_LINE_EVERY_S", 0.02)
        monkeypatch.setattr(console, "LOG_LINE_EVERY_SHARE", 0.5)  # at 0.02, 0.04, 0.08, ... seconds
        with working("evaluate", "training classifiers"):
            time.sleep(1.0)
        lines = log.getvalue().splitlines()
        assert "\r" not in log.getvalue()
        assert all(re.fullmatch(r"evaluate   training classifiers \d+s", line) for line in lines)
        assert 2 <= len(lines) <= 9


def test_training_shows_the_step_that_rank_0_wrote_and_what_it_has_cost(tmp_path):
    with redirect_stdout(Terminal()) as terminal:
        config = compose({"scaling.num_workers": 2, "warmup.num_steps": 40, "finetune.num_steps": 60})
        path = tmp_path / "progress.json"
        path.write_text(json.dumps({"stage": "finetune", "step": 60, "restarts": 0}))  # of a call before this one
        with training_status(path, config, [(20, 6.5), (60, 9.999)], 9.999):
            until(lambda: any(text.startswith("train      starting 2 workers ") for text in shown_on(terminal)))
            for stage, step, text in [
                ("warmup", 10, "warmup     step 10/40 25%"),
                ("finetune", 12, "finetune   step 12/60 20% eps 6.50/10.00"),
                ("finetune", 30, "finetune   step 30/60 50% eps 10.00/10.00 "),
            ]:
                path.write_text(json.dumps({"stage": stage, "step": step, "restarts": 0}))
                until(lambda text=text: any(one.startswith(text) for one in shown_on(terminal)))
        assert "img/s eta" in terminal.getvalue()
        assert not path.exists()
        assert left_on(terminal.getvalue()) == ""
