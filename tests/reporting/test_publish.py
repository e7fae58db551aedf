from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from safetensors.numpy import load_file, save_file

from e2h.config import NOT_PRIVATE, Config, PrivacyConfig, stamp
from e2h.data.exports import read_hf_parquet, write_image_folder, write_npz
from e2h.data.images import write_png
from e2h.errors import InputError
from e2h.reporting.check import check
from e2h.reporting.publish import publish

EXPECTED = {
    "README.md",
    "config.yaml",
    "data/part-00000.parquet",
    "data/part-00001.parquet",
    "figures/budget.svg",
    "figures/epsilon_by_step.svg",
    "figures/noise_by_share.svg",
    "figures/trade_off.svg",
    "grid.png",
    "ledger.json",
    "model.safetensors",
    "report.html",
}


def names(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_release_holds_the_allowed_files_and_passes_its_own_check(make_run):
    run = make_run()
    (run / "synthetic" / "notes.txt").write_text("private")
    release = publish(run)
    assert release == run / "release"
    assert names(release) == EXPECTED
    assert check(release) == []
    assert pq.read_table(release / "data").num_rows == 23
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in release.rglob("*") if path.is_file())
    assert not list(run.glob(".release*"))


def test_nothing_private_or_sensitive_is_written(make_run):
    release = publish(make_run())
    text = "".join((release / name).read_text() for name in ("README.md", "config.yaml", "ledger.json", "report.html"))
    for word in ("/secret", "machine-7", "12.345", "0.8765", "87.6", "finetune/loss", "DP-SGD loss", "evaluation.json"):
        assert word not in text
    config = yaml.safe_load((release / "config.yaml").read_text())
    assert "path" not in config["data"]
    assert "storage" not in config["run"]
    assert "secret" not in config["privacy"]
    assert config["finetune"]["max_grad_norm"] == 1.0


def test_ledger_keeps_the_contract(make_run, epsilons):
    ledger = json.loads((publish(make_run()) / "ledger.json").read_text())
    assert list(ledger) == [
        "epsilon",
        "delta",
        "target_epsilon",
        "neighbouring_relation",
        "accountant",
        "accountant_version",
        "releases",
        "n_is_public",
        "tuning",
    ]
    assert ledger["epsilon"] == epsilons["pld"]
    assert ledger["tuning"] is None
    assert [set(release) for release in ledger["releases"]] == [{"name", "event", "epsilon_alone"}] * 2


def test_publishing_again_replaces_and_a_refusal_keeps_the_old_release(make_run, write_table):
    run = make_run()
    release = publish(run)
    (release / "stray.txt").write_text("left behind")
    publish(run)
    assert names(release) == EXPECTED
    before = (release / "README.md").read_bytes()
    write_table(run / "synthetic" / "part-00002.parquet", [0], path_of=lambda i: "/secret/patients/7.png")
    with pytest.raises(InputError, match=r"private path '/secret/patients/7.png'"):
        publish(run)
    assert names(release) == EXPECTED
    assert (release / "README.md").read_bytes() == before
    assert not list(run.glob(".release*"))


def test_recovers_from_a_kill_between_the_renames(make_run):
    run = make_run()
    publish(run).rename(run / ".release-old")
    (run / "checkpoints" / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"checkpoints/model.safetensors: expected this file"):
        publish(run)
    assert names(run / "release") == EXPECTED


@pytest.mark.parametrize(
    "missing", ["plan.json", "config.yaml", "synthetic/grid.png", "checkpoints/model.safetensors", "synthetic"]
)
def test_unfinished_run_is_refused_in_one_line_and_leaves_nothing(make_run, missing):
    run = make_run()
    path = run / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(InputError) as refusal:
        publish(run)
    assert missing.split("/")[0] in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not (run / "release").exists()
    assert not list(run.glob(".release*"))


def test_false_epsilon_is_not_published(make_run):
    run = make_run()
    plan = json.loads((run / "plan.json").read_text())
    plan["epsilon"] -= 0.01
    (run / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(InputError, match="its events give"):
        publish(run)


def test_a_run_that_is_not_private_says_so_everywhere(make_run):
    release = publish(make_run(not_private=True))
    for name in ("README.md", "report.html"):
        assert "NOT PRIVATE" in (release / name).read_text()
    assert json.loads((release / "ledger.json").read_text())["not_private"] is True
    assert [problem for problem in check(release) if "NOT PRIVATE" in problem] == check(release) != []


def stamp_table(release):
    path = release / "data" / "part-00000.parquet"
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({**(table.schema.metadata or {}), **stamp(published_secret())}), path)


def stamp_weights(release):
    path = release / "model.safetensors"
    save_file(load_file(path), path, {"format": "pt", **stamp(published_secret())})


def stamp_picture(release):
    picture = np.asarray(Image.open(release / "grid.png"))
    write_png(release / "grid.png", picture.reshape(*picture.shape[:2], -1), stamp(published_secret()))


def published_secret() -> Config:
    return Config(privacy=PrivacyConfig(test_mode=True))


@pytest.mark.parametrize("spoil", [stamp_table, stamp_weights, stamp_picture])
def test_one_file_of_a_run_that_is_not_private_spoils_a_release(release, spoil):
    assert check(release) == []
    spoil(release)
    (problem,) = check(release)
    assert problem.endswith(NOT_PRIVATE)


