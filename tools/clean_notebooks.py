"""Clean the notebooks for a commit: drop what must not be stored with a figure, then `nbdev_clean`.

plotly stores a figure twice, as HTML and as JSON. The site shows the HTML. The JSON has to go: `nbdev_clean` takes
every key `source` for that of a cell, and so breaks the pictures in it.
"""

import json
from pathlib import Path

from nbdev.clean import nbdev_clean

NBS = Path(__file__).resolve().parent.parent / "nbs"
NOTEBOOKS = [*sorted(NBS.glob("*.ipynb")), *sorted(NBS.glob("guides/*.ipynb"))]
FIGURE = "application/vnd.plotly.v1+json"


def without_copies(
    outputs: list[dict],  # of one cell
) -> list[dict]:  # the same, without stderr and without figures as JSON
    """Leave out progress bars and warnings, and what is stored twice."""
    kept = []
    for out in outputs:
        if out.get("name") == "stderr":
            continue
        data = out.get("data", {})
        if FIGURE in data and "text/html" in data:
            out = {**out, "data": {kind: value for kind, value in data.items() if kind != FIGURE}}
        kept.append(out)
    return kept


def clean(
    path: Path,  # a notebook, which is rewritten if need be
) -> None:
    """Clean one notebook."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    changed = False
    for cell in notebook["cells"]:
        outputs = without_copies(cell.get("outputs", []))
        if outputs != cell.get("outputs", []):
            cell["outputs"], changed = outputs, True
    if changed:
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    nbdev_clean.__wrapped__(fname=str(path))


if __name__ == "__main__":
    for found in NOTEBOOKS:
        clean(found)
