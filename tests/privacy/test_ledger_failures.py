"""The ledger under forgery, cut tails, torn lines and full disks."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import signal
from pathlib import Path

import pytest
from ledger_cases import EVENT, FORK, OWNER, PLAN, file_ledger, one_per_cent_a_step, spend, steps

from e2h.errors import BudgetError, InputError
from e2h.privacy.chain import encode
from e2h.privacy.ledger import Ledger
from e2h.privacy.logs import open_log


def alone(ledger: Ledger) -> Ledger:
    """The same file without its witness."""
    return file_ledger(ledger.chain.log.path, ledger.owner)


def test_every_flipped_byte_is_found(ledger):
    spend(ledger, 0, 16)
    spend(ledger, 16, 32)
    path = ledger.chain.log.path
    whole = path.read_bytes()
    # Without the witness: the file alone must show it, in the first line and in the last one's end too.
    for place in range(len(whole)):
        altered = bytearray(whole)
        altered[place] ^= 1 << random.Random(place).randrange(8)
        path.write_bytes(altered)
        with pytest.raises((BudgetError, InputError)):
            alone(ledger).charged()
    path.write_bytes(whole)
    assert steps(alone(ledger)) == 32


def rewritten(line: bytes) -> bytes:
    """Fewer steps, and its own hash right again: the next record still names the old one."""
    return encode({**json.loads(line), "steps": [0, 1]})


@pytest.mark.parametrize(
    "forge",
    [
        lambda lines: lines[1:],
        lambda lines: [lines[0], *lines[2:]],
        lambda lines: [lines[0], lines[2], lines[1], *lines[3:]],
        lambda lines: [*lines, lines[-1]],
        lambda lines: [*lines[:-1], lines[-1].replace(b'"steps":[32,48]', b'"steps":[32,33]')],
        lambda lines: [lines[0].replace(b'"epsilon":1.0', b'"epsilon":9.0'), *lines[1:]],
        lambda lines: [*lines[:2], rewritten(lines[2]), *lines[3:]],
        lambda lines: [*lines, b"not json"],
        lambda lines: [*lines, b"[]"],
        lambda lines: [*lines, b""],
    ],
    ids=["first", "deleted", "swapped", "doubled", "steps", "budget", "rewritten", "text", "list", "blank"],
)
def test_a_forged_ledger_is_refused_by_every_call(ledger, forge):
    for start in (0, 16, 32):
        spend(ledger, start, start + 16)
    path = ledger.chain.log.path
    content = b"".join(line + b"\n" for line in forge(path.read_bytes().splitlines()))
    path.write_bytes(content)
    forged = alone(ledger)
    calls = [forged.charged, forged.budget, forged.head, lambda: forged.open(PLAN, one_per_cent_a_step)]
    for call in [*calls, lambda: forged.paid("finetune", "a"), lambda: spend(forged, 48, 64)]:
        with pytest.raises(BudgetError, match="altered"):
            call()
    assert path.read_bytes() == content


def forged_chain(ledger: Ledger, *more: dict) -> None:
    """Appends records with right hashes, as one who knows the format would."""
    for content in more:
        ledger.chain.append(lambda records, content=content: content)


SPENT = {"kind": "SPEND", "owner": OWNER, "release": "finetune", "domain": "a", "steps": [16, 32]}
UNIT = {**EVENT.to_json(), "count": 1}


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({**SPENT, "event": UNIT, "domain": "b", "steps": [0, 90]}, "122 would be needed"),
        ({**SPENT, "event": {**UNIT, "noise_multiplier": 9.0}, "domain": "b"}, "expected a release of the plan"),
        ({**SPENT, "event": UNIT, "owner": "ee" * 16}, "another process took over"),
        ({**SPENT, "event": UNIT, "release": "central"}, "expected one release and event"),
        ({"kind": "OPEN", "epsilon": 9.0}, "the budget first, and once"),
        ({"kind": "REFUND", "steps": [0, 16]}, "unknown kind"),
        ({"kind": "SPEND"}, "can't stand"),
    ],
    ids=["too many", "other event", "other owner", "other release", "second budget", "refund", "empty"],
)
def test_a_record_against_the_rules_is_found_although_its_hashes_are_right(ledger, record, said):
    spend(ledger, 0, 16)
    forged_chain(ledger, {**SPENT, "event": UNIT})
    assert steps(ledger) == 32
    forged_chain(ledger, record)
    with pytest.raises(BudgetError, match=said):
        ledger.charged()
    with pytest.raises(BudgetError, match=said):
        spend(ledger, 32, 48)


def test_a_ledger_of_another_version_is_refused_in_words(ledger):
    path = ledger.chain.log.path
    path.write_bytes(encode({**json.loads(path.read_bytes()), "v": 1}) + b"\n")
    with pytest.raises(InputError, match="expected a ledger of version 2, found 1"):
        alone(ledger).charged()


# The witness ----------------------------------------------------------------------------------------------------------


def test_a_cut_tail_is_found_by_the_witness(ledger):
    spend(ledger, 0, 16)
    spend(ledger, 16, 32)
    path = ledger.chain.log.path
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    with pytest.raises(BudgetError, match=r"expected the 4 records that .*head saw"):
        ledger.charged()
    assert steps(alone(ledger)) == 16  # what the chain alone can't see


def test_an_emptied_ledger_begins_anew_only_where_that_is_allowed(ledger):
    spend(ledger, 0, 16)
    ledger.chain.log.path.unlink()
    assert ledger.budget() is None
    ledger.chain.begins_anew = False
    with pytest.raises(BudgetError, match=r"expected the 3 records that .*head saw"):
        ledger.budget()


def test_a_kill_before_the_witness_leaves_a_ledger_that_goes_on(ledger):
    spend(ledger, 0, 16)
    before = ledger.chain.witness.read_bytes()
    spend(ledger, 16, 32)
    ledger.chain.witness.write_bytes(before)
    assert spend(ledger, 32, 48)
    assert steps(ledger) == 48


def test_an_unreadable_witness_is_refused_in_words(ledger):
    ledger.chain.witness.write_bytes(b"")
    with pytest.raises(BudgetError, match="expected the ledger's length and head"):
        ledger.charged()


# Torn lines, full disks -----------------------------------------------------------------------------------------------


def test_a_torn_last_line_counts_for_nothing_and_the_next_charge_cuts_it(ledger):
    spend(ledger, 0, 16)
    path, witness = ledger.chain.log.path, ledger.chain.witness
    before, seen = path.read_bytes(), witness.read_bytes()
    spend(ledger, 16, 32)
    line = path.read_bytes()[len(before) :]
    for length in range(1, len(line)):
        path.write_bytes(before + line[:length])
        witness.write_bytes(seen)
        assert steps(ledger) == 16
        assert path.read_bytes() == before + line[:length]  # a reader changes nothing
    assert spend(ledger, 16, 32)
    content = path.read_bytes()
    assert content.startswith(before)
    assert content.count(b"\n") == 4
    assert steps(alone(ledger)) == 32


def spend_within(ledger: Ledger, room: int) -> None:
    """Spends where files may grow by `room` bytes only, as on a disk that is nearly full."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limit = ledger.chain.log.path.stat().st_size + room
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        spend(ledger, 16, 32)
    except OSError:
        os._exit(7)


