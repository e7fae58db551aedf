"""The main job on the real digits with real Ray: what it leaves, how it resumes, how it survives kills."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import time
from pathlib import Path

import dp_accounting as dpa
import pytest
from dp_accounting.pld import PLDAccountant
from job_calls import SMALL, TEST_SECRET, command, environment
from safetensors.numpy import load_file

pytestmark = [pytest.mark.ray, pytest.mark.slow]

# One secret for all runs, so that they take the same draws; ledgers and folders are their own.
SECRET = "privacy.secret=env:E2H_TEST_SECRET"


def start(storage: Path, *overrides: str, job: str = "pipeline") -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(job, f"run.storage={storage}", "run.name=r", SECRET, *SMALL, *overrides),
        cwd=storage.parent,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Whoever runs the tests in the background has Ctrl-C ignored, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, out + err
    assert err == "", "the terminal is the user's: nothing but our lines"
    return out


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A whole run with two workers, and what it printed."""
    storage = tmp_path_factory.mktemp("undisturbed") / "runs"
    return storage / "r", finish(start(storage))


def charged_steps(root: Path, name: str) -> list[int]:
    records = [json.loads(line) for line in (root / "ledger.jsonl").read_text().splitlines()]
    return [s for r in records if r["kind"] == "SPEND" and r["release"] == name for s in range(*r["steps"])]


def wait_for_step(root: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if any(path.name >= f"finetune-{step:08d}.pt" for path in (root / "checkpoints").glob("finetune-*.pt")):
            return
        time.sleep(0.05)
    raise AssertionError(f"no checkpoint of step {step} in two minutes")


def same_weights(a: Path, b: Path) -> bool:
    one, two = (load_file(root / "checkpoints" / "model.safetensors") for root in (a, b))
    return one.keys() == two.keys() and all((one[name] == two[name]).all() for name in one)


def test_pipeline_leaves_every_contracted_file(undisturbed: tuple[Path, str]) -> None:
    root, printed = undisturbed
    names = "config.yaml command.txt environment.json ledger.jsonl plan.json metrics.jsonl evaluation.json report.html"
    for name in [
        *names.split(),
        "prepared/meta.json",
        "central/images.parquet",
        "central/grid.png",
        "central/event.json",
    ]:
        assert (root / name).is_file(), name
    for name in ("synthetic/grid.png", "tb/releasable", "tb/sensitive", "checkpoints/model.safetensors"):
        assert (root / name).exists(), name
    for stage in ("prepared", "central", "checkpoints", "synthetic"):
        assert (root / stage / "_SUCCESS.json").is_file(), stage
    release = {str(path.relative_to(root / "release")) for path in (root / "release").rglob("*") if path.is_file()}
    fixed = {"README.md", "ledger.json", "model.safetensors", "config.yaml", "report.html", "grid.png"}
    fixed |= {f"figures/{name}.svg" for name in ("budget", "trade_off", "epsilon_by_step", "noise_by_share")}
    assert fixed <= release
    assert all(name.startswith("data/") and name.endswith(".parquet") for name in release - fixed)
    evaluation = json.loads((root / "evaluation.json").read_text())
    assert 0 <= evaluation["downstream"]["logistic_regression"]["accuracy"] <= 1
    assert evaluation["num_synthetic"] == 120
    assert str(root / "release") in printed
    assert str(root / "report.html") in printed
    assert "Traceback" not in printed
    assert "arning" not in printed.replace("warning    privacy.delta", "")


@pytest.mark.chaos
def test_on_a_terminal_there_is_a_live_line_from_the_first_seconds_on_and_only_whole_lines_stay(tmp_path: Path) -> None:
    primary, secondary = os.openpty()
    process = subprocess.Popen(
        command("pipeline", f"run.storage={tmp_path / 'runs'}", "run.name=r", SECRET, *SMALL),
        cwd=tmp_path,
        env=environment(COLUMNS="80"),
        stdout=secondary,
        stderr=secondary,
        start_new_session=True,
    )
    os.close(secondary)
    written, deadline = b"", time.monotonic() + 400
    while (part := _read(primary, deadline)) and time.monotonic() < deadline:
        written += part
    process.kill()  # where it is over, nothing happens
    assert process.wait() == 0, written.decode()
    live = re.findall(r"\r([a-z0-9]+)", written.decode())
    assert live[0] == "ray"  # before anything else is known
    assert {"ray", "train", "finetune"} <= set(live)  # the others may be over too soon
    stayed = [line.split("\r")[-1] for line in written.decode().split("\r\n")]
    stages = [line.split()[0] for line in stayed if re.match("[a-z]", line)]
    assert not stayed[-1].strip("\x1b[0m")  # colorama's good-bye, which nobody sees
    assert stages == ["prepare", "plan", "central", "train", "ledger", "sample", "evaluate", "publish"]


def _read(terminal: int, deadline: float) -> bytes:
    """What is written next; nothing at the deadline, or once nobody has the terminal open."""
    if not select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))[0]:
        return b""
    try:
        return os.read(terminal, 65536)
    except OSError:
        return b""


