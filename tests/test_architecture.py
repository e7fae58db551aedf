"""The floors of the house: imports only point down, and the core needs neither Ray nor Hydra."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A part may import the floors below it and itself, never a sibling of its own floor.
FLOORS = {
    "jobs": 6,
    "distributed": 5,
    "api": 5,
    "__main__": 4,
    "results": 4,  # what a receiver of a release runs
    "curriculum": 3,
    "evaluation": 3,
    "reporting": 3,
    "privacy": 2,
    "diffusion": 2,
    "data": 2,
    "validation": 2,
    "binding": 2,
    "settings": 2,
    "config": 1,
    "s3": 1,
    "errors": 0,
    "conf": 0,
    "__init__": 0,
}
# Libraries that only these parts may import.
RESERVED = {"ray": {"distributed"}, "hydra": {"jobs"}, "omegaconf": {"jobs"}}
TORCH = {"torch", "torchvision", "opacus", "safetensors"}
PRIVACY_WITH_TORCH = {
    "dpsgd.py",
    "folded.py",
    "optimizer.py",
    "clipped_sum.py",
    "layers.py",
    "group_norm.py",
    "kernels.py",
    "compiling.py",
}
FRONT_DOOR = ("__init__", "api")  # `from e2h import run`: asked for by name, loaded then
MAX_LINES = 300


def sources() -> list[Path]:
    return [*sorted((ROOT / "e2h").rglob("*.py")), *sorted((ROOT / "jobs").rglob("*.py"))]


def part_of(path: Path) -> str:
    """`e2h/privacy/keys.py` -> privacy; `e2h/config.py` -> config; `jobs/train.py` -> jobs."""
    first, *rest = path.relative_to(ROOT).parts
    return first if first == "jobs" else rest[0].removesuffix(".py")


def imports(source: str) -> Iterator[str]:
    """Dotted names that a module imports, wherever in it; relative and computed imports are refused."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            assert name not in ("import_module", "__import__"), f"line {node.lineno}: a computed import"


def own_part(name: str) -> str:
    """The part that `e2h.x.y` names; `import e2h` and `from e2h import __version__` name the root."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in FLOORS else "__init__"


def violations(path: Path, source: str) -> list[str]:
    part, found = part_of(path), []
    for name in imports(source):
        library = name.split(".")[0]
        if library == "e2h":
            target = own_part(name)
            allowed = target == part or FLOORS[target] < FLOORS[part] or (part, target) == FRONT_DOOR
        elif library in RESERVED:
            allowed = part in RESERVED[library]
        elif library in TORCH and part in ("data", "config", "errors", "__init__"):
            allowed = False
        elif library in TORCH and part == "privacy":
            allowed = path.name in PRIVACY_WITH_TORCH
        else:
            allowed = True
        if not allowed:
            found.append(f"{path.relative_to(ROOT)} imports {name}")
    return found


def test_imports_only_point_down():
    assert [line for path in sources() for line in violations(path, path.read_text())] == []


def test_every_part_has_a_floor():
    assert {part_of(path) for path in sources()} <= set(FLOORS)


@pytest.mark.parametrize(
    ("place", "source"),
    [
        ("e2h/privacy/keys.py", "from e2h.diffusion.ema import EMA"),
        ("e2h/diffusion/ema.py", "from e2h.data import storage"),
        ("e2h/data/images.py", "import e2h.privacy.keys"),
        ("e2h/curriculum/run.py", "from e2h.reporting.metrics import MetricWriter"),
        ("e2h/curriculum/run.py", "from e2h.distributed import datasets"),
        ("e2h/curriculum/train.py", "def train():\n    import ray.train"),
        ("e2h/evaluation/evaluate.py", "import hydra"),
        ("e2h/distributed/session.py", "from omegaconf import OmegaConf"),
        ("jobs/train.py", "import ray"),
        ("e2h/config.py", "from e2h.privacy.plan import make_plan"),
        ("e2h/config.py", "import torch"),
        ("e2h/data/storage.py", "from torch import Tensor"),
        ("e2h/privacy/ledger.py", "import torch"),
        ("e2h/errors.py", "import e2h.config"),
    ],
)
def test_an_import_that_points_up_is_found(place, source):
    assert len(violations(ROOT / place, source)) == 1


@pytest.mark.parametrize("source", ["from . import keys", "import importlib\nimportlib.import_module('ray')"])
def test_imports_that_hide_are_refused(source):
    with pytest.raises(AssertionError):
        violations(ROOT / "e2h/privacy/noise.py", source)


def run_without(libraries: str, script: str, *arguments: str) -> str:
    """Runs a script in a fresh interpreter where importing these libraries fails, as if they weren't installed."""
    blocker = f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {libraries.split()!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}} (blocked)", name=name)
