"""What somebody might leave in a release, or slip into it: `check` refuses each, and so does `python -m e2h check`."""

from __future__ import annotations

import base64
import errno
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from finished_run import png
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.numpy import load_file, save_file

from e2h.__main__ import main
from e2h.api import load_release
from e2h.errors import InputError
from e2h.reporting.check import content_problems
from e2h.reporting.metrics import MetricWriter

PIXELS = np.zeros((8, 8), np.uint8)
TABLE = "data/part-00000.parquet"


def picture(kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, kind, **options)
    return buffer.getvalue()


def noted() -> PngInfo:
    notes = PngInfo()
    notes.add_text("Author", "Jane")
    return notes


def exif() -> Image.Exif:
    found = Image.Exif()
    found[0x010E] = "ward 7"
    return found


def put(name: str, content: bytes | str):
    def plant(release: Path) -> None:
        (release / name).parent.mkdir(exist_ok=True)
        (release / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return plant


def row(content: bytes | None, label: int = 0, path: str | None = None):
    """One more row in a table of the release, which the card doesn't count, or in place of its first."""

    def plant(release: Path) -> None:
        table = pq.read_table(release / TABLE)
        first = {"image": [{"bytes": content, "path": path}], "label": [label]}
        table = pa.concat_tables([pa.table(first, table.schema), table.slice(1)])
        pq.write_table(table, release / TABLE)

    return plant


def one_more(release: Path) -> None:
    table = pq.read_table(release / TABLE)
    pq.write_table(pa.concat_tables([table, table.slice(0, 1)]), release / TABLE)


def column(release: Path) -> None:
    table = pq.read_table(release / TABLE)
    pq.write_table(table.append_column("source", pa.array(["ward 7"] * len(table))), release / TABLE)


def table_note(release: Path) -> None:
    table = pq.read_table(release / TABLE)
    pq.write_table(table.replace_schema_metadata({**table.schema.metadata, "origin": "ward 7"}), release / TABLE)


def model_note(release: Path) -> None:
    path = release / "model.safetensors"
    save_file(load_file(path), path, {"format": "pt", "trained_on": "ward 7"})


def setting(*keys: str):
    def plant(release: Path) -> None:
        path = release / "config.yaml"
        config = yaml.safe_load(path.read_text())
        holder = config
        for key in keys[:-1]:
            holder = holder[key]
        holder[keys[-1]] = "sesame"
        path.write_text(yaml.safe_dump(config))

    return plant


def events(place: str):
    """TensorBoard's file of sensitive curves, as the run writes it."""

    def plant(release: Path) -> None:
        run = release.parent / "other"
        run.mkdir()
        with MetricWriter(run) as metrics:
            metrics.scalar("finetune/loss", 1.0, 0)
        (source,) = (run / "tb" / "sensitive").glob("events*")
        (release / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, release / place)

    return plant


def in_report(release: Path) -> None:
    uri = base64.b64encode(picture(pnginfo=noted())).decode()
    with open(release / "report.html", "a") as file:
        file.write(f'<img src="data:image/png;base64,{uri}" alt="">')


def no_front_matter(release: Path) -> None:
    (release / "README.md").write_text("# Synthetic digits")


def damaged_labels(release: Path) -> None:
    path = release / TABLE
    start = pq.read_metadata(path).row_group(0).column(2).data_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + 40] = bytes(40)
    path.write_bytes(content)


def words_for_labels(release: Path) -> None:
    table = pq.read_table(release / TABLE)
    pq.write_table(table.set_column(1, "label", table["label"].cast(pa.string())), release / TABLE)


def target(value: object):
    def plant(release: Path) -> None:
        path = release / "ledger.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "target_epsilon": value}))

    return plant


SENSITIVE_ROW = json.dumps({"name": "finetune/batch_size", "value": 511, "step": 3, "class": "sensitive"})


