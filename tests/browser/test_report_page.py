"""The report in a real browser: accessible, on any screen, on paper, and silent."""

from __future__ import annotations

from pathlib import Path

import axe_playwright_python
import pytest
from playwright.sync_api import Page

pytestmark = pytest.mark.browser
AXE = (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text()
WIDTHS, SCHEMES, RENDERINGS = (1280, 390), ("light", "dark"), ("internal", "release")
# What the Tab key must reach, in this order.
FOCUSABLE = "[...document.querySelectorAll('a[href], summary, [tabindex=\"0\"]')].filter(e => e.checkVisibility())"


def show(page: Page, path: Path, width: int = 1280, scheme: str = "light") -> Page:
    page.set_viewport_size({"width": width, "height": 900})
    page.emulate_media(color_scheme=scheme)
    page.goto(path.as_uri())
    return page


def findings(page: Page) -> list[str]:
    """Serious and critical findings of axe-core, each with its first element."""
    page.evaluate(AXE)
    result = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    return [
        f"{one['id']}: {one['nodes'][0]['html'][:200]}"
        for one in result["violations"]
        if one["impact"] in ("serious", "critical")
    ]


@pytest.mark.parametrize("rendering", RENDERINGS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_axe_finds_nothing_serious_and_the_page_fits(page, pages, tmp_path, rendering, width, scheme):
    show(page, pages[rendering], width, scheme)
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    page.screenshot(path=tmp_path / f"{rendering}-{width}-{scheme}.png", full_page=True)
    assert findings(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, ground[4:-1].split(","))) > 3 * 128) == (scheme == "light")


@pytest.mark.parametrize(
    ("spoil", "rule"),
    [
        ("document.documentElement.removeAttribute('lang')", "html-has-lang"),
        ("document.querySelector('svg').removeAttribute('aria-label')", "svg-img-alt"),
        ("document.body.style.color = '#aaa'; document.body.style.background = '#bbb'", "color-contrast"),
        ("document.querySelector('main a, nav a').textContent = ''", "link-name"),
    ],
)
def test_axe_finds_what_is_spoiled(page, pages, spoil, rule):
    show(page, pages["release"]).evaluate(spoil)
    assert any(found.startswith(f"{rule}:") for found in findings(page))


@pytest.mark.parametrize("rendering", RENDERINGS)
def test_nothing_is_requested_and_nothing_runs(page, pages, rendering):
    requests, messages = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: messages.append(message.text))
    show(page, pages[rendering]).wait_for_load_state("networkidle")
    assert [url for url in requests if not url.startswith("data:image/png")] == [pages[rendering].as_uri()]
    fetched = page.evaluate("performance.getEntriesByType('resource').map(one => one.name)")
    assert all(url.startswith("data:image/png") for url in fetched)
    assert messages == []
    assert page.evaluate("document.scripts.length") == 0
    pictures = "[...document.images].every(one => one.complete && one.naturalWidth > 0) && document.images.length > 20"
    assert page.evaluate(pictures)


def test_even_a_planted_picture_from_elsewhere_is_not_fetched(page, pages, tmp_path):
    planted = tmp_path / "planted.html"
    planted.write_text(pages["release"].read_text().replace("<main", '<img src="http://127.0.0.1:9/x.png"><main', 1))
    failed = []
    page.on("requestfailed", lambda request: failed.append((request.url, request.failure)))
    show(page, planted).wait_for_load_state("networkidle")
    assert failed == [("http://127.0.0.1:9/x.png", "csp")]


@pytest.mark.parametrize("rendering", RENDERINGS)
def test_the_tab_key_reaches_every_link_in_order_and_shows_where_it_is(page, pages, rendering):
    show(page, pages[rendering], width=390)
    expected = page.evaluate(f"{FOCUSABLE}.map(e => e.outerHTML.slice(0, 80))")
    reached = []
    for _ in expected:
        page.keyboard.press("Tab")
        html, outline, top = page.evaluate(
            "(e => [e.outerHTML.slice(0, 80), getComputedStyle(e).outlineStyle, e.getBoundingClientRect().top])"
            "(document.activeElement)"
        )
        assert outline != "none", html
        assert 0 <= top < 900, html
        reached.append(html)
    assert reached == expected
    assert len([html for html in reached if html.startswith("<a ")]) > 8


def test_links_lead_to_headings_on_the_page(page, pages):
    show(page, pages["internal"])
    targets = page.evaluate("[...document.querySelectorAll('nav a')].map(a => a.getAttribute('href'))")
    for target in targets:
        page.click(f"nav a[href='{target}']")
        assert page.evaluate(f"document.querySelector('{target}').matches('h2')")
        assert -1 <= page.evaluate(f"document.querySelector('{target}').getBoundingClientRect().top") < 900


def test_the_words_of_a_chart_can_be_read_on_a_phone(page, pages):
    show(page, pages["internal"], width=390)
    scale = "Math.hypot(t.getScreenCTM().c, t.getScreenCTM().d)"
    size = f"t => parseFloat(getComputedStyle(t).fontSize) * {scale}"
    sizes = page.evaluate(f"[...document.querySelectorAll('svg text')].map({size})")
    assert len(sizes) > 50
    assert min(sizes) > 9


def test_on_paper_there_is_no_navigation_and_the_table_is_unfolded(page, pages, tmp_path):
    show(page, pages["internal"], scheme="dark").emulate_media(media="print", color_scheme="dark")
    assert not page.locator("nav").is_visible()
    assert page.locator("details:not(.long) table").is_visible()
    page.pdf(path=tmp_path / "report.pdf", format="A4")
    assert (tmp_path / "report.pdf").read_bytes().count(b"/Type /Page\n") <= 8


def test_the_release_rendering_says_less(page, pages):
    words = {name: show(page, path).inner_text("body") for name, path in pages.items()}
    for sensitive in ("87.6 ± 1.2 %", "DP-SGD loss on the private images", "sensitive"):
        assert sensitive in words["internal"]
        assert sensitive not in words["release"]
    assert "The guarantee" in words["release"]
