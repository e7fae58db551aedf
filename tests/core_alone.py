"""A whole run in one process, as an ordinary program: prepare, central images, warm-up, DP-SGD, synthesis.

`test_architecture.py` runs it where neither Ray nor Hydra can be imported; it prints what the ledger charged.
"""

from __future__ import annotations

import sys

import numpy as np
import torch

from e2h.config import Config, FinetuneConfig, ModelConfig, RunConfig, SamplingConfig, WarmupConfig
from e2h.curriculum.central import CentralQuery
from e2h.curriculum.run import open_run
from e2h.curriculum.synthesis import Synthesizer, shard_path
from e2h.curriculum.train import train
from e2h.curriculum.workers import Workers
from e2h.data.exports import read_hf_parquet, write_hf_parquet
from e2h.data.prepare import finish_prepared, prepare_shard
from e2h.data.sources import open_source
from e2h.data.storage import iter_batches, open_prepared
from e2h.privacy.accounting import NEIGHBOURING_RELATION
from e2h.privacy.events import PoissonSampledGaussian, Release
from e2h.privacy.keys import derive_key
from e2h.privacy.ledger import Budget
from e2h.validation import validate


def main(storage: str) -> None:
    torch.set_num_threads(1)
    config = Config(
        model=ModelConfig(base_width=8, width_multipliers=[1], attention_resolutions=[], embedding_width=16),
        warmup=WarmupConfig(num_steps=3, batch_size=8),
        finetune=FinetuneConfig(num_steps=4, expected_batch_size=20, noise_multiplicity=2, ledger_block=3),
        sampling=SamplingConfig(num_images=6, num_steps=3),
        run=RunConfig(storage=storage),
    )
    config.data.records_per_shard = 600
    config.scaling.physical_batch_size = 8
    with open_run(validate(config)) as run:
        source = open_source(config.data)
        stats = [prepare_shard(shard, config.data, run.prepared, i) for i, shard in enumerate(source.shards)]
        facts = finish_prepared(run.prepared, source, config.data, stats)
        event = PoissonSampledGaussian(config.central.sampling_prob, 6.0, config.central.num_rounds)
        step = PoissonSampledGaussian(config.finetune.expected_batch_size / facts.num_train, 1.0, 4)
        planned = (Release("central", event), Release("finetune", step))
        run.open_budget(Budget(config.privacy.epsilon, config.privacy.delta, NEIGHBOURING_RELATION.name, planned))

        domain = run.domain(event.to_json(), facts.digest, "one process")
        run.ledger.spend("central", event, domain, 0, event.count)
        classes = len(facts.class_names)
        query = CentralQuery(config.central, event, facts.image_size, facts.channels, classes, facts.num_train)
        blocks = iter_batches(open_prepared(run.prepared).paths("train"), 500)
        mask_key, noise_key = (derive_key(run.secret(), purpose, domain) for purpose in ("sampling", "noise"))
        sums = sum(query.partial_sums(block.images, block.labels, block.ids, mask_key) for block in blocks)
        released = query.release(sums, noise_key)
        images = query.decode(released).reshape(-1, 8, 8, 1)
        run.central.mkdir()
        run.synthetic.mkdir()
        labels = np.tile(np.arange(query.num_groups), event.count)
        write_hf_parquet(run.central / "images.parquet", images, labels, facts.class_names)

        train(run, planned[1], Workers.current(), lambda *_: None, lambda *_: None)
        Synthesizer(run).write_shard(0)
        for release in run.ledger.charged():
            print(release.name, release.event.count)
        print("images", len(read_hf_parquet([shard_path(run.synthetic, 0)])[0]))


if __name__ == "__main__":
    main(sys.argv[1])
