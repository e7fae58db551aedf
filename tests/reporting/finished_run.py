"""A small finished run directory, as the tests of reports and releases need it."""

from __future__ import annotations

import io
import json
from dataclasses import asdict
from pathlib import Path

import dp_accounting
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image
from safetensors.numpy import save_file

from e2h.config import Config
from e2h.data.exports import write_hf_parquet

DELTA = 1e-5
NAMES = ["zero", "one", "two"]
EVENTS = {
    "central": {"type": "poisson_sampled_gaussian", "sampling_prob": 0.5, "noise_multiplier": 20.0, "count": 5},
    "finetune": {"type": "poisson_sampled_gaussian", "sampling_prob": 0.1, "noise_multiplier": 4.0, "count": 100},
}


def reference_epsilon(names, accountant="pld", delta=DELTA) -> float:
    """By dp_accounting directly, as one composed event."""
    relation = dp_accounting.NeighboringRelation.REPLACE_SPECIAL
    kinds = {"pld": dp_accounting.pld.PLDAccountant, "rdp": dp_accounting.rdp.RdpAccountant}
    events = []
    for event in (EVENTS[name] for name in names):
        gaussian = dp_accounting.GaussianDpEvent(event["noise_multiplier"])
        sampled = dp_accounting.PoissonSampledDpEvent(event["sampling_prob"], gaussian)
        events.append(dp_accounting.SelfComposedDpEvent(sampled, event["count"]))
    composed = dp_accounting.ComposedDpEvent(events)
    return float(kinds[accountant](neighboring_relation=relation).compose(composed).get_epsilon(delta))


def reference_epsilons() -> dict:
    """Epsilon of either stage, of both by both accountants, and at other deltas."""
    both = ["central", "finetune"]
    return {
        "central": reference_epsilon(["central"]),
        "finetune": reference_epsilon(["finetune"]),
        "pld": reference_epsilon(both),
        "rdp": reference_epsilon(both, "rdp"),
        "curve": [[delta, reference_epsilon(both, delta=delta)] for delta in (1e-4, 1e-6)],
    }


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_table(path: Path, labels, size=8, path_of=lambda index: None, **columns) -> None:
    rng = np.random.default_rng(0)
    images = [
        {"bytes": png(rng.integers(0, 256, (size, size), dtype=np.uint8)), "path": path_of(i)}
        for i in range(len(labels))
    ]
    path.parent.mkdir(exist_ok=True, parents=True)
    pq.write_table(pa.table({"image": images, "label": [int(label) for label in labels], **columns}), path)


def plan_of(epsilons, accountant="pld", not_private=False, warnings=()) -> dict:
    releases = [
        {
            "name": name,
            "sampling_prob": event["sampling_prob"],
            "num_steps": event["count"],
            "noise_multiplier": event["noise_multiplier"],
            "epsilon_alone": epsilons[name],
            "event": event,
        }
        for name, event in EVENTS.items()
    ]
    return {
        "releases": releases,
        "epsilon": epsilons[accountant],
        "delta": DELTA,
        "target_epsilon": 2.5,
        "num_records": 5000,
        "epsilon_rdp": epsilons["rdp"],
        "accountant": accountant,
        "accountant_version": "dp-accounting 0.6.0",
        "neighbouring_relation": "REPLACE_SPECIAL",
        "epsilon_at_delta": epsilons["curve"],
        "epsilon_schedule": [[10, 0.9], [50, 1.5], [100, epsilons["pld"]]],
        "n_is_public": True,
        "public": {"num_records": 5000, "class_names": NAMES},
        "statement": ["A first sentence about <mechanisms> & noise."],
        "warnings": list(warnings),
        "not_private": not_private,
    }


def build_run(run: Path, epsilons, **plan) -> Path:
    """Fills a run directory; keyword arguments go to the plan."""
    for folder in ("central", "checkpoints"):
        (run / folder).mkdir(parents=True)
    config = Config()
    config.data.path, config.run.storage = "/secret/place/digits", "/secret/runs"
    config.privacy.secret = "file:/secret/key/x"
    (run / "config.yaml").write_text(yaml.safe_dump(asdict(config)))
    (run / "command.txt").write_text("python jobs/pipeline.py data.path=/secret/place/digits\n")
    (run / "environment.json").write_text(json.dumps({"python": "3.11", "host": {"name": "machine-7"}}))
    (run / "plan.json").write_text(json.dumps(plan_of(epsilons, **plan)))
    write_table(run / "central" / "images.parquet", [0, 1, 2] * 5, size=4, round=[i // 3 for i in range(15)])
    (run / "synthetic").mkdir()
    for part, labels in enumerate(([0, 1, 2] * 5, [2, 1] * 4)):
        images = np.random.default_rng(part).integers(0, 256, (len(labels), 8, 8, 1), dtype=np.uint8)
        write_hf_parquet(run / "synthetic" / f"part-0000{part}.parquet", images, np.array(labels), NAMES)
    (run / "synthetic" / "grid.png").write_bytes(png(np.zeros((20, 20), np.uint8)))
    save_file({"weight": np.zeros(3, np.float32)}, run / "checkpoints" / "model.safetensors")
    (run / "checkpoints" / "model.safetensors").chmod(0o600)
    rows = [("warmup/loss", 1 / (i + 1), i, "releasable") for i in range(20)]
    # The second row of each step lies about its class: the declaration decides, not the row.
    rows += [("finetune/loss", 2 / (i + 1), i, kind) for i in range(20) for kind in ("sensitive", "releasable")]
    lines = [json.dumps({"name": n, "value": v, "step": s, "class": c, "time": 0.5}) for n, v, s, c in rows]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    evaluation = {
        "class": "sensitive",
        "downstream": {
            "cnn": {
                "accuracy": 0.8765,
                "std": 0.0123,
                "accuracies": [0.8642, 0.8888],
                "per_class": {"zero": 0.91, "one": 0.834},
            },
            "mlp": {"accuracy": 0.8, "std": 0.0, "accuracies": [0.8, 0.8], "per_class": {"zero": 0.7}},
        },
        "frechet": {"extractor": "small_cnn_v1", "distance": 12.345},
        "inception": {
            "fid": 31.27,
            "kid": 0.0213,
            "kid_std": 0.0011,
            "precision": 0.61,
            "recall": 0.43,
            "inception_score": 2.31,
            "inception_score_std": 0.05,
            "weights_sha256": "0" * 64,
        },
        "memorisation": {
            "num_images": 20,
            "nearest_train": [1.1, 1.9, 3.1],
            "nearest_train_of_test": [0.9, 1.4, 2.2],
            "ratio": 1.409,
            "share_below_first_percentile": 0.006,
            "share_by_chance": 0.0135,
        },
        "num_synthetic": 23,
        "num_real_test": 77,
    }
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    baselines = {
        "real": {"cnn": {"accuracy": 0.9512, "std": 0.004}},
        "no_easy_stage": {"cnn": {"accuracy": 0.6543}},
    }
    (run / "evaluation").mkdir()
    (run / "evaluation" / "baselines.json").write_text(json.dumps(baselines))
    return run
