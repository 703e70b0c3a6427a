"""The site: it builds without warnings, its links lead somewhere, no page needs a network, and all fit a phone."""

import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from build_docs import LOADED, draw_formulas, serve_locally, with_figures
from repository import NBS, ROOT, copy_tree, run_python


class Page(HTMLParser):
    """What a page refers to, and what can be referred to on it."""

    def __init__(self, text: str):
        super().__init__()
        self.names: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.names |= {found[key] for key in ("id", "name") if found.get(key)}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        if tag in ("script", "img", "iframe", "source") and found.get("src"):
            self.loads.append(found["src"])
        if tag == "link" and found.get("href") and found.get("rel") != "canonical":
            self.loads.append(found["href"])


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository whose site has been built."""
    copied = copy_tree(tmp_path_factory.mktemp("docs") / "tree")
    done = run_python("tools/build_docs.py", cwd=copied, PYTHONPATH=str(copied))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning" not in done.stderr.lower(), done.stderr
    assert ", 0 warnings" in done.stdout
    return copied


@pytest.fixture(scope="module")
def pages(tree: Path) -> dict[str, Page]:
    """The parsed pages of the site."""
    site = tree / "_docs"
    found = sorted(site.rglob("*.html"))
    return {str(path.relative_to(site)): Page(path.read_text(encoding="utf-8")) for path in found}


def test_every_notebook_has_a_page(pages: dict[str, Page]):
    expected = {re.sub(r"^\d\d[a-z]?_", "", path.stem) + ".html" for path in NBS.glob("*.ipynb")}
    expected |= {f"guides/{path.stem}.html" for path in NBS.glob("guides/*.ipynb")}
    assert expected <= set(pages)


def test_links_lead_somewhere(tree: Path, pages: dict[str, Page]):
    broken = []
    for name, page in pages.items():
        for link in page.links:
            target, _, anchor = link.partition("#")
            if re.match(r"[a-z]+:", target) or target.startswith("//"):
                continue
            place = (tree / "_docs" / name).parent / target if target else tree / "_docs" / name
            place = place / "index.html" if place.is_dir() else place
            found = place.resolve()
            key = str(found.relative_to((tree / "_docs").resolve())) if found.exists() else ""
            if not key or (anchor and key in pages and anchor not in pages[key].names):
                broken.append(f"{name}: {link}")
    assert not broken, "\n".join(broken)


def test_links_to_other_sites_are_well_formed(pages: dict[str, Page]):
    wrong = []
    for name, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if not parts.scheme and not parts.netloc:
                continue
            place = parts.scheme == "https" and re.fullmatch(r"[\w-]+(\.[\w-]+)+", parts.netloc)
            if parts.scheme != "mailto" and (not place or re.search(r"[\s<>\"`]", link)):
                wrong.append(f"{name}: {link}")
    assert not wrong, "\n".join(wrong)


def test_no_page_needs_a_network(tree: Path, pages: dict[str, Page]):
    outside = [f"{name}: {u}" for name, page in pages.items() for u in page.loads if re.match(r"(https?:)?//", u)]
    assert not outside, "\n".join(outside)
    missing = [
        f"{name}: {url}" for name, page in pages.items() for url in page.loads
        if not url.startswith("data:") and not ((tree / "_docs" / name).parent / url.split("?")[0]).exists()
    ]
    assert not missing, "\n".join(missing)


def test_figures_find_plotly(tree: Path, pages: dict[str, Page]):
    drawn = [name for name in pages if "Plotly.newPlot(" in (tree / "_docs" / name).read_text(encoding="utf-8")]
    assert drawn, "no page shows a figure"
    for name in drawn:
        assert any(url.endswith("site_libs/plotly.min.js") for url in pages[name].loads), name
    assert (tree / "_docs" / "site_libs" / "plotly.min.js").stat().st_size > 1_000_000


def test_what_plotly_stores_is_served_locally(tmp_path: Path):
    """Scripts as the renderer writes them today, and one that it does not know how to replace."""
    import plotly.graph_objects as go
    import plotly.io as pio

    pio.renderers.default = "plotly_mimetype+notebook_connected"
    stored = pio.renderers._build_mime_bundle(go.Figure(go.Scatter(y=[1, 2])).to_dict())["text/html"]
    started = pio.renderers["notebook_connected"]
    assert started.connected and "https://cdn" in stored
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.html").write_text(f"<html><head></head><body>{stored}</body></html>", encoding="utf-8")
    assert serve_locally(tmp_path, "https://site.example") == []
    page = (tmp_path / "sub" / "a.html").read_text(encoding="utf-8")
    assert '<script src="../site_libs/plotly.min.js">' in page and not LOADED.search(page)
    (tmp_path / "b.html").write_text('<script src="https://elsewhere.example/x.js"></script>', encoding="utf-8")
    assert len(serve_locally(tmp_path, "https://site.example")) == 1


def test_formulas_become_mathml():
    page = draw_formulas(r'<p><span class="math inline">\(a &lt; \sqrt{b}\)</span></p>')
    assert page.startswith("<p><math") and "<msqrt>" in page and "\\" not in page
    assert draw_formulas(r'<span class="math display">\[a\]</span>').startswith('<span class="formula"><math')


def test_a_figure_takes_the_place_of_its_picture(tmp_path: Path):
    (tmp_path / "idea.html").write_text("<div>figure</div>\n", encoding="utf-8")
    picture = '<img src="../images/idea.png" width="100%">'
    assert with_figures(f"<p>{picture}</p>", tmp_path) == f"<p><div>figure</div><noscript>{picture}</noscript></p>"
    other = '<img src="images/other.png">'
    assert with_figures(other, tmp_path) == other  # no figure of that name


def test_readme_is_current(tree: Path):
    assert (ROOT / "README.md").read_text() == (tree / "README.md").read_text(), "run make docs"


def test_readme_says_first_what_this_is():
    screen = "\n".join((ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:40])
    assert re.search(r'src="(nbs/images/\w+\.png)"', screen), "no picture"
    for needed in ("LLaVA-TA", "Not for clinical use", "make demo", "make test", "runs/demo/report.html"):
        assert needed in screen, needed


# ---- in a browser

OVERFLOW = """
var width = document.documentElement.clientWidth, found = [];
document.querySelectorAll("main *, header *").forEach(function (part) {
  var box = part.getBoundingClientRect(), parent = part.parentElement;
  if (!box.width || !box.height || box.right <= width + 1) return;
  for (; parent && parent !== document.body; parent = parent.parentElement) {
    var scrolls = /auto|scroll/.test(getComputedStyle(parent).overflowX);
    if (scrolls && parent.getBoundingClientRect().right <= width + 1) return;
  }
  found.push(part.tagName + " " + part.textContent.trim().slice(0, 40));
});
return document.documentElement.scrollWidth > width ? ["the page itself"].concat(found) : found;
"""


def browser(width: int) -> Chrome:
    """A headless Chromium; 390 pixels make it a phone."""
    options = ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={width},1000"):
        options.add_argument(argument)
    if width < 500:
        metrics = {"width": width, "height": 844, "pixelRatio": 2.0}
        options.add_experimental_option("mobileEmulation", {"deviceMetrics": metrics})
    return Chrome(options=options, service=Service(shutil.which("chromedriver")))


needs_browser = pytest.mark.skipif(not shutil.which("chromedriver"), reason="no chromedriver: NOT tested in a browser")


@pytest.fixture(scope="module", params=[390, 1280])
def window(request: pytest.FixtureRequest) -> Iterator[Chrome]:
    """A phone, and a desktop."""
    driver = browser(request.param)
    yield driver
    driver.quit()


@pytest.mark.slow
@needs_browser
def test_pages_fit(tree: Path, pages: dict[str, Page], window: Chrome):
    """Nothing reaches beyond the right edge, unless the reader can scroll to it within its box."""
    wide = {}
    for name in pages:
        window.get((tree / "_docs" / name).as_uri())
        if found := window.execute_script(OVERFLOW):
            wide[name] = found[:3]
    assert not wide, "\n".join(f"{name}: {found}" for name, found in wide.items())


@needs_browser
def test_topics_answer_to_clicks_and_keys(tree: Path, window: Chrome):
    window.get((tree / "_docs/index.html").as_uri())
    buttons = window.find_elements(By.CSS_SELECTOR, ".idea button")
    assert len(buttons) >= 4

    def shown() -> list[str]:
        parts = window.find_elements(By.CSS_SELECTOR, ".idea [data-topic]")
        return [part.get_attribute("data-topic") for part in parts if part.get_attribute("hidden") is None]

    assert shown() == ["0"] * 3  # outlines, masked film, words
    window.execute_script("arguments[0].scrollIntoView({block: 'center'})", buttons[1])
    buttons[1].click()
    assert shown() == ["1"] * 3 and buttons[1].get_attribute("aria-pressed") == "true"
    buttons[1].send_keys(Keys.TAB)
    window.switch_to.active_element.send_keys(Keys.ENTER)
    assert shown() == ["2"] * 3 and buttons[1].get_attribute("aria-pressed") == "false"
    assert window.find_element(By.CSS_SELECTOR, ".idea dl:not([hidden])").text.count("\n") >= 3


@needs_browser
def test_search_finds_without_a_server(tree: Path, window: Chrome):
    """A page that is opened as a file, in a folder of its own; the result leads to the passage."""
    window.get((tree / "_docs/guides/tutorial.html").as_uri())
    box = WebDriverWait(window, 30).until(lambda _: window.find_element(By.CSS_SELECTOR, ".smalldocs-search input"))
    if not box.is_displayed():
        window.find_element(By.CSS_SELECTOR, ".navbar-toggler").click()
        WebDriverWait(window, 30).until(lambda _: box.is_displayed())
    box.send_keys("narrative bias")
    found = WebDriverWait(window, 30).until(lambda _: window.find_elements(By.CSS_SELECTOR, "a.search-result"))
    names = [one.get_attribute("href") for one in found]
    assert any("narrative_bias.html" in name for name in names), names
    window.get(names[0])
    assert window.title


def test_search_covers_every_page(tree: Path, pages: dict[str, Page]):
    entries = json.loads((tree / "_docs/search.json").read_text(encoding="utf-8"))
    places = {entry["href"].partition("#")[::2] for entry in entries}
    assert not [place for place in places if place[1] and place[1] not in pages[place[0]].names]
    assert {page for page, _ in places} == set(pages)
