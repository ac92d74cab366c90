"""What data sets made on the fly have in common: any sample, any time, in any process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

__all__ = ["EndlessScenes"]


class EndlessScenes:
    """Map-style data set whose sample ``i`` is a function of its settings and of ``i`` alone.

    Those that inherit give :meth:`arrays` and set ``length``: None is endless, a number makes
    ``len()`` and plain iteration finite.
    """

    length: int | None = None

    def arrays(self, index: int) -> Mapping[str, Any]:
        """The sample as it is stored; in shards image uint8, target and disparity uint16
        (C, H, W), df and K floats, ``aperture`` and ``provenance`` dicts that JSON can hold."""
        raise NotImplementedError

    def __len__(self) -> int:
        if self.length is None:
            name = type(self).__name__
            raise TypeError(f"{name} is endless; give it a length, or index it with scenes[i].")
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index < 0 or (self.length is not None and index >= self.length):
            raise IndexError(
                f"index is {index}; wanted at least 0"
                + ("." if self.length is None else f" and less than {self.length}.")
            )
        return self.as_tensors(self.arrays(int(index)))

    @staticmethod
    def as_tensors(arrays: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """The sample as it is trained on: float32, pictures and maps in [0, 1]."""
        return {
            "image": torch.from_numpy(arrays["image"].astype(np.float32) / 255),
            "disparity": torch.from_numpy(arrays["disparity"].astype(np.float32) / 65535),
            "df": torch.tensor(arrays["df"], dtype=torch.float32),
            "K": torch.tensor(arrays["K"], dtype=torch.float32),
            "target": torch.from_numpy(arrays["target"].astype(np.float32) / 65535),
        }
