"""Samples of the two kinds of steps by which a generator of bokeh stacks is trained.

Pictures come from :mod:`training.bokeh_stack_sources`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.utils.data import Dataset

from bokehdiff.pipelines.stack_inputs import STACK_PROMPT
from training.bokeh_stack_sources import Source
from training.samples import draw, seeded_generator

SCENES, PHOTOGRAPHS, PAIRS = "scenes", "photographs", "pairs"
SOURCES = (SCENES, PHOTOGRAPHS, PAIRS)

ATTEMPTS = 100
"""Draws of a picture until one fits the range of K."""

INSTRUCTIONS = (
    STACK_PROMPT,
    "Blur what is out of focus as a lens would, dof_cond = {K}; leave the subject sharp.",
    "The same photo through a wider aperture: dof_cond = {K}; nothing else changes.",
    "Apply depth of field with dof_cond = {K} and keep the scene as it is.",
)
"""Prompts of pictures made from a sharp one; the first is the one that the pipeline uses."""

# The numbers that keep streams of random numbers apart.
_OF_GROUP, _OF_SCENE, _OF_SAMPLE, _OF_PROMPT = range(4)


class BokehStackSamples(Dataset[dict[str, Tensor]]):
    """Samples of the two kinds of steps, in groups of one kind, as functions of their number.

    Group g holds samples ``g n .. g n + n - 1`` for batch size n, so that a batch is a group. In a
    share `reference_share` of the groups every sample is of a scene of its own and comes with the
    sharp picture as a reference. The others have no reference: they show one scene at n different K
    (sources that can), and in a share `pivot_share` of the samples noise, timestep and attention
    are those of one member of the group, its pivot, so that only the blur differs.

    ``samples[number]`` is a dict of tensors:

    - ``image``, ``target`` (3, S, S): sharp, and with lens blur; sRGB in [0, 1].
    - ``K`` (): px*m of these pictures. ``tells_K`` (): False where the network is not told it.
    - ``with_reference`` (): whether the network sees ``image``; the same in a group.
    - ``pivot`` (): position in the group of the sample whose noise and layout this one shares.
    - ``number`` (), ``source`` (), ``index`` (): of the sample, in `sources`, in that source.

    Args:
        sources: by name.
        weights: by the same names, how often each is chosen, in proportion.
        batch_size: n.
        seed: of everything that is drawn.
        reference_share, pivot_share: see above.
        drop_K: share of the samples without reference whose K is not told.
        drop_caption: share of the scenes without reference whose prompt is empty.
        keep_caption: share of the samples with reference whose prompt is the caption, if they have
            one, and not an instruction that says K.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        weights: Mapping[str, float],
        *,
        batch_size: int,
        seed: int,
        reference_share: float = 0.5,
        pivot_share: float = 0.2,
        drop_K: float = 0.1,
        drop_caption: float = 0.1,
        keep_caption: float = 0.35,
    ) -> None:
        self.sources = list(sources.values())
        self.weights = torch.tensor([float(weights[name]) for name in sources])
        self.batch_size = batch_size
        self.seed = seed
        self.reference_share = reference_share
        self.pivot_share = pivot_share
        self.drop_K = drop_K
        self.drop_caption = drop_caption
        self.keep_caption = keep_caption

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        """Return the sample.

        Raises:
            ValueError: in a hundred draws, no picture could show a K within the range.
        """
        group, position = divmod(number, self.batch_size)
        of_group = seeded_generator(self.seed, _OF_GROUP, group)
        with_reference = _happens(self.reference_share, of_group)
        which = int(torch.multinomial(self.weights, 1, generator=of_group))
        pivot = draw(self.batch_size, of_group)
        source = self.sources[which]
        one_scene = source.one_scene and not with_reference
        frame = (position, self.batch_size) if one_scene else (0, 1)
        of_sample = seeded_generator(self.seed, _OF_SAMPLE, number)
        shares = one_scene and _happens(self.pivot_share, of_sample)
        tells_K = with_reference or not _happens(self.drop_K, of_sample)

        scene_number = group * self.batch_size if one_scene else number
        of_scene = seeded_generator(self.seed, _OF_SCENE, scene_number)
        mirrored = _happens(0.5, of_scene)
        for _ in range(ATTEMPTS):
            index = draw(source.count or 1 << 31, of_scene)
            pictures = source.sample(index, of_scene, *frame)
            if pictures is not None:
                break
        else:
            raise ValueError(
                f"None of {ATTEMPTS} pictures of the data could be blurred by a K within the range "
                "of data.smallest_K and data.largest_K: what they show is too near. Widen the "
                "range, or take other pictures."
            )
        if mirrored:
            for name in ("image", "target"):
                pictures[name] = pictures[name].flip(-1)
        return {
            **pictures,
            "tells_K": torch.tensor(tells_K),
            "with_reference": torch.tensor(with_reference),
            "pivot": torch.tensor(pivot if shares else position),
            "number": torch.tensor(number),
            "source": torch.tensor(which),
            "index": torch.tensor(index),
        }

    def prompts(self, batch: Mapping[str, Tensor]) -> list[str]:
        """Return the prompt of each sample of a batch.

        What is drawn for it belongs to the scene: pictures of one scene have one caption.
        """
        names = ("source", "index", "number", "K", "with_reference")
        return [
            self._prompt(int(source), int(index), int(number), float(K), bool(with_reference))
            for source, index, number, K, with_reference in zip(
                *(batch[name].tolist() for name in names), strict=True
            )
        ]

    def _prompt(self, source: int, index: int, number: int, K: float, with_reference: bool) -> str:
        caption = self.sources[source].caption(index)
        if self.sources[source].one_scene and not with_reference:
            number -= number % self.batch_size
        generator = seeded_generator(self.seed, _OF_PROMPT, number)
        if not with_reference:
            return "" if _happens(self.drop_caption, generator) else caption
        kept = _happens(self.keep_caption, generator)
        which = draw(len(INSTRUCTIONS), generator)
        return caption if kept and caption else instruction(K, which)


def instruction(K: float, which: int = 0) -> str:
    """Return one of the `INSTRUCTIONS`, with K in px*m, said with two decimals."""
    return INSTRUCTIONS[which].replace("{K}", f"{K:.2f}")


def _happens(share: float, generator: torch.Generator) -> bool:
    """True in a share of the draws, each of which takes one number."""
    return float(torch.rand((), generator=generator)) < share
