"""The phantom's stored numbers, held against what they were made from."""

import inspect
import json

import numpy as np
import pytest

from llava_ta import phantom, realism
from llava_ta.phantom import KINDS, Finding, draw, findings_from_mesh, fit_lung_shapes
from llava_ta.sources import openi_reports
from repository import LIB


def test_lung_shapes_are_those_of_the_masks():
    stored = json.loads((LIB / "weights" / "lung_shapes.json").read_text(encoding="utf-8"))
    fitted = fit_lung_shapes()
    assert stored["masks"] == fitted["masks"] > 200 and len(stored["modes"]) == 10
    assert np.allclose(stored["mean"], fitted["mean"], atol=2e-3)
    assert np.allclose(stored["modes"], fitted["modes"], atol=5e-3)


def test_codes_of_real_reports_are_drawn():
    missed = [findings_from_mesh(codes)[1] for codes in openi_reports()["mesh"]]
    every = [code.strip().lower() for codes in openi_reports()["mesh"] for code in codes]
    asked = sum(code not in ("normal", "no indexing") for code in every)
    assert asked == 6812 and 1 - sum(map(len, missed)) / asked > 0.895
    assert sum(not codes for codes in missed) / len(missed) > 0.855


def test_what_a_finding_changes_stands_in_tables(monkeypatch: pytest.MonkeyPatch):
    """The drawing code names no finding: a kind that is moved to the table of exposures is drawn as one."""
    code = "".join(map(inspect.getsource, (phantom._deform, phantom._changes_shape, draw)))
    assert [kind for kind in KINDS if f'"{kind}"' in code] == []
    assert not draw([Finding("osteopenia")], 5, 64).finding_masks.all()
    monkeypatch.setitem(phantom._EXPOSURES, "osteopenia", {"dose": ("*", 0.25, 0)})
    monkeypatch.delitem(phantom._SHAPES, "osteopenia")
    drawn, normal = draw([Finding("osteopenia")], 5, 64), draw([], 5, 64)
    assert drawn.finding_masks.all() and np.array_equal(drawn.regions, normal.regions)
    assert not np.array_equal(drawn.film, normal.film)


def test_only_films_travel_between_processes(monkeypatch: pytest.MonkeyPatch):
    """Masks of phantoms are not sent along with the films that are asked for."""
    sent = []

    def each(function: object, jobs: list[tuple], desc: str) -> list:
        sent.extend(function(*job) for job in jobs)
        return sent

    monkeypatch.setattr(realism, "each", each)
    films = realism.draw_films([[], [Finding("cardiomegaly")]], 1, size=64)
    assert films.shape == (2, 64, 64) and np.array_equal(films[0], draw([], 1_000_000, 64).film)
    assert [type(one) for one in sent] == [np.ndarray] * 2
