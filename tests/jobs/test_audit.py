"""`jobs/audit.py` as a user calls it: what it writes and says, and that a defective program fails it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

# The demo's settings with a smaller network.
SMALL = ("model.base_width=8", "model.width_multipliers=[1]", "model.attention_resolutions=[]")
RUN = "digits-eps10-central-frequency-seed0"
# Found by every Python process of the job, the spawned workers included.
HALF_THE_NOISE = """
import e2h.privacy.noise as noise
real = noise.gaussian_noise
noise.gaussian_noise = lambda *arguments: real(*arguments) // 2
"""


def files(tmp_path: Path) -> list[str]:
    return sorted(str(path.relative_to(tmp_path / "runs")) for path in (tmp_path / "runs").rglob("*") if path.is_file())


@pytest.mark.slow
def test_the_program_passes_and_leaves_one_file(run_job, tmp_path):
    done = run_job("audit", *SMALL, "curriculum=[central,frequency]")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = [line.split()[:2] for line in done.stdout.splitlines()]
    assert lines[:3] == [["audit", "DP-SGD"], ["audit", "central"], ["audit", "query"]]
    assert lines[3:7] == [[tier, "pass"] for tier in ("noise", "coupled", "sampler", "one_run")]
    assert lines[7] == ["audit", "passed;"]
    assert files(tmp_path) == [f"{RUN}/audit.json"]  # no binding, no ledger, no secret
    written = json.loads((tmp_path / "runs" / RUN / "audit.json").read_text())
    assert list(written) == ["epsilon_claimed", "epsilon_lower_bound", "confidence", "tiers", "ceiling"]
    assert 0 <= written["epsilon_lower_bound"] <= written["epsilon_claimed"] <= 1 < written["ceiling"]
    assert written["confidence"] == 0.95
    assert list(written["tiers"]) == ["noise", "coupled", "sampler", "one_run"]
    for tier in written["tiers"].values():
        assert tier["passed"]
        assert tier["false_alarm_rate"] <= 0.05 + 1e-12
        assert {"gradient", "central", "frequency"} <= tier.keys()


@pytest.mark.slow
def test_half_the_noise_fails_with_code_1_and_is_named(run_job, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(HALF_THE_NOISE)
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    done = run_job("audit", *SMALL, "run.name=broken", PYTHONPATH=path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "noise      FAIL" in done.stdout
    for mechanism in ("gradient", "central"):
        assert f"{mechanism}: the noise has 0." in done.stdout
    assert "audit      FAILED" in done.stdout
    tiers = json.loads((tmp_path / "runs" / "broken" / "audit.json").read_text())["tiers"]
    assert [tiers[name]["passed"] for name in ("noise", "coupled", "sampler")] == [False, True, True]


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["privacy.epsilon=0"], "privacy.epsilon=0.0"),
        (["modle=px8"], "modle"),
        (["dry_run=true"], "dry_run=True: expected no dry run"),
        (["run.storage=gs://bucket/x"], "run.storage=gs://bucket/x"),
        (["run.storage=FILE"], "run.storage="),
        (["data.image_size=1", "model.width_multipliers=[1]", "model.attention_resolutions=[]"], "data.image_size=1"),
        (["run.name=other", "privacy.epsilon=3"], "privacy.epsilon is 3.0 and was 10.0"),
    ],
)
def test_bad_input_is_one_line_and_code_2(run_job, tmp_path, overrides, named):
    (tmp_path / "file").write_text("x")
    other = tmp_path / "runs" / "other"
    if "run.name=other" in overrides:  # a run of another configuration
        other.mkdir(parents=True)
        (other / "binding.json").write_text(json.dumps({"privacy": {"epsilon": 10.0}}))
    done = run_job("audit", *(one.replace("FILE", str(tmp_path / "file")) for one in overrides))
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.startswith("e2h: ")
    assert named in done.stderr
    assert not list((tmp_path / "runs").rglob("audit.json"))
