"""The run directory: one configuration, one process, one secret that is nowhere in it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from e2h.binding import binding
from e2h.config import Config, RunConfig
from e2h.curriculum import run as run_module
from e2h.curriculum.run import Run, open_run, run_root
from e2h.errors import InputError
from e2h.privacy.keys import TEST_SECRET


def settings(storage: Path, **sections) -> Config:
    return Config(run=RunConfig(storage=str(storage)), **sections)


def test_a_run_lies_where_its_name_says_and_describes_itself(tmp_path):
    config = settings(tmp_path / "deep" / "runs")
    with open_run(config) as run:
        assert run.root == tmp_path / "deep" / "runs" / "digits-eps10-seed0"
        assert yaml.safe_load((run.root / "config.yaml").read_text()) == binding(config)
        assert (run.root / "command.txt").read_text().startswith("python ")
        assert '"torch"' in (run.root / "environment.json").read_text()
        assert stat.S_IMODE(run.root.stat().st_mode) == 0o700
        for path in run.root.iterdir():
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_a_changed_key_is_refused_with_both_values_and_a_new_name(tmp_path):
    config = settings(tmp_path)
    with open_run(config) as run:
        run.bind()
    changed = settings(tmp_path)
    changed.finetune.num_steps = 61
    changed.central.sharpen = True
    before = {path: path.read_bytes() for path in run.root.iterdir()}
    with pytest.raises(InputError) as refused, open_run(changed):
        pass
    message = str(refused.value)
    assert message.startswith("run.name=digits-eps10-seed0: expected the configuration that this run began with, but ")
    assert "central.sharpen is True and was False, finetune.num_steps is 61 and was 60" in message
    assert message.endswith("choose a new name: run.name=digits-eps10-seed0-2")
    assert {path: path.read_bytes() for path in run.root.iterdir()} == before
    changed.run.name = "digits-eps10-seed0-2"
    with open_run(changed) as other:
        assert other.root != run.root


def test_where_it_runs_may_change_and_the_run_resumes(tmp_path):
    with open_run(settings(tmp_path)) as run:
        run.bind()
        secret = run.secret()
    moved = settings(tmp_path)
    moved.scaling.num_workers = 7
    with open_run(moved) as again:
        assert again.secret() == secret
        assert again.root == run.root


def test_a_run_that_prepared_nothing_yet_may_still_change(tmp_path):
    with open_run(settings(tmp_path)):
        pass
    changed = settings(tmp_path)
    changed.finetune.num_steps = 61
    with open_run(changed) as run:
        assert run.config.finetune.num_steps == 61


def hold(storage: Path, opened) -> None:
    with open_run(settings(storage)):
        opened.set()
        signal.pause()


def test_two_processes_cannot_run_one_run_and_a_dead_one_holds_nothing(tmp_path):
    context = multiprocessing.get_context("fork")
    opened = context.Event()
    holder = context.Process(target=hold, args=(tmp_path, opened), daemon=True)
    holder.start()
    assert opened.wait(timeout=30)
    with (
        pytest.raises(
            InputError, match=rf"run\.name=digits-eps10-seed0: another process \(pid {holder.pid} on \S+\) is"
        ),
        open_run(settings(tmp_path)),
    ):
        pass
    with open_run(settings(tmp_path, seed=1)):
        pass  # another run of the same storage
    os.kill(holder.pid, signal.SIGKILL)
    holder.join(timeout=30)
    with open_run(settings(tmp_path)):
        pass


def test_the_secret_is_owner_only_beside_the_run_and_nowhere_in_it(tmp_path):
    with open_run(settings(tmp_path)) as run:
        run.bind()
        run.prepared.mkdir()
        run.mark_done("prepare")
    path = tmp_path / ".secrets" / "digits-eps10-seed0.key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert path.read_text() == run.secret().hex()
    for found in run.root.rglob("*"):
        content = b"" if found.is_dir() else found.read_bytes()
        assert run.secret().hex().encode() not in content
        assert run.secret() not in content


def test_a_given_secret_is_used_and_none_is_made(tmp_path, monkeypatch):
    monkeypatch.setenv("E2H_A_SECRET", bytes(range(32)).hex())
    config = settings(tmp_path)
    config.privacy.secret = "env:E2H_A_SECRET"
    with open_run(config) as run:
        assert run.secret() == bytes(range(32))
    assert not list(tmp_path.rglob("*.key"))
    monkeypatch.delenv("E2H_A_SECRET")
    config.run.name = "without"
    with pytest.raises(InputError, match="expected an environment variable"), open_run(config):
        pass


def test_test_mode_uses_the_published_secret_and_stamps_the_name(tmp_path):
    config = settings(tmp_path)
    config.privacy.test_mode = True
    with open_run(config) as run:
        assert run.secret() == TEST_SECRET
        assert run.root.name == "digits-eps10-seed0-NOT-PRIVATE"
        assert yaml.safe_load((run.root / "config.yaml").read_text())["privacy"]["test_mode"] is True
    assert not list(tmp_path.rglob("*.key"))


def test_a_storage_that_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for storage in (tmp_path / "file", Path("/proc/nothing")):
        refused = pytest.raises(InputError, match=rf"^run\.storage={storage}: expected a folder to write to \(")
        with refused, open_run(settings(storage)):
            pass
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]
    with pytest.raises(InputError, match=r"^run\.storage=http://host/x: expected a folder, or s3://bucket/prefix"):
        run_root(Config(run=RunConfig(storage="http://host/x")))


@pytest.mark.parametrize("name", ["one/binding.json", "one/.lock", "one/config.yaml", ".secrets"])
def test_what_can_t_be_opened_of_a_run_is_refused_by_its_name(tmp_path, name):
    """As where it is somebody else's, which stops everybody but root: a folder for a file, and a file for a folder."""
    path = tmp_path / name
    path.touch() if name == ".secrets" else path.mkdir(parents=True)
    config = settings(tmp_path)
    config.run.name = "one"
    refused = pytest.raises(
        InputError, match=rf"^run\.storage=.*: expected a folder to write to \(.*{path.name}.*; choose"
    )
    with refused, open_run(config):
        pass


