"""What the secure generator costs beside the gradients of a DP-SGD step.

    python benchmarks/noise.py           # the demo's size and two of MNIST's, a table
    python benchmarks/noise.py --quick   # the same with fewer rounds

A logical step is the work units of the expected batch and then, once, the noise on every coordinate. Both are measured
on one thread, in turn, in processor time; the step is the median unit times the number of units. `torch.randn`, not
secure, is the scale on which to see what security costs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from e2h.config import Config
from e2h.diffusion.losses import draw_noise_levels, micro_batch_loss
from e2h.diffusion.networks import UNet
from e2h.privacy.dpsgd import GRID_BITS, make_engine
from e2h.privacy.noise import gaussian_noise

SIZES = {
    "digits (demo)": [],
    "MNIST on a CPU": ["experiment=mnist_cpu", "data.path=unused"],
    "MNIST, the paper's": ["experiment=mnist", "data.path=unused"],
}


@dataclass(frozen=True)
class Step:
    """A logical step of a configuration, in its parts."""

    num_units: int
    num_parameters: int
    unit: Callable[[], object]


def step_of(overrides: list[str]) -> Step:
    config = OmegaConf.to_object(compose("config", overrides))
    assert isinstance(config, Config)
    data, finetune = config.data, config.finetune
    size = max(1, 64 // finetune.noise_multiplicity)  # images a unit: what a small machine's memory holds
    network = UNet.from_config(config.model, data.image_size, data.channels, 10, config.seed)
    engine = make_engine("folded", network, micro_batch_loss, finetune.max_grad_norm, finetune.noise_multiplicity)
    generator = torch.Generator().manual_seed(0)
    shape = (data.channels, data.image_size, data.image_size)
    batch = {
        "images": torch.rand(size, *shape, generator=generator) * 2 - 1,
        "labels": torch.randint(0, 11, (size,), generator=generator),
        "sigma": draw_noise_levels((size, finetune.noise_multiplicity), generator),
        "noise": torch.randn(size, finetune.noise_multiplicity, *shape, generator=generator),
    }
    num_parameters = sum(parameter.numel() for parameter in network.parameters())
    units = -(-finetune.expected_batch_size // size)
    return Step(units, num_parameters, lambda: engine.accumulate(batch, torch.ones(size)))


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def measure(step: Step, num_rounds: int) -> dict[str, float]:
    """Seconds of a unit and of the noise, in turn."""

    def secure() -> object:
        return gaussian_noise(bytes(range(32)), 0, step.num_parameters, 2.0**GRID_BITS)

    works = (step.unit, secure, lambda: torch.randn(step.num_parameters))
    for work in works:
        work()
    rounds = [[seconds(work) for work in works] for _ in range(num_rounds)]
    unit, noise, insecure = (statistics.median(column) for column in zip(*rounds, strict=True))
    gradients = unit * step.num_units
    return {
        "parameters": step.num_parameters,
        "units": step.num_units,
        "gradients_s": gradients,
        "noise_s": noise,
        "noise_share": noise / (gradients + noise),
        "noise_over_randn": noise / insecure,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    options = parser.parse_args()
    torch.set_num_threads(1)
    ConfigStore.instance().store("schema", Config)
    rows = []
    print(f"{'size':20} {'parameters':>10} {'gradients':>10} {'noise':>9} {'share':>7} {'over randn':>11}")
    with initialize_config_module("e2h.conf", version_base="1.3"):
        for name, overrides in SIZES.items():
            row = {"size": name, **measure(step_of(overrides), 3 if options.quick else 9)}
            rows.append(row)
            print(
                f"{name:20} {row['parameters']:10d} {row['gradients_s']:8.2f} s {1000 * row['noise_s']:6.1f} ms "
                f"{row['noise_share']:7.2%} {row['noise_over_randn']:10.1f}x"
            )
    if options.json:
        print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
