"""The easy stages on Ray: one pass over the data each (`e2h.curriculum.easy`)."""

from __future__ import annotations

from e2h.config import Config
from e2h.curriculum import easy
from e2h.curriculum.run import Run
from e2h.data.storage import Prepared
from e2h.distributed import datasets
from e2h.distributed.capacity import await_nodes
from e2h.distributed.console import say, working
from e2h.distributed.nodes import on_any_node
from e2h.privacy.plan import PrivacyPlan
from e2h.results import show_grid


def release_easy_stages(run: Run, prepared: Prepared, plan: PrivacyPlan) -> None:
    """What the curriculum begins with, each an event of its own, in its order."""
    for stage in run.config.curriculum:
        release_easy_stage(run, prepared, plan, stage)


def release_easy_stage(run: Run, prepared: Prepared, plan: PrivacyPlan, stage: str) -> None:
    """Makes one easy stage, unless it is done."""
    if not run.done(stage):
        with working(stage, "fitting a generator" if stage == "frequency" else "") as tell:
            await_nodes(run.config.scaling, run.root)
            easy.release_easy_stage(
                run,
                prepared,
                plan,
                stage,
                lambda query, domain: datasets.query_sums(run, prepared, query, stage, domain, tell),
                on_any_node,
            )
            show_grid(run, stage)
    say(stage, f"{_told(run.config, stage)} ({stage}/grid.png)")


def _told(config: Config, stage: str) -> str:
    if stage == "central":
        group = "a class" if config.central.class_conditional else "of all records"
        return f"{config.central.num_rounds} noisy {config.central.query} images {group} released"
    return f"noisy mean embeddings released; {config.frequency.num_images} images from a generator fitted to them"
