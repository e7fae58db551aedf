"""What the list of the data alone shows to be impossible is refused before anything is paid for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from e2h.config import Config
from e2h.curriculum.listing import listed
from e2h.data.exports import write_hf_parquet
from e2h.errors import InputError


def config_of(folder: Path, num_classes: int = 2) -> Config:
    images, labels = np.zeros((60, 8, 8, 1), np.uint8), np.arange(60) % num_classes
    write_hf_parquet(folder / "images.parquet", images, labels, [str(label) for label in range(num_classes)])
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


@pytest.mark.parametrize(("score", "ok"), [(None, False), ("accuracy", False), ("central", True)])
def test_one_class_has_no_accuracy_to_search_by(tmp_path, score, ok):
    config = config_of(tmp_path, num_classes=1)
    assert listed(config).class_names == ("0",)
    config.search.privacy, config.search.score = "selection", score
    if ok:
        listed(config)
    else:
        with pytest.raises(InputError, match=rf"^search.score={score}: expected central where there is one class"):
            listed(config)