def spoil_text(name, addition):
    def spoil(release):
        with open(release / name, "a") as file:
            file.write(addition)

    return spoil


def spoil_table(**columns):
    def spoil(release):
        image = {"image": [{"bytes": b"", "path": "0.png"}], "label": [0]}
        pq.write_table(pa.table(image | columns), release / "data" / "z.parquet")

    return spoil


def spoil_ledger(**entries):
    def spoil(release):
        path = release / "ledger.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda r: (r / "evaluation.json").write_text("{}"), "evaluation.json: unexpected file"),
        (lambda r: (r / "data" / "raw.csv").write_text(""), "data/raw.csv: unexpected file"),
        (lambda r: (r / "tb").mkdir(), "tb: unexpected folder"),
        (lambda r: (r / "data" / "x.parquet").symlink_to("/etc/hostname"), "data/x.parquet: expected a regular file"),
        (lambda r: (r / "model.safetensors").unlink(), "model.safetensors: missing"),
        (lambda r: shutil.rmtree(r / "data"), "data/*.parquet: missing"),
        (lambda r: (r / "data" / "y.parquet").write_text("no table"), "data/y.parquet: expected a Parquet file"),
        (spoil_table(name=["Jane"]), "z.parquet: expected the columns image and label, found image, label, name"),
        (spoil_table(image=[b"pixels"]), "z.parquet: expected a Parquet file with columns image (bytes, path)"),
        (spoil_table(image=[{"bytes": b"", "path": "", "owner": "Jane"}]), "expected image to hold bytes and path"),
        (lambda r: save_file({}, r / "model.safetensors", {"from": "/home/jane/run"}), "private path '/home/jane/run'"),
        (lambda r: (r / "model.safetensors").write_text("x"), "model.safetensors: expected a safetensors file"),
        (spoil_text("README.md", "see finetune/mean_norm"), "README.md: sensitive name 'finetune/mean_norm'"),
        (spoil_text("README.md", "see evaluation.json"), "README.md: sensitive name 'evaluation.json'"),
        (spoil_text("report.html", "<b>DP-SGD loss on the private images</b>"), "report.html: sensitive name 'DP-SGD"),
        (spoil_text("report.html", '{"class": "sensitive"}'), "report.html: content marked sensitive"),
        (spoil_text("config.yaml", "path: /home/jane/images"), "config.yaml: private path '/home/jane/images'"),
        (spoil_text("config.yaml", "path: s3://hospital/scans"), "config.yaml: private path 's3://hospital/scans'"),
        (spoil_text("report.html", "<p>~/images</p>"), "report.html: private path '~/images'"),
        (spoil_ledger(epsilon=0.5), "ledger.json: epsilon=0.5: its events give"),
        (spoil_ledger(epsilon=None), "expected a number under epsilon"),
        (spoil_ledger(target_epsilon=0.1), "above target_epsilon=0.1"),
        (spoil_ledger(batch_sizes=[511, 498]), "unexpected entry 'batch_sizes'"),
        (lambda r: (r / "ledger.json").write_text("{}"), "ledger.json: "),
        (lambda r: (r / "ledger.json").write_text("[]"), "expected a JSON object"),
    ],
)
def test_check_finds(release, spoil, expected):
    spoil(release)
    assert any(expected in problem for problem in check(release)), check(release)


def test_check_knows_an_internal_report(make_run):
    from e2h.reporting.report import write_report

    run = make_run()
    release = publish(run)
    shutil.copy(write_report(run), release / "report.html")
    assert "report.html: content marked sensitive" in check(release)


def test_check_of_no_folder(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.png").write_bytes(b"1")
    for name in ("none", "photos"):
        (problem,) = check(tmp_path / name)
        assert re.match("release_dir=.*expected a release folder, runs/NAME/release", problem)


def test_hugging_face_datasets_load_the_release(release, tmp_path):
    import datasets  # a second to import

    def load(*arguments, **named):
        return datasets.load_dataset(*arguments, cache_dir=str(tmp_path / "cache"), split="train", **named)

    by_card = load(str(release))
    by_files = load("parquet", data_files=str(release / "data" / "*.parquet"))
    for loaded in (by_card, by_files):
        assert len(loaded) == 23
        assert isinstance(loaded.features["image"], datasets.Image)
        assert loaded.features["label"].names == ["zero", "one", "two"]
        assert loaded[0]["image"].size == (8, 8)
        assert loaded[1]["label"] == 1


def test_image_folder_and_npz_made_of_a_release_are_read_by_others(release, tmp_path):
    import datasets  # its `imagefolder` reads what torchvision's ImageFolder reads: a folder a class

    images, labels = read_hf_parquet(sorted(release.glob("data/*.parquet")))
    write_image_folder(tmp_path / "folder", images, labels, ["zero", "one", "two"])
    cache = str(tmp_path / "cache")
    folder = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "folder"), cache_dir=cache, split="train")
    assert folder.features["label"].names == ["one", "two", "zero"]
    assert sorted(np.bincount(folder["label"])) == sorted(np.bincount(labels))
    write_npz(tmp_path / "all.npz", images, labels)
    with np.load(tmp_path / "all.npz") as arrays:
        assert arrays["arr_0"].shape == (23, 8, 8, 1)
        assert arrays["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(arrays["arr_1"], labels)
