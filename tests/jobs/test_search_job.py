"""A search on the real digits with real Ray: what leaves its private store, how it resumes, how it survives kills."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from job_calls import SMALL, command, environment
from omegaconf import OmegaConf
from PIL import Image
from test_pipeline import _training_workers, charged_steps

from e2h.config import Config
from e2h.curriculum.run import Run
from e2h.curriculum.search import search_address, trial_law
from e2h.curriculum.stages import prepare
from e2h.privacy.keys import derive_key
from e2h.reporting.check import check

# A search takes two minutes on two cores, and five on a machine with other work.
pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.timeout(2400)]

SECRET = "privacy.secret=env:E2H_TEST_SECRET"
TINY = [
    SECRET,
    *SMALL,
    "search.space={warmup.num_steps:[10,20]}",
    "search.score_images=120",
    "finetune.num_steps=6",
    "evaluation.max_feature_records=100",
]
SELECTION = [*TINY, "search.privacy=selection", "search.expected_trials=2", "search.max_trials=3"]
OWN_LINE = re.compile(r"(ray|prepare|plan|central|search|ledger|sample|evaluate|publish|train|warmup|finetune|) +\S")


def config_of(*overrides: str) -> Config:
    ConfigStore.instance().store("schema", Config)
    with initialize_config_module("e2h.conf", version_base="1.3"):
        config = OmegaConf.to_object(compose("config", list(overrides)))
    assert isinstance(config, Config)
    return config


def secret_of(number: int, *overrides: str) -> str:
    """A secret from which this number of trials is drawn."""
    config = config_of(*overrides)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder) / "r", config)  # the name of every search here
        run.root.mkdir()
        prepare(run)
        law, address = trial_law(config), search_address(run)
    drawn = (hashlib.sha256(b"search" + bytes([i])).hexdigest() for i in range(100))
    return next(one for one in drawn if law.draw(derive_key(bytes.fromhex(one), "search/number", address)) == number)


class Search:
    """`jobs/search.py` on one run directory, with everything that was ever to be seen in it."""

    def __init__(self, storage: Path, *overrides: str, secret: str = "", name: str = "r") -> None:
        self.root, self.overrides = storage / name, overrides
        self.extra = {"E2H_TEST_SECRET": secret} if secret else {}
        self.seen: set[str] = set()
        self.written: dict[str, set[int]] = {}

    def start(self) -> subprocess.Popen[str]:
        storage = self.root.parent
        return subprocess.Popen(
            command("search", f"run.storage={storage}", f"run.name={self.root.name}", *self.overrides),
            cwd=storage.parent,
            env=environment(**self.extra),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # Whoever runs the tests in the background has Ctrl-C ignored, and that is inherited.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def look(self) -> None:
        for folder, _, names in os.walk(self.root):
            for path in (Path(folder) / name for name in names):
                name = path.relative_to(self.root).as_posix()
                self.seen.add(name)
                if re.fullmatch(r"trials/trial-\w+/(score.json|checkpoints/model.safetensors)", name):
                    try:
                        self.written.setdefault(name, set()).add(path.stat().st_mtime_ns)
                    except FileNotFoundError:
                        continue

    def until(self, process: subprocess.Popen[str], happens: Callable[[], bool], limit_s: float = 300) -> None:
        """Looks until something happens, or the process ends."""
        deadline = time.monotonic() + limit_s
        while process.poll() is None and not happens():
            assert time.monotonic() < deadline, sorted(self.seen)
            self.look()
            time.sleep(0.2)

    def finish(self, process: subprocess.Popen[str]) -> str:
        self.until(process, lambda: False, 900)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, out + err
        assert err == "", "the terminal is the user's: nothing but our lines"
        assert [line for line in out.splitlines() if not OWN_LINE.match(line)] == []
        return out

    @property
    def trials(self) -> set[str]:
        return {name.split("/")[1] for name in self.seen if name.startswith("trials/trial-")}

    def result(self) -> dict:
        return json.loads((self.root / "search.json").read_text())


def files(root: Path) -> dict[str, bytes]:
    """What a release says, but for the head of its ledger, which holds times."""
    found = {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    ledger = json.loads(found.pop("ledger.json"))
    del ledger["ledger_head"]
    return found | {"ledger.json": json.dumps(ledger).encode()}


@pytest.fixture(scope="module")
def two_trials() -> str:
    return secret_of(2, *SELECTION)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, two_trials: str) -> tuple[Search, str]:
    """A whole search of two trials, and what it printed."""
    search = Search(tmp_path_factory.mktemp("undisturbed") / "runs", *SELECTION, secret=two_trials)
    return search, search.finish(search.start())


OUTSIDE = {
    *("binding.json", "config.yaml", "command.txt", "environment.json", "ray.log", ".lock"),
    *("plan.json", "ledger.jsonl", "metrics.jsonl", "search.json", "evaluation.json", "report.html"),
    *("prepared/_SUCCESS.json", "prepared/meta.json", "prepared/train-00000.parquet", "prepared/test-00000.parquet"),
    *("central/_SUCCESS.json", "central/event.json", "central/grid.png", "central/images.parquet"),
    *("checkpoints/_SUCCESS.json", "checkpoints/model.safetensors"),
    *("synthetic/_SUCCESS.json", "synthetic/grid.png", "synthetic/weights.sha256"),
    *(f"synthetic/part-{part:05d}.parquet" for part in range(3)),
    *("release/README.md", "release/config.yaml", "release/grid.png", "release/ledger.json"),
    *("release/model.safetensors", "release/report.html"),
    *(f"{folder}figures/{name}.svg" for folder in ("", "release/") for name in ("budget", "trade_off")),
    *(f"release/data/part-{part:05d}.parquet" for part in range(3)),
}
# Names that differ from run to run: TensorBoard's, the mapped images', those of files in the making.
PASSING = re.compile(r"tb/.*|prepared/\.?train-\w+\.npy(\.\w+)?|(.*/)?\.\S*tmp\S*|\.release-building/.*|(.*/)?\.[^/]+")


def test_nothing_but_the_best_trial_leaves_the_private_store(undisturbed: tuple[Search, str]) -> None:
    search, printed = undisturbed
    assert search.trials == {"trial-000", "trial-001"}
    after = {path.relative_to(search.root).as_posix() for path in search.root.rglob("*") if path.is_file()}
    assert not any(name.startswith("trials") for name in after)
    assert not (search.root / "trials").exists()
    for names in (after, {name for name in search.seen if not name.startswith("trials/")}):
        assert {name for name in names if not PASSING.fullmatch(name)} <= OUTSIDE
    assert after >= OUTSIDE
    # Neither a trial's name nor how many there were is told anywhere, nor is a second score.
    told = [path for path in search.root.rglob("*") if path.is_file() and path.name != "ray.log"]
    assert [path for path in told if b"trial-0" in path.read_bytes()] == []
    assert "trial-0" not in printed
    assert set(search.result()) == {"values", "score"}
    assert check(search.root / "release") == []


def test_the_ledger_pays_for_the_search_once_and_before_any_trial(undisturbed: tuple[Search, str]) -> None:
    search, printed = undisturbed
    assert charged_steps(search.root, "central") == list(range(5))
    assert charged_steps(search.root, "search") == [0]
    ledger = json.loads((search.root / "release" / "ledger.json").read_text())
    assert [one["name"] for one in ledger["releases"]] == ["central", "search"]
    assert (1 - 1e-3) <= ledger["epsilon"] <= 1
    assert ledger["tuning"]["mode"] == "selection"
    assert f"epsilon {ledger['epsilon']:.4f} of 1 spent" in printed


def test_the_same_command_again_changes_nothing(undisturbed: tuple[Search, str]) -> None:
    search, _ = undisturbed
    kept = ("search.json", "ledger.jsonl", "checkpoints/model.safetensors", "synthetic/part-00000.parquet")
    before = {name: (search.root / name).stat().st_mtime_ns for name in kept}, files(search.root / "release")
    search.finish(search.start())
    after = {name: (search.root / name).stat().st_mtime_ns for name in kept}, files(search.root / "release")
    assert after == before
    assert not (search.root / "trials").exists()


def test_a_search_with_other_settings_under_the_same_name_is_refused(undisturbed: tuple[Search, str]) -> None:
    search, _ = undisturbed
    other = Search(search.root.parent, *SELECTION, "search.expected_trials=1.5", name=search.root.name)
    process = other.start()
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err.count("\n")) == (2, 1), out + err
    assert "search.expected_trials is 1.5 and was 2.0" in err


def same_search(one: Search, two: Search) -> bool:
    return one.result() == two.result() and files(one.root / "release") == files(two.root / "release")


def test_a_killed_driver_goes_on_with_the_same_trials(
    undisturbed: tuple[Search, str], two_trials: str, tmp_path: Path
) -> None:
    search = Search(tmp_path / "runs", *SELECTION, secret=two_trials)
    process, finished = search.start(), search.root / "trials" / "trial-000" / "score.json"
    search.until(process, lambda: finished.exists() and (search.root / "trials" / "trial-001").exists())
    process.kill()
    process.communicate()
    search.look()
    score = {finished.stat().st_mtime_ns}
    assert not (search.root / "search.json").exists()
    again = Search(tmp_path / "runs", *SELECTION, secret=two_trials)
    again.finish(again.start())
    assert again.written["trials/trial-000/score.json"] == score  # kept, not made again
    assert search.trials | again.trials == {"trial-000", "trial-001"}
    assert charged_steps(search.root, "search") == [0]
    assert same_search(again, undisturbed[0])


def test_a_killed_worker_of_a_trial_is_replaced(
    undisturbed: tuple[Search, str], two_trials: str, tmp_path: Path
) -> None:
    search = Search(tmp_path / "runs", *SELECTION, secret=two_trials)
    process, training = search.start(), search.root / "trials" / "trial-000" / "checkpoints"
    search.until(process, lambda: any(training.glob("warmup-*.pt")))
    os.kill(_training_workers(process.pid)[0], signal.SIGKILL)
    search.finish(process)
    assert search.trials == {"trial-000", "trial-001"}
    assert same_search(search, undisturbed[0])


TWO_AT_A_TIME = ["search.concurrent_trials=2", "scaling.num_workers=1"]


def test_two_trials_at_a_time_are_stopped_early_by_asha_and_all_of_them_paid_for(tmp_path: Path) -> None:
    settings = [*TINY, "search.privacy=compose", "search.scheduler=asha", "search.expected_trials=4", *TWO_AT_A_TIME]
    settings += ["finetune.num_steps=9", "search.space={warmup.num_steps:[1,10,20,30]}"]
    search = Search(tmp_path / "runs", *settings)
    search.finish(search.start())
    trials = search.result()["trials"]
    assert len(trials) == 4
    assert sorted(one["values"]["warmup.num_steps"] for one in trials) == [1, 10, 20, 30]
    assert all("0.111" in one["scores"] for one in trials)
    assert any("1.000" in one["scores"] for one in trials)
    assert any("1.000" not in one["scores"] for one in trials)  # stopped
    assert charged_steps(search.root, "finetune") == list(range(4 * 9))
    assert charged_steps(search.root, "score after 0.333") == list(range(4))
    assert check(search.root / "release") == []
    assert "<svg" in (search.root / "release" / "report.html").read_text()


def public_images(folder: Path) -> Path:
    """Bright quarters of 8x8 pixels in four classes."""
    for label in range(4):
        (folder / str(label)).mkdir(parents=True)
        for i in range(60):
            with Image.new("L", (8, 8), i) as picture:
                picture.paste(200 + i % 50, (4 * (label % 2), 4 * (label // 2), 4 * (label % 2) + 4, 8))
                picture.save(folder / str(label) / f"{i}.png")
    return folder


def test_optuna_on_public_images_costs_nothing_and_the_best_makes_an_ordinary_run(tmp_path: Path) -> None:
    images = public_images(tmp_path / "public")
    settings = [*TINY, "search.privacy=proxy", "search.sampler=optuna", "search.expected_trials=3"]
    settings += ["search.proxy.source=image_folder", f"search.proxy.path={images}"]
    settings += ["search.space={warmup.num_steps:[1,10,20]}"]
    search = Search(tmp_path / "runs", *settings)
    search.finish(search.start())
    assert all(one["scores"] for one in search.result()["trials"])
    assert charged_steps(search.root, "central") == list(range(5))
    assert charged_steps(search.root, "finetune") == list(range(6))
    ledger = json.loads((search.root / "release" / "ledger.json").read_text())
    assert [one["name"] for one in ledger["releases"]] == ["central", "finetune"]
    assert check(search.root / "release") == []
    assert str(images) not in (search.root / "release" / "config.yaml").read_text()
