"""The site is built from the documents, and every link and anchor of it leads somewhere."""

from __future__ import annotations

import runpy
import shutil
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).resolve().parents[2]
builder = SimpleNamespace(**runpy.run_path(str(ROOT / "docs" / "site" / "build.py")))


class Links(HTMLParser):
    """What a page links to, what it loads, and its anchors."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: list[str] = []
        self.tags: set[str] = set()
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.tags.add(tag)
        self.anchors += [values["id"] or ""] if "id" in values else []
        if tag == "a":
            self.links.append(values["href"] or "")
        self.loads += [values[name] or "" for name in ("src", "srcset", "data") if name in values]


def dead_ends(site: Path) -> list[str]:
    """Links and pictures of a site that lead to no file or no anchor in it."""
    pages, found = {path: Links(path) for path in site.rglob("*.html")}, []
    for path, page in pages.items():
        for link in [*page.links, *page.loads]:
            name, _, anchor = link.partition("#")
            target = (path.parent / unquote(name)).resolve() if name else path
            if link.startswith("https://"):
                continue
            if not target.is_file() or (anchor and anchor not in pages[target].anchors):
                found.append(f"{path.relative_to(site)}: {link}")
    return found


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site").resolve() / "site"
    builder.build(target)
    return target


def test_every_document_and_notebook_is_a_page_that_all_others_name(site):
    documents = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "notebooks").glob("*.ipynb")]
    names = {"index.html" if path.stem == "README" else f"{path.stem}.html" for path in documents}
    assert {path.name for path in site.glob("*.html")} == names
    for name in names:
        assert names <= set(Links(site / name).links), name


def test_every_link_leads_somewhere(site):
    assert dead_ends(site) == []
    assert "files/e2h/privacy/plan.py.html" in Links(site / "index.html").links
    assert "cluster.html" in Links(site / "index.html").links


def test_nothing_is_loaded_from_elsewhere_and_nothing_runs(site):
    for path in site.rglob("*.html"):
        page = Links(path)
        assert not [one for one in page.loads if ":" in one], path
        assert not page.tags & {"script", "link", "iframe", "object", "embed", "form"}, path
        assert "@import" not in path.read_text()
        assert "url(" not in path.read_text().split("</style>")[0]


def test_anchors_are_githubs_and_distinct(site):
    anchors = Links(site / "guarantee.html").anchors
    assert "41-central-images-e2hcurriculumcentralpy" in anchors
    for path in site.rglob("*.html"):
        found = Links(path).anchors
        assert len(found) == len(set(found)), path


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Documents of one line each."""
    root = tmp_path / "repository"
    for name in (*builder.FIRST, *builder.LAST):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"# {Path(name).stem}\n")
    return root


def test_same_headings_are_numbered_files_shown_and_folders_listed(repository, tmp_path):
    (repository / "code").mkdir()
    (repository / "code" / "a.py").write_text("x = '<b>'\n")
    links = "[again](#run-1), [code](../code), [it](../code/a.py), [up](../README.md#readme)"
    (repository / "docs" / "guide.md").write_text(f"# Guide\n\n## Run\n\n## Run\n\n{links}\n")
    builder.build(tmp_path / "site", repository)
    assert Links(tmp_path / "site" / "guide.html").anchors == ["main", "guide", "run", "run-1"]
    assert "x = &#x27;&lt;b&gt;&#x27;" in (tmp_path / "site" / "files" / "code" / "a.py.html").read_text()
    assert "a.py.html" in Links(tmp_path / "site" / "files" / "code" / "index.html").links
    assert dead_ends(tmp_path / "site") == []
    shutil.move(tmp_path / "site" / "files" / "code" / "a.py.html", tmp_path / "gone")
    assert len(dead_ends(tmp_path / "site")) == 2, "the check itself finds a missing page"


@pytest.mark.parametrize(
    ("link", "message"),
    [
        ("gide.md", "docs/guide.md: gide.md: no such file"),
        ("#rnu", "docs/guide.md: docs/guide.md#rnu: no such heading"),
        ("../README.md#start", "docs/guide.md: README.md#start: no such heading"),
        ("../../elsewhere", "docs/guide.md: ../../elsewhere: no such file"),
    ],
)
def test_a_link_that_leads_nowhere_stops_the_build(repository, tmp_path, link, message):
    (repository / "docs" / "guide.md").write_text(f"# Guide\n\n## Run\n\n[here]({link})\n")
    (repository.parent / "elsewhere").touch()
    with pytest.raises(builder.BrokenLinkError) as refused:
        builder.build(tmp_path / "site", repository)
    assert str(refused.value) == message
    assert not (tmp_path / "site").exists()
