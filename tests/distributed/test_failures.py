"""What a user is told of a failure: one line, each cause once, and where the rest lies."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest
from ray.exceptions import RayTaskError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback

from e2h.data.remote import place
from e2h.distributed.failures import MAX_CHARACTERS, RunFailedError, noted, refusal, summary
from e2h.errors import BudgetError, InputError

ROOT = Path(__file__).resolve().parents[2]
PEER = "Connection closed by peer [10.0.0.{}]:2938{}"


def in_a_task(error: Exception) -> Exception:
    """As Ray raises what a task raised: its text is a traceback in colours."""
    text = f"\x1b[36mray::f()\x1b[39m (pid=7)\n  File f\n{type(error).__name__}: {error}"
    return RayTaskError("f", text, error, "f", 7, "10.0.0.1").as_instanceof_cause()


def of_workers(failures: dict[int, Exception]) -> WorkerGroupError:
    return WorkerGroupError("[Rank 0 Error Snippet]:\nTraceback ...", failures)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (KeyError("q"), "KeyError: 'q'"),
        (RuntimeError(), "RuntimeError"),
        (ValueError("\n one\ntwo"), "ValueError: one"),
        (in_a_task(KeyError("q")), "KeyError: 'q'"),
        (of_workers({1: ValueError("bad")}), "worker 1: ValueError: bad"),
        (of_workers({1: ValueError("bad"), 0: ValueError("bad")}), "workers 0, 1: ValueError: bad"),
        (of_workers({0: in_a_task(ValueError("bad"))}), "worker 0: ValueError: bad"),
        (of_workers({0: UserExceptionWithTraceback(ValueError("bad"), "Traceback ...")}), "worker 0: ValueError: bad"),
        (ControllerError(in_a_task(ValueError("bad"))), "ValueError: bad"),
        (
            of_workers({n: RuntimeError(PEER.format(n, n)) if n != 2 else ValueError("bad") for n in range(4)}),
            "workers 0, 1, 3: RuntimeError: Connection closed by peer [10.0.0.0]:29380; worker 2: ValueError: bad",
        ),
        (
            of_workers({n: ValueError("abcde"[n]) for n in range(5)}),
            "worker 0: ValueError: a; worker 1: ValueError: b; worker 2: ValueError: c; 2 more",
        ),
    ],
)
def test_each_cause_is_told_once(error, told):
    assert summary(error) == told


def test_a_long_message_is_cut():
    assert len(summary(ValueError("x" * 10_000))) < MAX_CHARACTERS + 10


@pytest.fixture(params=["folder", "bucket"])
def root(request, tmp_path):
    return place(f"{request.getfixturevalue('bucket')}/one" if request.param == "bucket" else tmp_path)


def test_a_fault_is_written_down_in_full(root):
    told = rf"^failed: ValueError: bad; the full tracebacks are in {root}/failure\.txt$"
    with pytest.raises(RunFailedError, match=told), noted(root):
        raise ValueError("bad")
    first, empty, *rest = (root / "failure.txt").read_text().splitlines()
    assert (first, empty, rest[0]) == ("failed: ValueError: bad", "", "Traceback (most recent call last):")
    assert 'raise ValueError("bad")' in rest[-2]
    if isinstance(root, Path):
        assert (root / "failure.txt").stat().st_mode & 0o777 == 0o600
    with noted(root):
        assert not (root / "failure.txt").exists()


def test_the_text_of_workers_is_kept_without_colours(tmp_path):
    with pytest.raises(RunFailedError), noted(tmp_path):
        raise in_a_task(ValueError("bad"))
    text = (tmp_path / "failure.txt").read_text()
    assert "ray::f() (pid=7)" in text
    assert "\x1b" not in text


@pytest.mark.parametrize("error", [InputError("data.path=x: no"), BudgetError("no step is left")])
def test_a_refusal_is_raised_as_it_is_and_noted_in_a_line(tmp_path, error):
    with pytest.raises(type(error)) as raised, noted(tmp_path):
        raise in_a_task(error)
    assert raised.value.cause is error
    assert (tmp_path / "failure.txt").read_text() == f"refused: {error}\n"


DENIED = "When getting information for key 'runs/one' in bucket 'b': AWS Error {} during HeadObject operation: No body."


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("NETWORK_CONNECTION", "can't be reached ({}); run the same command again when it can"),
        ("ACCESS_DENIED", "refuses ({}); check your keys and rights, then run the same command again"),
        ("UNKNOWN (HTTP status 400)", "refuses ({}); check your keys and rights, then run the same command again"),
    ],
)
def test_keys_that_expire_in_mid_run_are_one_line_that_nothing_else_hides(tmp_path, monkeypatch, answer, said):
    def denied(*_: object) -> None:
        raise OSError(DENIED.format(answer))

    monkeypatch.setattr("e2h.distributed.failures.write_bytes", denied)
    for error in (OSError(DENIED.format(answer)), of_workers({0: in_a_task(OSError(DENIED.format(answer)))})):
        with pytest.raises(type(error)) as raised, noted(tmp_path):
            raise error
        told = said.format(f"{answer} during HeadObject operation: No body.")
        assert refusal(raised.value) == f"run.storage: the store {told}"
    assert refusal(PermissionError("a fault of the program")) is None


def test_a_fault_that_can_t_be_written_down_is_raised_itself(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr("e2h.distributed.failures.write_bytes", full)
    with pytest.raises(ValueError, match="bad"), noted(tmp_path):
        raise ValueError("bad")
    with pytest.raises(InputError, match="no"), noted(tmp_path):
        raise InputError("no")


SCRIPT = """
import sys
from contextlib import nullcontext
import entry, status
from ray.train import WorkerGroupError

def stages(run):
    failure = ValueError("an image of shape (3, 8)")
    raise WorkerGroupError("[Rank 0 Error Snippet]: Traceback of a worker", {0: failure, 1: failure})

entry.session = lambda *_: nullcontext()
sys.argv = ["jobs/pipeline.py", "run.storage=" + sys.argv[1], "run.name=one"]
entry.job(stages)
"""


def test_a_job_whose_workers_fail_ends_with_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        cwd=ROOT / "jobs",
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    failed = "failed: workers 0, 1: ValueError: an image of shape (3, 8)"
    assert done.stderr == f"e2h: {failed}; the full tracebacks are in {tmp_path / 'one' / 'failure.txt'}\n"
    assert "Traceback of a worker" in (tmp_path / "one" / "failure.txt").read_text()

    shown = subprocess.run(
        [sys.executable, str(ROOT / "jobs" / "status.py"), str(tmp_path / "one")],
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    assert f"ended      {failed}\n" in shown.stdout
    assert f"next       read {tmp_path / 'one' / 'failure.txt'}, then run the same command again" in shown.stdout