sys.meta_path.insert(0, Blocker())
"""
    done = subprocess.run(
        [sys.executable, "-c", blocker + script, *arguments], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


IMPORT_ALL = """
import importlib, pkgutil
def import_all(package):
    for found in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
        try:
            importlib.import_module(found.name)
        except ModuleNotFoundError as error:  # torch's builds for CPUs bring no Triton, and the kernels are for GPUs
            if (found.name, error.name) != ("e2h.privacy.kernels", "triton"):
                raise
"""


def test_the_data_floor_imports_without_torch():
    script = "import e2h.config, e2h.errors\nimport_all('e2h.data')\nprint(sorted(sys.modules))"
    loaded = run_without("torch ray hydra omegaconf opacus", IMPORT_ALL + script)
    assert "'e2h.data.prepare'" in loaded


def test_the_blocker_blocks():
    with pytest.raises(AssertionError, match="blocked"):
        run_without("ray", "import ray")


@pytest.mark.slow
def test_the_core_imports_and_trains_without_ray_and_hydra(tmp_path):
    packages = "for package in ('privacy', 'diffusion', 'curriculum'): import_all('e2h.' + package)\n"
    run_file = f"import runpy\nrunpy.run_path({str(ROOT / 'tests' / 'core_alone.py')!r}, run_name='__main__')"
    printed = run_without("ray hydra omegaconf", IMPORT_ALL + packages + run_file, str(tmp_path))
    assert printed.split() == ["central", "5", "frequency", "1", "finetune", "4", "images", "6"]


def test_only_declared_metrics_reach_tensorboard_and_none_reaches_ray():
    """What a run shows goes through `MetricWriter`, which knows each name's release class; Ray is told nothing."""
    for path in sources():
        text = path.read_text()
        if path.name != "metrics.py":
            assert "SummaryWriter" not in text, path
            assert not re.search(r"[\"']tb[\"'/]", text), f"{path}: a path below tb/"
        # A search tells Tune the scores that it is charged for.
        reports = r"\b(train|session)\.report\(" if path.name == "search.py" else r"\b(train|tune|session)\.report\("
        assert not re.search(reports, text), f"{path}: a report to Ray"


def project_files() -> list[Path]:
    folders = ("e2h", "jobs", "tests", "benchmarks", "clusters", "docs", ".ci")
    kinds = {".py", ".yaml", ".yml", ".toml", ".j2", ".css", ".md", ".sh", ".json", ""}
    found = [path for folder in folders for path in (ROOT / folder).rglob("*") if "__pycache__" not in path.parts]
    found += [path for path in ROOT.iterdir() if not path.name.startswith(".")]
    return sorted(path for path in found if path.is_file() and path.suffix in kinds)


def test_no_file_is_long():
    for path in project_files():
        name = str(path.relative_to(ROOT))
        if path.suffix in (".py", ".j2", ".css", ".yaml"):
            num_lines = len(path.read_text().splitlines())
            assert num_lines <= MAX_LINES, f"{name}: {num_lines} lines"


UNFINISHED = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")
# `ray` is the user of Ray's container images, `jane` the one of our examples.
PRIVATE_PLACE = re.compile(r"/(home|Users)/(?!(ray|jane)\b)\w|(?<![\w./])/(work|root)/")


@pytest.mark.parametrize(
    ("pattern", "found", "missed"),
    [
        (UNFINISHED, "# TO" + "DO: later", "# to do or not"),
        (PRIVATE_PLACE, "open('/home" + "/john/x')", "folder: /home/ray/data"),
        (PRIVATE_PLACE, "cd /wo" + "rk/main", "ray://head:10001, my/work/folder"),
        (PRIVATE_PLACE, "/Users" + "/ann/images", "/usr/bin/env"),
    ],
)
def test_what_counts_as_unfinished_or_private(pattern, found, missed):
    assert pattern.search(found)
    assert not pattern.search(missed)


@pytest.mark.parametrize("pattern", [UNFINISHED, PRIVATE_PLACE], ids=["unfinished", "private place"])
def test_no_file_is_unfinished_or_names_a_private_place(pattern):
    assert len(project_files()) > 100
    for path in project_files():
        match = pattern.search(path.read_text(errors="replace"))
        assert match is None, f"{path.relative_to(ROOT)}: {match.group()!r}"
