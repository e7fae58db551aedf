"""What tests on clusters share: the run that nobody disturbs, which is what every other one must equal."""

from __future__ import annotations

from typing import Any

import pytest
from cluster_runs import ALONE, finish, outcome, start


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """On this machine alone, with one worker."""
    storage = tmp_path_factory.mktemp("undisturbed")
    finish(start(storage, None, *ALONE), storage)
    return outcome(storage)
