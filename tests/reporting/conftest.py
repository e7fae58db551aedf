"""Run directories and releases to report on, and to spoil."""

from __future__ import annotations

import shutil
from pathlib import Path

import finished_run
import pytest

from e2h.reporting.publish import publish


@pytest.fixture(scope="session")
def epsilons():
    return finished_run.reference_epsilons()


@pytest.fixture
def write_table():
    """Writes a Parquet file of random images with these labels; keyword arguments become further columns."""
    return finished_run.write_table


@pytest.fixture
def make_run(tmp_path, epsilons):
    """make_run("name", **plan) -> a new run directory."""
    return lambda name="run", **plan: finished_run.build_run(tmp_path / name, epsilons, **plan)


@pytest.fixture(scope="session")
def finished(tmp_path_factory, epsilons):
    """A run directory with its release; not to be changed."""
    run = finished_run.build_run(tmp_path_factory.mktemp("finished") / "run", epsilons)
    publish(run)
    return run


@pytest.fixture
def release(finished, tmp_path):
    """A release of one's own to spoil."""
    return Path(shutil.copytree(finished / "release", tmp_path / "release"))
