"""A whole run in one process, as an ordinary program: prepare, both easy stages, warm-up, DP-SGD, synthesis.

`test_architecture.py` runs it where neither Ray nor Hydra can be imported; it prints what the ledger charged.
"""

from __future__ import annotations

import sys

from e2h.config import Config, FinetuneConfig, FrequencyConfig, ModelConfig, RunConfig, SamplingConfig, WarmupConfig
from e2h.curriculum import stages
from e2h.curriculum.run import open_run
from e2h.curriculum.synthesis import shard_path
from e2h.data.exports import read_hf_parquet
from e2h.validation import validate


def main(storage: str) -> None:
    config = Config(
        model=ModelConfig(base_width=8, width_multipliers=[1], attention_resolutions=[], embedding_width=16),
        curriculum=["central", "frequency"],
        warmup=WarmupConfig(num_steps=3, batch_size=8),
        frequency=FrequencyConfig(num_features=40, generator_steps=2, num_images=20),
        finetune=FinetuneConfig(num_steps=4, expected_batch_size=20, noise_multiplicity=2, ledger_block=3),
        sampling=SamplingConfig(num_images=6, num_steps=3),
        run=RunConfig(storage=storage),
    )
    config.privacy.epsilon = 1.0  # the smaller, the faster PLD
    config.frequency.warmup = WarmupConfig(num_steps=2, batch_size=8)
    config.data.records_per_shard, config.scaling.physical_batch_size = 600, 8
    with open_run(validate(config)) as run:
        prepared = stages.prepare(run)
        plan = stages.calibrate(run, prepared)
        stages.release_easy_stages(run, prepared, plan)
        stages.train(run, plan)
        stages.sample(run)
        for release in run.ledger.charged():
            print(release.name, release.event.count)
        print("images", len(read_hf_parquet([shard_path(run.synthetic, 0)])[0]))


if __name__ == "__main__":
    main(sys.argv[1])
