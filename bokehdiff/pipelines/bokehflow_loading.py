"""What the pipelines of BokehFlow for photos and for films share: loading, and checks."""

from __future__ import annotations

import os
import warnings
from typing import TypeVar

import torch
from diffusers import DiffusionPipeline

from ..images import InputRepairedWarning

# A component is found again at loading only if its module is imported by then.
from ..models.bokehflow import REFERENCE_WIDTH, BokehFlowModel
from ..rendering import Aperture
from ..whole_files import PathLike
from .network_loading import read_network

__all__ = [
    "PipelineWithBokehFlow",
    "bring_in",
    "check_aperture",
    "read_bokehflow",
    "tell_of_clamping",
]

CLAMPED_SHARE_ALLOWED = 0.01
"""Share of the pixels that may be blurred less than the lens would without a word about it."""

Pipeline = TypeVar("Pipeline", bound="PipelineWithBokehFlow")

HOW_TO_GET_BOKEHFLOW = (
    "bokehdiff.FLOW_NANO is the network inside this package; `python -m training.train_bokehflow` "
    "trains others."
)


class PipelineWithBokehFlow(DiffusionPipeline):
    """A pipeline whose one component is the network ``model``.

    Args:
        model: the network, trained.

    Raises:
        ValueError: something else.
    """

    model_cpu_offload_seq = "model"

    def __init__(self, model: BokehFlowModel) -> None:
        super().__init__()
        if not isinstance(model, BokehFlowModel):
            raise ValueError(
                f"model is a {type(model).__name__}; wanted a bokehdiff.models.BokehFlowModel. "
                f"{HOW_TO_GET_BOKEHFLOW}"
            )
        self.register_modules(model=model)

    @classmethod
    def from_pretrained(
        cls: type[Pipeline],
        pretrained_model_name_or_path: PathLike,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Pipeline:
        """The pipeline with the network in a folder or on the Hub; safetensors only.

        Args:
            pretrained_model_name_or_path: folder saved by this class, by its sibling or by
                ``save_pretrained`` of the network, or the name of such a one on the Hub;
                ``bokehdiff.FLOW_NANO`` ships with the package.
            revision: branch, tag or commit on the Hub.
            token: of the Hub, for repositories that are not public.
            dtype: in which the network computes; float16 and bfloat16 are for GPUs. Light is summed
                in float32 in any case.

        Raises:
            ValueError: nothing there, another kind of model, or one that is damaged or incomplete.
        """
        name = os.fspath(pretrained_model_name_or_path)
        return cls(read_bokehflow(name, revision=revision, token=token, dtype=dtype))


def read_bokehflow(
    name: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    dtype: torch.dtype = torch.float32,
) -> BokehFlowModel:
    """The network of a folder, its own or a pipeline's, or of a repository on the Hub.

    Arguments and errors as of :meth:`PipelineWithBokehFlow.from_pretrained`.
    """
    model: BokehFlowModel = read_network(
        name,
        {BokehFlowModel.__name__: BokehFlowModel},
        system="BokehFlow",
        how_to_get=HOW_TO_GET_BOKEHFLOW,
        revision=revision,
        token=token,
        dtype=dtype,
    )
    return model


def bring_in(model: BokehFlowModel) -> None:
    """Brings an offloaded network to its device, as hooks do by themselves before ``forward``."""
    if hasattr(model, "_hf_hook"):
        model._hf_hook.pre_forward(model)


def check_aperture(model: BokehFlowModel, aperture: Aperture | None) -> None:
    """Raises ``ValueError`` for an aperture that is none, or that the renderer cannot take."""
    if aperture is None:
        return
    if not isinstance(aperture, Aperture):
        raise ValueError(
            f"aperture is a {type(aperture).__name__}; wanted a bokehdiff.Aperture, for instance "
            "Aperture(blades=7)."
        )
    if model.renderer == "pyramid":
        raise ValueError(
            "aperture was given, but this network blurs with Gaussians (renderer 'pyramid'), which "
            "have no shape; leave it out, take a network with the renderer 'binned' or 'layered', "
            "or bokehdiff.render_bokeh(..., method='layered')."
        )


def tell_of_clamping(
    model: BokehFlowModel, clamped_share: torch.Tensor, photo_width_px: int
) -> bool:
    """Warns, and says so, if more than 1 % of a picture should be blurred wider than it is.

    Args:
        model: the network, which knows its largest radius.
        clamped_share: (N,) of N pictures.
        photo_width_px: as the network was told.
    """
    largest_share = float(clamped_share.max())
    if largest_share <= CLAMPED_SHARE_ALLOWED:
        return False
    radius = model.config.max_coc_radius * photo_width_px / REFERENCE_WIDTH
    warnings.warn(
        f"{100 * largest_share:.3g} % of the pixels should be blurred wider than the largest "
        f"radius of this network, {radius:.4g} px here, and are blurred with that radius. A larger "
        "f-number or a smaller K blurs less; bokehdiff.render_bokeh (--method layered) has no such "
        "limit.",
        InputRepairedWarning,
        stacklevel=3,
    )
    return True
