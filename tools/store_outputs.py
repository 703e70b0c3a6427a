"""Run the notebooks above '## Run' and store what they show, for readers of the site and of GitHub.

`.venv/bin/python tools/store_outputs.py` runs all, `... 04_mapping guides/tutorial` some. Cells with `#| eval: false`
are left as they are, so that everything stored comes from phantoms.
"""

import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from execnb.nbio import read_nb, write_nb
from execnb.shell import CaptureShell

from clean_notebooks import NBS, NOTEBOOKS, clean, without_copies


def is_left_out(
    cell: dict,  # of a notebook
) -> bool:  # whether its outputs stay as they are
    """Recognise cells that are not code, and those that only papermill runs."""
    directives = [line.removeprefix("#|").strip() for line in cell["source"].splitlines() if line.startswith("#|")]
    return cell["cell_type"] != "code" or "eval: false" in directives


def store(
    path: Path,  # a notebook
) -> int:  # cells that show something
    """Run one notebook in this process and write its outputs into it; raises what a cell raised."""
    os.chdir(path.parent)
    os.environ["IN_TEST"] = "1"
    notebook = read_nb(path)
    shell = CaptureShell(path)
    shell.run_all(notebook, exc_stop=True, preproc=is_left_out)
    for cell in notebook.cells:
        if "outputs" in cell:
            cell["outputs"] = without_copies(cell["outputs"])
    write_nb(notebook, path)
    clean(path)
    return sum(bool(cell.get("outputs")) for cell in notebook.cells)


if __name__ == "__main__":
    every = [path.relative_to(NBS).with_suffix("").as_posix() for path in NOTEBOOKS if path.stem != "index"]
    wanted = sys.argv[1:] or every
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, max_tasks_per_child=1, mp_context=fresh) as pool:
        for name in wanted:
            print(f"{name}: {pool.submit(store, NBS / f'{name}.ipynb').result()} cells show something", flush=True)
