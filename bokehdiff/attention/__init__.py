"""Physics-inspired self-attention (PISA): light spreads from each token over its blur circle.

`pisa_attention` and `PisaGeometry` need torch only; the rest puts PISA into a diffusers UNet and is
imported when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .backends import BackendChoice, available_backends, explain
from .config import PisaConfig
from .geometry import PisaGeometry
from .pisa import pisa_attention

if TYPE_CHECKING:
    from .processor import (
        DEFAULT_PISA_LAYERS,
        PisaAttnProcessor,
        PisaContext,
        install_pisa,
        remove_pisa,
        verify_pisa,
    )

__all__ = [
    "BackendChoice",
    "DEFAULT_PISA_LAYERS",
    "PisaAttnProcessor",
    "PisaConfig",
    "PisaContext",
    "PisaGeometry",
    "available_backends",
    "explain",
    "install_pisa",
    "pisa_attention",
    "remove_pisa",
    "verify_pisa",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from . import processor

        return getattr(processor, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
