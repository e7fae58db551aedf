"""The notebooks run from top to bottom in a real kernel, and are kept without outputs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "notebooks").glob("*.ipynb"))


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for both: the second takes the release of the first."""
    return tmp_path_factory.mktemp("notebooks")


def printed(book: NotebookNode) -> Iterator[str]:
    """What each code cell shows, as text."""
    for cell in book.cells:
        if cell.cell_type == "code":
            yield "".join(one.get("text", "") or one.data["text/plain"] for one in cell.outputs)


def executed(name: str, folder: Path) -> list[str]:
    """Outputs of the code cells; nothing but the notebook's own lines is on standard error."""
    book = read(next(path for path in NOTEBOOKS if path.stem == name))
    # A raised error ends the test with the cell and the traceback.
    NotebookClient(book, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    errors = [one.text for cell in book.cells for one in cell.get("outputs", []) if one.get("name") == "stderr"]
    assert errors == []
    return list(printed(book))


@pytest.mark.long
def test_the_quick_start_makes_a_release(folder):
    shown = executed("quickstart", folder)
    assert shown[1].splitlines()[-1].startswith("epsilon 3.99")
    assert "runs/digits-eps4-seed0/release" in shown[3]
    assert "done       in " in shown[3], "the status line's last state"
    assert "image mode=L" in shown[5]
    assert float(shown[6]) > 0.7, "of ten classes, learned from synthetic digits alone"
    assert "'ledger.json'" in shown[7]


@pytest.mark.long
def test_a_release_is_recomputed_checked_and_audited(folder):
    shown = executed("recompute_and_audit", folder)
    stated, recomputed = (float(line.split()[-1]) for line in shown[1].splitlines()[-2:])
    assert stated == pytest.approx(recomputed, abs=1e-6)
    assert float(shown[2]) == pytest.approx(stated, abs=1e-6)
    assert "epsilon=1: its events give" in shown[3]
    assert "Audit(passed=True" in shown[4]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_valid_and_kept_without_outputs(path):
    book = read(path)
    nbformat.validate(book)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert len(code) >= 5
    assert [cell for cell in code if cell.outputs or cell.execution_count is not None] == []
