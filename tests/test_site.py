"""The built site, as a reader's browser sees it: complete, self-contained, accessible and light."""

import functools
import gzip
import http.server
import re
import shutil
import threading
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe
from bs4 import BeautifulSoup
from conftest import NOTEBOOKS, ROOT
from playwright.sync_api import sync_playwright

from companion import claims

SITE = ROOT / "_build" / "html"
PAGES = sorted(str(path.relative_to(SITE)) for path in SITE.rglob("*.html") if "_static" not in path.parts)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WEIGHT = 600_000  # bytes of one page over the wire, everything included, with an empty cache
# WCAG, and only what is wrong: listing what is right takes three times as long on pages full of figures.
AXE = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"], "resultTypes": ["violations"]}

pytestmark = pytest.mark.skipif(not PAGES, reason="the site is not built: run `make book` first")
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves the site compressed, as a web server does."""

    def do_GET(self):
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        body = gzip.compress(path.read_bytes())
        self.send_response(200)
        self.send_header("Content-Type", self.guess_type(str(path)))
        self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def address():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(SITE))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@in_browser
@pytest.mark.parametrize("name", PAGES)
def test_page_loads_alone_and_is_accessible(browser, address, name):
    context = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme="light")
    page = context.new_page()
    problems, weights = [], []
    page.on("pageerror", lambda error: problems.append(f"JavaScript: {error}"))
    page.on("console", lambda message: problems.append(f"console: {message.text}") if message.type == "error" else None)
    page.on("requestfailed", lambda request: problems.append(f"failed: {request.url}"))

    def on_response(response):
        if not response.url.startswith((address, "data:")):
            problems.append(f"request to another host: {response.url}")
        weights.append(int(response.headers.get("content-length", 0)))

    page.on("response", on_response)
    page.goto(address + name, wait_until="networkidle")
    page.wait_for_function("() => !window.MathJax?.startup || MathJax.startup.promise.then(() => true)")
    assert (
        page.evaluate("[...document.images].filter(i => i.loading !== 'lazy' && !i.naturalWidth).map(i => i.src)") == []
    )
    formulas = page.locator(".math").count()
    assert page.locator("mjx-container").count() >= formulas
    assert page.locator("mjx-merror, .math:has-text('\\\\\\\\(')").count() == 0
    assert sum(weights) < WEIGHT
    assert problems == []

    page.remove_listener("response", on_response)
    for scheme, width in (("light", 1280), ("dark", 360)):
        page.set_viewport_size({"width": width, "height": 800})
        page.emulate_media(color_scheme=scheme)
        page.wait_for_function("scheme => document.documentElement.dataset.theme === scheme", arg=scheme)
        page.wait_for_timeout(500)  # the theme waits for the end of a resize before it marks what scrolls
        found = [
            f"{scheme}: {violation['id']}: {node['html'][:300]} {node['failureSummary']}"
            for violation in Axe().run(page, options=AXE).response["violations"]
            for node in violation["nodes"]
        ]
        assert found == []

    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    begins = "[...document.querySelectorAll('mjx-container')].map(e => e.getBoundingClientRect().left)"
    assert min(page.evaluate(begins), default=0) >= 0, "the left end of a formula cannot be reached"
    context.close()


@functools.cache
def soup(path: Path) -> BeautifulSoup:
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


@pytest.mark.parametrize("name", PAGES)
def test_internal_links_and_images_exist(name):
    path = SITE / name
    broken = []
    for tag, attribute in (("a", "href"), ("link", "href"), ("img", "src"), ("script", "src")):
        for element in soup(path).find_all(tag, **{attribute: True}):
            url = urlsplit(element[attribute])
            if url.scheme or url.netloc:
                assert tag == "a", f"{element} comes from elsewhere"
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file() or (
                url.fragment and target.suffix == ".html" and not soup(target).find(id=unquote(url.fragment))
            ):
                broken.append(element[attribute])
    assert broken == []


@pytest.mark.parametrize("name", PAGES)
def test_every_picture_has_alternative_text(name):
    page = soup(SITE / name)
    assert not [image for image in page.find_all("img") if not image.has_attr("alt")]
    pictures = page.select("figure.lens svg:not([aria-hidden])")
    assert not [picture for picture in pictures if not picture.find_parent(role="img", attrs={"aria-label": True})]
    assert not [figure for figure in page.select("figure.lens") if not figure.figcaption.get_text(strip=True)]


@pytest.mark.parametrize("name", PAGES)
def test_figures_find_their_letters_and_share_no_identifier(name):
    identifiers = [tag["id"] for tag in soup(SITE / name).select("svg [id]")]
    assert len(identifiers) == len(set(identifiers))
    assert {tag["xlink:href"][1:] for tag in soup(SITE / name).find_all("use")} <= set(identifiers)


def test_every_tutorial_is_in_the_gallery_with_its_picture():
    cards = {item.a["href"]: item for item in soup(SITE / "index.html").select("ul.gallery li")}
    for path in NOTEBOOKS:
        card = cards[f"{path.parent.name}/{path.stem}.html"]
        assert (SITE / card.img["src"]).stat().st_size < 60_000


def test_scoreboard_shows_every_claim_with_its_verdict():
    rows = soup(SITE / "guide" / "claims.html").select("div.claims tbody tr:not(.tutorial)")
    shown = [(row.th.get_text(), row.select_one(".verdict").get_text()[2:]) for row in rows]
    reports = claims.read_reports(ROOT / "book")
    assert sorted(shown) == sorted((claim.id, claim.verdict) for report in reports for claim in report.claims)


@pytest.mark.parametrize("report", claims.read_reports(ROOT / "book"), ids=lambda report: report.tutorial)
def test_a_tutorials_page_shows_the_verdicts_that_are_committed(report):
    rows = soup(SITE / f"{report.tutorial}.html").select("div.claims tbody tr")
    shown = [(row.th.get_text(), row.select_one(".verdict").get_text()[2:]) for row in rows]
    assert shown == [(claim.id, claim.verdict) for claim in report.claims]


def test_links_of_launch_buttons_follow_the_home_address():
    home = re.search(r'^  url: "(.*)"$', (ROOT / "_config.yml").read_text(encoding="utf-8"), re.MULTILINE)[1]
    for name in PAGES:
        accounts = {
            link["href"]
            for link in soup(SITE / name).find_all("a", href=re.compile(r"mybinder\.org|colab\.research|github\.com"))
        }
        assert all(home and home.removeprefix("https://github.com/") in link for link in accounts), name