@pytest.mark.parametrize("room", [0, 1, 50])
def test_a_full_disk_leaves_the_file_as_it_was(ledger, room):
    spend(ledger, 0, 16)
    path = ledger.chain.log.path
    before = path.read_bytes()
    process = FORK.Process(target=spend_within, args=(ledger, room))
    process.start()
    process.join(timeout=30)
    assert process.exitcode == 7
    assert path.read_bytes() == before
    assert spend(ledger, 16, 32)
    assert steps(ledger) == 32


def test_a_disk_that_fails_to_sync_has_charged_nothing(ledger, monkeypatch):
    spend(ledger, 0, 16)
    path = ledger.chain.log.path
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            spend(ledger, 16, 32)
    assert path.read_bytes() == before
    assert spend(ledger, 16, 32)


def test_a_ledger_may_lie_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    Ledger(open_log("~/own.jsonl"), OWNER).open(PLAN, one_per_cent_a_step)
    assert (tmp_path / "own.jsonl").exists()


def test_a_folder_that_is_not_there_is_one_line(tmp_path):
    ledger = file_ledger(tmp_path / "nowhere" / "ledger.jsonl")
    with pytest.raises(InputError, match="expected a file in a folder that exists"):
        ledger.open(PLAN, one_per_cent_a_step)


def test_a_ledger_that_may_not_be_looked_at_is_no_empty_one(ledger, monkeypatch):
    def denied(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", denied)
    with pytest.raises(InputError, match=r"ledger\.jsonl: expected a file in a folder .* \(Permission denied\)"):
        ledger.chain.log.read()
