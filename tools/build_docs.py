"""Build the documentation site in _docs/, and README.md, without Quarto and without a network.

Everything that a page shows is in the site: plotly.js is copied from the plotly package, formulas become MathML, which
browsers draw by themselves, and fonts are the reader's own.

The notebooks' stored outputs are shown as they are; nothing is run but imports and definitions, which the signature
tables need. The staged tree in _proc/ stays a normal Quarto project: `quarto render _proc` would read it as well.
"""

import gc
import html
import json
import os
import re
import shutil
import sys
from pathlib import Path

import latex2mathml.converter
import plotly
import yaml
from nbdev.config import get_config
from nbdev.doclinks import nbdev_export
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs
from smalldocs.site import build

from build_readme import write_readme

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "nbs" / "images"
PLOTLY_JS = "site_libs/plotly.min.js"  # inside the site
# nbdev's links inside a signature, where they are only text.
LINK_IN_CODE = re.compile(r"\[`([^`\]]+)`\]\(https?://[^)\s]*\)")
# How smalldocs writes TeX, and what it adds to a page that has some.
FORMULA = re.compile(r'<span class="math (inline|display)">\\[(\[](.*?)\\[)\]]</span>', re.DOTALL)
KATEX = re.compile(r'<(?:link|script)[^>]*cdn\.jsdelivr\.net/npm/katex[^>]*>(?:</script>)?')
# What plotly's renderer stores with a figure to fetch scripts from a network. Figures here hold no TeX.
PLOTLY_SCRIPT = re.compile(r'<script[^>]*\bsrc="https://cdn\.plot\.ly/plotly[^"]*"[^>]*></script>')
PLOTLY_MODULE = re.compile(r'<script type="module">\s*import\s+"https://cdn\.plot\.ly/plotly[^"]*"\s*;?\s*</script>')
MATHJAX_SCRIPT = re.compile(r'<script[^>]*\bsrc="https://cdnjs\.cloudflare\.com/ajax/libs/mathjax[^"]*"[^>]*></script>')
# Style sheets of themes import their fonts from a network; the names after them in the font stack are local.
FONT_IMPORT = re.compile(r'@import\s+url\(\s*["\']?https?://[^)]*\)\s*;')
# A picture of nbs/images, which may have a figure in its place.
PICTURE = re.compile(r'<img\b[^>]*\bsrc="(?:[^"]*/)?images/([\w-]+)\.png"[^>]*>')
# Where a page is opened as a file, the search asks for search.json in vain: search.js, beside it, is loaded instead.
SEARCH_AS_FILE = """
if (location.protocol === "file:") window.fetch = (function (fetch) {
  return function (url) {
    if (!/search\\.json$/.test(url)) return fetch.apply(window, arguments);
    return new Promise(function (found, failed) {
      var script = document.createElement("script");
      script.src = url.replace(/json$/, "js");
      script.onload = function () { found(new Response(JSON.stringify(window.searchIndex))); };
      script.onerror = failed;
      document.head.append(script);
    });
  };
})(window.fetch);
"""
# Whatever else a page would load: scripts, style sheets, pictures, frames. Plain links to other sites are none of it.
LOADED = re.compile(
    r'<(?:script|img|iframe|video|audio|source|embed)\b[^>]*\bsrc=["\'](?:https?:)?//[^"\']+'
    r'|<link\b(?=[^>]*\brel=["\'](?:stylesheet|preload|icon|modulepreload|preconnect))[^>]*\bhref=["\'](?:https?:)?//[^"\']+'
    r'|<script\b[^>]*>[^<]*\bimport\s*\(?\s*["\']https?://[^"\']+',
    re.IGNORECASE,
)


