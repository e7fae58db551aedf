"""A cost model of private training: fitted on this machine, checked against 1 and 2 workers, extrapolated to GPUs.

    python benchmarks/scale.py                        # some four minutes on two quiet cores
    python benchmarks/scale.py --quick                # the small 28 px network, under two minutes
    python benchmarks/scale.py --json > run.txt
    python benchmarks/scale.py --constants run.txt --gpu l4 --set request=0    # measures nothing; other assumptions

The model is in lib/cost_model.py, its constants are measured by lib/constants.py, the check by lib/step_check.py.

What a GPU and its links do is assumed, not measured: the sustained rate is a tenth of the data sheet's bfloat16 rate
(A100 312, L4 121 TFLOP/s), links are what clouds sell. Whatever runs on a processor is taken from this machine's core.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from lib.constants import in_scratch, measure_hardware, measure_host
from lib.cost_model import (
    HARDWARE,
    UNITS,
    Hardware,
    Host,
    Work,
    best_unit,
    efficiency,
    run_terms,
    step_terms,
)
from lib.experiments import PUBLISHED_GPU_HOURS, paper_settings
from lib.step_check import UNIT, check
from scaling import SIZES, network_of

from e2h.errors import InputError

WORKERS = (1, 8, 64)
TEN_MILLION = 10_000_000


def extrapolate(works: list[Work], host: Host, hardware: Hardware) -> Iterator[dict[str, Any]]:
    for work in works:
        for workers in WORKERS:
            unit = best_unit(work, host, hardware, workers)
            terms = step_terms(work, host, hardware, workers, unit)
            yield {
                "work": work.name,
                "gpus": workers,
                "unit": unit,
                "step_s": sum(terms.values()),
                "efficiency": efficiency(terms),
                "shares": {name: value / sum(terms.values()) for name, value in terms.items()},
                "stages_h": {k: v / 3600 for k, v in run_terms(work, host, hardware, workers, unit).items()},
            }


def unit_rows(work: Work, host: Host, hardware: Hardware) -> Iterator[dict[str, Any]]:
    """What the size of a work unit does to the efficiency of a step."""
    for workers in WORKERS:
        shares = [efficiency(step_terms(work, host, hardware, workers, unit)) for unit in UNITS]
        yield {"work": work.name, "gpus": workers, "efficiency": dict(zip(UNITS, shares, strict=True))}


def remedies(work: Work, host: Host, hardware: Hardware, workers: int) -> Iterator[dict[str, Any]]:
    """The step again with one thing mended, one at a time: what each of them is worth."""
    mended = {
        "as it is": (work, host, hardware),
        "ledger in a file": (work, host, replace(hardware, request=0.0)),
        "finetune.ledger_block=128": (replace(work, ledger_block=128), host, hardware),
        "micro-batches made beside the GPU": (work, replace(host, image=0.0, normal=0.0), hardware),
        "sixteen times the batch, a sixteenth of the steps": (
            replace(work, batch=16 * work.batch, steps=work.steps // 16), host, hardware
        ),
        "all of these but the batch": (
            replace(work, ledger_block=128),
            replace(host, image=0.0, normal=0.0),
            hardware,
        ),
    }  # fmt: skip
    for name, (new_work, new_host, new_hardware) in mended.items():
        unit = best_unit(new_work, new_host, new_hardware, workers)
        terms = step_terms(new_work, new_host, new_hardware, workers, unit)
        yield {
            "work": work.name,
            "gpus": workers,
            "change": name,
            "step_s": sum(terms.values()),
            "efficiency": efficiency(terms),
            "dp_sgd_h": new_work.steps * sum(terms.values()) / 3600,
        }


def gpu_hours(works: list[Work], host: Host, hardware: Hardware) -> Iterator[dict[str, Any]]:
    """GPU hours on one GPU, where nothing is lost between workers.

    Also at the rate that the published run's sampling implies: non-private float32 code on the authors' GPUs.
    """
    published = next(work for work in works if work.name == "mnist")
    flops = published.synthetic_images * published.evaluations * published.forward_flops
    slow = replace(hardware, flops=flops / PUBLISHED_GPU_HOURS["mnist"][1] / 3600)
    for work in works:
        row = {"work": work.name, "exaflop": work.steps * work.batch * work.training_flops / 1e18}
        for name, one in (("", hardware), ("_published_rate", slow)):
            terms = run_terms(work, host, one, 1, best_unit(work, host, one, 1))
            row |= {f"dp_sgd_h{name}": terms["DP-SGD"] / 3600, f"sampling_h{name}": terms["sampling"] / 3600}
        if work.name in PUBLISHED_GPU_HOURS:
            row |= dict(zip(("published_h", "published_sampling_h"), PUBLISHED_GPU_HOURS[work.name], strict=True))
            row["published_dp_sgd_tflops"] = row["exaflop"] * 1e6 / row["published_h"] / 3600
            row["published_sampling_tflops"] = slow.flops / 1e12
        yield row


def short(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key}:{short(one)}" for key, one in value.items())
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def print_rows(title: str, rows: list[dict[str, Any]]) -> None:
    print(f"\n{title}")
    for row in rows:
        print("  ".join(f"{name}={short(value)}" for name, value in row.items()), flush=True)


def chosen(options: argparse.Namespace) -> Hardware:
    """The GPU with what `--set` changes.

    Raises:
      InputError: for a name that is none of its constants, or a value that can't be.
    """
    known = {field.name: type(getattr(HARDWARE[options.gpu], field.name)) for field in fields(Hardware)}
    values = {}
    for pair in options.set:
        name, _, value = pair.partition("=")
        if known.get(name) not in (float, int):
            numbers = ", ".join(one for one, kind in known.items() if kind in (float, int))
            raise InputError(f"--set {pair}: expected NAME=NUMBER with one of {numbers}")
        try:
            values[name] = known[name](float(value))
        except (ValueError, OverflowError) as error:
            raise InputError(f"--set {pair}: expected a number") from error
    return replace(HARDWARE[options.gpu], **values)


def measured(quick: bool) -> dict[str, list[dict[str, Any]]]:
    """Constants of this machine, and the check; by the names in the JSON object."""
    preset = "px28_small" if quick else "px28"
    host = in_scratch(lambda folder: measure_host(network_of(preset), folder))
    machine = in_scratch(lambda folder: measure_hardware(preset, SIZES[preset], UNIT, folder))
    return {
        "load": [{"processors": os.cpu_count(), "running": os.getloadavg()[0]}],
        "host": [asdict(host)],
        "machine": [asdict(machine)],
        "check": check(preset, host, machine, 2, 10 if quick else 12),
    }


def earlier(path: str) -> dict[str, list[dict[str, Any]]]:
    """What `measured` found when the file was written.

    Raises:
      InputError: if it is no output of this program.
    """
    try:
        found = json.loads(Path(path).read_text().splitlines()[-1])
        Host(**found["host"][0])
        return {name: found[name] for name in ("load", "host", "machine", "check")}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"--constants {path}: expected what `scale.py --json` printed ({error})") from error


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Cost model: measured here, checked, extrapolated.")
    parser.add_argument("--quick", action="store_true", help="the small 28 px network, fewer steps")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--gpu", choices=sorted(HARDWARE), default="a100")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=NUMBER", help="assumptions about the hardware")
    parser.add_argument("--constants", metavar="FILE", help="instead of measuring: what --json printed before")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        hardware = chosen(options)
        found = measured(options.quick) if options.constants is None else earlier(options.constants)
    except InputError as error:
        parser.error(str(error))
    found["assumed"] = [asdict(hardware)]
    host = Host(**found["host"][0])
    works = paper_settings()
    large = [replace(w, name=f"{w.name}, 10 M images", records=TEN_MILLION) for w in works if w.name == "celeba64"]
    shown = [work for work in works if work.name in ("mnist", "celeba32", "celeba64")] + large
    found |= {
        "extrapolation": list(extrapolate(shown, host, hardware)),
        "units": [row for work in shown for row in unit_rows(work, host, hardware)],
        "remedies": [row for work in (shown[0], large[0]) for row in remedies(work, host, hardware, 64)],
        "gpu_hours": list(gpu_hours(works, host, hardware)),
    }
    for title, rows in found.items():
        print_rows(title, rows)
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
