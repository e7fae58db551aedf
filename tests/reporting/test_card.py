from __future__ import annotations

import contextlib
import io
import json
import re

import pytest
import yaml

from e2h.reporting.publish import publish


def parts(run):
    text = (publish(run) / "README.md").read_text()
    _, front_matter, body = text.split("---\n", 2)
    return yaml.safe_load(front_matter), body


def test_front_matter_describes_the_data(make_run):
    matter, _ = parts(make_run())
    assert matter["license"] == "other"
    assert matter["task_categories"] == ["image-classification"]
    assert matter["configs"][0]["data_files"] == [{"split": "train", "path": "data/*.parquet"}]
    image, label = matter["dataset_info"]["features"]
    assert image == {"name": "image", "dtype": "image"}
    assert label["dtype"]["class_label"]["names"] == {"0": "zero", "1": "one", "2": "two"}
    split = matter["dataset_info"]["splits"][0]
    assert split["num_examples"] == 23
    assert split["num_bytes"] > 0
    assert matter["size_categories"] == ["n<1K"]


def test_body_states_guarantee_releases_and_limits(make_run, epsilons):
    _, body = parts(make_run())
    assert re.search(r"\*\*Everything in the folder release/.* is \(\d\.\d+, 1e-5\)-differentially private", body)
    assert "| Central images (easy stage) | Poisson-sampled Gaussian | 0.5 | 20 | 5 |" in body
    assert "| DP-SGD training (hard stage) | Poisson-sampled Gaussian | 0.1 | 4 | 100 |" in body
    assert "`REPLACE_SPECIAL`: one record's contribution is replaced by nothing" in body
    assert "| Training records N | 5000 |" in body
    assert "A first sentence about <mechanisms> & noise." in body
    for delta, epsilon in epsilons["curve"]:
        shown = re.search(rf"\| {delta:.0e}".replace("e-0", "e-") + r" \| ([\d.]+) \|", body)
        assert epsilon <= float(shown.group(1)) < epsilon * 1.001


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_printed_lines_recompute_epsilon(make_run, monkeypatch, epsilons, accountant):
    run = make_run(accountant=accountant)
    plan = json.loads((run / "plan.json").read_text())
    (run / "plan.json").write_text(json.dumps(plan | {"target_epsilon": 5.0}))
    _, body = parts(run)
    code = re.search(r"```python\n(.*?)```", body, re.S).group(1)
    monkeypatch.chdir(run / "release")
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(code, {})
    assert float(output.getvalue()) == pytest.approx(epsilons[accountant], abs=1e-6)
    assert len(code.splitlines()) <= 8


def test_warnings_and_the_banner_appear_only_when_due(make_run):
    _, quiet = parts(make_run("quiet"))
    assert "Warning" not in quiet
    assert "NOT PRIVATE" not in quiet
    matter, loud = parts(make_run("loud", not_private=True, warnings=["privacy.delta=0.1 is not below 1/N"]))
    assert "> **Warning.** privacy.delta=0.1 is not below 1/N" in loud
    assert loud.index("> **NOT PRIVATE") < loud.index("## Guarantee")
    assert "not-private" in matter["tags"]
