"""What the tests of training share."""

from __future__ import annotations

import pytest
import torch
from small_runs import Training, averaged, parameters, warmed, watch_units

from e2h.curriculum.checkpoint import Checkpoints


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """A replay is bit-identical with one thread, and small problems gain nothing from more."""
    torch.set_num_threads(1)


@pytest.fixture
def quick_store(monkeypatch):
    """A checkpoint is written before the next step, so that none is left out because the one before still is."""
    save = Checkpoints.save

    def saved(checkpoints, *arguments):
        save(checkpoints, *arguments)
        checkpoints.wait()

    monkeypatch.setattr(Checkpoints, "save", saved)


@pytest.fixture(scope="session")
def alone(tmp_path_factory):
    """The uninterrupted run of one process: warm-up, then all steps, with a look at every step's records."""
    folder = tmp_path_factory.mktemp("alone")
    network = warmed(folder)
    start = parameters(network).clone()
    training = Training(folder, network=network)
    with pytest.MonkeyPatch.context() as patched:
        seen = watch_units(patched.setattr)
        ema = training.run()
    return {"folder": folder, "start": start, "training": training, "ema": averaged(ema), "seen": seen}
