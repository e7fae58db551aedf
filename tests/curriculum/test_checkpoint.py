"""Checkpoints: whole or absent, of this run alone, and read without executing anything."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import random
import stat
import threading
from types import SimpleNamespace

import pytest
import torch

from e2h.curriculum import checkpoint as checkpoint_module
from e2h.curriculum.checkpoint import DIGEST_BYTES, FORMAT, Checkpoints
from e2h.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")
STATE = {"network": {"weight": torch.arange(6.0).reshape(2, 3)}, "step": 3, "names": ["a", "b"]}


@pytest.fixture
def checkpoints(tmp_path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", "this run")


def seal(path, content: bytes) -> None:
    """As if e2h had written it."""
    path.write_bytes(content + hashlib.sha256(content).digest())


def only_file(checkpoints: Checkpoints):
    checkpoints.wait()
    (path,) = checkpoints.folder.iterdir()
    return path


def test_a_state_comes_back(checkpoints):
    assert checkpoints.latest("finetune") is None
    checkpoints.save("finetune", 5, STATE)
    step, state = checkpoints.latest("finetune")
    assert step == 5
    assert torch.equal(state["network"]["weight"], STATE["network"]["weight"])
    assert (state["step"], state["names"]) == (3, ["a", "b"])
    assert checkpoints.latest("warmup") is None


def test_the_newest_is_read_and_two_are_kept(checkpoints):
    for step in (5, 100, 20):
        checkpoints.save("finetune", step, {"step": step})
    checkpoints.save("warmup", 7, {"step": 7})
    assert checkpoints.latest("finetune")[0] == 100
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == [
        "finetune-00000020.pt",
        "finetune-00000100.pt",
        "warmup-00000007.pt",
    ]


def test_files_are_the_owners(checkpoints):
    checkpoints.save("finetune", 5, STATE)
    assert stat.S_IMODE(checkpoints.folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(only_file(checkpoints).stat().st_mode) == 0o600


def test_a_save_that_fails_leaves_the_last_one(checkpoints, monkeypatch):
    checkpoints.save("finetune", 5, STATE)
    checkpoints.wait()

    def full(*_):
        raise OSError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        checkpoints.save("finetune", 6, STATE)
        with pytest.raises(OSError, match="No space left"):
            checkpoints.save("finetune", 7, STATE)  # says so before it begins
    assert only_file(checkpoints).name == "finetune-00000005.pt"
    assert checkpoints.latest("finetune")[0] == 5


def test_training_goes_on_while_a_checkpoint_is_written(checkpoints, monkeypatch):
    may_write, state = threading.Event(), {"weight": torch.zeros(3)}
    write = checkpoint_module.write_bytes

    def slow(*arguments):
        assert may_write.wait(30)
        write(*arguments)

    monkeypatch.setattr(checkpoint_module, "write_bytes", slow)
    checkpoints.save("finetune", 5, state)
    state["weight"] += 1  # the next step
    assert list(checkpoints.folder.iterdir()) == []
    may_write.set()
    assert torch.equal(checkpoints.latest("finetune")[1]["weight"], torch.zeros(3))


def test_one_is_due_after_so_many_steps_and_after_less_than_a_minute(checkpoints, monkeypatch):
    now = [checkpoints.saved]
    monkeypatch.setattr(checkpoint_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    assert [step for step in range(1, 11) if checkpoints.due(step, 4, 10)] == [4, 8, 10]
    now[0] += 60
    assert checkpoints.due(5, 4, 10)
    checkpoints.save("finetune", 5, STATE)
    checkpoints.wait()
    assert not checkpoints.due(6, 4, 10)


def test_none_is_due_while_one_is_written_but_the_last(checkpoints, monkeypatch):
    may_write, write = threading.Event(), checkpoint_module.write_bytes
    monkeypatch.setattr(checkpoint_module, "EVERY_S", 0.0)
    monkeypatch.setattr(checkpoint_module, "write_bytes", lambda *a: may_write.wait(30) and write(*a))
    assert checkpoints.due(3, 1, 10)
    checkpoints.save("finetune", 3, STATE)
    checkpoints.leaving = lambda step: True
    assert [step for step in range(4, 11) if checkpoints.due(step, 1, 10)] == [10]
    may_write.set()
    checkpoints.wait()
    assert checkpoints.due(4, 1, 10)


def test_every_step_is_due_once_a_machine_must_leave(checkpoints):
    checkpoints.leaving = lambda step: step >= 3
    assert [step for step in range(1, 5) if checkpoints.due(step, 100, 100)] == [3, 4]


def test_a_checkpoint_of_another_run_is_refused(checkpoints):
    checkpoints.save("finetune", 5, STATE)
    checkpoints.wait()
    with pytest.raises(InputError, match="expected a checkpoint of this configuration and data"):
        Checkpoints(checkpoints.folder, "another run").latest("finetune")


def test_a_truncated_file_is_refused(checkpoints):
    checkpoints.save("finetune", 5, STATE)
    path = only_file(checkpoints)
    whole = path.read_bytes()
    for length in [0, 1, 2, 3, 10, *range(50, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match="expected a checkpoint that e2h wrote"):
            checkpoints.latest("finetune")
    path.write_bytes(whole)
    assert checkpoints.latest("finetune")[0] == 5


def test_a_damaged_file_is_read_or_refused_and_nothing_else(checkpoints):
    checkpoints.save("finetune", 5, STATE)
    path = only_file(checkpoints)
    whole, chance, refused = path.read_bytes(), random.Random(0), 0
    start = whole.index(b"data.pkl")
    for attempt in range(3000):
        damaged = bytearray(whole)
        for _ in range(chance.choice([1, 2, 5])):
            # Half of the time in the part that says how to build the objects.
            place = chance.randrange(start, start + 400) if attempt % 2 else chance.randrange(len(whole))
            damaged[place] = chance.randrange(256)
        seal(path, bytes(damaged[:-DIGEST_BYTES]))
        try:
            checkpoints.latest("finetune")
        except InputError:
            refused += 1
    assert refused > 1000


def test_a_checkpoint_with_another_number_in_it_is_refused(checkpoints):
    """torch reads a changed bit of a tensor without a word, and paid steps would be made again from other weights."""
    checkpoints.save("finetune", 5, STATE)
    path = only_file(checkpoints)
    written = path.read_bytes()
    place = written.index(STATE["network"]["weight"].numpy().tobytes()) + 6  # of the second number
    path.write_bytes(written[:place] + bytes([written[place] ^ 1]) + written[place + 1 :])
    with pytest.raises(InputError, match=f"{path}: expected a checkpoint that e2h wrote"):
        checkpoints.latest("finetune")
    path.write_bytes(written)
    assert checkpoints.latest("finetune")[0] == 5


def test_what_a_killed_writer_left_is_removed_by_the_next(checkpoints):
    left = checkpoints.folder / ".finetune-00000005.pt.0123456789abcdef.tmp"
    left.write_bytes(b"half")
    checkpoints.save("finetune", 7, STATE)
    assert only_file(checkpoints).name == "finetune-00000007.pt"


class Hostile:
    """Unpickling it would write a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def write_pickle(content, path):
    path.write_bytes(pickle.dumps(content))


