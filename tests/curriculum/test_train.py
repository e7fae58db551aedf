"""The whole of `train`: the same call resumes after a kill in any stage, and every step is in the ledger."""

from __future__ import annotations

import base64
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_runs import Killed, prepare, small_config

from e2h.curriculum import learner as learner_module
from e2h.curriculum import machine
from e2h.curriculum.checkpoint import Checkpoints
from e2h.curriculum.run import open_run
from e2h.curriculum.train import fitting_unit, new_network, train, weights_digest
from e2h.curriculum.workers import Workers
from e2h.data.storage import open_prepared
from e2h.errors import BudgetError, InputError


@pytest.fixture(autouse=True)
def secret(monkeypatch):
    monkeypatch.setenv("E2H_TEST_SECRET", bytes(range(32)).hex())


def trained(
    storage: Path, kill_at: tuple[str, int] | None = None, central: bool = True, unit: int | None = 8
) -> tuple[bytes, list, tuple]:
    """The bytes of the weights, the steps that were made, and what the ledger charged."""
    config, made = small_config(storage), []
    config.curriculum, config.scaling.physical_batch_size = (["central"] if central else []), unit

    def progress(stage: str, step: int) -> None:
        made.append((stage, step))
        if (stage, step) == kill_at:
            raise Killed

    with open_run(config) as run:
        fresh = not run.prepared.exists()
        release = prepare(run) if fresh else run.ledger.budget().planned[0]
        train(run, release, Workers.current(), lambda *_: None, progress)
        return run.weights.read_bytes(), made, run.ledger.charged()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("E2H_TEST_SECRET", bytes(range(32)).hex())
        return trained(tmp_path_factory.mktemp("runs"))


STEPS = [*(("warmup", step) for step in range(1, 7)), *(("finetune", step) for step in range(1, 7))]


def test_a_run_makes_every_step_and_charges_it(uninterrupted):
    _, made, charged = uninterrupted
    assert made == STEPS
    assert [(release.name, release.event.count) for release in charged] == [("finetune", 6)]


@pytest.mark.parametrize(
    ("kill_at", "rest"),
    [
        (("warmup", 3), STEPS),
        (("finetune", 1), STEPS[6:]),
        (("finetune", 5), STEPS[10:]),
        (("finetune", 6), []),
    ],
)
@pytest.mark.usefixtures("quick_store")
def test_the_same_call_resumes_and_ends_in_the_same_bits(uninterrupted, tmp_path, kill_at, rest):
    with pytest.raises(Killed):
        trained(tmp_path, kill_at)
    weights, made, charged = trained(tmp_path)
    assert made == rest
    assert weights == uninterrupted[0]
    assert charged == uninterrupted[2]


def test_without_the_easy_stage_there_is_no_warm_up(uninterrupted, tmp_path):
    weights, made, _ = trained(tmp_path, central=False)
    assert made == STEPS[6:]
    assert weights != uninterrupted[0]


def test_other_starting_weights_are_another_domain(tmp_path):
    """Noise that was drawn once must not be drawn again over another warm-up."""
    with pytest.raises(Killed):
        trained(tmp_path, ("finetune", 1))
    with open_run(small_config(tmp_path)) as run:
        checkpoints = Checkpoints(run.checkpoints, run.training_binding)
        step, state = checkpoints.latest("warmup")
        state["network"]["conv_out.bias"] += 1e-3
        checkpoints.save("warmup", step, state)
        checkpoints.wait()
        before = run.ledger.charged()
    # The plan has these steps once: over another warm-up they would be drawn, and paid, a second time.
    with pytest.raises(
        BudgetError, match="release finetune: the budget pays for 6 steps, and 8 would be needed: 2 were"
    ):
        trained(tmp_path)
    with open_run(small_config(tmp_path)) as run:
        assert run.ledger.charged() == before
        assert not run.weights.exists()


def test_another_kind_of_machine_is_another_domain(tmp_path, monkeypatch):
    """Its last bits may differ: the same step there would be a second release with the same noise."""
    with pytest.raises(Killed):
        trained(tmp_path, ("finetune", 3))
    for change in (
        lambda patch: patch.setattr(machine, "_processor", lambda: ["another model"]),
        lambda patch: patch.setattr(machine, "version", lambda name: "another version"),
        lambda patch: patch.setenv("MKL_CBWR", "COMPATIBLE"),
    ):
        with monkeypatch.context() as patch:
            change(patch)
            with pytest.raises(BudgetError, match="not in the ledger under this key, data, code and machine"):
                trained(tmp_path)
    assert trained(tmp_path)[1] == STEPS[8:]


