"""The paper's settings as the cost model's counts, read from e2h/conf/experiment."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from e2h.config import Config, SamplingConfig
from e2h.diffusion.networks import UNet
from e2h.diffusion.samplers import noise_grid
from e2h.validation import validate

from .constants import forward_flops
from .cost_model import Work

EXPERIMENTS = Path(__file__).resolve().parents[2] / "e2h" / "conf" / "experiment"
# Training records of the public sets; CelebA's own split, Camelyon17's of WILDS.
RECORDS = {"mnist": 60_000, "fashion_mnist": 60_000, "celeba": 162_770, "camelyon": 302_436}
# Of DP-SGD and of sampling: 17 hours on 4 GPUs, then 80 minutes (Li et al. 2025; on 4 GPUs, too, is our reading).
PUBLISHED_GPU_HOURS = {"mnist": (68.0, 80 / 60 * 4)}


def configured(experiment: str, overrides: Sequence[str]) -> Config:
    """The checked settings of an experiment file (`demo`: the defaults) with overrides as on the command line."""
    ConfigStore.instance().store("schema", Config)
    chosen = [] if experiment == "demo" else [f"experiment={experiment}"]
    with initialize_config_module("e2h.conf", version_base="1.3"):
        config = OmegaConf.to_object(compose("config", [*chosen, *overrides]))
    assert isinstance(config, Config)
    return validate(config)


def paper_settings() -> list[Work]:
    """One for each experiment file that names its data."""
    ConfigStore.instance().store("schema", Config)
    with initialize_config_module("e2h.conf", version_base="1.3"):
        return [work_of(path.stem) for path in sorted(EXPERIMENTS.glob("*.yaml")) if path.stem != "gpu"]


def work_of(name: str) -> Work:
    """Counts of an experiment; call it where Hydra is ready."""
    config = OmegaConf.to_object(compose("config", [f"experiment={name}", "data.path=unused"]))
    assert isinstance(config, Config)
    data, central, tuned = config.data, config.central, config.finetune
    network = UNet.from_config(config.model, data.image_size, data.channels, 10, config.seed)
    pooled = data.channels * (data.image_size // central.pool_factor) ** 2
    evaluations, draws = sampler_counts(config.sampling)
    return Work(
        name=name,
        records=next(records for start, records in RECORDS.items() if name.startswith(start)),
        batch=tuned.expected_batch_size,
        draws=tuned.noise_multiplicity,
        steps=tuned.num_steps,
        pixels=data.channels * data.image_size**2,
        parameters=sum(p.numel() for p in network.parameters()),
        forward_flops=forward_flops(network, data.image_size, data.channels),
        ledger_block=tuned.ledger_block,
        checkpoint_every=tuned.checkpoint_every,
        warmup_steps=config.warmup.num_steps,
        warmup_batch=config.warmup.batch_size,
        central_rounds=central.num_rounds if "central" in config.curriculum else 0,
        central_prob=central.sampling_prob,
        central_dimension=pooled + 1 if central.query == "mean" else pooled * central.num_bins,
        synthetic_images=config.sampling.num_images,
        evaluations=evaluations,
        sampling_draws=draws,
    )


def sampler_counts(sampling: SamplingConfig) -> tuple[int, int]:
    """Forward passes, and normal images drawn, for one synthetic image (`e2h.diffusion.samplers`)."""
    passes = 1 if sampling.guidance == 0 else 2
    if sampling.sampler == "ddim":
        return passes * sampling.num_steps, 1
    levels = noise_grid(sampling.num_steps)[:-1]
    churned = int(((levels >= sampling.churn_min) & (levels <= sampling.churn_max)).sum()) if sampling.churn else 0
    return passes * (2 * sampling.num_steps - 1), 1 + churned