@pytest.mark.parametrize("write", [torch.save, write_pickle], ids=["torch", "pickle"])
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"format": FORMAT, "state": x}])
def test_a_file_that_would_execute_code_is_refused_and_executes_nothing(checkpoints, tmp_path, write, wrap):
    marker, path = tmp_path / "executed", checkpoints.folder / "finetune-00000009.pt"
    write(wrap(Hostile(marker)), path)
    written = path.read_bytes()
    seal(path, written)
    with pytest.raises(InputError, match="it can't be read safely"):
        checkpoints.latest("finetune")
    assert not marker.exists()
    # The file is dangerous indeed.
    torch.load(io.BytesIO(written), weights_only=False) if write is torch.save else pickle.loads(written)
    assert marker.exists()


@pytest.mark.parametrize(
    "content",
    [
        torch.zeros(3),
        {"network": torch.zeros(3)},
        {"format": "another/1", "binding": "this run", "step": 3, "state": {}},
        {"format": FORMAT},
        {"format": FORMAT, "binding": "this run"},
        [],
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused(checkpoints, content):
    path = checkpoints.folder / "finetune-00000009.pt"
    torch.save(content, path)
    seal(path, path.read_bytes())
    with pytest.raises(InputError, match="expected a checkpoint that e2h wrote"):
        checkpoints.latest("finetune")


def test_text_is_refused(checkpoints):
    (checkpoints.folder / "finetune-00000009.pt").write_text("weights: yes\n")
    with pytest.raises(InputError, match="expected a checkpoint that e2h wrote"):
        checkpoints.latest("finetune")
