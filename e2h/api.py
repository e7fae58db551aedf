"""The public API, for programs and notebooks: `from e2h import plan, run, load_release, audit, recompute_epsilon`.

Settings are those of the command line: values by dotted key and presets by group, `{"data": "mnist", "data.path":
"idx", "privacy.epsilon": 1.0}`, or a whole `e2h.config.Config`. What the command line refuses is refused here with the
same line, as `e2h.errors.InputError`, and as `e2h.errors.BudgetError` where the privacy budget does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from e2h.config import Config, expect, warmups
from e2h.curriculum.listing import listed, public_records, remarks
from e2h.curriculum.notes import usable
from e2h.curriculum.run import Run, open_run, run_root
from e2h.data.exports import read_hf_parquet
from e2h.data.remote import Place
from e2h.errors import InputError
from e2h.privacy.plan import PrivacyPlan, make_plan
from e2h.reporting.check import check
from e2h.reporting.recompute import read_ledger, recompute, stated_epsilon
from e2h.reporting.status_line import StatusLine
from e2h.settings import compose
from e2h.validation import validate

Settings = Config | Mapping[str, Any] | None
Progress = Callable[[str, int, int], None]


def plan(settings: Settings = None) -> PrivacyPlan:
    """What a run would release and what all of it costs together; the data is listed, not read, and nothing is spent.

    Args:
      settings: see `e2h.settings.compose`; none: the demo on scikit-learn's digits.

    Returns:
      The plan: `releases` (each with `event.sampling_prob`, `noise_multiplier`, `count`), `bound.epsilon`, `delta`,
      `num_records`, `warnings`, and `statement()`, the guarantee in sentences.

    Raises:
      InputError: if a setting or the data is refused.
      BudgetError: if the easy stages alone exceed the target, or the data set's budget refuses the run.

    >>> found = plan({"privacy.epsilon": 1.0, "privacy.delta": 1e-5})
    >>> [release.name for release in found.releases], found.num_records
    (['central', 'finetune'], 1523)
    >>> 0.999 < found.bound.epsilon <= 1
    True
    """
    config = _of_one_run(settings)
    source = listed(config)
    made = make_plan(config, public_records(config, source), source.class_names)
    with usable(config):
        return Run(run_root(config), config).shared_plan(made)


def run(settings: Settings = None, progress: Progress | None = None) -> Place:
    """From private images to a publishable synthetic set, in this process, without Ray; the same call resumes.

    What `jobs/pipeline.py` does, on one GPU if there is one, else on one core for DP-SGD. A call that was stopped, even
    by a kill, goes on where it was and pays nothing twice; a finished one only builds `release/` again.

    Args:
      settings: see `e2h.settings.compose`; none: the demo on scikit-learn's digits.
      progress: called as progress(stage, done, total) when a stage begins and after each step; none: one live status
        line in a terminal or notebook. Nothing else is printed.

    Returns:
      The path of `release/`, the only folder to publish. The folder above it is the run's, for its owner alone, with
      `report.html` and `evaluation.json`.

    Raises:
      InputError: if a setting or the data is refused, the run directory holds a run of another configuration, or
        another process is running it.
      BudgetError: if the privacy budget refuses.
    """
    import torch

    config = _of_one_run(settings)
    expect(not config.dry_run, "dry_run", True, "false: e2h.plan() plans")
    remarks(Run(run_root(config), config))  # refuses what the list of the images alone shows
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with StatusLine() as line, open_run(config) as opened:
        _all_stages(opened, device, progress or line)
    return opened.release


def _all_stages(run: Run, device: str, tell: Progress) -> None:
    """`jobs/pipeline.py`, stage by stage."""
    from e2h import results
    from e2h.curriculum import stages

    tell("prepare", 0, 1)
    prepared = stages.prepare(run)
    tell("plan", 0, 1)
    spending = stages.calibrate(run, prepared)
    with _grids_shown(run):
        if run.config.curriculum:
            tell(" + ".join(run.config.curriculum), 0, 1)
        stages.release_easy_stages(run, prepared, spending)
    tell("train", 0, 1)
    _train(run, spending, device, tell)
    tell("sample", 0, 1)
    with _grids_shown(run):
        stages.sample(run, device)
    if run.config.evaluation.enabled:
        tell("evaluate", 0, 1)
        results.evaluate(run)
    tell("publish", 0, 1)
    results.publish(run)
    tell("done", 1, 1)


def _train(run: Run, spending: PrivacyPlan, device: str, tell: Progress) -> None:
    from e2h.curriculum import stages
    from e2h.reporting.metrics import MetricWriter

    totals = {name: one.num_steps for name, (_, one) in warmups(run.config).items()}
    totals["finetune"] = run.config.finetune.num_steps
    if not run.done("train"):
        with MetricWriter(run.root, run.config.privacy.test_mode) as metrics:
            stages.train(run, spending, device, lambda stage, step: tell(stage, step, totals[stage]), metrics.scalar)


@contextmanager
def _grids_shown(run: Run) -> Iterator[None]:
    """Pictures that the block makes are in TensorBoard after it."""
    from e2h.results import show_grid

    folders = {stage: stage for stage in run.config.curriculum} | {"sample": "synthetic"}
    missing = [stage for stage in folders if not run.done(stage)]
    yield
    for stage in missing:
        if run.done(stage):
            show_grid(run, folders[stage])


@dataclass(frozen=True, eq=False)
class Release:
    """A published synthetic set.

    Attributes:
      images: uint8 [N, H, W, C], C 1 (grey) or 3 (RGB).
      labels: int64 [N] in [0, len(class_names)).
      class_names: in label order.
      epsilon, delta: the guarantee for everything in the release, recomputed.
      ledger: `ledger.json`.
    """

    images: NDArray[np.uint8] = field(repr=False)
    labels: NDArray[np.int64] = field(repr=False)
    class_names: tuple[str, ...]
    epsilon: float
    delta: float
    ledger: dict[str, Any] = field(repr=False)


def load_release(path: str | os.PathLike[str]) -> Release:
    """Checks a release folder as `python -m e2h check` does, and reads it into memory.

    Args:
      path: a `release/` folder on this machine.

    Raises:
      InputError: naming every problem that the check found: files that don't belong into a release, an epsilon that the
        ledger's events don't give, a run that was not private.
    """
    folder = Path(path)
    problems = check(folder)
    if problems:
        raise InputError(f"release={folder}: expected nothing private or false in it, found {'; '.join(problems)}")
    images, labels = read_hf_parquet(sorted(folder.glob("data/*.parquet")))
    described = yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])["dataset_info"]
    names = described["features"][1]["dtype"]["class_label"]["names"]
    ledger = read_ledger(folder / "ledger.json")
    return Release(images, labels, tuple(names.values()), stated_epsilon(ledger), float(ledger["delta"]), ledger)


def recompute_epsilon(path: str | os.PathLike[str]) -> float:
    """Epsilon at the ledger's delta, from the published events alone, as `python -m e2h recompute` finds it.

    Args:
      path: a `release/` folder, or its `ledger.json`.

    Raises:
      InputError: if the ledger is missing, damaged or incomplete.
    """
    found = Path(path)
    return recompute(read_ledger(found / "ledger.json" if found.is_dir() else found))


@dataclass(frozen=True)
class Audit:
    """What an audit found; printed, a line for each tier.

    Attributes:
      passed: whether every tier did. No proof, see docs/guarantee.md.
      epsilon_claimed: what the audited mechanisms claim, by the accountant.
      epsilon_lower_bound: what the canaries show of it, at `report["confidence"]`; above the claim it refutes it.
      report: `audit.json` of `jobs/audit.py`.
    """

    passed: bool
    epsilon_claimed: float
    epsilon_lower_bound: float
    lines: tuple[str, ...] = field(repr=False)
    report: dict[str, Any] = field(repr=False)

    def __str__(self) -> str:
        return "\n".join(self.lines)


def audit(settings: Settings = None, num_canaries: int = 2000, num_steps: int = 60) -> Audit:
    """Checks the mechanisms of a configuration against what is claimed of them; no data is read, nothing is spent.

    It takes about half a minute on two cores with the defaults, on two processes that it starts: a script must call
    it below `if __name__ == "__main__":`.

    Args:
      settings: see `e2h.settings.compose`; none: the demo's.
      num_canaries: records of known effect, 100 to 65,536; fewer refute less.
      num_steps: DP-SGD steps, at least 2.

    Raises:
      InputError: if a setting is refused, or the configured network can't be built or audited.
    """
    from e2h.curriculum import audit as auditor
    from e2h.curriculum.canaries import Subject

    config = validate(compose(settings))
    expect(100 <= num_canaries <= 65536, "num_canaries", num_canaries, "100 to 65536")
    expect(num_steps >= 2, "num_steps", num_steps, "a whole number of at least 2")
    with StatusLine() as line:
        found = auditor.audit(Subject(config, num_canaries, num_steps), os.urandom(32), lambda part: line(part, 0, 1))
        line("done", 1, 1)
    report, lines = auditor.report(found), tuple(f"{tier:<10} {text}" for tier, text in auditor.summary(found))
    return Audit(auditor.passed(found), report["epsilon_claimed"], report["epsilon_lower_bound"], lines, report)


def _of_one_run(settings: Settings) -> Config:
    config = validate(compose(settings))
    mode = config.search.privacy
    expect(mode is None, "search.privacy", mode, "none: jobs/search.py searches")
    return config
