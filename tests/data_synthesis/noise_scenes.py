"""Scenes of noise, made at once, and a program that writes them: for tests of shards."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

SIZE = 16


class NoiseScenes:
    """Sample i is noise drawn from (seed, i), with JSON of changing fields.

    ``made``: the samples made so far. Making sample ``fails_at`` fails.
    """

    def __init__(self, seed: int = 0, fails_at: int | None = None) -> None:
        self.seed, self.fails_at = seed, fails_at
        self.made: list[int] = []

    @property
    def settings(self) -> dict[str, Any]:
        return {"generator": "noise", "seed": self.seed, "size": SIZE}

    def arrays(self, index: int) -> dict[str, Any]:
        if index == self.fails_at:
            raise RuntimeError(f"Sample {index} fails.")
        self.made.append(index)
        rng = np.random.default_rng([self.seed, index])
        return {
            "image": rng.integers(0, 256, (3, SIZE, SIZE), np.uint8),
            "target": rng.integers(0, 65536, (3, SIZE, SIZE), np.uint16),
            "disparity": rng.integers(0, 65536, (1, SIZE, SIZE), np.uint16),
            "df": rng.uniform(),
            "K": rng.uniform(0, 30),
            "aperture": {} if index % 2 else {"blades": 5, "rotation": rng.uniform()},
            "provenance": {"mistakes": [["eroded", index]]} if index > 5 else {"made": "noise"},
        }


def main(folder: str, count: str, num_shards: str) -> None:
    from data_synthesis.writer import write_shards

    # Whoever waits for this line knows that writing begins now.
    print("writing", flush=True)
    write_shards(NoiseScenes(), folder, count=int(count), num_shards=int(num_shards))


if __name__ == "__main__":
    main(*sys.argv[1:])
