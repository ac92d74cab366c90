"""What the person who starts the page decides; visitors choose among it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..cli.renderers import NETWORKS, Method


@dataclass(frozen=True)
class Choice:
    """One way to make the blur, as it stands in the menu of the page.

    Args:
        label: what the menu says.
        method: how.
        model: folder or hub id of the network; None: the one inside the package.
    """

    label: str
    method: Method
    model: str | None = None

    @property
    def name(self) -> str:
        """The label without its explanation."""
        return self.label.split(":")[0]

    @property
    def shapes_openings(self) -> bool:
        """Whether blades and cat-eye can be asked for."""
        return self.method not in NETWORKS


BUILT_IN_CHOICES = (
    Choice("TINY: the embedded diffusion model", Method.model),
    Choice("BokehFlow: small and fast, embedded", Method.flow),
    Choice("layered: classical, most faithful", Method.layered),
    Choice("scatter: classical, guesses nothing", Method.scatter),
    Choice("pyramid: classical, fast", Method.pyramid),
)


@dataclass(frozen=True)
class PageSettings:
    """Settings of the page.

    Args:
        models: folders or hub ids of :class:`~bokehdiff.BokehDiffPipeline` that visitors may
            choose, beside those inside the package. Visitors name no folders: what they could name
            they could look for.
        depth_model: folder or hub id of the model that estimates disparity; None: Depth Anything V2
            Small, fetched when it is first needed.
        device: to compute on; None: CUDA if there is one.
        largest_upload_mb: files above are refused.
        largest_photo_megapixels: photographs above are refused.
    """

    models: tuple[str, ...] = ()
    depth_model: str | None = None
    device: str | None = None
    largest_upload_mb: int = 64
    largest_photo_megapixels: float = 24
    choices: tuple[Choice, ...] = field(init=False)

    def __post_init__(self) -> None:
        given = tuple(Choice(_label(model), Method.model, model) for model in self.models)
        labels = {choice.label for choice in given}
        if len(labels) < len(given):
            raise ValueError(
                f"Several models have one name in the menu, which has {', '.join(sorted(labels))}; "
                "wanted folders with different names."
            )
        object.__setattr__(self, "choices", BUILT_IN_CHOICES + given)

    def choice(self, label: str) -> Choice:
        """The choice with a label.

        Raises:
            ValueError: there is none.
        """
        for choice in self.choices:
            if choice.label == label:
                return choice
        raise ValueError(f"There is no method {label!r}; wanted one of the menu.")


def _label(model: str) -> str:
    """The name of a model without the folders it lies in, which are nobody's business."""
    return f"{Path(model).name} (diffusion)"
