"""PISA as one opaque operator inside a graph that `torch.compile` makes.

Which tiles there are, and what they reach, depends on the scene. A graph cannot hold that, and need
not: it holds a handle, and the operator asks for the scene of the moment whenever it runs. So one
compiled UNet serves all scenes.
"""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .backends import Backend
    from .geometry import PisaGeometry

_owners: weakref.WeakValueDictionary[int, GraphOwner] = weakref.WeakValueDictionary()
_numbers = itertools.count()


class GraphOwner:
    """What a compiled graph can hold a handle of: something that knows a geometry.

    Attributes:
        handle: int64 scalar that stands for this object as long as it lives; copies get their own.
    """

    handle: Tensor

    def take_handle(self) -> None:
        """Make the handle; call it once the object is there."""
        number = next(_numbers)
        _owners[number] = self
        self.__dict__["handle"] = torch.tensor(number)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "handle"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.take_handle()

    def find_geometry(self, q: Tensor, disp_coc: Tensor | None) -> tuple[PisaGeometry, Backend]:
        """Return the geometry for a layer with this q and the authors' conditioning.

        The backend that was asked for comes with it.
        """
        raise NotImplementedError


def _find(handle: Tensor, q: Tensor, disp_coc: Tensor | None) -> tuple[PisaGeometry, Backend]:
    owner = _owners.get(int(handle))
    if owner is None:
        raise RuntimeError(
            "The PISA context or geometry that this compiled graph was made with is gone; compile "
            "the model again after install_pisa."
        )
    geometry, backend = owner.find_geometry(q, disp_coc)
    return geometry.to(q.device), backend


@torch.library.custom_op("bokehdiff::pisa_attention", mutates_args=())
def pisa_attention_in_graph(
    q: Tensor, k: Tensor, v: Tensor, handle: Tensor, disp_coc: Tensor | None, scale: float
) -> Tensor:
    """Return `pisa_attention` of the geometry that `handle` stands for."""
    from .pisa import pisa_attention

    geometry, backend = _find(handle, q, disp_coc)
    return pisa_attention(q, k, v, geometry, scale=scale, backend=backend).contiguous()


@pisa_attention_in_graph.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, handle: Tensor, disp_coc: Tensor | None, scale: float
) -> Tensor:
    return v.new_empty(v.shape)


@torch.library.custom_op("bokehdiff::pisa_attention_gradients", mutates_args=())
def _gradients_in_graph(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    handle: Tensor,
    disp_coc: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from .pisa import pisa_attention_gradients

    geometry, backend = _find(handle, q, disp_coc)
    gradients = pisa_attention_gradients(grad_out, q, k, v, geometry, scale, backend)
    grad_q, grad_k, grad_v = (gradient.contiguous() for gradient in gradients)
    return grad_q, grad_k, grad_v


@_gradients_in_graph.register_fake
def _(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    handle: Tensor,
    disp_coc: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, handle, disp_coc, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, handle, disp_coc)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, handle, disp_coc = ctx.saved_tensors
    gradients = _gradients_in_graph(grad_out, q, k, v, handle, disp_coc, ctx.scale)
    return *gradients, None, None, None


pisa_attention_in_graph.register_autograd(_backward, setup_context=_remember)
