"""The private images as a list, before any is read: what can be refused is refused in a second, without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from e2h.config import Config, PrivacyConfig, expect
from e2h.curriculum.labels import image_labels
from e2h.curriculum.notes import usable
from e2h.curriculum.run import Run
from e2h.data.private_paths import private_paths
from e2h.data.records import Source, few
from e2h.data.sources import open_source
from e2h.privacy.plan import check_batch


def listed(config: Config) -> Source:
    """Looks at the source, and at what else a run will need; nothing is written.

    Raises:
      InputError: if the data can't be listed, a class has a name that no release may hold, the expected batch is
        larger than N, or a file is missing.
    """
    source = open_source(config.data)
    _check_names(source.class_names)
    check_batch(config, public_records(config, source))
    fractions, classes = config.sampling.class_fractions, len(source.class_names)
    one_each = fractions is None or len(fractions) == classes
    expect(one_each, "sampling.class_fractions", fractions, f"{classes} shares, one a class")
    held_out, advice = source.num_test >= 2, "hold some out (data.test_fraction), or evaluation.enabled=false"
    expect(held_out or not config.evaluation.enabled, "evaluation.enabled", True, "2 test images or more", advice)
    search = config.search
    told_apart = search.privacy is None or search.score == "central" or _several_labels(config, classes)
    expect(told_apart, "search.score", search.score, "central where all score images are of one class")
    weights = config.evaluation.inception_weights
    there = weights is None or Path(weights).expanduser().is_file()
    expect(there, "evaluation.inception_weights", weights, "a file that this and the evaluating machine can read")
    return source


def remarks(run: Run) -> tuple[str, ...]:
    """What the list of the source says that its owner may not have meant; none where the images are prepared.

    From then on nobody needs the source: it may be away, or have other images in it.

    Raises:
      InputError: as `listed`.
    """
    with usable(run.config):
        prepared = run.done("prepare")
    return () if prepared else listed(run.config).remarks


def _several_labels(config: Config, num_classes: int) -> bool:
    return len(set(image_labels(replace(config.sampling, num_images=config.search.score_images), num_classes))) > 1


def _check_names(names: Sequence[str]) -> None:
    refused = [name for name in names if private_paths(name)]
    advice = f"give all {len(names)} classes names, in the order of their labels: 'data.class_names=[...]'"
    expectation = "names that don't look like paths, for they are published"
    expect(not refused, "data.class_names", few(refused), expectation, advice)


def public_records(config: Config, source: Source) -> int:
    """N as it is declared, or the number of listed training records."""
    return config.data.num_records or source.num_train


def doubts(config: Config) -> list[str]:
    """Settings that are allowed and seldom meant, in a sentence each."""
    found, model, own = [], config.model, config.data.source in ("image_folder", "parquet")
    if own and (config.privacy.epsilon, config.privacy.delta) == (PrivacyConfig.epsilon, PrivacyConfig.delta):
        found.append(
            "privacy.epsilon=10 and privacy.delta=1e-4 are the demo's; choose yours (docs/guide.md, section 4)"
        )
    side = config.data.image_size // model.patch_size
    sides = [side // 2**level for level in range(len(model.width_multipliers))]
    if model.attention_resolutions and not set(model.attention_resolutions) & set(sides):
        found.append(
            f"model.attention_resolutions={model.attention_resolutions}: the network's levels are {sides} wide, so "
            f"attention is in its middle alone; choose the model= made for data.image_size={config.data.image_size}"
        )
    kept = config.finetune.ema_snapshots
    if kept and not config.sampling.ema_widths:
        found.append(f"finetune.ema_snapshots={kept}: nobody reads them without sampling.ema_widths")
    return found