def test_third_party_recomputes_the_printed_epsilon_with_the_easy_stage_in_it(undisturbed: tuple[Path, str]) -> None:
    root, printed = undisturbed
    ledger = json.loads((root / "release" / "ledger.json").read_text())
    accountant = PLDAccountant(dpa.NeighboringRelation[ledger["neighbouring_relation"]])
    for release in ledger["releases"]:
        e = release["event"]
        step = dpa.PoissonSampledDpEvent(e["sampling_prob"], dpa.GaussianDpEvent(e["noise_multiplier"]))
        accountant.compose(dpa.SelfComposedDpEvent(step, e["count"]))
    recomputed = accountant.get_epsilon(ledger["delta"])
    assert [release["name"] for release in ledger["releases"]] == ["central", "finetune"]
    assert abs(recomputed - ledger["epsilon"]) < 1e-6
    assert (1 - 1e-3) * ledger["target_epsilon"] <= recomputed <= ledger["target_epsilon"]
    assert f"epsilon {recomputed:.4f} of 1 spent" in printed


def test_ledger_charges_each_step_once_and_before_the_weights(undisturbed: tuple[Path, str]) -> None:
    root, _ = undisturbed
    assert charged_steps(root, "central") == list(range(5))
    assert charged_steps(root, "finetune") == list(range(20))
    ledger_time = (root / "ledger.jsonl").stat().st_mtime
    assert ledger_time <= (root / "checkpoints" / "model.safetensors").stat().st_mtime


def test_everything_sensitive_is_owner_only_and_secrets_lie_apart(undisturbed: tuple[Path, str]) -> None:
    root, _ = undisturbed
    assert root.stat().st_mode & 0o077 == 0
    for path in [*root.glob("prepared/*"), root / "evaluation.json", root / "report.html", root / "metrics.jsonl"]:
        assert path.stat().st_mode & 0o077 == 0, path
    for path in root.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        assert TEST_SECRET.encode() not in content, path
        assert bytes.fromhex(TEST_SECRET) not in content, path


def test_own_secret_is_made_apart_from_the_run_and_differs_between_runs(tmp_path: Path) -> None:
    from e2h.config import Config
    from e2h.curriculum.run import open_run

    config, secrets = Config(), []
    for name in ("a", "b"):
        config.run.storage, config.run.name = str(tmp_path), name
        with open_run(config) as run:
            secrets.append(run.secret())
            path = Path(run.secret_reference.removeprefix("file:"))
        assert run.root not in path.parents
        assert path.stat().st_mode & 0o077 == 0
    assert secrets[0] != secrets[1]


def test_same_command_again_does_nothing_twice(undisturbed: tuple[Path, str]) -> None:
    root, _ = undisturbed
    before = (root / "ledger.jsonl").read_bytes(), (root / "checkpoints" / "model.safetensors").stat().st_mtime
    finish(start(root.parent))
    assert before == (
        (root / "ledger.jsonl").read_bytes(),
        (root / "checkpoints" / "model.safetensors").stat().st_mtime,
    )


def test_changed_configuration_is_refused_with_both_values(undisturbed: tuple[Path, str]) -> None:
    root, _ = undisturbed
    process = start(root.parent, "finetune.max_grad_norm=0.5")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert len(err.strip().splitlines()) == 1
    assert all(part in err for part in ("finetune.max_grad_norm", "0.5", "1.0", "run.name=r-2"))
    assert "Traceback" not in out + err


@pytest.mark.chaos
def test_one_worker_equals_two_after_twenty_steps(undisturbed: tuple[Path, str], tmp_path: Path) -> None:
    # Two workers choose units of 8 images, one alone would choose 16.
    finish(start(tmp_path / "runs", "scaling.num_workers=1", "scaling.physical_batch_size=8", job="train"))
    assert same_weights(undisturbed[0], tmp_path / "runs" / "r")


def test_a_killed_worker_is_replaced_and_a_killed_driver_is_resumed_by_the_same_command(
    undisturbed: tuple[Path, str], tmp_path: Path
) -> None:
    process = start(tmp_path / "runs", job="train")
    root = tmp_path / "runs" / "r"
    wait_for_step(root, 4)
    os.kill(_training_workers(process.pid)[0], signal.SIGKILL)
    wait_for_step(root, 12)  # reached by the group that took over
    process.kill()
    process.communicate()
    finish(start(tmp_path / "runs", job="train"))
    assert charged_steps(root, "finetune") == list(range(20))
    assert same_weights(undisturbed[0], root)


@pytest.mark.chaos
def test_ctrl_c_ends_in_seconds_with_one_line(tmp_path: Path) -> None:
    process = start(tmp_path / "runs", job="train")
    wait_for_step(tmp_path / "runs" / "r", 4)
    stopped = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (130, "e2h: stopped; the same command goes on\n")
    assert time.monotonic() - stopped < 60


def _training_workers(driver: int, title: str = "TrainWorker") -> list[int]:
    """Ray's processes that run the training function, or another, below one driver."""
    table = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in table.splitlines()[1:]]
    below, grown = {driver}, True
    while grown:
        more = {int(pid) for pid, parent, _ in rows if int(parent) in below} - below
        below |= more
        grown = bool(more)
    found = [int(pid) for pid, _, args in rows if int(pid) in below and re.search(f"ray::.*{title}", args)]
    assert found, f"no {title} below the driver"
    return found
