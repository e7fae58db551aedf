"""The cost model of benchmarks/scale.py: its algebra, its limits, and what it reads from the experiment files."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from werkzeug.serving import WSGIRequestHandler

from e2h.config import SamplingConfig
from e2h.data.remote import place
from e2h.distributed import training
from e2h.errors import InputError
from e2h.privacy.events import PoissonSampledGaussian, Release
from e2h.privacy.ledger import Budget, Ledger
from e2h.privacy.logs import open_log

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import scale  # noqa: E402
from lib.cost_model import (  # noqa: E402
    ASK_EVERY_S,
    ASK_EVERY_STEPS,
    HARDWARE,
    PAYMENT_REQUESTS,
    UNITS,
    Hardware,
    Host,
    Work,
    barrier,
    best_unit,
    busiest_units,
    central_seconds,
    dealt,
    efficiency,
    payment,
    ring,
    run_terms,
    step_terms,
)
from lib.experiments import paper_settings, sampler_counts  # noqa: E402

WORK = Work(
    "synthetic",
    records=100_000,
    batch=2048,
    draws=4,
    steps=1000,
    pixels=3072,
    parameters=4_000_000,
    forward_flops=1e9,
    warmup_steps=100,
    central_rounds=10,
    central_dimension=769,
    synthetic_images=1000,
    evaluations=50,
)
NOTHING = Host(**{field.name: 0.0 for field in fields(Host)})
HOST = Host(
    image=1e-5, normal=1e-8, mask=1e-8, noise=1e-8, save=1e-9, payment=1e-3, payment_record=1e-5, unpack=1e-9,
    encode=1e-9, product=1e-10, select=1e-9, normal64=1e-8, barrier=1e-3, barrier_worker=1e-4, start=10.0,
)  # fmt: skip
GPU = HARDWARE["a100"]
# Nothing but arithmetic costs anything.
IDEAL = replace(GPU, unit=0.0, update=0.0, hop=0.0, far_hop=0.0, link=1e30, far_link=1e30, copy=1e30, request=0.0)


def seconds(work: Work = WORK, host: Host = HOST, hardware: Hardware = GPU, workers: int = 8, unit: int = 16) -> float:
    return sum(step_terms(work, host, hardware, workers, unit).values())


def test_one_worker_has_no_collective_and_two_have_a_ring():
    assert step_terms(WORK, HOST, GPU, 1, 16)["collective"] == 0
    near = replace(GPU, hop=1e-3, link=1e9)
    assert ring(8e9, 2, near) == pytest.approx(2 * 1e-3 + 8.0)
    assert ring(8e9, 8, near) == pytest.approx(14 * 1e-3 + 14.0)  # twice 7/8 of the bytes
    assert ring(8e9, 9, near) == pytest.approx(16 * GPU.far_hop + 16 / 9 * 8e9 / GPU.far_link)  # leaves the node


def test_without_overheads_a_step_is_its_arithmetic():
    work = replace(WORK, records=2048)  # all records in each step: no draw varies
    assert seconds(work, NOTHING, IDEAL, 1, 1) == pytest.approx(2048 * 12e9 / IDEAL.flops)
    assert seconds(work, NOTHING, IDEAL, 64, 32) == pytest.approx(2048 / 64 * 12e9 / IDEAL.flops)
    assert efficiency(step_terms(work, NOTHING, IDEAL, 64, 32)) == pytest.approx(1.0)


def test_units_that_do_not_go_round_leave_workers_idle():
    work = replace(WORK, records=2048)
    # Eight units of 256 for 64 workers: each step waits for one whole unit.
    assert efficiency(step_terms(work, NOTHING, IDEAL, 64, 256)) == pytest.approx(8 / 64)
    # A single record more, and one worker has two.
    assert dealt(np.array([2048, 2049]), 256, 8).tolist() == [1, 2]
    assert dealt(np.array([0, 1]), 256, 8).tolist() == [0, 1]


@pytest.mark.parametrize(("unit", "workers"), [(1, 1), (256, 8), (32, 64), (7, 3)])
def test_the_busiest_workers_units_are_those_of_simulated_draws(unit, workers):
    drawn = np.random.default_rng(0).binomial(WORK.records, WORK.batch / WORK.records, 200_000)
    simulated = dealt(drawn, unit, workers)
    assert busiest_units(WORK, unit, workers) == pytest.approx(
        simulated.mean(), abs=5 * simulated.std() / 200_000**0.5 + 1e-9
    )


def test_poisson_draws_cost_more_than_their_mean():
    # 2048 records make eight units of 256, or nine in half of the steps.
    assert busiest_units(WORK, 256, 8) == pytest.approx(1.5, abs=0.02)


@pytest.mark.parametrize("name", [field.name for field in fields(Host) if field.name not in ("start", "select")])
def test_every_constant_of_the_host_costs_something_and_nothing_gets_cheaper(name):
    dearer = replace(HOST, **{name: 1e3 * getattr(HOST, name)})
    slower = replace(GPU, spare_core=False, request=0.0)
    before, after = seconds(hardware=slower), seconds(host=dearer, hardware=slower)
    stages = [sum(run_terms(WORK, host, slower, 8, 16).values()) for host in (HOST, dearer)]
    assert after >= before
    assert stages[1] > stages[0]


@pytest.mark.parametrize(("name", "value"), [("flops", 1e12), ("unit", 0.1), ("update", 1e-8), ("copy", 1e9),
                                             ("link", 1e9), ("hop", 0.1), ("request", 1.0)])  # fmt: skip
def test_worse_hardware_is_slower(name, value):
    assert seconds(hardware=replace(GPU, **{name: value})) > seconds()


def test_more_records_draws_or_batch_are_slower_and_more_workers_at_first_faster():
    for name in ("records", "draws", "batch", "parameters", "pixels"):
        assert seconds(replace(WORK, **{name: 2 * getattr(WORK, name)})) > seconds(), name
    taken = [seconds(workers=workers) for workers in (1, 2, 4, 8)]
    assert taken == sorted(taken, reverse=True)
    assert seconds(workers=10_000) > seconds(workers=64)  # then the ring and the barrier win


def test_noise_hides_behind_gradients_where_there_is_a_core_for_it():
    slow = replace(HOST, noise=1e-6)
    crowded = replace(GPU, spare_core=False)
    assert step_terms(WORK, slow, crowded, 8, 16)["noise"] == pytest.approx(0.5)
    hidden = step_terms(WORK, slow, GPU, 8, 16)
    assert hidden["noise"] == pytest.approx(0.5 - hidden["gradients"] - hidden["idle, padding"])
    assert step_terms(WORK, HOST, GPU, 8, 16)["noise"] == 0


def test_a_mask_hides_too_however_many_workers_there_are():
    many = replace(WORK, records=10_000_000)
    assert step_terms(many, HOST, replace(GPU, spare_core=False), 64, 16)["mask"] == pytest.approx(0.1)
    hidden = step_terms(many, HOST, GPU, 64, 16)
    assert hidden["mask"] == pytest.approx(0.1 - hidden["gradients"] - hidden["idle, padding"])
    assert step_terms(WORK, HOST, GPU, 64, 16)["mask"] == 0


def test_ray_is_asked_once_a_second_or_every_sixteenth_step_or_in_each_that_is_longer():
    question = HOST.barrier + 8 * HOST.barrier_worker
    assert [barrier(HOST, 8, step) / question for step in (0.01, 0.25, 1.0, 3.0)] == pytest.approx(
        [1 / 16, 1 / 4, 1, 1]
    )
    assert (ASK_EVERY_S, ASK_EVERY_STEPS) == (training.ASK_EVERY_S, training.ASK_EVERY_STEPS)


def test_the_ledger_is_shared_by_the_steps_of_a_block_and_grows():
    apart, longer = replace(WORK, ledger_block=1), replace(WORK, steps=1_000_000)
    assert step_terms(apart, HOST, GPU, 8, 16)["ledger"] > 10 * step_terms(WORK, HOST, GPU, 8, 16)["ledger"]
    assert payment(longer, HOST, GPU) > payment(WORK, HOST, GPU) > PAYMENT_REQUESTS * GPU.request
    assert payment(WORK, HOST, replace(GPU, request=0.0)) == pytest.approx(1e-3 + 1e-5 * 1000 / 16 / 2)


def test_a_long_step_saves_each_time_and_a_short_one_every_twentieth():
    state = 16 * WORK.parameters * HOST.save
    assert step_terms(WORK, HOST, GPU, 8, 16)["checkpoint"] == pytest.approx(state / 20)
    assert step_terms(WORK, HOST, replace(GPU, flops=1e9), 8, 16)["checkpoint"] == pytest.approx(state)


def test_the_best_unit_is_the_best_of_all():
    for workers in (1, 8, 64):
        unit = best_unit(WORK, HOST, GPU, workers)
        assert seconds(workers=workers, unit=unit) == min(seconds(workers=workers, unit=one) for one in UNITS)
    assert best_unit(WORK, HOST, GPU, 64) < best_unit(WORK, HOST, GPU, 1)


def test_the_central_pass_is_linear_and_sparse_rounds_are_looked_up():
    base = central_seconds(WORK, HOST, 4)
    assert central_seconds(replace(WORK, records=200_000), HOST, 4) == pytest.approx(2 * base)
    assert central_seconds(WORK, HOST, 8) == pytest.approx(base / 2)
    assert central_seconds(replace(WORK, central_rounds=0), HOST, 4) == 0
    sparse = replace(WORK, central_prob=0.01)
    assert central_seconds(sparse, replace(HOST, select=1e-6), 4) > central_seconds(sparse, HOST, 4)
    assert central_seconds(WORK, replace(HOST, select=1e-6), 4) == base


@pytest.mark.parametrize("change", [{"batch": 0}, {"records": 100}, {"ledger_block": 0}, {"forward_flops": -1.0}])
def test_a_run_that_cannot_be_is_refused(change):
    with pytest.raises(InputError, match=r"^\w+=\S+: expected "):
        replace(WORK, **change)


@pytest.mark.parametrize("change", [{"flops": 0.0}, {"link": -1.0}, {"request": float("nan")}, {"workers_per_node": 0}])
def test_hardware_that_cannot_be_is_refused(change):
    with pytest.raises(InputError, match=r"^\w+=\S+: expected "):
        replace(GPU, **change)


def test_no_worker_and_no_image_are_refused():
    for unit, workers in ((0, 1), (1, 0)):
        with pytest.raises(InputError, match="expected numbers of at least 1"):
            busiest_units(WORK, unit, workers)


def test_a_payment_into_a_bucket_takes_the_requests_that_the_model_says(bucket, monkeypatch):
    asked, answer = [], WSGIRequestHandler.run_wsgi

    def counted(handler):
        asked.append((handler.command, handler.path))
        answer(handler)

    monkeypatch.setattr(WSGIRequestHandler, "run_wsgi", counted)
    event = PoissonSampledGaussian(0.1, 1.0, 64)
    ledger = Ledger(open_log(f"{bucket}/runs/ledger.jsonl"), witness=place(f"{bucket}/secrets/run.head"))
    ledger.open(Budget(1.0, 1e-5, "ADD_OR_REMOVE_ONE", (Release("finetune", event),)), lambda *_: 1.0)
    ledger.spend("finetune", event, "ab" * 32, 0, 16)  # takes the ledger over, too
    for start in (16, 32):
        asked.clear()
        ledger.spend("finetune", event, "ab" * 32, start, start + 16)
        assert len(asked) == PAYMENT_REQUESTS, asked


def test_experiment_files_become_counts():
    works = {work.name: work for work in paper_settings()}
    assert set(works) == {path.stem for path in (BENCHMARKS.parent / "e2h/conf/experiment").glob("*.yaml")} - {"gpu"}
    mnist, celeba = works["mnist"], works["celeba64"]
    assert (mnist.steps, mnist.batch, mnist.draws, mnist.pixels) == (2250, 4000, 32, 784)
    assert 1.5e6 < mnist.parameters < 1.7e6
    # By hand: a 3x3 convolution at 28x28 from 64 to 64 channels is 58 million; the network has some twenty such.
    assert 5e8 < mnist.forward_flops < 3e9
    assert celeba.forward_flops > 2 * mnist.forward_flops
    assert (mnist.evaluations, works["camelyon32"].evaluations) == (1999, 50)
    hours = {name: run_terms(work, HOST, GPU, 1, 64)["DP-SGD"] / 3600 for name, work in works.items()}
    assert all(0 < one < 1000 for one in hours.values())
    assert hours["celeba32"] > hours["mnist"] > hours["mnist_cpu"]


def test_a_samplers_forward_passes_are_counted():
    assert sampler_counts(SamplingConfig(sampler="ddim", num_steps=50)) == (50, 1)
    assert sampler_counts(SamplingConfig(sampler="ddim", num_steps=50, guidance=1.0)) == (100, 1)
    assert sampler_counts(SamplingConfig(sampler="heun", num_steps=10)) == (19, 1)
    passes, draws = sampler_counts(SamplingConfig(sampler="heun", num_steps=10, churn=5.0))
    assert passes == 19
    assert 1 < draws < 11


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "flop=1"], "--set flop=1: expected NAME=NUMBER with one of flops, "),
        (["--set", "name=B200"], "expected NAME=NUMBER"),
        (["--set", "flops=fast"], "--set flops=fast: expected a number"),
        (["--set", "far_link=0"], "far_link=0.0: expected a number above 0"),
        (["--gpu", "tpu"], "invalid choice: 'tpu'"),
        (["--constants", "/nowhere/run.txt"], "--constants /nowhere/run.txt: expected what `scale.py --json` printed"),
    ],
)
def test_a_bad_argument_is_refused_before_anything_is_measured(arguments, message, capsys):
    with pytest.raises(SystemExit) as refused:
        scale.main(arguments)
    assert refused.value.code == 2
    assert message in capsys.readouterr().err


def test_other_assumptions_are_taken_over():
    options = Namespace(gpu="l4", set=["request=0", "workers_per_node=4"])
    assert scale.chosen(options) == replace(HARDWARE["l4"], request=0.0, workers_per_node=4)


def test_constants_of_an_earlier_run_are_extrapolated_anew(tmp_path, capsys, monkeypatch):
    before = {"load": [{}], "host": [vars(HOST)], "machine": [{}], "check": [{"workers": 1}]}
    (tmp_path / "run.txt").write_text("a table\n" + json.dumps(before))
    monkeypatch.setattr(scale, "paper_settings", lambda: [replace(WORK, name=one) for one in ("mnist", "celeba64")])
    scale.main(["--constants", str(tmp_path / "run.txt"), "--gpu", "l4", "--set", "flops=1e13", "--json"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["host"], found["check"]) == (before["host"], before["check"])
    assert found["assumed"][0]["flops"] == 1e13
    assert len(found["extrapolation"]) == 3 * 3  # two settings and ten million images, on 1, 8 and 64
    for row in found["extrapolation"]:
        assert sum(row["shares"].values()) == pytest.approx(1.0)
    (tmp_path / "run.txt").write_text(json.dumps({**before, "host": [{"image": 1.0}]}))
    with pytest.raises(SystemExit):
        scale.main(["--constants", str(tmp_path / "run.txt")])


def test_the_programs_core_needs_no_ray():
    script = f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); import scale; print('ray' in sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100, check=True)
    assert loaded.stdout.strip() == "False"
