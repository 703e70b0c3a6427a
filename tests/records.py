"""What every record of the study has to satisfy, a committed one and one that a test has made."""

import numpy as np
import pandas as pd

NAMES = {"study", "patient", "topic", "system", "mode", "film", "evaluation", "template"}


def assert_no_text(
    numbers: pd.DataFrame,  # from `read_records`
) -> None:
    """Fail if a record holds anything but names and numbers."""
    for column in set(numbers) - NAMES:
        values = numbers[column].dropna()
        assert all(isinstance(value, (int, float, np.number, np.ndarray)) for value in values), column
    for column in ("study", "patient"):
        assert numbers[column].astype(str).str.fullmatch(r"[\w.-]+").all(), column