def test_the_weights_load_and_are_the_average(tmp_path):
    trained(tmp_path)
    with open_run(small_config(tmp_path)) as run:
        network = new_network(run, open_prepared(run.prepared))
        initial = weights_digest(network)
        network.load_state_dict(load_file(run.weights))
        assert weights_digest(network) != initial
        newest = torch.load(sorted(run.checkpoints.glob("finetune-*.pt"))[-1], weights_only=True)
        for name, parameter in network.named_parameters():
            assert torch.equal(parameter, newest["state"]["ema"]["parameters"][name])


def test_a_unit_is_chosen_for_as_many_workers_as_the_group_may_grow_to(tmp_path, monkeypatch):
    sizes = []
    monkeypatch.setattr(
        "e2h.curriculum.train.largest_that_fits", lambda *arguments: sizes.append(arguments[-1].size) or 8
    )
    config = small_config(tmp_path)
    config.scaling.num_workers, config.scaling.min_workers = 6, 1
    with open_run(config) as run:
        prepare(run)
        assert fitting_unit(run, new_network(run, open_prepared(run.prepared)), Workers.current()) == 8
    assert sizes == [6]


def test_a_run_that_was_not_prepared_is_refused(tmp_path):
    with open_run(small_config(tmp_path)) as run, pytest.raises(InputError, match="expected a prepared set"):
        train(run, None, Workers.current(), lambda *_: None, lambda *_: None)


def test_a_chosen_unit_is_kept_through_a_kill_and_belongs_to_the_run(uninterrupted, tmp_path, monkeypatch):
    def choose(size):
        monkeypatch.setattr("e2h.curriculum.train.largest_that_fits", lambda *_: size)

    choose(8)
    with pytest.raises(Killed):
        trained(tmp_path, ("finetune", 3), unit=None)
    choose(4)  # another time the memory might be short
    weights, made, _ = trained(tmp_path, unit=None)
    assert weights == uninterrupted[0]  # which was told to take 8
    assert made == STEPS[8:]


def test_a_lost_choice_that_comes_out_otherwise_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("e2h.curriculum.train.largest_that_fits", lambda *_: 8)
    with pytest.raises(Killed):
        trained(tmp_path, ("finetune", 3), unit=None)
    for path in tmp_path.rglob("units.json"):
        path.unlink()
    monkeypatch.setattr("e2h.curriculum.train.largest_that_fits", lambda *_: 4)
    with pytest.raises(BudgetError, match="not in the ledger under this"):
        trained(tmp_path, unit=None)


def test_out_of_memory_in_mid_training_is_one_line_that_names_the_unit(tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr("e2h.curriculum.train.finetune", full)
    with pytest.raises(InputError, match=r"scaling\.physical_batch_size=8: expected so many images to fit"):
        trained(tmp_path)


def forms(key: bytes) -> set[bytes]:
    """A key as it could be written: as it is, in hexadecimal digits, in base 64, as Python or JSON shows it."""
    shown = {key.hex(), key.hex().upper(), base64.b64encode(key).decode(), str(list(key)), repr(key)}
    return {key, *(one.encode() for one in shown)}


def test_no_key_is_written_printed_or_sent_to_the_workers(tmp_path, monkeypatch, capfd, caplog):
    keys, derive = [bytes(range(32))], learner_module.derive_key

    def watched(secret, purpose, *address):
        keys.append(derive(secret, purpose, *address))
        return keys[-1]

    monkeypatch.setattr(learner_module, "derive_key", watched)
    config, reported = small_config(tmp_path), []
    with open_run(config) as run:
        release = prepare(run)
        sent = pickle.dumps((run, release))  # what Ray's object store holds
        train(run, release, Workers.current(), lambda *point: reported.append(point), lambda *_: None)
        sent += pickle.dumps((run, reported))
    printed = capfd.readouterr()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".pt" for path in files)
    assert len(set(keys)) == 1 + 1 + 6  # the secret, the masks' and one a step
    said = [printed.out.encode(), printed.err.encode(), caplog.text.encode()]
    for content in (sent, *said, *(path.read_bytes() for path in files)):
        for key in set(keys):
            assert not any(form in content for form in forms(key))