def test_a_name_that_is_too_long_is_refused(tmp_path):
    config = settings(tmp_path)
    config.run.name = "x" * 300
    refused = pytest.raises(InputError, match=r"File name too long: .*; choose another, or another run\.name\)$")
    with refused, open_run(config):
        pass
    assert not list(tmp_path.iterdir())


def test_errors_of_what_is_done_in_a_run_are_not_its_storage_s(tmp_path):
    with pytest.raises(PermissionError), open_run(settings(tmp_path)):
        raise PermissionError
    with open_run(settings(tmp_path)):
        pass  # nothing is held


EVENT = {"type": "poisson_sampled_gaussian", "sampling_prob": 0.1, "noise_multiplier": 2.0, "count": 10}


def test_a_domain_names_all_that_determines_a_release(tmp_path, monkeypatch):
    monkeypatch.setenv("E2H_A_SECRET", bytes(range(32)).hex())
    monkeypatch.setenv("E2H_ANOTHER", bytes(range(1, 33)).hex())

    def domain(
        name="central", event=EVENT, data="aa", place="bb", secret="env:E2H_A_SECRET", change=lambda config: None
    ):
        config = settings(tmp_path)
        config.privacy.secret = secret
        change(config)
        return Run(run_root(config), config).domain(name, event, data, place)

    def with_steps(config):
        config.finetune.num_steps = 61

    def with_seed(config):
        config.seed = 1

    def with_name(config):
        config.run.name = "another"

    others = [
        domain("frequency"),  # with an equal event it is another release all the same
        domain(event={**EVENT, "noise_multiplier": 2.1}),
        domain(data="ab"),
        domain(place="bc"),
        domain(secret="env:E2H_ANOTHER"),
        domain(change=with_steps),
        domain(change=with_seed),
        domain(change=with_name),  # under one secret, another run's noise is its own
    ]
    assert len({domain(), *others}) == 9
    assert len(bytes.fromhex(domain())) == 32

    def elsewhere(config):
        config.scaling.num_workers = 8
        config.sampling.num_images = 5  # post-processing
        config.evaluation.enabled = False

    assert domain(change=elsewhere) == domain()
    same = domain()
    monkeypatch.setenv("E2H_A_SECRET", bytes(range(2, 34)).hex())
    assert domain() != same  # another secret behind the same words
    monkeypatch.setenv("E2H_A_SECRET", bytes(range(32)).hex())
    assert domain() == same
    monkeypatch.setattr(run_module, "code_digest", lambda: "other code")
    assert domain() != same


def test_a_stage_is_done_for_the_configuration_that_did_it(tmp_path):
    with open_run(settings(tmp_path)) as run:
        assert not run.done("prepare")
        run.prepared.mkdir()
        run.mark_done("prepare")
        assert not run.done("prepare")  # what it made is gone
        (run.prepared / "meta.json").touch()
        assert run.done("prepare")
        assert not run.done("central")
        assert Run(run.root, replace(run.config, scaling=replace(run.config.scaling, num_workers=9))).done("prepare")
        assert not Run(run.root, replace(run.config, seed=1)).done("prepare")
        for damaged in ("", "{", "[]", "{}"):
            (run.prepared / "_SUCCESS.json").write_text(damaged)
            assert not run.done("prepare")
