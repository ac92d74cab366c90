"""Classical renderers of lens blur, in linear light, and the aperture they share."""

from bokehdiff.rendering.aperture import Aperture
from bokehdiff.rendering.raytraced import LayerRender, render_layers
from bokehdiff.rendering.render import render_bokeh
from bokehdiff.rendering.scatter import (
    depth_ordered_scatter,
    scatter_bokehme,
    scatter_reference,
)

__all__ = [
    "Aperture",
    "LayerRender",
    "depth_ordered_scatter",
    "render_bokeh",
    "render_layers",
    "scatter_bokehme",
    "scatter_reference",
]
