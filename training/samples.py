"""Training samples as pure functions of (seed, sample number).

Nothing here remembers what was drawn before. A run that stops after any optimiser step and starts
again therefore sees exactly the samples the uninterrupted run would have seen.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

IMAGE_KEYS = ("image", "disparity", "target")


class Scenes(Protocol):
    """Scenes by index: image (3, H, W), disparity (1, H, W), df (), K (), target (3, H, W)."""

    def __getitem__(self, index: int) -> dict[str, Tensor]: ...


class AugmentedCrops(Dataset[dict[str, Tensor]]):
    """Random crops of scenes, mirrored and turned by quarter turns.

    A share `corruption` of them gets the mistakes of estimated disparity maps; see
    `with_mistakes`.

    Sample n takes scene n of an endless series when `scene_count` is None. Otherwise it takes a
    scene of pass ``n // scene_count``, and every pass goes through all scenes once in its own
    random order.
    """

    def __init__(
        self,
        scenes: Scenes,
        scene_count: int | None,
        crop_size: int,
        seed: int,
        *,
        corruption: float = 0.0,
    ) -> None:
        self.scenes = scenes
        self.scene_count = scene_count
        self.crop_size = crop_size
        self.seed = seed
        self.corruption = corruption
        self._order: tuple[int, Tensor] | None = None

    def __getitem__(self, sample_number: int) -> dict[str, Tensor]:
        """Return the sample: image and target (3, C, C), disparity (1, C, C), df (), K (), the
        true_disparity (1, C, C), which differs from the disparity in a corrupted sample alone, and
        number (), the sample's own."""
        sample = dict(self.scenes[self._scene_index(sample_number)])
        generator = seeded_generator(self.seed, 1, sample_number)
        height, width = sample["image"].shape[-2:]
        size = self.crop_size
        if size > min(height, width):
            raise ValueError(
                f"Crops of {size} pixels do not fit scenes of {height} x {width} pixels."
            )
        top = draw(height - size + 1, generator)
        left = draw(width - size + 1, generator)
        mirrored, quarter_turns = draw(2, generator), draw(4, generator)
        for key in IMAGE_KEYS:
            crop = sample[key][..., top : top + size, left : left + size]
            crop = crop.flip(-1) if mirrored else crop
            sample[key] = torch.rot90(crop, quarter_turns, (-2, -1)).contiguous()
        sample["true_disparity"] = sample["disparity"]
        if self.corruption:
            # Not the generator of the crops: they are the same whatever is corrupted.
            rng = numpy.random.default_rng((self.seed, 3, sample_number))
            if rng.uniform() < self.corruption:
                sample |= with_mistakes(sample, rng)
        return {**sample, "number": torch.tensor(sample_number)}

    def _scene_index(self, sample_number: int) -> int:
        if self.scene_count is None:
            return sample_number
        pass_number, position = divmod(sample_number, self.scene_count)
        if self._order is None or self._order[0] != pass_number:
            generator = seeded_generator(self.seed, 0, pass_number)
            self._order = (pass_number, torch.randperm(self.scene_count, generator=generator))
        return int(self._order[1][position])


class ConsecutiveBatches(Sampler[list[int]]):
    """Batches of sample numbers that follow each other, dealt to the processes in turn.

    Batch b of process p of P holds samples ``(b P + p) n .. (b P + p) n + n - 1`` for batch size n.
    """

    def __init__(
        self,
        first_batch: int,
        last_batch: int,
        batch_size: int,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        self.batches = range(first_batch, last_batch)
        self.batch_size = batch_size
        self.process = process
        self.processes = processes

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches:
            start = (batch * self.processes + self.process) * self.batch_size
            yield list(range(start, start + self.batch_size))

    def __len__(self) -> int:
        return len(self.batches)


def sample_loader(
    samples: Dataset[dict[str, Tensor]], batches: ConsecutiveBatches, workers: int, pin_memory: bool
) -> DataLoader[dict[str, Tensor]]:
    """Return a loader of `batches` that draws nothing from the global random generator."""
    return DataLoader(
        samples,
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_the_main_process,
        generator=torch.Generator().manual_seed(0),
    )


def seeded_generator(*numbers: int) -> torch.Generator:
    """Return a generator whose draws depend on `numbers` (integers >= 0) and on nothing else."""
    state = numpy.random.SeedSequence(numbers).generate_state(1, numpy.uint64)[0]
    return torch.Generator().manual_seed(int(state >> 1))


def with_mistakes(sample: dict[str, Tensor], rng: numpy.random.Generator) -> dict[str, Tensor]:
    """Return disparity (1, H, W) and df () of a sample as someone with an estimated map has them.

    Half of the maps have near things shrunk or grown by 1 to 8 px, a quarter typical mistakes of
    estimators (`data_synthesis.corruption`; in half of these, edges are washed out over 0.5 to 4 px
    besides), and a quarter both. df follows the map as it does there, and K stays.

    Args:
        sample: image (3, H, W), disparity (1, H, W), the true one, df () and K ().
        rng: where the mistakes are drawn from.
    """
    # Training on maps as they are needs nothing of what makes scenes.
    from data_synthesis.corruption import (
        IN_FOCUS_RADIUS_PX,
        CorruptionSettings,
        blurred,
        corrupt_disparity,
        eroded,
    )

    true, image = sample["disparity"][0].numpy(), sample["image"].permute(1, 2, 0).numpy()
    df, K = float(sample["df"]), float(sample["K"])
    kind = rng.uniform()
    changed = true
    if kind < 0.75:
        changed = eroded(changed, int(rng.integers(1, 9)) * (1 if rng.uniform() < 0.5 else -1))
    if kind > 0.5:
        if rng.uniform() < 0.5:
            changed = blurred(changed, rng.uniform(0.5, 4))
        # Another unit would be no mistake, and would need another K.
        settings = CorruptionSettings(rescaled=0)
        changed = corrupt_disparity(changed, df, K, image, rng, settings).disparity
    in_focus = K * numpy.abs(true - df) < IN_FOCUS_RADIUS_PX
    if in_focus.any():
        df += float(numpy.median((changed - true)[in_focus]))
    disparity = torch.from_numpy(numpy.ascontiguousarray(changed, numpy.float32))
    return {"disparity": disparity[None], "df": torch.tensor(df)}


def draw(limit: int, generator: torch.Generator) -> int:
    """A uniform integer in [0, limit)."""
    return int(torch.randint(limit, (), generator=generator))


def _leave_signals_to_the_main_process(worker: int) -> None:
    """A worker that died of a signal meant to end the run would break the run before it saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def scenes_on_the_fly(kind: type, seed: int, size: int, options: Mapping[str, Any]) -> Any:
    """Return endless scenes of a kind, with the ``data.options`` of a settings file.

    Raises:
        ValueError: the kind has no such option, or refuses its value.
    """
    values = {
        name: tuple(value) if isinstance(value, list) else value for name, value in options.items()
    }
    try:
        return kind(seed, size=size, **values)
    except TypeError as error:
        raise ValueError(
            f"The settings in data.options do not fit {kind.__name__}: {error}."
        ) from error
