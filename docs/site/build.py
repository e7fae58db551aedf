"""The documents as a static site: README, docs/*.md and the notebooks as pages that load nothing from elsewhere.

python docs/site/build.py [FOLDER]

Pages read as on GitHub (CommonMark with tables, the same anchors), and files that they link to become pages, too. A
link that leads nowhere is an error: exit code 2.
"""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from jinja2 import Environment, FileSystemLoader
from markdown_it import MarkdownIt
from markdown_it.token import Token

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FIRST = ("README.md", "docs/guide.md", "docs/guarantee.md", "docs/search.md", "docs/cluster.md", "docs/scale.md")
LAST = ("docs/LOG.md",)
PICTURES = (".png", ".svg")


class BrokenLinkError(ValueError):
    """A link to a file or an anchor that is not there."""


@dataclass
class Page:
    """One page; `source` and `target` are relative to the repository and to the site."""

    source: str
    target: str
    title: str = ""
    body: str = ""
    contents: list[tuple[str, str]] = field(default_factory=list)  # of its parts: anchor, title
    anchors: set[str] = field(default_factory=set)

    @property
    def name(self) -> str:
        """For the navigation."""
        return "e2h" if self.source == "README.md" else PurePosixPath(self.source).stem.replace("_", " ").capitalize()


def documents(root: Path) -> list[str]:
    """The pages of the site in the order of its navigation."""
    found = [path.relative_to(root).as_posix() for path in sorted(root.glob("docs/*.md"))]
    others = [name for name in found if name not in (*FIRST, *LAST)]
    books = [path.relative_to(root).as_posix() for path in sorted(root.glob("notebooks/*.ipynb"), reverse=True)]
    return [*FIRST, *others, *sorted(books, key=lambda name: "quickstart" not in name), *LAST]


class Site:
    """Renders pages, and notes what they link to."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.pages = {name: Page(name, _page_name(name)) for name in documents(root)}
        self.linked: list[str] = []  # other files of the repository, each of which becomes a page or is copied
        self.wanted: list[tuple[str, str, str]] = []  # (from, to, anchor)
        self.markdown = MarkdownIt("commonmark").enable("table")
        self.markdown.add_render_rule("table_open", _open_table)
        self.markdown.add_render_rule("table_close", lambda *_: "</table></div>\n")
        self.markdown.add_render_rule("fence", _code)
        self.markdown.add_render_rule("code_block", _code)

    def render(self, page: Page) -> None:
        """Fills in a document's page."""
        tokens = self.markdown.parse(_text(self.root / page.source))
        for place, token in enumerate(tokens):
            if token.type == "heading_open":
                self._name(page, token, tokens[place + 1])
            for child in token.children or []:
                for attribute in ("href", "src"):
                    if attribute in child.attrs:
                        child.attrSet(attribute, self._link(page, str(child.attrs[attribute])))
        made = self.markdown.renderer.render(tokens, self.markdown.options, {})
        page.body = made.replace("<th></th>", "<td></td>")  # an empty cell is nothing's header

    def _name(self, page: Page, heading: Token, inline: Token) -> None:
        """An anchor as GitHub makes it."""
        title = "".join(one.content for one in inline.children or [] if one.type in ("text", "code_inline"))
        anchor = base = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        count = 0
        while anchor in page.anchors:
            count += 1
            anchor = f"{base}-{count}"
        page.anchors.add(anchor)
        heading.attrSet("id", anchor)
        if heading.tag == "h1" and not page.title:
            page.title = title
        elif heading.tag == "h2":
            page.contents.append((anchor, title))

    def _link(self, page: Page, link: str) -> str:
        """Where a link of a document leads on the site."""
        if re.match(r"https?://", link):
            return link
        path, _, anchor = link.partition("#")
        source = os.path.normpath(PurePosixPath(page.source).parent / path) if path else page.source
        if not (self.root / source).exists() or source.startswith(".."):
            raise BrokenLinkError(f"{page.source}: {link}: no such file")
        self.wanted.append((page.source, source, anchor))
        if source not in self.pages and source not in self.linked:
            self.linked.append(source)
        target = self.pages[source].target if source in self.pages else _target(self.root, source)
        return _relative(page.target, target) + (f"#{anchor}" if anchor else "")

    def check_anchors(self) -> None:
        """Raises `BrokenLinkError` where a link names a heading that is not there."""
        for source, target, anchor in self.wanted:
            if anchor and (target not in self.pages or anchor not in self.pages[target].anchors):
                raise BrokenLinkError(f"{source}: {target}#{anchor}: no such heading")

    def file_page(self, source: str) -> Page:
        """A page that shows a file, or lists a folder, whose files become pages in turn."""
        path, page = self.root / source, Page(source, _target(self.root, source), source)
        if path.is_dir():
            names = sorted(one.relative_to(self.root).as_posix() for one in path.iterdir() if one.is_file())
            self.linked += [name for name in names if name not in self.linked]
            rows = [
                f'<li><a href="{_relative(page.target, _target(self.root, name))}">{name}</a></li>' for name in names
            ]
            page.body = f"<h1>{source}/</h1>\n<ul>\n" + "\n".join(rows) + "\n</ul>\n"
        else:
            page.body = f"<h1>{source}</h1>\n{_block(path.read_text())}"
        return page


