"""The site: it builds without warnings, its links lead somewhere, and no page needs a network."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from build_docs import LOADED, draw_formulas, serve_locally
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


def test_readme_is_current(tree: Path):
    assert (ROOT / "README.md").read_text() == (tree / "README.md").read_text(), "run make docs"


def test_readme_says_first_what_this_is():
    screen = "\n".join((ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:40])
    for needed in ("LLaVA-TA", "Not for clinical use", "make demo", "make test", "runs/demo/report.html"):
        assert needed in screen, needed
