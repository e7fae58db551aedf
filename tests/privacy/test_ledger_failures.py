"""The ledger under several processes, kills, full disks and forgery."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import resource
import signal
import time
from pathlib import Path

import pytest
from ledger_cases import EVENT, PLAN, one_per_cent_a_step, spend, steps

from e2h.errors import BudgetError
from e2h.privacy.events import PoissonSampledGaussian, Release
from e2h.privacy.ledger import Budget, Ledger

# Forking is safe here: the children touch files only.
FORK = multiprocessing.get_context("fork")


def test_every_flipped_byte_is_found(ledger):
    spend(ledger, 0, 16)
    spend(ledger, 16, 32)
    whole = ledger.path.read_bytes()
    # Without the witness: the file alone must show it, in the last line and its end too.
    alone = Ledger(ledger.path, one_per_cent_a_step)
    for place in range(len(whole)):
        altered = bytearray(whole)
        altered[place] ^= 1 << random.Random(place).randrange(8)
        ledger.path.write_bytes(altered)
        with pytest.raises(BudgetError):
            alone.charged()
    ledger.path.write_bytes(whole)
    assert steps(alone) == 32


@pytest.mark.parametrize(
    "forge",
    [
        lambda lines: lines[1:],
        lambda lines: [lines[0], *lines[2:]],
        lambda lines: [lines[0], lines[2], lines[1], lines[3]],
        lambda lines: [*lines, lines[-1]],
        lambda lines: [*lines[:-1], lines[-1].replace(b'"steps":[32,48]', b'"steps":[32,33]')],
        lambda lines: [lines[0].replace(b'"epsilon":1.0', b'"epsilon":9.0'), *lines[1:]],
        lambda lines: [*lines, b"not json"],
        lambda lines: [*lines, b"[]"],
        lambda lines: [*lines, b""],
    ],
    ids=["first", "deleted", "swapped", "doubled", "steps", "budget", "text", "list", "blank"],
)
def test_a_forged_ledger_is_refused_by_every_call(tmp_path, ledger, forge):
    for start in (0, 16, 32):
        spend(ledger, start, start + 16)
    content = b"".join(line + b"\n" for line in forge(ledger.path.read_bytes().splitlines()))
    ledger.path.write_bytes(content)
    alone = Ledger(ledger.path, one_per_cent_a_step)
    calls = [alone.charged, alone.budget, alone.head, lambda: alone.open(PLAN), lambda: alone.paid("finetune", "a")]
    for call in [*calls, lambda: spend(alone, 48, 64)]:
        with pytest.raises(BudgetError, match="altered"):
            call()
    assert ledger.path.read_bytes() == content


def test_a_cut_tail_is_found_by_the_witness(ledger):
    spend(ledger, 0, 16)
    spend(ledger, 16, 32)
    lines = ledger.path.read_bytes().splitlines(keepends=True)
    ledger.path.write_bytes(b"".join(lines[:-1]))
    with pytest.raises(BudgetError, match=r"expected the 3 records that .*head saw"):
        ledger.charged()
    assert steps(Ledger(ledger.path, one_per_cent_a_step)) == 16  # what the chain alone can't see


def test_a_kill_before_the_witness_leaves_a_ledger_that_goes_on(ledger):
    spend(ledger, 0, 16)
    before = ledger.witness.read_bytes()
    spend(ledger, 16, 32)
    ledger.witness.write_bytes(before)
    assert spend(ledger, 32, 48)
    assert steps(ledger) == 48


def test_an_unreadable_witness_is_refused_in_words(ledger):
    ledger.witness.write_bytes(b"")
    with pytest.raises(BudgetError, match="expected the ledger's length and head"):
        ledger.charged()


def test_a_torn_last_line_is_cut_and_nothing_else_lost(ledger):
    spend(ledger, 0, 16)
    before = ledger.path.read_bytes()
    witness = ledger.witness.read_bytes()
    spend(ledger, 16, 32)
    line = ledger.path.read_bytes()[len(before) :]
    for length in range(1, len(line)):
        ledger.path.write_bytes(before + line[:length])
        ledger.witness.write_bytes(witness)
        assert steps(ledger) == 16
        assert ledger.path.read_bytes() == before
    assert spend(ledger, 16, 32)
    assert steps(ledger) == 32


def spend_in_turn(ledger: Ledger, own: str, answers) -> None:
    charged = [(spend(ledger, i, i + 1, "shared"), spend(ledger, i, i + 1, own)) for i in range(50)]
    answers.put(charged)


def test_two_processes_race_for_one_ledger(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl", one_per_cent_a_step, tmp_path / "head")
    event = PoissonSampledGaussian(0.1, 2.0, 300)
    ledger.open(Budget(3.0, 1e-5, "REPLACE_SPECIAL", (Release("finetune", event),)))
    answers = FORK.Queue()
    racers = [FORK.Process(target=spend_in_turn, args=(ledger, own, answers)) for own in ("b", "c")]
    for racer in racers:
        racer.start()
    first, second = answers.get(timeout=60), answers.get(timeout=60)
    for racer in racers:
        racer.join(timeout=60)
        assert racer.exitcode == 0
    # Each shared step was charged by exactly one of the two, each own step by its owner.
    assert [a[0] + b[0] for a, b in zip(first, second, strict=True)] == [1] * 50
    assert all(own for _, own in (*first, *second))
    assert steps(ledger) == 150
    assert ledger.head()[0] == 151
    for domain in ("shared", "b", "c"):
        assert ledger.paid("finetune", domain) == set(range(50))


def spend_and_use(ledger: Ledger, used: Path) -> None:
    """Goes on where the used steps end; "uses" each step, durably, as soon as its spend returns."""
    descriptor = os.open(used, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for step in range(used.stat().st_size // 8, EVENT.count):
        spend(ledger, step, step + 1)
        os.write(descriptor, step.to_bytes(8, "big"))
    time.sleep(60)


def test_no_step_is_used_uncharged_whenever_the_process_is_killed(ledger, tmp_path):
    instants, used = random.Random(0), tmp_path / "used"
    for _ in range(10):
        process = FORK.Process(target=spend_and_use, args=(ledger, used))
        process.start()
        time.sleep(instants.uniform(0.005, 0.08))
        os.kill(process.pid, signal.SIGKILL)
        process.join(timeout=30)
        content = used.read_bytes() if used.exists() else b""
        done = {int.from_bytes(content[i : i + 8], "big") for i in range(0, len(content), 8)}
        charged = ledger.paid("finetune", "a")
        assert done <= charged
        assert len(charged - done) <= 1  # the step that was charged when the kill came; its replay is free
    assert done, "the kills came before any step was used"


def spend_within(ledger: Ledger, room: int) -> None:
    """Spends where files may grow by `room` bytes only, as on a disk that is nearly full."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limit = ledger.path.stat().st_size + room
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        spend(ledger, 16, 32)
    except OSError:
        os._exit(7)


@pytest.mark.parametrize("room", [0, 1, 50])
def test_a_full_disk_leaves_the_file_as_it_was(ledger, room):
    spend(ledger, 0, 16)
    before = ledger.path.read_bytes()
    process = FORK.Process(target=spend_within, args=(ledger, room))
    process.start()
    process.join(timeout=30)
    assert process.exitcode == 7
    assert ledger.path.read_bytes() == before
    assert spend(ledger, 16, 32)
    assert steps(ledger) == 32


def test_a_disk_that_fails_to_sync_has_charged_nothing(ledger, monkeypatch):
    before = ledger.path.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            spend(ledger, 0, 16)
    assert ledger.path.read_bytes() == before
    assert spend(ledger, 0, 16)
