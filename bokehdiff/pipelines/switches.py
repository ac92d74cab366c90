"""The switches of diffusers that must know about PISA or about our own networks.

Most switches need nothing: a layer keeps its PISA whatever processor they set, see
:class:`bokehdiff.attention.processor.PisaAttention`. ``docs/switches.md`` lists them all.
"""

from __future__ import annotations

import functools
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.hooks import apply_group_offloading
from diffusers.utils import is_xformers_available
from torch import Tensor, nn

from ..attention import PisaContext, verify_pisa
from ..attention.processor import pisa_contexts, reinstall_pisa, uncompiled

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
Pipeline = TypeVar("Pipeline", bound=StableDiffusionXLPipeline)

_locks: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()


def one_at_a_time(
    method: Callable[Concatenate[Pipeline, Parameters], Result],
) -> Callable[Concatenate[Pipeline, Parameters], Result]:
    """A method of pipelines that waits while another thread is in one, with the same UNet.

    PISA's scene lies in the UNet, offloading hooks and a codec that is upcast for a while lie in
    the other parts: two calls at once would see each other's.
    """

    @functools.wraps(method)
    def alone(pipe: Pipeline, *arguments: Parameters.args, **options: Parameters.kwargs) -> Result:
        with _locks.setdefault(uncompiled(pipe.unet), threading.RLock()):
            return method(pipe, *arguments, **options)

    return alone


