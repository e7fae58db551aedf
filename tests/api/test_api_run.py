"""A small run of the real digits through the public API: stopped, resumed, loaded, recomputed, refused."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from e2h import audit, load_release, plan, recompute_epsilon, run
from e2h.curriculum import listing
from e2h.errors import BudgetError, InputError

pytestmark = pytest.mark.long

SMALL = {
    "privacy.epsilon": 1.0,
    "curriculum": [],
    "model.base_width": 8,
    "model.width_multipliers": [1],
    "model.attention_resolutions": [],
    "model.embedding_width": 16,
    "finetune.num_steps": 4,
    "finetune.expected_batch_size": 20,
    "finetune.noise_multiplicity": 1,
    "finetune.ledger_block": 2,
    "finetune.checkpoint_every": 2,
    "sampling.num_images": 20,
    "sampling.num_steps": 3,
    "scaling.physical_batch_size": 8,
    "evaluation.enabled": False,
}


class Stopped(BaseException):
    """As Ctrl-C in the middle of a step."""


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    return {**SMALL, "run.storage": str(tmp_path_factory.mktemp("api") / "runs"), "run.name": "small"}


@pytest.fixture(scope="module")
def told() -> list[tuple[str, int, int]]:
    return []


@pytest.fixture(scope="module")
def release(settings: dict[str, object], told: list[tuple[str, int, int]]) -> Path:
    """Made by two calls: the first was stopped after three of four steps."""

    def stop(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("finetune", 3):
            assert torch.get_num_threads() == 1
            raise Stopped

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with pytest.raises(Stopped):
        run(settings, stop)
    assert torch.get_num_threads() == 2, "the caller's number, whatever training needs"
    torch.set_num_threads(before)
    found = run(settings, lambda *point: told.append(point))
    assert isinstance(found, Path)
    return found


def charged_steps(root: Path) -> list[int]:
    records = [json.loads(line) for line in (root / "ledger.jsonl").read_text().splitlines()]
    return [step for record in records if record["kind"] == "SPEND" for step in range(*record["steps"])]


def test_a_stopped_call_goes_on_and_pays_nothing_twice(release, settings, told):
    assert release == Path(str(settings["run.storage"])) / "small" / "release"
    assert charged_steps(release.parent) == [0, 1, 2, 3]
    steps = [point for point in told if point[0] == "finetune"]
    assert steps == [("finetune", 3, 4), ("finetune", 4, 4)], "from the checkpoint of step 2"
    assert [stage for stage, _, total in told if total == 1] == [
        "prepare",
        "plan",
        "train",
        "sample",
        "publish",
        "done",
    ]


def test_an_alien_checkpoint_is_refused_and_not_executed(settings, tmp_path):
    def stop(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("finetune", 3):
            raise Stopped

    settings = {**settings, "run.name": "alien"}
    with pytest.raises(Stopped):
        run(settings, stop)
    witness = tmp_path / "executed"

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {witness}",)

    (newest,) = (Path(str(settings["run.storage"])) / "alien" / "checkpoints").glob("finetune-*.pt")
    content = pickle.dumps(Evil())
    newest.write_bytes(content + hashlib.sha256(content).digest())  # as if e2h had written it
    with pytest.raises(InputError, match=newest.name):
        run(settings)
    assert not witness.exists()


def test_a_finished_call_changes_nothing_and_prints_nothing(release, settings, capfd, monkeypatch):
    monkeypatch.setattr(listing, "open_source", None)  # nor are the images listed again
    root = release.parent
    before = {name: (root / name).read_bytes() for name in ("ledger.jsonl", "checkpoints/model.safetensors")}
    assert run(settings) == release
    assert {name: (root / name).read_bytes() for name in before} == before
    assert capfd.readouterr() == ("", "")


def test_what_a_job_leaves_is_there(release):
    root = release.parent
    names = ["plan.json", "config.yaml", "environment.json", "report.html", "metrics.jsonl", "tb/sensitive"]
    assert [name for name in names if not (root / name).exists()] == []
    losses = [json.loads(line)["step"] for line in (root / "metrics.jsonl").read_text().splitlines() if "loss" in line]
    assert set(losses) == {1, 2, 3, 4}


def test_the_plan_is_the_one_that_was_spent_and_writes_nothing(release, settings):
    before = sorted(release.parent.rglob("*"))
    found = plan(settings)
    assert sorted(release.parent.rglob("*")) == before
    ledger = json.loads((release / "ledger.json").read_text())
    assert [one.event.to_json() for one in found.releases] == [one["event"] for one in ledger["releases"]]
    assert found.bound.epsilon == ledger["epsilon"]


def test_a_release_is_loaded_as_arrays_with_its_guarantee(release):
    found = load_release(release)
    assert (found.images.shape, found.images.dtype) == ((20, 8, 8, 1), np.uint8)
    assert sorted(found.labels.tolist()) == sorted([*range(10)] * 2)
    assert found.class_names == tuple("0123456789")
    assert found.delta == 1e-4
    assert 0.99 < found.epsilon <= 1
    assert found.epsilon == pytest.approx(recompute_epsilon(release), abs=1e-6)
    assert recompute_epsilon(release) == recompute_epsilon(str(release / "ledger.json"))
    assert repr(found).startswith("Release(class_names=('0', ")


@pytest.mark.parametrize("planted", ["file", "epsilon"])
def test_a_release_with_something_wrong_in_it_is_not_loaded(release, tmp_path, planted):
    copy = tmp_path / "release"
    shutil.copytree(release, copy)
    if planted == "file":
        Image.new("L", (8, 8)).save(copy / "original.png")
        message = r"original\.png: unexpected file"
    else:
        ledger = json.loads((copy / "ledger.json").read_text())
        (copy / "ledger.json").write_text(json.dumps({**ledger, "epsilon": 0.5}))
        message = r"epsilon=0\.5: its events give"
    with pytest.raises(InputError, match=message):
        load_release(copy)


def test_what_is_not_there_is_refused_in_one_line(tmp_path):
    for read in (load_release, recompute_epsilon):
        with pytest.raises(InputError, match="expected a re"):
            read(tmp_path / "release")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"finetune.max_grad_norm": 0.5}, "finetune.max_grad_norm is 0.5 and was 1.0"),
        ({"finetune.expected_batch_size": 4000}, "at most the 1523 training records"),
        ({"sampling.class_fractions": [0.5, 0.5]}, "sampling.class_fractions=.*: expected 10 shares"),
        ({"data": "mnist", "data.path": "/nowhere"}, "data.path=/nowhere: expected a folder with idx data"),
        ({"search.privacy": "selection"}, "search.privacy=selection: expected none"),
        ({"dry_run": True}, r"dry_run=True: expected false: e2h.plan\(\) plans"),
    ],
)
def test_a_run_is_refused_before_anything_is_spent(release, settings, changed, message):
    before = (release.parent / "ledger.jsonl").read_bytes()
    with pytest.raises(InputError, match=message):
        run({**settings, **changed})
    assert (release.parent / "ledger.jsonl").read_bytes() == before


def test_a_budget_that_is_too_small_is_refused_as_such(tmp_path):
    settings = {**SMALL, "curriculum": ["central"], "run.storage": str(tmp_path)}
    settings |= {"central.noise_multiplier": 1.0, "central.num_rounds": 1, "central.sampling_prob": 1.0}
    with pytest.raises(BudgetError, match=r"privacy\.epsilon"):
        plan(settings)


def test_an_audit_too_small_to_mean_anything_is_refused():
    with pytest.raises(InputError, match="num_canaries=10: expected 100 to 65536"):
        audit(num_canaries=10)
    with pytest.raises(InputError, match="num_steps=1: expected a whole number of at least 2"):
        audit(num_steps=1)
