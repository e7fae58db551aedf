"""`jobs/ledger.py`: what it shows, what it finds, and its exit codes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import ledger as job
import pytest
from job_calls import ROOT, command

from e2h.config import Config, LedgerConfig, PrivacyConfig, RunConfig
from e2h.curriculum.run import open_run
from e2h.errors import BudgetError, InputError
from e2h.privacy.accounting import epsilon
from e2h.privacy.events import PoissonSampledGaussian, Release
from e2h.privacy.plan import PrivacyPlan
from e2h.privacy.rounding import rounded_up

RELEASES = (
    Release("central", PoissonSampledGaussian(0.5, 8.0, 3)),
    Release("finetune", PoissonSampledGaussian(0.1, 4.0, 20)),
)
BOUND = epsilon(RELEASES, 1e-4)
PLAN = PrivacyPlan(2.0, 1e-4, 100, ("a",), RELEASES, BOUND, False)


@pytest.fixture
def run(tmp_path) -> Path:
    """A run that paid for its central images and 8 of 20 steps, on a data set that others share."""
    config = Config(privacy=PrivacyConfig(epsilon=2.0), ledger=LedgerConfig("dataset", 5.0))
    config.run = RunConfig(str(tmp_path / "runs"), "one")
    with open_run(config) as run:
        run.root.joinpath("plan.json").write_text(json.dumps(PLAN.to_json()))
        run.open_budget(PLAN.budget)
        run.ledger.spend("central", RELEASES[0].event, "aa" * 32, 0, 3)
        run.ledger.spend("finetune", RELEASES[1].event, "bb" * 32, 0, 8)
    return run.root


def shown(run: Path) -> str:
    return job.main(["show", str(run)])


def test_a_run_is_shown_with_what_it_paid_and_planned(run):
    text = shown(run)
    spent = epsilon([RELEASES[0], replace(RELEASES[1], event=replace(RELEASES[1].event, count=8))], 1e-4)
    assert f"epsilon    {rounded_up(spent.epsilon):.4f} spent of {rounded_up(BOUND.epsilon):.4f} planned" in text
    assert "budget     epsilon 2 at delta 1e-4, REPLACE_SPECIAL" in text
    assert re.search(r"owner      20\d\d-\d\d-\d\d \d\d:\d\d:\d\d UTC pid \d+ on \S+", text)
    rows = [line.split() for line in text.splitlines()[-2:]]
    assert rows == [["central", "0.5000", "8.0000", "3", "3", "1"], ["finetune", "0.1000", "4.0000", "8", "20", "1"]]
    assert shown(run / "ledger.jsonl") == text


def test_a_data_set_is_shown_with_its_runs(run):
    text = shown(run.parent / ".ledgers" / "digits.jsonl")
    assert "budget     epsilon 5 at delta 1e-4 for all runs together" in text
    assert f"epsilon    {rounded_up(BOUND.epsilon):.4f} held by 1 run\n" in text
    assert text.endswith(f"{rounded_up(BOUND.epsilon):.4f}  one")


def test_showing_changes_nothing(run):
    before = {path: path.read_bytes() for path in run.parent.rglob("*") if path.is_file()}
    shown(run)
    job.main(["verify", str(run)])
    assert {path: path.read_bytes() for path in run.parent.rglob("*") if path.is_file()} == before


def test_an_intact_ledger_verifies(run):
    said = job.main(["verify", str(run)])
    assert re.fullmatch(r"ok: 4 records, head [0-9a-f]{64}", said)
    assert said.split()[-1] in shown(run)
    assert job.main(["verify", str(run.parent / ".ledgers" / "digits.jsonl")]).startswith("ok: 2 records")


def cut(run: Path) -> None:
    path = run / "ledger.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))


def flip(run: Path) -> None:
    path = run / "ledger.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"steps":[0,8]', b'"steps":[0,6]'))


def other_plan(run: Path) -> None:
    path = run / "plan.json"
    path.write_text(path.read_text().replace('"noise_multiplier": 4.0', '"noise_multiplier": 4.5'))


@pytest.mark.parametrize(
    ("alter", "said"),
    [(cut, "some are missing"), (flip, "does not continue the chain"), (other_plan, "found another")],
    ids=["cut tail", "flipped byte", "other plan"],
)
def test_an_altered_ledger_is_refused(run, alter, said):
    alter(run)
    with pytest.raises(BudgetError, match=said):
        job.main(["verify", str(run)])


def test_an_open_budget_that_its_plan_exceeds_is_refused(run, monkeypatch):
    """As by an accountant of a later day that finds more."""
    monkeypatch.setattr("e2h.reporting.spending.epsilon_pld", lambda releases, delta: 2.1)
    with pytest.raises(BudgetError, match=r"expected plans of at most epsilon 2, found 2\.1"):
        job.main(["verify", str(run)])


def test_a_ledger_elsewhere_is_found_from_its_run(tmp_path):
    config = Config(privacy=PrivacyConfig(epsilon=2.0), ledger=LedgerConfig(path=str(tmp_path / "own.jsonl")))
    config.run = RunConfig(str(tmp_path / "runs"), "one")
    with open_run(config) as run:
        run.open_budget(PLAN.budget)
    assert job.main(["verify", str(run.root)]) == job.main(["verify", str(tmp_path / "own.jsonl")])


@pytest.mark.parametrize("name", ["nowhere", ".", "empty.jsonl"])
def test_no_ledger_is_an_input_error(tmp_path, name):
    (tmp_path / "empty.jsonl").write_bytes(b"")
    with pytest.raises(InputError, match="expected a ledger, found none"):
        job.main(["show", str(tmp_path / name)])


def test_a_ledger_that_may_not_be_read_is_an_input_error(denying_store):
    with pytest.raises(InputError, match=rf"^{denying_store}/runs/one: expected a ledger that you may read \(.*DENIED"):
        job.main(["show", f"{denying_store}/runs/one"])


def called(*arguments: str) -> tuple[int, str, str]:
    done = subprocess.run(
        command("ledger", *arguments), cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    return done.returncode, done.stdout, done.stderr


def test_the_exit_codes(run, tmp_path):
    code, out, err = called("verify", str(run))
    assert (code, err) == (0, "")
    assert out.startswith("ok: 4 records, head ")
    flip(run)
    for action in ("show", "verify"):
        code, out, err = called(action, str(run))
        assert (code, out) == (3, "")
        assert err.startswith("e2h: ")
        assert err.count("\n") == 1
    code, out, err = called("verify", str(tmp_path / "nowhere"))
    assert (code, out) == (2, "")
    assert err.startswith(f"e2h: {tmp_path / 'nowhere'}: expected a ledger")
    assert called("destroy", str(run))[0] == 2


def test_ray_and_torch_are_not_started(run):
    script = f"import sys, ledger\nledger.main(['show', {str(run)!r}])\nprint(sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT / "jobs", capture_output=True, text=True, timeout=120, check=True
    )
    assert "'e2h.reporting.spending'" in done.stdout
    assert not {"'ray'", "'torch'"} & set(re.findall(r"'\w+'", done.stdout))
