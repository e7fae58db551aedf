"""Every setting of e2h: dataclasses are the schema; `e2h.validation` checks the values, once, at the border.

Public facts (N, class names, resolution, clip norms, q, T) are fields here; private facts are call arguments elsewhere.
Privacy parameters and performance knobs are different dataclasses: nothing in `ScalingConfig` can change epsilon.
This module imports neither torch nor ray nor hydra.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from e2h.errors import InputError

SOURCES = ("digits", "idx", "cifar", "image_folder", "parquet")
EASY_STAGES = ("central", "frequency")  # that a curriculum may consist of
MAX_NOISE_MULTIPLIER = 1e5  # of any release: above, noise on its grid would outgrow the integers that carry it
WARMUPS = ("warmup", "warmup2")  # training on what the first and the second of them released


@dataclass
class DataConfig:
    """The sensitive images and what is publicly known of them."""

    name: str = "digits"  # part of the run's default name
    source: str = "digits"  # digits | idx | cifar | image_folder | parquet
    path: str | None = None  # local path, s3://, gs://; none for digits
    image_size: int = 8  # pixels a side; images are square
    channels: int = 1  # 1 grey, 3 colour
    class_names: list[str] | None = None  # public; none: the source's own list (folder names, ClassLabel)
    labelled: bool = True  # image folder: one folder a class; false: one class for all
    image_column: str = "image"  # parquet
    label_column: str | None = "label"  # parquet; none: one class
    num_records: int | None = None  # public N; none: the number of listed training records, declared public
    test_fraction: float = 1 / 6  # held out by a hash of the record's name where the source has no split of its own
    resize: str = "uniform"  # uniform: one size, no upscaling, or refuse; any: crop and resize each image
    max_rejected_fraction: float = 0.001  # corrupt images above this share are refused, below it skipped and named
    records_per_shard: int = 4096  # prepared images a file


@dataclass
class ModelConfig:
    """EDM U-Net (Karras et al. 2022), with GroupNorm only, and the noise levels that it is trained at."""

    base_width: int = 16  # channels of the first level
    width_multipliers: list[int] = field(default_factory=lambda: [1, 1])  # of each level; every level halves the side
    attention_resolutions: list[int] = field(default_factory=lambda: [4])  # sides, in patches, of levels with attention
    blocks_per_level: int = 1
    embedding_width: int = 64  # of noise level and class; a multiple of 64
    patch_size: int = 1  # pixels a side that the network sees as one place; 2: a quarter of the places, less time
    log_sigma_mean: float = 0.0  # ln(sigma) ~ N(mean, std^2) in training, pixels in [-1, 1]; the paper: -1.2
    log_sigma_std: float = 1.2


@dataclass
class PrivacyConfig:
    """The target and how randomness is kept."""

    epsilon: float = 10.0  # what all releases together may cost: up to about 1 strong, 10 weak
    delta: float = 1e-4  # chance that the bound by epsilon fails; well below 1/N
    secret: str | None = None  # file:PATH, env:NAME or s3://... of the master secret; none: a file beside the run
    test_mode: bool = False  # fixed public secret: reproducible and NOT PRIVATE, stamped on every artefact
    noise_shares: int = 1  # parts of a step's noise, dealt to the workers; as many as workers: no sum is bare


@dataclass
class CentralConfig:
    """An easy stage: noisy central images (DP-FETA)."""

    query: str = "mean"  # mean | mode
    class_conditional: bool = True  # images of each class; false: of all records together
    num_rounds: int = 5  # central images a class
    sampling_prob: float = 0.5  # chance of a record to be in a round
    noise_multiplier: float | None = None  # none: solved from budget_share
    budget_share: float = 0.5  # without noise_multiplier: the stage alone is (budget_share * epsilon, delta)-DP
    max_norm: float = 4.0  # clip norm of one record's pooled, centred pixels (mean query)
    centre: float = 0.0  # public m0 in [0, 1]
    count_weight: float = 0.0  # weight of the noisy-count coordinate, in units of max_norm; 0 drops it
    num_bins: int = 16  # mode query
    pool_factor: int = 1  # 2: half resolution
    median_filter: bool = False
    sharpen: bool = False


@dataclass
class WarmupConfig:
    """Ordinary training on what an easy stage released: post-processing, free."""

    num_steps: int = 400  # 0: none
    batch_size: int = 64
    learning_rate: float = 3e-3
    label_dropout: float = 0.1  # share of images without their class, for guidance
    max_shift: int = 0  # pixels; public augmentation
    dtype: str = "float32"  # float32 | bfloat16 (autocast)
    compile: bool = False  # torch.compile; a minute at the start, for GPUs


@dataclass
class FrequencyConfig:
    """An easy stage: noisy mean embeddings of each class, and images of a generator fitted to them (FETA-Pro)."""

    num_features: int = 2000  # half of them cosines, half sines
    bandwidth: float = 0.25  # of the Gaussian kernel: a root mean square difference of grey values in [0, 1]
    noise_multiplier: float | None = None  # none: solved from budget_share
    budget_share: float = 0.3  # without noise_multiplier: the stage alone is (budget_share * epsilon, delta)-DP
    generator_steps: int = 400  # fitting the generator: free
    num_images: int = 2000  # of the generator, which the diffusion model then trains on
    warmup: WarmupConfig = field(default_factory=WarmupConfig)


@dataclass
class FinetuneConfig:
    """The hard stage: DP-SGD on the full set."""

    num_steps: int = 60  # T
    expected_batch_size: int = 256  # q N, at most N
    noise_multiplicity: int = 4  # K noise draws an image, averaged before the clip
    max_grad_norm: float = 1.0  # C: what a record adds to a step at most
    learning_rate: float = 1e-3
    schedule: str = "constant"  # constant | cosine | linear: how the learning rate falls to 0 by the last step
    correct_noise_bias: bool = False  # take the noise's known variance out of Adam's second moment
    max_shift: int = 0  # pixels; each of an image's K draws is moved by its own (augmentation multiplicity)
    flip: bool = False  # each of the K draws is mirrored or not
    ema_decay: float = 0.95  # of the average of weights over steps, which is what is published
    ema_snapshots: int = 0  # how many snapshots of averages are kept, for `sampling.ema_widths`; 0: none
    label_dropout: float = 0.1
    clipping: str = "flat"  # flat | normalized | global; contributions are at most max_grad_norm with each
    norm_threshold: float = 1.0  # Z of clipping=global: scale by max_grad_norm / Z, drop gradients above Z
    engine: str = "folded"  # folded | opacus | loop; the last two are references
    dtype: str = "float32"  # float32 | bfloat16 (autocast; sums stay exact)
    compile: bool = False  # torch.compile; minutes at the start, for GPUs
    ledger_block: int = 16  # steps paid for at a time
    checkpoint_every: int = 20  # steps


@dataclass
class SamplingConfig:
    """Synthetic images: post-processing, free."""

    num_images: int = 2000
    sampler: str = "heun"  # heun | ddim
    num_steps: int = 12  # of the sampler; with heun two evaluations of the network each
    guidance: float = 0.0  # w in (1+w) D(y) - w D(null)
    churn: float = 0.0  # noise that the sampler adds anew (Karras et al. 2022); 0: none
    churn_min: float = 0.05  # only between these noise levels
    churn_max: float = 50.0
    ema_widths: list[float] = field(default_factory=list)  # of averages made after training; none: ema_decay
    class_fractions: list[float] | None = None  # none: uniform; else public shares in class order
    images_per_shard: int = 500
    dtype: str = "float32"  # float32 | bfloat16 (autocast of the network; the sampler's own sums stay float64)
    compile: bool = False  # torch.compile; minutes at the start, for GPUs


@dataclass
class EvaluationConfig:
    """Measured on real data without noise: sensitive, never released."""

    enabled: bool = True
    classifiers: list[str] = field(default_factory=lambda: ["logistic_regression", "mlp", "cnn"])
    cnn_epochs: int = 20
    num_seeds: int = 1  # each classifier is trained with so many seeds: mean and spread
    inception_weights: str | None = None  # file of the standard FID weights; none: no FID, KID, precision and recall
    memorisation_images: int = 500  # synthetic images whose nearest real neighbours are looked up; 0: none
    max_feature_records: int = 10000  # real training records behind the Frechet statistics


@dataclass
class ScalingConfig:
    """Where a run computes and how fast: nothing here can change epsilon.

    Fixed once private steps have begun: physical_batch_size, use_gpu.
    """

    num_workers: int = 2
    min_workers: int | None = None  # elastic: train with as few, grow to num_workers; none: always num_workers
    use_gpu: bool = False
    cpus_per_worker: float = 1.0
    physical_batch_size: int | None = None  # work unit, in images; none: what fits, up to 1/4 of a worker's share
    max_failures: int = 3  # restarts of the worker group
    hours: float | None = None  # that DP-SGD may take: only jobs/plan.py asks


@dataclass
class LedgerConfig:
    """What keeps count of the budget, and for how many runs."""

    scope: str = "run"  # run: this run's budget; dataset: one budget for all runs on data.name
    epsilon: float | None = None  # scope=dataset: what all runs together may cost, at privacy.delta
    path: str | None = (
        None  # absolute path or s3://bucket/prefix of that ledger; none: in the run, or of a data set beside the runs
    )


@dataclass
class ProxyConfig:
    """Public or synthetic images that stand in for the sensitive ones in `search.privacy=proxy`."""

    source: str | None = None  # one as data.source; central: the released central images; release: an earlier one
    path: str | None = None  # where they lie, as data.path; of a release its folder; none for central
    image_column: str = "image"
    label_column: str | None = "label"


@dataclass
class SearchConfig:
    """Choosing settings by trials (jobs/search.py). What the choice costs is part of the one budget."""

    privacy: str | None = None  # proxy | selection | compose; without a default on purpose
    space: Any = None  # {dotted key: [values]}, each equally likely; none: lengths and shares of the easy stages
    expected_trials: float = 8.0  # proxy, compose: their number; selection: the mean of a secret random number
    max_trials: int = 32  # selection: the law of that number is conditioned on at most so many
    law: str = "negative_binomial"  # selection: negative_binomial | poisson
    shape: float = 3.0  # of the negative binomial: 1 geometric, 0 logarithmic
    score: str | None = None  # accuracy (noisy, charged) | central (free) | test (proxy only); none: accuracy or test
    score_noise_multiplier: float | None = None  # accuracy: noise on how many are right; none: 0.5 % of N, 25 or more
    score_images: int = 1000  # synthetic images behind a score
    sampler: str = "random"  # random | optuna; selection: random
    scheduler: str = "fifo"  # fifo | asha; selection: fifo
    concurrent_trials: int = 1  # trained at a time, each with scaling.num_workers; optuna: 1
    proxy: ProxyConfig = field(default_factory=ProxyConfig)


@dataclass
class RunConfig:
    """Where a run lies, and its name."""

    storage: str = "runs"  # a folder (on a cluster absolute, and shared by NFS 4), or s3://bucket/prefix
    name: str | None = None  # none: e.g. digits-eps10-seed0


@dataclass
class Config:
    """One run, whole. `seed` drives public randomness only (initialisation, augmentation, synthetic images)."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    curriculum: list[str] = field(default_factory=lambda: ["central"])  # easy stages, of central and frequency
    central: CentralConfig = field(default_factory=CentralConfig)
    warmup: WarmupConfig = field(default_factory=WarmupConfig)  # on central images
    frequency: FrequencyConfig = field(default_factory=FrequencyConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    ledger: LedgerConfig = field(default_factory=LedgerConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    run: RunConfig = field(default_factory=RunConfig)
    seed: int = 0  # of public randomness only
    dry_run: bool = False  # print the plan, read no image, spend nothing


def expect(condition: bool, name: str, value: object, expectation: str, advice: str = "") -> None:
    """Raises `InputError` ("name=value: expected ...; advice") unless the condition holds."""
    if not condition:
        shown = "null" if value is None else value
        raise InputError(f"{name}={shown}: expected {expectation}" + (f"; {advice}" if advice else ""))


def run_name(config: Config) -> str:
    """`run.name`, or the deterministic default, so that the same command resumes: `digits-eps10-seed0`."""
    if config.run.name:
        return config.run.name
    easy = "" if config.curriculum == ["central"] else "-" + ("-".join(config.curriculum) or "noeasy")
    chosen = f"-{config.search.privacy}" if config.search.privacy else ""
    stamp = "-NOT-PRIVATE" if config.privacy.test_mode else ""
    return f"{config.data.name}-eps{config.privacy.epsilon:g}{easy}{chosen}-seed{config.seed}{stamp}"


def warmups(config: Config) -> dict[str, tuple[str, WarmupConfig]]:
    """What comes before DP-SGD, in order: (easy stage, settings), by its name in checkpoints and metrics."""
    settings = {"central": config.warmup, "frequency": config.frequency.warmup}
    return {name: (stage, settings[stage]) for name, stage in zip(WARMUPS, config.curriculum, strict=False)}


# What a finished stage leaves in the run directory, beside its `_SUCCESS.json`.
PRODUCTS = {
    "prepare": "prepared/meta.json",
    "central": "central/images.parquet",
    "frequency": "frequency/images.parquet",
    "train": "checkpoints/model.safetensors",
    "sample": "synthetic/grid.png",
}


def describe_record(class_names: Sequence[str]) -> str:
    """What one record is, which the guarantee is for."""
    return "one image with its label" if len(class_names) > 1 else "one image"


NOT_PRIVATE = "NOT PRIVATE: made with a published secret (privacy.test_mode=true); anyone can subtract the noise"


def stamp(config: Config) -> dict[str, str]:
    """Metadata of every file that is made from private records: in test mode a warning, otherwise nothing."""
    return {"not_private": NOT_PRIVATE} if config.privacy.test_mode else {}
