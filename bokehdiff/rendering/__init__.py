"""Classical renderers of lens blur, in linear light, and the aperture they share."""

from bokehdiff.rendering.aperture import Aperture
from bokehdiff.rendering.gaussian_pyramid import gaussian_pyramid_blur
from bokehdiff.rendering.highlights import HighlightBoost, recover_highlights
from bokehdiff.rendering.layered import layered_blur, layered_reference
from bokehdiff.rendering.painted_layers import painted_layers_blur
from bokehdiff.rendering.pyramid import pyramid_blur
from bokehdiff.rendering.radius_bins import binned_blur
from bokehdiff.rendering.raytraced import LayerRender, render_layers
from bokehdiff.rendering.render import render_bokeh
from bokehdiff.rendering.scatter import (
    depth_ordered_scatter,
    scatter_bokehme,
    scatter_reference,
)

__all__ = [
    "Aperture",
    "HighlightBoost",
    "LayerRender",
    "binned_blur",
    "depth_ordered_scatter",
    "gaussian_pyramid_blur",
    "layered_blur",
    "layered_reference",
    "painted_layers_blur",
    "pyramid_blur",
    "recover_highlights",
    "render_bokeh",
    "render_layers",
    "scatter_bokehme",
    "scatter_reference",
]
