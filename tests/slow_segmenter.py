"""A segmenter that takes its time, and a program that writes masks with it: what is killed in the middle."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llava_ta.masks import RegionMasks
from llava_ta.phantom import draw
from llava_ta.segment import write_shard

FILMS = 120  # that the program segments


class Slow:
    """A segmenter that takes its time and notes what it was asked."""

    convention = "phantom"

    def __init__(self, log: Path, masks: np.ndarray, seconds: float):
        self.log, self.masks, self.seconds = log, masks, seconds

    def segment(self, films: Sequence[np.ndarray], rows: Sequence[int] | None = None) -> list[RegionMasks]:
        """Shift the same masks by the number of the film."""
        time.sleep(self.seconds)
        with open(self.log, "a") as log:
            log.write("".join(f"{row}\n" for row in rows))
        return [RegionMasks(np.roll(self.masks, row, axis=2), ("ok",) * 7, "phantom", "ok", float(row)) for row in rows]


def write(
    folder: Path,  # of the store, and of the log
    rank: int,  # of this process
    ranks: int,  # processes that share the films
    seconds: float,  # for each batch
) -> None:
    """Segment this process's part of the films."""
    segmenter = Slow(folder / f"log{rank}", draw([], 3, size=96).regions, seconds)
    write_shard(folder, [np.zeros((96, 96), np.float32)] * FILMS, segmenter, 96, rank, ranks, batch=4)


if __name__ == "__main__":
    write(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), 0.02)
