"""A ledger in an S3 bucket: conditional writes, lost answers, deleted objects, and stores that can't do it."""

from __future__ import annotations

import json
import signal
import time

import boto3
import pytest
from ledger_cases import FORK, OWNER, PLAN, one_per_cent_a_step, race, spend, steps
from moto.server import ThreadedMotoServer

from e2h.data.remote import S3Path
from e2h.errors import BudgetError, InputError
from e2h.privacy.chain import ConflictError
from e2h.privacy.ledger import Ledger
from e2h.privacy.logs import ObjectLog, open_log

PLACE = "s3://bucket/some/run"
WITNESS = S3Path("bucket/apart/run.head")


def opened(witness=None, owner: str = OWNER) -> Ledger:
    ledger = Ledger(open_log(PLACE), owner, witness)
    ledger.open(PLAN, one_per_cent_a_step)
    return ledger


def key(position: int) -> str:
    return f"/bucket/some/run/{position:012d}"


def test_a_record_is_an_object_and_any_process_reads_them_all(store):
    ledger = opened()
    assert spend(ledger, 0, 16)
    assert not spend(ledger, 0, 16)
    assert spend(ledger, 16, 32)
    assert sorted(store.objects) == ["/bucket/some/run/.probe", *(key(position) for position in range(4))]
    again = opened()
    assert again.head() == ledger.head()
    assert again.head()[0] == 4
    assert steps(again) == 32


def test_a_second_writer_at_a_position_is_refused(store):
    first, second = ObjectLog(PLACE), ObjectLog(PLACE)
    first.append(b"one", 0)
    with pytest.raises(ConflictError):
        second.append(b"two", 0)
    second.append(b"two", 1)
    assert first.read() == second.read() == [b"one", b"two"]


def test_a_line_that_lost_the_race_is_not_kept(store):
    first, second = ObjectLog(PLACE), ObjectLog(PLACE)
    first.append(b"one", 0)
    with pytest.raises(ConflictError):
        second.append(b"two", 0)
    store.faults = [503] * 5  # for good
    with pytest.raises(InputError):
        second.append(b"two", 1)
    assert second.read() == [b"one"]
    store.faults = ["lost"] * 5  # written, though no answer came
    second.append(b"two", 1)
    assert second.read() == first.read() == [b"one", b"two"]


@pytest.mark.parametrize(("witness", "requests"), [(WITNESS, 4), (None, 2)])
def test_a_payment_is_few_requests(store, witness, requests):
    """The witness, the next record, which is not there; then that record is written, and the witness."""
    ledger = opened(witness)
    spend(ledger, 0, 16)
    for start in range(16, 96, 16):
        before = store.requests
        assert spend(ledger, start, start + 16)
        assert store.requests - before == requests
    assert steps(opened(witness)) == 96


def test_a_witness_in_a_bucket_knows_of_a_cut_tail(store):
    ledger = opened(WITNESS)
    spend(ledger, 0, 16)
    assert json.loads(store.objects["/bucket/apart/run.head"]) == list(ledger.head())
    del store.objects[key(2)]
    with pytest.raises(BudgetError, match=r"expected the 3 records that s3://bucket/apart/run\.head saw"):
        opened(WITNESS)


@pytest.mark.parametrize("faults", [["lost"], [503, 500], ["lost"] * 4])
def test_a_witness_in_a_bucket_is_written_again_where_an_answer_is_lost(store, faults):
    ledger = opened(WITNESS)
    spend(ledger, 0, 16)
    store.faults = [200, *faults]  # the record first
    assert spend(ledger, 16, 32)
    assert store.faults == []
    assert opened(WITNESS).head() == ledger.head()


def test_a_witness_that_can_not_be_written_is_one_line_and_the_payment_stands(store):
    ledger = opened(WITNESS)
    spend(ledger, 0, 16)
    store.faults = [200, *[503] * 5]
    with pytest.raises(InputError, match=rf"^{WITNESS}: expected an S3 bucket that may be read and written"):
        spend(ledger, 16, 32)
    assert steps(opened(WITNESS)) == 32
    assert not spend(ledger, 16, 32)
    assert spend(ledger, 32, 48)


def test_the_budget_is_checked_again_after_a_conflict(store, monkeypatch):
    """Another domain begins between the reading and the writing of this one: then nothing is left for it."""
    ledger, other = opened(), opened()
    ledger.take_over(), other.take_over()
    append = ObjectLog.append

    def slower(log, line, position):
        monkeypatch.setattr(ObjectLog, "append", append)
        spend(other, 0, 16, "b")
        append(log, line, position)

    monkeypatch.setattr(ObjectLog, "append", slower)
    with pytest.raises(BudgetError, match="16 were released in another domain"):
        spend(ledger, 0, 16, "a")
    assert steps(ledger) == 16