def build(target: Path, root: Path = ROOT) -> list[Path]:
    """Builds the site; returns its files.

    Raises:
      BrokenLinkError: naming the document and the link.
    """
    site, template = (
        Site(root),
        Environment(loader=FileSystemLoader(HERE), autoescape=True).get_template("page.html.j2"),
    )
    for page in site.pages.values():
        site.render(page)
    site.check_anchors()
    shutil.rmtree(target, ignore_errors=True)
    made, style = [], (HERE / "site.css").read_text()
    pages = list(site.pages.values())
    for source in site.linked:  # grows while folders are listed
        if source.endswith(PICTURES):
            made.append(_copy(root / source, target / _target(root, source)))
        else:
            pages.append(site.file_page(source))
    for page in pages:
        menu = [(_relative(page.target, one.target), one.name, one is page) for one in site.pages.values()]
        path = target / page.target
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(template.render(page=page, menu=menu, style=style))
        made.append(path)
    return made


def _page_name(source: str) -> str:
    return "index.html" if source == "README.md" else f"{PurePosixPath(source).stem}.html"


def _target(root: Path, source: str) -> str:
    """Where a linked file goes: pictures as they are, all others as pages."""
    if source.endswith(PICTURES):
        return f"files/{source}"
    return f"files/{source}/index.html" if (root / source).is_dir() else f"files/{source}.html"


def _relative(page: str, target: str) -> str:
    return os.path.relpath(target, PurePosixPath(page).parent)


def _text(path: Path) -> str:
    """A document as Markdown; a notebook is its cells, one after the other."""
    if path.suffix != ".ipynb":
        return path.read_text()
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(path.read_text())["cells"]]
    return "\n\n".join(text if kind == "markdown" else f"```python\n{text}\n```" for kind, text in cells)


def _open_table(*_: object) -> str:
    # Wider than a phone: the table scrolls, not the page; with the keyboard, too.
    return '<div class="scroll" tabindex="0" role="group" aria-label="Table"><table>\n'


def _code(renderer: object, tokens: list[Token], place: int, *_: object) -> str:
    return _block(tokens[place].content)


def _block(text: str) -> str:
    return f'<pre tabindex="0" role="group" aria-label="Code"><code>{html.escape(text)}</code></pre>\n'


def _copy(source: Path, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    return target


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "site"
    try:
        build(folder)
    except BrokenLinkError as error:
        print(f"docs: {error}", file=sys.stderr)
        sys.exit(2)
    print(folder / "index.html")
