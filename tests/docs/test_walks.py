"""What README and guides tell a reader to type, run in their order: an image folder to a checked release; a search.

Typed as printed, with what stands for the reader's own put in, and with small settings behind it.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cluster_checks import ROOT
from doc_commands import commands, fenced
from PIL import Image

pytestmark = [pytest.mark.ray]

DOCS = ROOT / "docs"
SMALL = [
    "finetune.num_steps=6",
    "finetune.expected_batch_size=32",
    "finetune.noise_multiplicity=2",
    "sampling.num_images=80",
    "sampling.num_steps=4",
    "evaluation.classifiers=[logistic_regression]",
    "evaluation.max_feature_records=60",
]
TINY_IMAGES = ["data.image_size=8", "model=px8", "central.pool_factor=1", "warmup.num_steps=10"]
PETS = "pets-eps4-seed0"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What a reader has before the first command: the checkout, and a folder of images of two kinds."""
    for name in ("jobs", "Makefile"):
        (tmp_path / name).symlink_to(ROOT / name)
    draw = np.random.default_rng(0)
    for kind in ("cat", "dog"):
        (tmp_path / "FOLDER" / kind).mkdir(parents=True)
        for i in range(60):
            Image.fromarray(draw.integers(0, 256, (8, 8, 3), np.uint8)).save(tmp_path / "FOLDER" / kind / f"{i}.png")
    return tmp_path


def typed(folder: Path, command: str, *settings: str) -> str:
    """What the command prints; it must succeed, and say nothing else."""
    program, *words = shlex.split(command)
    done = subprocess.run(
        [{"python": sys.executable}.get(program, program), *words, *settings],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    assert done.stderr == "", command
    return done.stdout


def only(path: Path, start: str, *parts: str) -> str:
    """The one command of a document that begins so and has these parts."""
    [found] = [
        one
        for one in dict.fromkeys(commands(path.read_text()))
        if one.startswith(start) and all(p in one for p in parts)
    ]
    return found


@pytest.mark.long
def test_own_images_to_a_checked_release(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guide, readme = DOCS / "guide.md", ROOT / "README.md"
    planned = typed(
        checkout, only(readme, "python jobs/pipeline.py", "data.name=pets", "dry_run=true"), *TINY_IMAGES, *SMALL
    )
    assert "plan       N 100" in planned
    assert sorted(path.name for path in (checkout / "runs").iterdir()) == [PETS]

    run = typed(checkout, only(guide, "python jobs/pipeline.py", "finetune.num_steps=100"), *TINY_IMAGES, *SMALL)
    assert f"runs/{PETS}/release" in run

    for command in (
        only(guide, "python jobs/status.py"),
        only(guide, "python jobs/ledger.py"),
        only(guide, "python -m e2h check"),
        only(guide, "python -m e2h recompute"),
    ):
        assert "epsilon" in typed(checkout, command.replace("PATH", "runs/NAME").replace("NAME", PETS)), command
    assert "ok: " in typed(checkout, f"python jobs/ledger.py verify runs/{PETS}")

    monkeypatch.chdir(checkout / "runs" / PETS / "release")
    [recipe] = [block for block in fenced(readme.read_text(), "python") if "dp_accounting" in block]
    assert float(ran(recipe)) == pytest.approx(json.loads(Path("ledger.json").read_text())["epsilon"], rel=1e-6)

    monkeypatch.chdir(checkout)
    [exports] = fenced(guide.read_text(), "python")
    ran(exports.replace("NAME", PETS))
    assert len(list(Path("pets_synthetic").rglob("*.png"))) == 80
    assert np.load("pets_synthetic.npz")["arr_0"].shape == (80, 8, 8, 3)


def ran(code: str) -> str:
    """What a block of Python prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    return printed.getvalue()


@pytest.mark.chaos
def test_a_search_as_its_guide_has_it(checkout: Path) -> None:
    guide = DOCS / "search.md"
    few = ["search.expected_trials=2", "search.max_trials=3", "search.score_images=80", *SMALL]
    planned, searched, *_ = (one for one in commands(guide.read_text()) if one.startswith("python jobs/search.py"))
    priced = typed(checkout, planned)
    assert "training + 274 test listed" in priced
    assert "noise of one trial" in priced
    listed = only(guide, "python jobs/search.py", "search.space=")
    assert "best of about 2" in typed(checkout, listed, *few, "run.name=listed", "dry_run=true")
    assert not list((checkout / "runs").rglob("ledger.jsonl"))

    short = "search.space={warmup.num_steps:[10,20]}"
    assert "best of the trials" in typed(checkout, searched, *few, short, "run.name=searched")
    release = checkout / "runs" / "searched" / "release"
    assert "recomputed" in typed(checkout, only(guide, "python -m e2h").replace("release/", f"{release}/"))
