"""Every setting is checked once, at the border: a bad value is refused by name, with what was expected and what to do.

This module imports neither torch nor ray nor hydra.
"""

from __future__ import annotations

import math
import re

from e2h.config import (
    EASY_STAGES,
    MAX_NOISE_MULTIPLIER,
    SOURCES,
    CentralConfig,
    Config,
    DataConfig,
    FrequencyConfig,
    PrivacyConfig,
    SearchConfig,
    WarmupConfig,
    expect,
)


def _positive_int(config: object, prefix: str, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        expect(value >= 1, f"{prefix}.{name}", value, "a whole number of at least 1")


def _positive(config: object, prefix: str, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        expect(math.isfinite(value) and value > 0, f"{prefix}.{name}", value, "a finite number above 0")


def _noise_multiplier(config: object, prefix: str, name: str = "noise_multiplier") -> None:
    value, most = getattr(config, name), MAX_NOISE_MULTIPLIER
    expect(value is None or 0 < value <= most, f"{prefix}.{name}", value, f"a number above 0, at most {most:g}")


def _share(config: object, prefix: str, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        expect(0 <= value < 1, f"{prefix}.{name}", value, "a share in [0, 1)")


def _choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    expect(value in choices, name, value, "one of " + ", ".join(choices))


def _validate_data(data: DataConfig) -> None:
    _choice("data.source", data.source, SOURCES)
    _choice("data.resize", data.resize, ("uniform", "any"))
    _positive_int(data, "data", "image_size", "records_per_shard")
    expect(data.channels in (1, 3), "data.channels", data.channels, "1 (grey) or 3 (colour)")
    _share(data, "data", "test_fraction", "max_rejected_fraction")
    needs_path = data.source != "digits"
    expect(
        bool(data.path) or not needs_path,
        "data.path",
        data.path,
        f"where the {data.source} data lies",
        "set data.path=... to a local path, s3:// or gs://",
    )
    advice = "say what it is: data=image_folder, parquet, mnist, cifar10, ..."
    expect(needs_path or data.path is None, "data.path", data.path, "no path with data.source=digits", advice)
    _folder_name("data.name", data.name)
    if data.num_records is not None:
        _positive_int(data, "data", "num_records")
    if data.class_names is not None:
        expect(len(data.class_names) >= 1, "data.class_names", data.class_names, "at least one class")
        unique = len(set(data.class_names)) == len(data.class_names)
        expect(unique, "data.class_names", data.class_names, "distinct names")


def _folder_name(key: str, name: str) -> None:
    safe = bool(name) and "/" not in name and not name.startswith(".") and len(name.encode(errors="replace")) <= 180
    expect(safe, key, name, "a folder name of at most 180 bytes without '/' and leading '.'")


def _validate_privacy(privacy: PrivacyConfig) -> None:
    advice = "10 is a weak promise already (docs/guide.md, section 4)"
    expect(0 < privacy.epsilon <= 100, "privacy.epsilon", privacy.epsilon, "a number above 0, at most 100", advice)
    delta_ok = math.isfinite(privacy.delta) and 0 < privacy.delta < 1
    expect(delta_ok, "privacy.delta", privacy.delta, "a number in (0, 1)", "a common choice is below 1/N")
    # The FFT behind PLD and PRV becomes optimistic below this (docs/guarantee.md).
    expect(privacy.delta >= 1e-10, "privacy.delta", privacy.delta, "at least 1e-10, where the accountant is sound")
    _positive_int(privacy, "privacy", "noise_shares")
    expect(privacy.noise_shares <= 1024, "privacy.noise_shares", privacy.noise_shares, "1 to 1024, e.g. one a worker")
    if privacy.secret is not None:
        scheme, _, rest = privacy.secret.partition(":")
        places = scheme in ("file", "env") or privacy.secret.startswith("s3://")
        expect(places and bool(rest), "privacy.secret", "...", "file:PATH, env:NAME or s3://bucket/key")


def _validate_ledger(config: Config) -> None:
    ledger, path, total, one = config.ledger, config.ledger.path, config.ledger.epsilon, config.privacy.epsilon
    _choice("ledger.scope", ledger.scope, ("run", "dataset"))
    place = path is None or re.fullmatch(r"/.+|s3://[^/]+/+[^/].*", path) is not None
    expect(place, "ledger.path", path, "an absolute path or s3://bucket/prefix")
    if ledger.scope == "run":
        expect(total is None, "ledger.epsilon", total, "none with ledger.scope=run", "set ledger.scope=dataset")
        return
    enough = total is not None and math.isfinite(total) and total >= one
    expect(enough, "ledger.epsilon", total, f"what all runs together may cost, at least privacy.epsilon={one:g}")
    expect(not config.privacy.test_mode, "privacy.test_mode", True, "false with ledger.scope=dataset")


def _validate_curriculum(config: Config) -> None:
    stages = config.curriculum
    for stage in stages:
        _choice("curriculum", stage, EASY_STAGES)
    expect(len(set(stages)) == len(stages), "curriculum", stages, "each stage once")
    if "central" in stages:
        _validate_central(config.central, config.data.image_size)
        _validate_warmup(config.warmup, "warmup")
    if "frequency" in stages:
        _validate_frequency(config.frequency)
        _validate_warmup(config.frequency.warmup, "frequency.warmup")


def _validate_frequency(frequency: FrequencyConfig) -> None:
    _positive_int(frequency, "frequency", "num_features", "generator_steps", "num_images")
    even = frequency.num_features % 2 == 0
    expect(even, "frequency.num_features", frequency.num_features, "an even number: cosines and sines")
    _positive(frequency, "frequency", "bandwidth")
    _noise_multiplier(frequency, "frequency")
    share = frequency.budget_share
    expect(0 < share < 1, "frequency.budget_share", share, "a share in (0, 1)")


def _validate_warmup(warmup: WarmupConfig, name: str) -> None:
    expect(warmup.num_steps >= 0, f"{name}.num_steps", warmup.num_steps, "a whole number of at least 0")
    expect(warmup.max_shift >= 0, f"{name}.max_shift", warmup.max_shift, "a number of pixels of at least 0")
    _positive_int(warmup, name, "batch_size")
    _positive(warmup, name, "learning_rate")
    _share(warmup, name, "label_dropout")
    _choice(f"{name}.dtype", warmup.dtype, ("float32", "bfloat16"))


def _validate_central(central: CentralConfig, image_size: int) -> None:
    _choice("central.query", central.query, ("mean", "mode"))
    _positive_int(central, "central", "num_rounds", "pool_factor")
    q = central.sampling_prob
    expect(0 < q <= 1, "central.sampling_prob", q, "a probability in (0, 1]")
    _noise_multiplier(central, "central")
    share = central.budget_share
    expect(0 < share < 1, "central.budget_share", share, "a share in (0, 1)")
    _positive(central, "central", "max_norm")
    expect(0 <= central.centre <= 1, "central.centre", central.centre, "a grey value in [0, 1]")
    expect(0 <= central.count_weight <= 10, "central.count_weight", central.count_weight, "a weight between 0 and 10")
    expect(2 <= central.num_bins <= 256, "central.num_bins", central.num_bins, "2 to 256 bins")
    divides = image_size % central.pool_factor == 0
    expect(divides, "central.pool_factor", central.pool_factor, f"a divisor of data.image_size={image_size}")


def _validate_training(config: Config) -> None:
    finetune, model = config.finetune, config.model
    _positive_int(model, "model", "base_width", "blocks_per_level", "embedding_width", "patch_size")
    in_range = 0 < model.log_sigma_std <= 5
    expect(in_range, "model.log_sigma_std", model.log_sigma_std, "a number above 0, at most 5")
    expect(math.isfinite(model.log_sigma_mean), "model.log_sigma_mean", model.log_sigma_mean, "a finite number")
    expect(len(model.width_multipliers) >= 1, "model.width_multipliers", model.width_multipliers, "at least one level")
    levels = len(model.width_multipliers)
    shrink = model.patch_size * 2 ** (levels - 1)
    expect(
        config.data.image_size % shrink == 0,
        "data.image_size",
        config.data.image_size,
        f"a multiple of {shrink} (model.width_multipliers has {levels} levels, model.patch_size is {model.patch_size})",
        "choose another model=",
    )
    _positive_int(finetune, "finetune", "num_steps", "expected_batch_size", "noise_multiplicity")
    _positive_int(finetune, "finetune", "ledger_block", "checkpoint_every")
    _positive(finetune, "finetune", "max_grad_norm", "norm_threshold", "learning_rate")
    for name in ("max_shift", "ema_snapshots"):
        value = getattr(finetune, name)
        expect(value >= 0, f"finetune.{name}", value, "a whole number of at least 0")
    _choice("finetune.schedule", finetune.schedule, ("constant", "cosine", "linear"))
    _share(finetune, "finetune", "label_dropout", "ema_decay")
    _choice("finetune.engine", finetune.engine, ("folded", "opacus", "loop"))
    _choice("finetune.clipping", finetune.clipping, ("flat", "normalized", "global"))
    _choice("finetune.dtype", finetune.dtype, ("float32", "bfloat16"))


def _validate_outputs(config: Config) -> None:
    sampling, scaling = config.sampling, config.scaling
    _positive_int(sampling, "sampling", "num_images", "num_steps", "images_per_shard")
    _choice("sampling.sampler", sampling.sampler, ("heun", "ddim"))
    _choice("sampling.dtype", sampling.dtype, ("float32", "bfloat16"))
    for name in ("guidance", "churn", "churn_min", "churn_max"):
        value = getattr(sampling, name)
        expect(math.isfinite(value) and value >= 0, f"sampling.{name}", value, "a finite number of at least 0")
    learnt, without = sampling.guidance == 0 or config.finetune.label_dropout > 0, "0 with finetune.label_dropout=0"
    expect(learnt, "sampling.guidance", sampling.guidance, without, "it leads away from images that had no label")
    chosen = len(sampling.ema_widths) < 2 or "central" in config.curriculum
    expect(chosen, "sampling.ema_widths", sampling.ema_widths, "one width: without central images there is no choice")
    for width in sampling.ema_widths:
        expect(0 < width <= 0.25, "sampling.ema_widths", width, "relative widths in (0, 0.25]")
    kept = not sampling.ema_widths or config.finetune.ema_snapshots > 0
    expect(kept, "sampling.ema_widths", sampling.ema_widths, "none without finetune.ema_snapshots, averages to make of")
    fractions = sampling.class_fractions
    if fractions is not None:
        total_ok = min(fractions, default=-1) >= 0 and abs(sum(fractions) - 1) < 1e-6
        expect(total_ok, "sampling.class_fractions", fractions, "shares of at least 0 that sum to 1")
    for name in config.evaluation.classifiers:
        _choice("evaluation.classifiers", name, ("logistic_regression", "mlp", "cnn"))
    _positive_int(config.evaluation, "evaluation", "cnn_epochs", "max_feature_records", "num_seeds")
    copies = config.evaluation.memorisation_images
    expect(copies >= 0, "evaluation.memorisation_images", copies, "a whole number of at least 0")
    _positive_int(scaling, "scaling", "num_workers")
    fewest = scaling.min_workers
    between = fewest is None or 1 <= fewest <= scaling.num_workers
    expect(between, "scaling.min_workers", fewest, f"1 to scaling.num_workers={scaling.num_workers}, or none")
    if scaling.physical_batch_size is not None:
        _positive_int(scaling, "scaling", "physical_batch_size")
    expect(scaling.max_failures >= 0, "scaling.max_failures", scaling.max_failures, "a whole number of at least 0")
    _positive(scaling, "scaling", "cpus_per_worker", *(["hours"] if scaling.hours is not None else []))
    expect(bool(config.run.storage), "run.storage", config.run.storage, "a folder")
    if config.run.name is not None:
        _folder_name("run.name", config.run.name)


MODES = ("proxy", "selection", "compose")
SCORES = {"proxy": ("test", "central"), "selection": ("accuracy", "central"), "compose": ("accuracy", "central")}
SEARCHED = ("model", "central", "warmup", "frequency", "finetune", "sampling")


def _validate_search(search: SearchConfig) -> None:
    """Privacy of a search rests on these rules (docs/guarantee.md); nothing is looked at unless it is asked for."""
    if search.privacy is None:
        return
    _choice("search.privacy", search.privacy, MODES)
    _validate_adaptivity(search)
    trials, whole = search.expected_trials, search.privacy == "selection" or search.expected_trials % 1 == 0
    expect(whole and trials >= 1, "search.expected_trials", trials, "a whole number of at least 1")
    _positive_int(search, "search", "max_trials", "score_images", "concurrent_trials")
    _noise_multiplier(search, "search", "score_noise_multiplier")
    _choice("search.law", search.law, ("negative_binomial", "poisson"))
    if search.score is not None:
        reason = "a score from the real test set is accounted nowhere, and what it chose would depend on it"
        advice = reason if search.score == "test" else ""
        known = search.score in SCORES[search.privacy]
        expect(known, "search.score", search.score, " or ".join(SCORES[search.privacy]), advice)
    stand_in = search.proxy.source
    if search.privacy == "proxy":
        named = stand_in in (*SOURCES, "central", "release") and (
            stand_in in ("digits", "central") or search.proxy.path
        )
        expectation = "public images to search on: a source with search.proxy.path, an earlier release, or central"
        expect(bool(named), "search.proxy.source", stand_in, expectation)
    else:
        expect(stand_in is None, "search.proxy.source", stand_in, f"none with search.privacy={search.privacy}")
    _validate_space(search.space)


def _validate_adaptivity(search: SearchConfig) -> None:
    _choice("search.sampler", search.sampler, ("random", "optuna"))
    _choice("search.scheduler", search.scheduler, ("fifo", "asha"))
    together = search.sampler == "random" or search.concurrent_trials == 1
    reason = "what it suggests depends on the trials before; search.sampler=random with asha takes several"
    expect(together, "search.concurrent_trials", search.concurrent_trials, "1 with search.sampler=optuna", reason)
    if search.privacy == "selection":
        reason = (
            "trials must be independent: one that depends on another's score breaks the bound; use compose or proxy"
        )
        expect(search.sampler == "random", "search.sampler", search.sampler, "random with selection", reason)
        expect(search.scheduler == "fifo", "search.scheduler", search.scheduler, "fifo with selection", reason)


def _validate_space(space: object) -> None:
    if space is None:
        return
    form = "{dotted.key: [value, value], ...}"
    expect(isinstance(space, dict) and bool(space), "search.space", space, form)
    assert isinstance(space, dict)
    for name, values in space.items():
        inside = isinstance(name, str) and name.split(".")[0] in SEARCHED and "." in name
        expect(inside, "search.space", name, f"a setting of {', '.join(SEARCHED)}, e.g. warmup.num_steps")
        several = isinstance(values, list) and len(values) > 0 and all(values.count(one) == 1 for one in values)
        expect(several, f"search.space.{name}", values, "a list of distinct values")


def validate(config: Config) -> Config:
    """Checks every value once.

    Raises:
      InputError: naming the key, its value, what was expected and what to do.
    """
    expect(0 <= config.seed < 2**31, "seed", config.seed, f"a whole number from 0 to {2**31 - 1}")
    _validate_data(config.data)
    _validate_privacy(config.privacy)
    _validate_ledger(config)
    _validate_curriculum(config)
    _validate_training(config)
    _validate_outputs(config)
    _validate_search(config.search)
    return config
