"""What the list of the data alone shows to be impossible is refused before anything is paid for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from e2h.config import Config
from e2h.curriculum.listing import doubts, listed, remarks
from e2h.curriculum.run import Run
from e2h.curriculum.stages import prepare
from e2h.data.exports import write_hf_parquet
from e2h.errors import InputError
from e2h.settings import compose


def config_of(folder: Path, num_classes: int = 2, names: Sequence[str] = ()) -> Config:
    images, labels = np.zeros((60, 8, 8, 1), np.uint8), np.arange(60) % num_classes
    write_hf_parquet(folder / "images.parquet", images, labels, names or [str(label) for label in range(num_classes)])
    config = Config()
    config.data.source, config.data.path = "parquet", str(folder / "images.parquet")
    config.finetune.expected_batch_size = 8
    return config


def test_an_evaluation_needs_held_out_images(tmp_path):
    config = config_of(tmp_path)
    config.data.test_fraction = 0.0
    with pytest.raises(InputError, match=r"^evaluation.enabled=True: expected 2 test images or more; hold some out"):
        listed(config)
    config.evaluation.enabled = False
    assert listed(config).num_train == 60


@pytest.mark.parametrize("name", ["/a/abbey", "/m/01g317", "s3://hospital/scans", "~/cats"])
def test_a_class_named_like_a_path_is_refused_before_anything_is_paid(tmp_path, name):
    config = config_of(tmp_path, names=["dog", name])
    refusal = rf"^data.class_names={name}: expected names that don't look like paths.*; give all 2 classes names"
    with pytest.raises(InputError, match=refusal):
        listed(config)
    config.data.class_names = ["dog", "abbey, 1/2 of them and/or /m"]
    assert listed(config).class_names == tuple(config.data.class_names)
    config.data.class_names[0] = name
    with pytest.raises(InputError, match=refusal):
        listed(config)


@pytest.mark.parametrize(("score", "ok"), [(None, False), ("accuracy", False), ("central", True)])
def test_one_class_has_no_accuracy_to_search_by(tmp_path, score, ok):
    config = config_of(tmp_path, num_classes=1)
    assert listed(config).class_names == ("0",)
    config.search.privacy, config.search.score = "selection", score
    if ok:
        listed(config)
    else:
        shown = score or "null"
        with pytest.raises(
            InputError, match=rf"^search.score={shown}: expected central where all score images are of one class"
        ):
            listed(config)


@pytest.mark.parametrize(
    ("fractions", "num_images", "ok"),
    [
        (None, 1000, True),
        (None, 2, True),
        (None, 1, False),
        ([0.9996, 0.0004], 1000, False),
        ([0.999, 0.001], 1000, True),
    ],
)
def test_score_images_of_one_class_teach_no_classifier(tmp_path, fractions, num_images, ok):
    config = config_of(tmp_path, num_classes=2)
    config.search.privacy, config.search.score_images, config.sampling.class_fractions = (
        "compose",
        num_images,
        fractions,
    )
    if ok:
        listed(config)
    else:
        with pytest.raises(InputError, match=r"^search.score=null: expected central where all score images are of one"):
            listed(config)


def test_own_images_at_the_demos_target_are_doubted(tmp_path):
    assert doubts(Config()) == []
    config = config_of(tmp_path)
    (said,) = doubts(config)
    assert said.startswith("privacy.epsilon=10 and privacy.delta=1e-4 are the demo's; choose yours")
    config.privacy.epsilon = 4.0
    assert doubts(config) == []


@pytest.mark.parametrize("model", ["px8", "px28", "px28_small", "px32", "px64", "px128"])
def test_a_network_for_another_size_is_doubted_and_one_for_this_size_is_not(model):
    size = int("".join(filter(str.isdigit, model)))
    assert doubts(compose({"model": model, "data.image_size": size})) == []
    other = compose({"model": model, "data.image_size": 20})
    assert ["in its middle alone" in said for said in doubts(other)] == [True]
    patched = {"model": model, "data.image_size": 2 * size, "model.patch_size": 2}
    assert doubts(compose(patched)) == []


def test_nobody_needs_the_source_of_images_that_are_prepared(tmp_path):
    run = Run(tmp_path / "run", config_of(tmp_path))
    run.root.mkdir()
    source = Path(str(run.config.data.path))
    source.rename(tmp_path / "away")
    with pytest.raises(InputError, match="found nothing"):
        remarks(run)
    (tmp_path / "away").rename(source)
    prepared = prepare(run)
    source.unlink()
    assert remarks(run) == ()
    assert prepare(run) == prepared
    other = replace(run.config, data=replace(run.config.data, test_fraction=0.5))
    with pytest.raises(InputError, match="found nothing"):
        remarks(Run(run.root, other))
