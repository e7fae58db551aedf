"""The dataset card: `README.md` of a release, with the front matter that the Hugging Face Hub reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

import e2h
from e2h.config import NOT_PRIVATE
from e2h.reporting import facts
from e2h.reporting.recompute import recipe, selected


def card(plan: Mapping[str, Any], config: Mapping[str, Any], num_images: int, num_bytes: int) -> str:
    """Markdown with YAML front matter.

    Args:
      plan: `plan.json` of the run.
      config: resolved configuration of the run; only public facts are read.
      num_images: synthetic images in `data/`.
      num_bytes: their size on disk.
    """
    environment = Environment(
        loader=PackageLoader("e2h.reporting"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("card.md.j2").render(
        front_matter=_front_matter(plan, config, num_images, num_bytes),
        name=config["data"]["name"],
        num_images=num_images,
        plan=plan,
        config=config,
        facts=facts,
        relation=facts.RELATIONS.get(plan["neighbouring_relation"], plan["neighbouring_relation"]),
        banner=NOT_PRIVATE if plan["not_private"] else None,
        recipe=recipe(plan),
        selected=selected(plan),
        version=e2h.__version__,
    )


def _front_matter(plan: Mapping[str, Any], config: Mapping[str, Any], num_images: int, num_bytes: int) -> str:
    names = {str(label): str(name) for label, name in enumerate(plan["public"]["class_names"])}
    features = [
        {"name": "image", "dtype": "image"},
        {"name": "label", "dtype": {"class_label": {"names": names}}},
    ]
    split = {"name": "train", "num_examples": num_images, "num_bytes": num_bytes}
    files = [{"split": "train", "path": "data/*.parquet"}]
    content = {
        "pretty_name": f"Synthetic {config['data']['name']} (epsilon {facts.up(plan['epsilon'])})",
        "license": "other",
        "task_categories": ["image-classification"],
        "tags": ["synthetic", "differential-privacy"] + (["not-private"] if plan["not_private"] else []),
        "size_categories": [_size_category(num_images)],
        "dataset_info": {"features": features, "splits": [split]},
        "configs": [{"config_name": "default", "data_files": files}],
    }
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _size_category(count: int) -> str:
    """The Hub's own words for the order of magnitude."""
    limits = [(1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M")]
    return next((name for limit, name in limits if count < limit), "1M<n<10M")