@pytest.mark.parametrize(
    ("plant", "expected"),
    [
        (put("evaluation.json", "{}"), "evaluation.json: unexpected file"),
        (put("evaluation/baselines.json", "{}"), "evaluation: unexpected folder"),
        (put("metrics.jsonl", SENSITIVE_ROW), "metrics.jsonl: unexpected file"),
        (put("secret.key", b"0" * 32), "secret.key: unexpected file"),
        (put("ledger.jsonl", "{}"), "ledger.jsonl: unexpected file"),
        (events("events.out.tfevents.1.host.2.0"), "events.out.tfevents.1.host.2.0: unexpected file"),
        (events("tb/sensitive/events.out.tfevents.1.host.2.0"), "tb/sensitive: unexpected folder"),
        (events("data/events.parquet"), "data/events.parquet: expected a Parquet file"),
        (put("README.md", SENSITIVE_ROW), "README.md: sensitive name 'finetune/batch_size'"),
        (put("figures/utility.svg", "<svg/>"), "figures/utility.svg: unexpected file"),
        (
            put("figures/budget.svg", "<svg><text>DP-SGD loss on the private images</text></svg>"),
            "sensitive name 'DP-SGD",
        ),
        (put("figures/budget.svg", '<svg><image href="data:image/jpeg;base64,xx"/></svg>'), "expected lines and words"),
        (put("grid.png", picture(pnginfo=noted())), "grid.png: expected pixels alone, found an entry 'tEXt'"),
        (put("grid.png", picture(exif=exif())), "grid.png: expected pixels alone, found an entry 'eXIf'"),
        (put("grid.png", png(PIXELS) + b"ward 7"), "grid.png: expected a whole PNG image and nothing behind it"),
        (put("grid.png", picture("JPEG")), "grid.png: expected a PNG image"),
        (in_report, "report.html: expected pixels alone, found an entry 'tEXt'"),
        (row(picture(pnginfo=noted())), f"{TABLE}: expected pixels alone, found an entry 'tEXt'"),
        (row(picture("JPEG")), f"{TABLE}: expected a PNG image"),
        (row(None), f"{TABLE}: expected a PNG image"),
        (row(png(PIXELS), path="jane.png"), f"{TABLE}: private path 'jane.png' in image.path"),
        (row(png(PIXELS), label=3), "data: expected the labels that README.md names, found 3"),
        (one_more, "data: expected the 23 images that README.md counts, found 24"),
        (column, f"{TABLE}: expected the columns image and label, found image, label, source"),
        (table_note, f"{TABLE}: unexpected metadata 'origin'"),
        (model_note, "model.safetensors: unexpected metadata 'trained_on'"),
        (setting("privacy", "secret"), "config.yaml: private setting privacy.secret"),
        (setting("data", "path"), "config.yaml: private setting data.path"),
        (setting("evaluation", "inception_weights"), "config.yaml: private setting evaluation.inception_weights"),
        (put("config.yaml", "a: [1"), "config.yaml: expected YAML"),
        (no_front_matter, "README.md: expected the front matter of a dataset card"),
    ],
)
def test_a_planted_file_row_or_word_is_refused(release, plant, expected):
    plant(release)
    assert any(expected in problem for problem in content_problems(release)), content_problems(release)


@pytest.mark.parametrize(
    ("plant", "expected"),
    [
        (put("report.html", "data:image/png;base64,abc"), "report.html: expected a PNG image"),
        (put("config.yaml", b"name: \xe9"), "config.yaml: expected YAML (UnicodeDecodeError)"),
        (put("config.yaml", "day: 2024-99-99"), "config.yaml: expected YAML (ValueError)"),
        (put("README.md", b"---\nname: \xe9\n---\n"), "README.md: expected the front matter of a dataset card (Uni"),
        (damaged_labels, f"{TABLE}: expected a Parquet file with columns image (bytes, path) and label ("),
        (words_for_labels, f"{TABLE}: expected label to hold whole numbers, found string"),
        (target(None), "ledger.json: ledger: expected a number under target_epsilon (TypeError"),
        (target("two"), "ledger.json: ledger: expected a number under target_epsilon (ValueError"),
        (target([2.5]), "ledger.json: ledger: expected a number under target_epsilon (TypeError"),
    ],
)
def test_a_damaged_file_is_a_problem_like_others(release, capsys, plant, expected):
    plant(release)
    assert main(["check", str(release)]) == 2
    assert expected in capsys.readouterr().out
    with pytest.raises(InputError, match=re.escape(expected)):
        load_release(release)


def test_a_file_that_can_t_be_read_is_a_problem(release, monkeypatch, capsys):
    def denied(path: Path, *_: object, **__: object) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_text", denied)
    assert main(["check", str(release)]) == 2
    assert f"expected files that you may read (Permission denied: {release}/" in capsys.readouterr().out


def test_the_command_refuses_a_planted_file_and_row(release, capsys):
    assert main(["check", str(release)]) == 0
    put("evaluation.json", "{}")(release)
    assert main(["check", str(release)]) == 2
    assert "evaluation.json: unexpected file" in capsys.readouterr().out
    (release / "evaluation.json").unlink()
    one_more(release)
    assert main(["check", str(release)]) == 2
    assert "expected the 23 images" in capsys.readouterr().out
