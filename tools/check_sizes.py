"""Refuse files that are too large for the repository: notebooks over 500 kB, weights over 4 MB, others over 1 MB."""

import sys
from pathlib import Path

NOTEBOOK_LIMIT = 500_000  # bytes: a stored figure that needs more shows too much data
WEIGHTS_LIMIT = 4_000_000  # bytes: the offline segmenter's, which come with the package
FILE_LIMIT = 1_000_000  # bytes


def too_large(
    paths: list[Path],  # files; what does not exist is passed over
) -> list[str]:  # one line for each offender
    """List the files that exceed their limit."""
    found = []
    for path in paths:
        limit = {".ipynb": NOTEBOOK_LIMIT, ".safetensors": WEIGHTS_LIMIT}.get(path.suffix, FILE_LIMIT)
        if path.is_file() and path.stat().st_size > limit:
            found.append(f"{path}: {path.stat().st_size / 1000:.0f} kB, allowed are {limit / 1000:.0f} kB")
    return found


if __name__ == "__main__":
    offenders = too_large([Path(name) for name in sys.argv[1:]])
    print("\n".join(offenders))
    sys.exit(1 if offenders else 0)
