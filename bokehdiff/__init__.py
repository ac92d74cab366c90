"""Lens blur for photographs. Everything public, sorted by what a photographer wants to do.

Nothing heavy is imported here: a name is loaded from its module the first time it is used.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

TINY: str = str(Path(__file__).parent / "assets" / "tiny")
"""Folder of the checkpoint inside the package, for ``BokehDiffPipeline.from_pretrained``."""

FLOW_NANO: str = str(Path(__file__).parent / "assets" / "flow_nano")
"""Folder of the small fast network inside the package, for ``from_pretrained`` of
``BokehFlowPipeline`` and ``BokehFlowVideoPipeline``."""

COMPACT_TINY: str = str(Path(__file__).parent / "assets" / "compact_tiny")
"""Folder of the network for phones inside the package, for ``LiteBokehPipeline.from_pretrained``
and ``bokehdiff export compact``."""

if TYPE_CHECKING:
    from .attention import PisaConfig, PisaGeometry, pisa_attention
    from .camera import Camera, subject_distance_m
    from .depth import DepthEstimator
    from .focus import find_focus, focus_disparity_at
    from .images import (
        linear_to_srgb,
        read_disparity,
        read_image,
        read_linear_image,
        srgb_to_linear,
        write_image,
        write_linear_image,
    )
    from .models import (
        AutoencoderSpaceToDepth,
        BokehAdapter,
        BokehFlowModel,
        DepthAnythingDSFAForDepthEstimation,
        DSFABlock,
        DSFAEncoder,
        GlassEncNet,
        LightTransportUNet,
        TinyUnet,
    )
    from .optics import (
        circle_of_confusion,
        collapse_focus_range,
        depth_to_disparity,
        normalise_disparity,
        rescale_strength,
        sensor_width_from_equivalent,
        signed_defocus,
        strength_from_camera,
    )
    from .overlay import coc_overlay
    from .photographs import Photograph, read_photograph, write_photograph
    from .pipelines import (
        BokehDiffPipeline,
        BokehDiffPipelineOutput,
        BokehFlowPipeline,
        BokehFlowPipelineOutput,
        BokehFlowVideoPipeline,
        BokehStackOutput,
        BokehStackPipeline,
        DepthFromBokehOutput,
        DepthFromBokehPipeline,
        LiteBokehPipeline,
        depth_from_sweep,
    )
    from .rendering import Aperture, HighlightBoost, render_bokeh

__all__ = [
    # Blur a photograph with the diffusion model.
    "BokehDiffPipeline",
    "BokehDiffPipelineOutput",
    "TINY",
    # Blur photographs and films with a small fast network.
    "BokehFlowPipeline",
    "BokehFlowPipelineOutput",
    "BokehFlowVideoPipeline",
    "FLOW_NANO",
    # Blur photographs as a phone can, from the photograph alone.
    "LiteBokehPipeline",
    "COMPACT_TINY",
    # Blur a photograph with classical optics.
    "render_bokeh",
    "Aperture",
    "HighlightBoost",
    # Make a stack of one photograph at several strengths, and find depth in a stack.
    "BokehStackPipeline",
    "BokehStackOutput",
    "DepthFromBokehPipeline",
    "DepthFromBokehOutput",
    "depth_from_sweep",
    # Read, estimate the disparity, choose the focus, write.
    "read_photograph",
    "Photograph",
    "read_image",
    "read_linear_image",
    "read_disparity",
    "DepthEstimator",
    "find_focus",
    "focus_disparity_at",
    "write_photograph",
    "write_image",
    "write_linear_image",
    # From a camera to blur strength, and from distances to disparity.
    "Camera",
    "subject_distance_m",
    "strength_from_camera",
    "sensor_width_from_equivalent",
    "rescale_strength",
    "depth_to_disparity",
    "normalise_disparity",
    # How blurred each pixel becomes.
    "coc_overlay",
    "circle_of_confusion",
    "signed_defocus",
    "collapse_focus_range",
    # Display and linear light.
    "srgb_to_linear",
    "linear_to_srgb",
    # Physics-inspired self-attention, to build with.
    "pisa_attention",
    "PisaGeometry",
    "PisaConfig",
    "LightTransportUNet",
    "AutoencoderSpaceToDepth",
    # The networks of films, of phones, of stacks and of depth from them, to build with.
    "BokehFlowModel",
    "TinyUnet",
    "GlassEncNet",
    "BokehAdapter",
    "DepthAnythingDSFAForDepthEstimation",
    "DSFABlock",
    "DSFAEncoder",
    "__version__",
]

_HOMES = {
    "pipelines": (
        "BokehDiffPipeline",
        "BokehDiffPipelineOutput",
        "BokehFlowPipeline",
        "BokehFlowPipelineOutput",
        "BokehFlowVideoPipeline",
        "BokehStackPipeline",
        "BokehStackOutput",
        "DepthFromBokehPipeline",
        "DepthFromBokehOutput",
        "LiteBokehPipeline",
        "depth_from_sweep",
    ),
    "rendering": ("render_bokeh", "Aperture", "HighlightBoost"),
    "photographs": ("Photograph", "read_photograph", "write_photograph"),
    "depth": ("DepthEstimator",),
    "focus": ("find_focus", "focus_disparity_at"),
    "overlay": ("coc_overlay",),
    "camera": ("Camera", "subject_distance_m"),
    "images": (
        "read_image",
        "read_linear_image",
        "read_disparity",
        "write_image",
        "write_linear_image",
        "srgb_to_linear",
        "linear_to_srgb",
    ),
    "optics": (
        "strength_from_camera",
        "sensor_width_from_equivalent",
        "rescale_strength",
        "depth_to_disparity",
        "normalise_disparity",
        "circle_of_confusion",
        "signed_defocus",
        "collapse_focus_range",
    ),
    "attention": ("pisa_attention", "PisaGeometry", "PisaConfig"),
    "models": (
        "LightTransportUNet",
        "AutoencoderSpaceToDepth",
        "BokehAdapter",
        "BokehFlowModel",
        "DepthAnythingDSFAForDepthEstimation",
        "DSFABlock",
        "DSFAEncoder",
        "GlassEncNet",
        "TinyUnet",
    ),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        value = getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
        globals()[name] = value
        return value
    if name in _HOMES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_HOMES])