def test_an_older_owner_on_another_machine_is_refused(store):
    ledger = opened()
    spend(ledger, 0, 16)
    newer = opened(owner="aa" * 16)
    assert spend(newer, 16, 32)
    before = dict(store.objects)
    with pytest.raises(BudgetError, match="another process took over"):
        spend(ledger, 32, 48)
    assert store.objects == before


@pytest.mark.parametrize("faults", [["lost"], [503], [500, "lost"], [409], [409, 503, 409]], ids=str)
def test_a_bad_network_charges_once(store, faults):
    """`lost`: boto3 sends the write again and meets its own object. 409: another write is said to be under way."""
    ledger = opened()
    ledger.take_over()
    store.faults = list(faults)
    assert spend(ledger, 0, 16)
    assert store.faults == []
    assert steps(opened()) == 16
    assert ledger.head()[0] == 3


def test_where_every_answer_is_lost_what_lies_there_decides(store):
    ledger = opened()
    ledger.take_over()
    store.faults = ["lost"] * 5  # as often as boto3 tries
    assert spend(ledger, 0, 16)
    assert steps(opened()) == 16


def test_a_store_that_fails_for_good_is_one_line_and_charges_nothing(store):
    ledger = opened()
    ledger.take_over()
    store.faults = [503] * 5
    with pytest.raises(InputError, match=rf"^ledger {PLACE}: expected an S3 bucket that may be read and written"):
        spend(ledger, 0, 16)
    assert steps(opened()) == 0
    assert spend(ledger, 0, 16)


def test_a_store_that_ignores_the_condition_is_refused_before_anything_is_written(store):
    store.honours = False
    with pytest.raises(InputError, match="expected a store that honours If-None-Match"):
        opened()
    assert set(store.objects) == {"/bucket/some/run/.probe"}
    with pytest.raises(InputError, match="expected a store that honours If-None-Match"):
        ObjectLog(PLACE).probe()


def test_a_store_that_is_not_there_is_one_line(monkeypatch, store):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(InputError, match="Could not connect"):
        opened()


@pytest.mark.parametrize("position", [0, 1, 3, 4])
def test_a_deleted_object_is_found(store, tmp_path, position):
    ledger = opened(tmp_path / "head")
    for start in (0, 16, 32):
        spend(ledger, start, start + 16)
    del store.objects[key(position)]
    with pytest.raises(BudgetError, match="missing"):
        opened(tmp_path / "head")
    if position < 4:  # the last one leaves no gap; there the witness alone knows
        with pytest.raises(BudgetError, match=f"record {position} is missing"):
            opened()


def test_an_altered_object_is_found(store):
    ledger = opened()
    spend(ledger, 0, 16)
    for position in range(3):
        whole = store.objects[key(position)]
        for place in (0, len(whole) // 2, len(whole) - 1):
            altered = bytearray(whole)
            altered[place] ^= 1
            store.objects[key(position)] = bytes(altered)
            with pytest.raises(BudgetError, match=f"record {position} does not continue"):
                opened()
        store.objects[key(position)] = whole
    assert steps(opened()) == 16


def test_six_processes_race_for_one_bucket(store, tmp_path):
    race(PLACE, tmp_path / "head", 5)


def spend_for_ever() -> None:
    ledger = opened()
    for step in range(100):
        spend(ledger, step, step + 1)
    time.sleep(60)


def test_kills_leave_a_ledger_that_goes_on(store):
    opened()
    for _ in range(3):
        before = len(store.objects)
        process = FORK.Process(target=spend_for_ever)
        process.start()
        deadline = time.monotonic() + 60
        while len(store.objects) < before + 3 and time.monotonic() < deadline:
            time.sleep(0.005)
        process.kill()
        process.join(timeout=30)
        assert process.exitcode == -signal.SIGKILL
    ledger = opened()
    spends = [record for record in ledger.chain.read() if record["kind"] == "SPEND"]
    assert steps(ledger) == len(spends) >= 8


def test_against_moto(monkeypatch, store):
    """A server that others wrote, so that not only this folder's idea of S3 is tested."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        boto3.client("s3").create_bucket(Bucket="bucket")
        ledger = opened()
        assert spend(ledger, 0, 16)
        with pytest.raises(ConflictError):
            ObjectLog(PLACE).append(b"late", 1)
        assert steps(opened()) == 16
        absent = Ledger(open_log("s3://absent/run"))
        with pytest.raises(InputError, match="NoSuchBucket"):
            absent.open(PLAN, one_per_cent_a_step)
    finally:
        server.stop()
