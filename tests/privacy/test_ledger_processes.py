"""The ledger under several processes, takeovers, and kills at any instant."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path

from ledger_cases import EVENT, FORK, OWNER, PLAN, file_ledger, one_per_cent_a_step, race, spend, steps

from e2h.errors import BudgetError
from e2h.privacy import logs
from e2h.privacy.chain import ConflictError
from e2h.privacy.events import PoissonSampledGaussian, Release
from e2h.privacy.ledger import Budget

LONG = PoissonSampledGaussian(0.1, 2.0, 1000)


def test_six_processes_race_for_one_file(tmp_path):
    race(str(tmp_path / "ledger.jsonl"), tmp_path / "head", 20)


def test_who_reads_to_write_is_alone_until_it_has_written(tmp_path, monkeypatch):
    """A second writer at the same position comes while the first has read and not yet written."""
    path, split, threads, answers = tmp_path / "log", logs.FileLog._split, [], []

    def second() -> None:
        try:
            answers.append(logs.FileLog(path).append(b"second", 0))
        except ConflictError:
            answers.append("refused")

    def paused(log, content):
        if not threads:
            threads.append(threading.Thread(target=second))
            threads[0].start()
            threads[0].join(timeout=0.5)  # as long as a writer without the lock may need; one with it waits
        return split(log, content)

    monkeypatch.setattr(logs.FileLog, "_split", paused)
    logs.FileLog(path).append(b"first", 0)
    threads[0].join(timeout=30)
    assert answers == ["refused"]
    assert path.read_bytes() == b"first\n"


def take_over_and_spend(path: Path, owner: str, start, answers) -> None:
    ledger, charged = file_ledger(path, owner), 0
    start.wait(timeout=60)
    try:
        for step in range(EVENT.count):
            charged += spend(ledger, step, step + 1)
        answers.put((owner, charged, ""))
    except BudgetError as refused:
        answers.put((owner, charged, str(refused)))


def test_of_six_drivers_the_newest_wins_and_every_step_is_paid_once(tmp_path):
    path = tmp_path / "ledger.jsonl"
    file_ledger(path).open(PLAN, one_per_cent_a_step)
    answers, start = FORK.Queue(), FORK.Barrier(6)
    owners = [f"{i:x}" * 32 for i in range(6)]
    drivers = [FORK.Process(target=take_over_and_spend, args=(path, owner, start, answers)) for owner in owners]
    for driver in drivers:
        driver.start()
    got = [answers.get(timeout=60) for _ in drivers]
    for driver in drivers:
        driver.join(timeout=30)
    state = file_ledger(path).state()
    # Who was not refused is the newest, or was through before a newer one came.
    assert state.owners[-1]["owner"] in {owner for owner, _, refused in got if not refused}
    assert all("another process took over" in refused for _, _, refused in got if refused)
    newest = ""
    for record in file_ledger(path).chain.read():
        newest = record["owner"] if record["kind"] == "OWNER" else newest
        assert record["kind"] != "SPEND" or record["owner"] == newest
    assert sum(charged for _, charged, _ in got) == EVENT.count
    assert state.charged() == PLAN.planned


def spend_and_use(path: Path, witness: Path, used: Path) -> None:
    """Goes on where the used steps end; "uses" each step, durably, as soon as its spend returns."""
    ledger = file_ledger(path, OWNER, witness)
    descriptor = os.open(used, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for step in range(used.stat().st_size // 8, LONG.count):
        ledger.spend("finetune", LONG, "a", step, step + 1)
        os.write(descriptor, step.to_bytes(8, "big"))
    time.sleep(60)


def test_no_step_is_used_uncharged_or_charged_twice_whenever_the_process_is_killed(tmp_path):
    path, witness, used = tmp_path / "ledger.jsonl", tmp_path / "head", tmp_path / "used"
    ledger = file_ledger(path, OWNER, witness)
    ledger.open(Budget(10.0, 1e-5, "REPLACE_SPECIAL", (Release("finetune", LONG),)), one_per_cent_a_step)
    instants = random.Random(0)
    for _ in range(40):
        process = FORK.Process(target=spend_and_use, args=(path, witness, used))
        process.start()
        time.sleep(instants.uniform(0.005, 0.08))
        os.kill(process.pid, signal.SIGKILL)
        process.join(timeout=30)
        content = used.read_bytes() if used.exists() else b""
        done = [int.from_bytes(content[i : i + 8], "big") for i in range(0, len(content), 8)]
        assert done == list(range(len(done)))
        charged = ledger.paid("finetune", "a")
        assert set(done) <= charged
        assert len(charged) - len(done) <= 1  # the step that was charged when the kill came; its replay is free
        spends = [record for record in ledger.chain.read() if record["kind"] == "SPEND"]
        assert len(spends) == len(charged)
    assert len(done) > 10, "the kills came before any step was used"


def torn_append(path: Path, instant: int) -> None:
    """Dies in the middle of the write itself, after `instant` bytes of the line."""
    ledger = file_ledger(path)

    def dying(file, content):
        file.write(content[:instant])
        os.kill(os.getpid(), signal.SIGKILL)

    logs._write = dying
    spend(ledger, 16, 32)


def test_a_kill_inside_the_write_loses_nothing(ledger):
    spend(ledger, 0, 16)
    path = ledger.chain.log.path
    before = path.read_bytes()
    for instant in (0, 1, 100, 10_000):
        process = FORK.Process(target=torn_append, args=(path, instant))
        process.start()
        process.join(timeout=30)
        assert process.exitcode == -signal.SIGKILL
        left = path.read_bytes()
        assert left.startswith(before)
        # All its bytes written: the charge stands, although nobody was told.
        whole = left.endswith(b"\n") and len(left) > len(before)
        assert whole == (instant == 10_000)
        assert steps(ledger) == (32 if whole else 16)
    assert not spend(ledger, 16, 32)