class PipelineWithSwitches(StableDiffusionXLPipeline):
    """What :class:`BokehDiffPipeline` does at the switches of diffusers."""

    # There is one step, after which nothing but the latents is used, or can be interrupted.
    _callback_tensor_inputs = ["latents"]
    _num_timesteps = 1
    _interrupt = False

    _pisa_context: PisaContext

    # -- Sharing a UNet --------------------------------------------------------------------------

    def verify_pisa(self) -> PisaContext:
        """The context through which PISA learns about the scene; its ``config`` is in force.

        If another pipeline that shares the UNet has put in its own PISA, the one of this pipeline
        is put back first.

        Raises:
            RuntimeError: PISA is not in all of the configured layers.
        """
        own = self._pisa_context
        if any(one.of_pipeline and one is not own for one in pisa_contexts(self.unet)):
            reinstall_pisa(self.unet, self.pisa_layer_names, own)
        return verify_pisa(self.unet, self.pisa_layer_names)

    # -- Processors ------------------------------------------------------------------------------

    def load_ip_adapter(self, *arguments: Any, **options: Any) -> None:
        """Not for this pipeline.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "BokehDiffPipeline takes no IP-Adapter: it renders the photo it is given, and there is "
            "no second picture whose style it could follow. Load the adapter into a "
            "StableDiffusionXLPipeline with a UNet of its own, and render its picture here."
        )

    def set_ip_adapter_scale(self, scale: Any) -> None:
        """Not for this pipeline.

        Raises:
            ValueError: always.
        """
        raise ValueError("BokehDiffPipeline takes no IP-Adapter; there is no scale to set.")

    def check_no_ip_adapter(self) -> None:
        """Raises ``ValueError`` if another pipeline has put an IP-Adapter into the shared UNet."""
        if getattr(self.unet.config, "encoder_hid_dim_type", None) == "ip_image_proj":
            raise ValueError(
                "The UNet holds an IP-Adapter, which wants a picture that BokehDiffPipeline does "
                "not have. Call unload_ip_adapter() first."
            )

    def set_use_memory_efficient_attention_xformers(
        self, valid: bool, attention_op: Callable[..., Any] | None = None
    ) -> None:
        """As of diffusers; what ``enable_xformers_memory_efficient_attention`` calls.

        Raises:
            ModuleNotFoundError: xformers is not installed.
            ValueError: there is no CUDA device.
        """
        if valid and not is_xformers_available():
            raise ModuleNotFoundError(
                "xformers is not installed: pip install 'bokehdiff[xformers]'. The attention of "
                "torch, in use now, needs no more memory; PISA layers use neither.",
                name="xformers",
            )
        super().set_use_memory_efficient_attention_xformers(valid, attention_op)

    def fuse_qkv_projections(self, unet: bool = True, vae: bool = True) -> None:
        """As of diffusers. PISA layers go on projecting queries, keys and values one by one.

        Raises:
            ValueError: UNet or codec are our own networks, which have nothing to fuse.
        """
        if unet:
            self._check_unet_of_sdxl("fuse_qkv_projections")
        if vae and not isinstance(self.vae, AutoencoderKL):
            raise ValueError(
                f"fuse_qkv_projections is for AutoencoderKL; {type(self.vae).__name__} has no "
                "attention. Pass vae=False."
            )
        super().fuse_qkv_projections(unet=unet, vae=vae)

    def enable_freeu(self, s1: float, s2: float, b1: float, b2: float) -> None:
        """As of diffusers.

        Raises:
            ValueError: the UNet is our own network, which has no skip connections to weigh.
        """
        self._check_unet_of_sdxl("enable_freeu")
        super().enable_freeu(s1, s2, b1, b2)

    def disable_freeu(self) -> None:
        """As of diffusers."""
        self._check_unet_of_sdxl("disable_freeu")
        super().disable_freeu()

    def _check_unet_of_sdxl(self, switch: str) -> None:
        unet = uncompiled(self.unet)
        if not isinstance(unet, UNet2DConditionModel):
            raise ValueError(
                f"{switch} is for UNet2DConditionModel; {type(unet).__name__} has no such layers."
            )

    # -- Memory ----------------------------------------------------------------------------------

    def enable_group_offload(
        self,
        onload_device: torch.device,
        offload_device: torch.device = torch.device("cpu"),  # noqa: B008
        *,
        offload_to_disk_path: str | os.PathLike[str] | None = None,
        exclude_modules: str | Sequence[str] | None = None,
        **options: Any,
    ) -> None:
        """As of diffusers, but on disk each part gets a folder of its own.

        diffusers names the files by layer alone: of two parts in one folder that both have a
        ``conv_in``, one would get the weights of the other, and a file that is there already is
        taken for the weights.

        Args:
            onload_device, offload_device, exclude_modules, options: as of diffusers.
            offload_to_disk_path: folder for the weights, new or empty.

        Raises:
            ValueError: ``offload_to_disk_path`` is not empty.
        """
        if offload_to_disk_path is None:
            super().enable_group_offload(
                onload_device, offload_device, exclude_modules=exclude_modules, **options
            )
            return
        folder = os.fspath(offload_to_disk_path)
        if os.path.exists(folder) and os.listdir(folder):
            raise ValueError(
                f"offload_to_disk_path {folder!r} is not empty, and files in it would be taken for "
                "weights. Give a new or an empty folder."
            )
        excluded = [exclude_modules] if isinstance(exclude_modules, str) else exclude_modules or []
        for name, part in self.components.items():
            if not isinstance(part, nn.Module):
                continue
            if name in excluded:
                part.to(onload_device)
                continue
            settings = {
                "onload_device": onload_device,
                "offload_device": offload_device,
                "offload_to_disk_path": os.path.join(folder, name),
                **options,
            }
            enable: Any = getattr(part, "enable_group_offload", None)
            if enable is None:  # not of diffusers
                apply_group_offloading(part, **settings)
            else:
                enable(**settings)

    # -- Callbacks -------------------------------------------------------------------------------

    def check_callback(self, callback: Any, tensor_inputs: Sequence[str]) -> None:
        """Checks the two keywords of callbacks before any work is done.

        Raises:
            ValueError: something that cannot be called, or tensors that it cannot get.
        """
        if callback is None:
            return
        if not callable(callback):
            raise ValueError(
                f"callback_on_step_end is a {type(callback).__name__}; it must be a function "
                "(pipe, step, timestep, callback_kwargs) that returns callback_kwargs."
            )
        if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
            tensor_inputs = callback.tensor_inputs
        unknown = [name for name in tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"The callback asks for {', '.join(unknown)}. After the one step of this pipeline "
                f"only {', '.join(self._callback_tensor_inputs)} can be had."
            )

    def call_back(
        self, latents: Tensor, callback: Callable[..., Any] | None, tensor_inputs: Sequence[str]
    ) -> Tensor:
        """The latents after ``callback_on_step_end`` has seen them, and may have replaced them.

        Args:
            latents: (B, C, h, w), denoised.
            callback: called with the pipeline, step 0, the timestep (a tensor), and a dict that
                holds ``latents`` if they are among ``tensor_inputs``; returns such a dict.
            tensor_inputs: what the callback asks for.

        Raises:
            ValueError: it returns no dict, or latents of another shape.
        """
        if callback is None:
            return latents
        if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
            tensor_inputs = callback.tensor_inputs
        given = {"latents": latents} if "latents" in tensor_inputs else {}
        timestep = torch.tensor(self.config.timestep, device=latents.device)
        returned = callback(self, 0, timestep, given)
        if not isinstance(returned, dict):
            raise ValueError(
                f"callback_on_step_end returned a {type(returned).__name__}; it must return a "
                "dict, for instance the callback_kwargs it got."
            )
        replaced = returned.get("latents", latents)
        if not isinstance(replaced, Tensor) or replaced.shape != latents.shape:
            raise ValueError(
                "callback_on_step_end returned latents of shape "
                f"{tuple(getattr(replaced, 'shape', ()))}; it must keep {tuple(latents.shape)}."
            )
        return replaced.to(latents)