def name_pages(
    staged: Path,  # the folder that nbdev has staged
) -> None:
    """Rename each staged notebook to the page that nbdev's links point at, e.g. `06_train` to `train`."""
    for path in sorted(staged.rglob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        head = notebook["cells"][0]
        source = "".join(head["source"])
        found = re.search(r"^output-file: (\S+)\.html\n", source, re.MULTILINE)
        if not found:
            continue
        head["source"] = source.replace(found.group(0), "")
        target = path.with_name(f"{found.group(1)}.ipynb")
        if target != path and target.exists():
            raise SystemExit(f"build_docs: {path.name} would overwrite {target.name}; two notebooks share a stem")
        path.unlink()
        target.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def check_sidebar(
    staged: Path,  # the folder with renamed pages
) -> list[str]:  # what is wrong with the sidebar
    """Compare the sidebar of _quarto.yml with the pages that exist."""
    config = yaml.safe_load((staged / "_quarto.yml").read_text(encoding="utf-8"))
    listed: list[str] = []
    for item in config["website"]["sidebar"]["contents"]:
        listed += item["contents"] if isinstance(item, dict) else [item]
    pages = {path.relative_to(staged).as_posix() for path in staged.rglob("*.ipynb")}
    return [f"sidebar: no page {name}" for name in listed if name not in pages] + [
        f"sidebar: {name} is not listed in nbs/_quarto.yml" for name in sorted(pages - set(listed))
    ]


def draw_formulas(
    page: str,  # HTML
) -> str:  # HTML without TeX
    """Turn TeX into MathML, and drop the scripts that would have been fetched for it."""

    def mathml(found: re.Match) -> str:
        tex = html.unescape(found.group(2)).strip()
        display = "block" if found.group(1) == "display" else "inline"
        drawn = latex2mathml.converter.convert(tex, display=display)
        return f'<span class="formula">{drawn}</span>' if display == "block" else drawn

    return KATEX.sub("", FORMULA.sub(mathml, page))


def plain_signature(
    found: re.Match,  # a block of code
) -> str:  # the same, to be read
    """Take out what nbdev leaves in signatures: links as Markdown, and the module that it ran the cell in."""
    return LINK_IN_CODE.sub(r"\1", found.group(0)).replace("__main__.", "")


def with_figures(
    page: str,  # HTML
    images: Path,  # folder of pictures, some with a figure of the same name, e.g. idea.png and idea.html
) -> str:  # HTML in which a figure takes the place of its picture; the picture is left for readers without scripts
    """Show what answers to clicks where the source, which GitHub shows too, has a picture."""

    def figure(found: re.Match) -> str:
        fragment = images / f"{found.group(1)}.html"
        if not fragment.exists():
            return found.group(0)
        return f"{fragment.read_text(encoding='utf-8').strip()}<noscript>{found.group(0)}</noscript>"

    return PICTURE.sub(figure, page)


def write_search(
    site: Path,  # the rendered site, with search.json
) -> None:
    """Write the index of the search as a script too: a page that is opened as a file may not fetch JSON."""
    index = (site / "search.json").read_text(encoding="utf-8")
    (site / "search.js").write_text(f"window.searchIndex = {index};\n", encoding="utf-8")


def serve_locally(
    site: Path,  # the rendered site
    address: str,  # where it will be published: nbdev's links begin with that
) -> list[str]:  # what its pages would still load from a network
    """Point plotly and links between pages into the site itself, and drop fonts and scripts from elsewhere."""
    left = []
    for path in sorted(site.rglob("*.html")):
        page = path.read_text(encoding="utf-8")
        up = os.path.relpath(site, path.parent).replace(os.sep, "/")
        page = PLOTLY_MODULE.sub("", MATHJAX_SCRIPT.sub("", draw_formulas(page)))
        page = page.replace("</head>", f"<script>{SEARCH_AS_FILE}</script>\n</head>", 1)
        page, figures = PLOTLY_SCRIPT.subn("", page)
        if figures or "Plotly.newPlot(" in page:
            page = page.replace("</head>", f'<script src="{up}/{PLOTLY_JS}"></script>\n</head>', 1)
        page = page.replace(f'href="{address}/', f'href="{up}/')
        page = re.sub(r"<pre\b.*?</pre>", plain_signature, page, flags=re.DOTALL)
        path.write_text(page, encoding="utf-8")
        left += [f"{path.relative_to(site)} loads {' '.join(found.split())[:160]}" for found in LOADED.findall(page)]
    for sheet in sorted(site.rglob("*.css")):
        css = FONT_IMPORT.sub("", sheet.read_text(encoding="utf-8"))
        sheet.write_text(css, encoding="utf-8")
        left += [f"{sheet.relative_to(site)}: {url}" for url in re.findall(r"url\(\s*[\"']?(?:https?:)?//[^)]+", css)]
    (site / PLOTLY_JS).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(Path(plotly.__file__).parent / "package_data" / "plotly.min.js", site / PLOTLY_JS)
    return left


def build_docs() -> list[str]:  # warnings; an empty list if all is well
    """Export, stage, render, move to _docs/, and write README.md."""
    os.chdir(ROOT)
    nbdev_export.__wrapped__()
    refresh_quarto_yml()
    staged = Path(proc_nbs(n_workers=0, force=True))
    name_pages(staged)
    warnings = check_sidebar(staged)
    write_readme(staged / "index.ipynb", ROOT / "README.md")
    warnings += [str(warning) for warning in build(staged, quiet=True).warnings]
    settings = get_config()
    pictures, pages = staged / "_docs" / "images", shutil.ignore_patterns("*.html")
    shutil.copytree(IMAGES, pictures, ignore=pages, dirs_exist_ok=True)  # some are there because a page shows them
    for path in (staged / "_docs").rglob("*.html"):
        path.write_text(with_figures(path.read_text(encoding="utf-8"), IMAGES), encoding="utf-8")
    write_search(staged / "_docs")
    warnings += serve_locally(staged / "_docs", settings.doc_host + settings.doc_baseurl)
    site = ROOT / "_docs"
    shutil.rmtree(site, ignore_errors=True)
    shutil.move(staged / "_docs", site)
    return warnings


if __name__ == "__main__":
    found = build_docs()
    for line in found:
        print(f"warning: {line}", file=sys.stderr)
    pages = len(list((ROOT / "_docs").rglob("*.html")))
    gc.freeze()  # at the end, each notebook's shell looks for garbage among all objects, half a second a notebook
    print(f"_docs: {pages} pages, {len(found)} warnings; README.md written")
    sys.exit(1 if found else 0)
