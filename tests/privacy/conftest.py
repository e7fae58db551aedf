"""An open ledger, and a store for ledgers."""

from __future__ import annotations

import object_store
import pytest
from ledger_cases import OWNER, PLAN, one_per_cent_a_step

from e2h.privacy.ledger import Ledger
from e2h.privacy.logs import FileLog


@pytest.fixture
def ledger(tmp_path) -> Ledger:
    made = Ledger(FileLog(tmp_path / "ledger.jsonl"), OWNER, tmp_path / "head")
    made.open(PLAN, one_per_cent_a_step)
    return made


@pytest.fixture
def store(monkeypatch):
    with object_store.serve(monkeypatch) as served:
        yield served
