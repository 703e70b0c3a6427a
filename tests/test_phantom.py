"""The phantom's stored numbers, held against what they were made from."""

import json

import numpy as np

from llava_ta.phantom import fit_lung_shapes
from repository import LIB


def test_lung_shapes_are_those_of_the_masks():
    stored = json.loads((LIB / "weights" / "lung_shapes.json").read_text(encoding="utf-8"))
    fitted = fit_lung_shapes()
    assert stored["masks"] == fitted["masks"] > 200 and len(stored["modes"]) == 10
    assert np.allclose(stored["mean"], fitted["mean"], atol=2e-3)
    assert np.allclose(stored["modes"], fitted["modes"], atol=5e-3)
