"""benchmarks/quality.py and gpu.py: rows of runs, and a budget of time that survives a stop."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu  # noqa: E402
import quality  # noqa: E402


def fake_row(seed: int, cnn: float, overrides: list[str]) -> dict:
    accuracy = {"logistic_regression": 0.5, "mlp": 0.6, "cnn": cnn}
    same = {"experiment": "mnist_cpu", "curriculum": ["central"], "epsilon": 1.0, "hardware": "2 CPU cores"}
    return {
        **same,
        "overrides": overrides,
        "seed": seed,
        "accuracy": accuracy,
        "frechet": 20.0 + seed,
        "minutes": 30.0 + seed,
    }


def test_a_row_of_the_table_has_mean_and_spread_over_the_seeds_of_one_experiment():
    rows = [fake_row(seed, 0.9 + seed / 100, ["privacy.epsilon=1"]) for seed in range(3)]
    rows.append(fake_row(0, 0.3, ["privacy.epsilon=1", "curriculum=[]"]))
    rows[2]["hardware"] = "1 CPU core"
    lines = quality.table(rows).splitlines()
    assert len(lines) == 4
    assert lines[2] == (
        "| `mnist_cpu privacy.epsilon=1` | central | 1 | 0.500 ± 0.000 | 0.600 ± 0.000 | 0.910 ± 0.010 | "
        "21 ± 1 | 3 | 30, 2 CPU cores; 32, 1 CPU core |"
    )
    assert "| 0.300 | 20 | 1 |" in lines[3]


def test_a_stopped_call_goes_on_with_the_seeds_that_have_no_row(tmp_path, monkeypatch, capsys):
    made: list[int] = []

    def measure(experiment, overrides, seed, storage, alone, before):
        if seed == 1 and len(made) == 1:
            raise KeyboardInterrupt
        made.append(seed)
        return fake_row(seed, 0.9, [one for one in overrides if not one.startswith(quality.ELSEWHERE)])

    monkeypatch.setattr(quality, "measure", measure)
    words = ["mnist_cpu", "--set", "data.path=/somewhere", "privacy.epsilon=1", "--seeds", "3"]
    monkeypatch.setattr(sys, "argv", ["quality.py", *words, "--rows", str(tmp_path / "rows.jsonl")])
    with pytest.raises(KeyboardInterrupt):
        quality.main()
    made.append(-1)
    quality.main()
    assert made == [0, -1, 1, 2]
    assert all("/somewhere" not in line for line in (tmp_path / "rows.jsonl").read_text().splitlines())
    quality.main()
    assert made == [0, -1, 1, 2]
    assert "| 3 |" in capsys.readouterr().out


def test_the_minutes_of_a_run_are_those_of_all_its_calls(tmp_path):
    path = tmp_path / "runs" / "one.minutes"
    killed = 'import os, quality, time, pathlib\nwith quality.stopwatch(pathlib.Path({!r}), "there", 0.1):\n'
    killed += "    time.sleep(1.2)\n    os.kill(os.getpid(), 9)"
    done = subprocess.run([sys.executable, "-c", killed.format(str(path))], cwd=BENCHMARKS, check=False)
    assert done.returncode == -9
    with quality.stopwatch(path, "here") as minutes:
        assert set(minutes()) == {"there", "here"}
        assert 1 / 60 <= minutes()["there"] < 1
        assert 0 <= minutes()["here"] < 1
    with quality.stopwatch(path, "there") as minutes:
        assert minutes()["there"] >= 1 / 60


def test_parts_are_cut_off_at_their_share_and_go_on_in_the_next_call(tmp_path, monkeypatch):
    slow = [sys.executable.rsplit("/", 1)[-1], "-c", "import time; time.sleep(60)"][1:]
    parts = [gpu.Part("quick", ["-c", "print('hello')"], 5.0), gpu.Part("slow", slow, 2.5)]
    parts.append(gpu.Part("broken", ["-c", "raise SystemExit(3)"], 5.0))
    monkeypatch.setattr(gpu, "parts", lambda given: parts)
    given = argparse.Namespace(out=tmp_path, minutes=1 / 3, before=None)
    assert gpu.run_all(given) == {"quick": "done", "slow": "cut off", "broken": "failed"}
    assert (tmp_path / "quick.log").read_text() == "hello\n"
    parts[1] = gpu.Part("slow", ["-c", "pass"], 2.5)
    parts[0] = gpu.Part("quick", ["-c", "raise SystemExit(1)"], 5.0)  # done before: not run again
    assert gpu.run_all(given)["quick"] == "done"
    assert json.loads((tmp_path / "done.json").read_text())["slow"] == "done"


def test_the_parts_of_a_gpu_fit_25_minutes_and_the_quick_ones_need_none(tmp_path, monkeypatch):
    names = {"mnist": Path("m"), "fashion_mnist": None, "cifar10": None}
    given = argparse.Namespace(**names, quick=False, out=tmp_path, minutes=25, before=None)
    assert [part.name for part in gpu.parts(given)] == ["mnist-epsilon1", "mnist-epsilon10"]
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    found = gpu.parts(given)
    assert [part.name for part in found] == ["mnist-epsilon1", "mnist-epsilon10", "tests", "engine", "sampling"]
    assert max(part.minutes for part in found if part.beside) + sum(p.minutes for p in found if not p.beside) <= 25
    assert all(
        "scaling.use_gpu=true" not in part.command
        for part in gpu.parts(argparse.Namespace(**{**vars(given), "quick": True}))
    )


def test_a_run_goes_on_elsewhere_from_the_stage_before_which_it_stopped(tmp_path, monkeypatch, capsys):
    """Its first and its last stages need no GPU; what they take is told apart."""

    def call(*before: str) -> None:
        words = ["demo", "--alone", "--storage", str(tmp_path / "runs"), "--rows", str(tmp_path / "rows.jsonl")]
        short = [*quality.QUICK, "sampling.num_images=100", "model.base_width=8", "privacy.epsilon=1"]
        monkeypatch.setattr(sys, "argv", ["quality.py", *words, *before, "--set", *short])
        quality.main()

    for before, missing in (("train", "checkpoints"), ("evaluate", "release")):
        call("--before", before)
        assert f"stopped before {before}" in capsys.readouterr().out
        (root,) = (path for path in (tmp_path / "runs").iterdir() if (path / "config.yaml").exists())
        assert not (root / missing).exists()
    made = (root / "synthetic" / "grid.png").stat().st_mtime_ns
    minutes = next((tmp_path / "runs").glob("*.minutes"))
    minutes.write_text(json.dumps({"1 x NVIDIA H200": 3.0}))  # as if those stages had been elsewhere
    call()
    (row,) = quality.read_rows(tmp_path / "rows.jsonl")
    assert row["hardware"] == "1 x NVIDIA H200 + 1 CPU core"
    assert row["minutes_on"]["1 x NVIDIA H200"] == 3
    assert (root / "synthetic" / "grid.png").stat().st_mtime_ns == made


def test_the_tests_for_a_gpu_are_all_named():
    tests = BENCHMARKS.parent / "tests"
    marked = {
        path for path in tests.rglob("test_*.py") if "pytest.mark.gpu" in path.read_text() and path != Path(__file__)
    }
    assert {path.relative_to(BENCHMARKS.parent).as_posix() for path in marked} == set(gpu.TESTS)
