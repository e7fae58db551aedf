"""Jobs as a user starts them."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TEST_SECRET = hashlib.sha256(b"a secret of these tests").hexdigest()
# A run of seconds: few steps, few images, one cheap classifier.
SMALL = [
    "privacy.epsilon=1",  # the smaller, the faster PLD
    "warmup.num_steps=20",
    "finetune.num_steps=20",
    "finetune.expected_batch_size=64",
    "finetune.noise_multiplicity=2",
    "finetune.checkpoint_every=4",
    "finetune.ledger_block=4",
    "sampling.num_images=120",
    "sampling.images_per_shard=40",
    "sampling.num_steps=4",
    "evaluation.classifiers=[logistic_regression]",
    "evaluation.max_feature_records=200",
]


def command(name: str, *overrides: str) -> list[str]:
    return [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *overrides]


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, "E2H_TEST_SECRET": TEST_SECRET, **extra}
