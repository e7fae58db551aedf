"""An open ledger."""

from __future__ import annotations

import pytest
from ledger_cases import PLAN, one_per_cent_a_step

from e2h.privacy.ledger import Ledger


@pytest.fixture
def ledger(tmp_path) -> Ledger:
    made = Ledger(tmp_path / "ledger.jsonl", one_per_cent_a_step, tmp_path / "head")
    made.open(PLAN)
    return made
