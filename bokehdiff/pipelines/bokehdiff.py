"""Lens blur by one step of a diffusion model: ``BokehDiffPipeline``.

The way of a picture: the photo is encoded (``prepare``), the UNet predicts noise at one timestep
with physics-inspired self-attention (PISA) told how wide every circle of confusion is, the noise is
removed in closed form, and the result is decoded (``render``). Focusing elsewhere repeats
``render`` only.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders import PeftAdapterMixin
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import BaseOutput
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from ..attention import PisaConfig, PisaContext, install_pisa, verify_pisa
from ..checkpoints import BOKEH_PISA_LAYERS, BOKEH_PROMPT, BOKEH_TIMESTEP, is_no_hub_id
from ..images import ImageInput, as_disparity_batch, as_image_batch, crop_to, pad_to_multiple

# Components are found again at loading only if their modules are imported by then.
from ..models.light_transport_unet import LightTransportUNet
from ..models.space_to_depth import AutoencoderSpaceToDepth
from ..models.stored_prompt import StoredPrompt
from ..optics import PerImage, check_focus_and_strength, normalise_disparity, signed_defocus
from .detail import RESIDUAL_GONE_RADIUS, put_back_detail
from .weights import PipelineWithBokehWeights

OUTPUT_TYPES = ("pil", "np", "pt", "latent")

# The occlusion test of PISA divides by (1 - disparity) (Eq. 7 of the paper).
NEAREST_DISPARITY = 1 - 1e-3


@dataclass
class BokehDiffPipelineOutput(BaseOutput):
    """What :class:`BokehDiffPipeline` returns.

    Args:
        images: the rendered pictures, display sRGB, of the size of the input. By ``output_type``:
            ``"pil"`` a list of B images of 8 bits, rounded to nearest; ``"np"`` float32 (B, H, W,
            3) in [0, 1]; ``"pt"`` float32 (B, 3, H, W) in [0, 1]; ``"latent"`` the denoised latents
            (B, C, h, w) of the padded image, as the UNet's side sees them.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor


@dataclass
class BokehScene:
    """A photo made ready by :meth:`BokehDiffPipeline.prepare`, for any focus and blur.

    Args:
        image: the photo, display sRGB, float32 (B, 3, H, W) in [0, 1].
        disparity: float32 (B, 1, H, W), larger is nearer, holes filled; in [0, 1], or 1/metres if
            ``metric``.
        latents: scaled latents of the padded photo, (B, C, h, w).
        metric: whether ``disparity``, and the focus to come, is in 1/metres.
        codec_image: the photo after encoding and decoding, (B, 3, H, W) around [0, 1]. Computed by
            the first render that needs it.
    """

    image: torch.Tensor
    disparity: torch.Tensor
    latents: torch.Tensor
    metric: bool = False
    codec_image: torch.Tensor | None = None

    @property
    def batch_size(self) -> int:
        """Number of photos, B."""
        return self.image.shape[0]

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the photos and of everything rendered from them, in pixels."""
        return self.image.shape[-2], self.image.shape[-1]


class BokehDiffPipeline(PipelineWithBokehWeights):
    """Adds the blur of a real lens to an all-in-focus photo, in one step of a diffusion model.

    Load with ``BokehDiffPipeline.from_pretrained(folder_or_hub_id)``: a folder saved by this class
    (``bokehdiff.TINY`` ships with the package) or any SDXL folder.
    ``DiffusionPipeline.from_pretrained`` does not know this class.

    **PISA lives in the UNet.** The constructor puts PISA processors into the self-attentions named
    by ``pisa_layers`` and leaves them there; a UNet shared with another pipeline carries them too.
    ``bokehdiff.attention.remove_pisa(unet)`` is the way back. Every call first verifies that they
    are still there, because methods such as ``enable_attention_slicing`` replace them, and raises
    ``RuntimeError`` if not; :meth:`install_pisa` puts them in again.

    **How the UNet learns about the lens.** PISA gets disparity and circle-of-confusion radii. If
    the UNet has ``latent_channels + 2 * s**2`` input channels, s being the pixels per latent side,
    disparity and signed defocus in pixels are also concatenated to the latents, each rearranged by
    ``torch.nn.functional.pixel_unshuffle``.

    Args:
        vae: image codec; ``AutoencoderKL`` or ``AutoencoderSpaceToDepth``.
        unet: ``UNet2DConditionModel`` of SDXL, or ``LightTransportUNet``.
        scheduler: only its betas and prediction type are used, never its clipping or spacing.
        text_encoder, text_encoder_2, tokenizer, tokenizer_2: encode the one prompt, once. All or
            none.
        stored_prompt: the embedding of the prompt, used when there are no text encoders.
        image_encoder, feature_extractor, force_zeros_for_empty_prompt, add_watermarker: of SDXL,
            kept so that folders convert in both directions; not used here.
        timestep: the one timestep T.
        prompt: the one prompt.
        pisa_layers: fragments of names of attention modules, comma separated or as a list; the
            self-attentions whose name contains one of them use PISA. Saved as one string, because
            diffusers takes every list in ``model_index.json`` for a component.
        pisa: the values of a ``PisaConfig`` (``PisaConfig.to_dict()``); ``None`` is the preset
            "paper".

    Raises:
        ValueError: a UNet whose input fits neither convention, or a layer name that is not there.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->image_encoder->stored_prompt->unet->vae"
    _optional_components = [*StableDiffusionXLPipeline._optional_components, "stored_prompt"]
    _lora_loadable_modules = [*StableDiffusionXLPipeline._lora_loadable_modules, "vae"]

    def __init__(
        self,
        vae: AutoencoderKL | AutoencoderSpaceToDepth,
        unet: UNet2DConditionModel | LightTransportUNet,
        scheduler: KarrasDiffusionSchedulers,
        text_encoder: CLIPTextModel | None = None,
        text_encoder_2: CLIPTextModelWithProjection | None = None,
        tokenizer: CLIPTokenizer | None = None,
        tokenizer_2: CLIPTokenizer | None = None,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        feature_extractor: CLIPImageProcessor | None = None,
        stored_prompt: StoredPrompt | None = None,
        force_zeros_for_empty_prompt: bool = True,
        add_watermarker: bool | None = None,
        timestep: int = BOKEH_TIMESTEP,
        prompt: str = BOKEH_PROMPT,
        pisa_layers: str | list[str] = BOKEH_PISA_LAYERS,
        pisa: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            vae=vae,
            text_encoder=text_encoder,
            text_encoder_2=text_encoder_2,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            unet=unet,
            scheduler=scheduler,
            image_encoder=image_encoder,
            feature_extractor=feature_extractor,
            force_zeros_for_empty_prompt=force_zeros_for_empty_prompt,
            # An invisible watermark would change pixels that are in focus.
            add_watermarker=False,
        )
        self.register_modules(stored_prompt=stored_prompt)
        pisa_config = PisaConfig.preset("paper") if pisa is None else PisaConfig.from_dict(pisa)
        layers = pisa_layers.split(",") if isinstance(pisa_layers, str) else pisa_layers
        self.register_to_config(
            timestep=timestep,
            prompt=prompt,
            pisa_layers=",".join(layer.strip() for layer in layers),
            pisa=pisa_config.to_dict(),
        )
        block_size = getattr(vae.config, "block_size", None)
        self.vae_scale_factor = block_size or 2 ** (len(vae.config.block_out_channels) - 1)
        self._encoded_prompt: tuple[Any, torch.Tensor, torch.Tensor] | None = None
        if not isinstance(vae, PeftAdapterMixin):
            # A codec without weights takes no adapters.
            self._lora_loadable_modules = StableDiffusionXLPipeline._lora_loadable_modules

        plain = vae.config.latent_channels
        conditioned = plain + 2 * self.vae_scale_factor**2
        if unet.config.in_channels not in (plain, conditioned):
            raise ValueError(
                f"The UNet takes {unet.config.in_channels} channels. With this VAE ({plain} latent "
                f"channels, {self.vae_scale_factor} pixels per latent) it must take {plain}, or "
                f"{conditioned} with disparity and defocus. Inpainting and editing UNets do not "
                "fit."
            )
        self.install_pisa()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> BokehDiffPipeline:
        """The pipeline saved in a folder or on the Hub, ours or a plain SDXL one.

        Args:
            pretrained_model_name_or_path: folder, or ``"owner/name"`` on the Hub.
            kwargs: as of ``DiffusionPipeline.from_pretrained``; ``dtype=torch.bfloat16`` for
                instance.

        Raises:
            ValueError: a path that does not exist, a folder that holds no pipeline, or the folder
                of a pipeline without the parts needed here.
        """
        name = os.fspath(pretrained_model_name_or_path)
        if os.path.isdir(name):
            check_model_folder(name, given=kwargs)
        elif os.path.exists(name):
            raise ValueError(
                f"{name!r} is a file. from_pretrained takes the folder that holds model_index.json."
            )
        elif is_no_hub_id(name):
            raise ValueError(
                f"There is no folder {name!r}. Give a folder written by save_pretrained, "
                "bokehdiff.TINY for the checkpoint inside this package, or the name of an SDXL "
                "model on the Hub such as 'stabilityai/stable-diffusion-xl-base-1.0'."
            )
        return super().from_pretrained(name, **kwargs)

    # -- PISA ------------------------------------------------------------------------------------

    @property
    def pisa_layer_names(self) -> list[str]:
        """Fragments of names of the attention modules that use PISA."""
        return [layer for layer in self.config.pisa_layers.split(",") if layer]

    def install_pisa(self) -> PisaContext:
        """Puts PISA into the configured layers of the UNet (again) and returns its context."""
        config = PisaConfig.from_dict(dict(self.config.pisa))
        return install_pisa(self.unet, self.pisa_layer_names, config)

    def verify_pisa(self) -> PisaContext:
        """The context through which PISA learns about the scene; its ``config`` is in force.

        Raises:
            RuntimeError: PISA is not in all of the configured layers.
        """
        return verify_pisa(self.unet, self.pisa_layer_names)

    # -- The call --------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        image: ImageInput,
        disparity: ImageInput,
        df: PerImage,
        K: PerImage = 20.0,
        *,
        metric: bool = False,
        preserve_detail: bool = True,
        generator: torch.Generator | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> BokehDiffPipelineOutput | tuple[Any]:
        """Renders all-in-focus photos as a lens focused on ``df`` would have taken them.

        Args:
            image: PIL image, numpy array (H, W, 3), tensor (3, H, W) or (B, 3, H, W), path, or a
                list of them of one size; display sRGB, floats in [0, 1].
            disparity: one map per photo, of its size: numpy array, tensor, path, or a list. Larger
                is nearer, in [0, 1] unless ``metric``. NaN and infinity are holes and get filled.
            df: disparity of the plane in focus, in the unit of the map; one number, or one per
                photo.
            K: blur strength, pixels of circle-of-confusion radius per unit of disparity; one
                number, or one per photo. The radius is ``K * |disparity - df|``.
            metric: disparity and df are in 1/metres.
            preserve_detail: put back what the codec lost where nothing is blurred, see
                :func:`bokehdiff.pipelines.detail.put_back_detail`. K = 0 then returns the photo.
            generator: source of randomness; the default PISA preset draws nothing.
            output_type: ``"pil"``, ``"np"``, ``"pt"`` or ``"latent"``.
            return_dict: return a plain tuple when false.

        Returns:
            :class:`BokehDiffPipelineOutput` with the rendered ``images``, of the size of the input.

        Raises:
            ValueError: an input that cannot be meant; the message says what to do.
            RuntimeError: PISA is not installed in the UNet.
        """
        # 1. Check inputs before any work is done.
        image, disparity, df, K = self.check_inputs(
            image, disparity, df, K, metric, generator, output_type
        )
        # 2. Pad and encode.
        scene = self.prepare(image, disparity, metric=metric)
        # 3. One step of the UNet, decode, put detail back, output.
        return self.render(
            scene,
            df,
            K,
            preserve_detail=preserve_detail,
            generator=generator,
            output_type=output_type,
            return_dict=return_dict,
        )

    def check_inputs(
        self,
        image: ImageInput,
        disparity: ImageInput,
        df: PerImage,
        K: PerImage,
        metric: bool,
        generator: torch.Generator | None,
        output_type: str,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Everything read and validated: image (B, 3, H, W), disparity (B, 1, H, W), df, K (B,).

        Raises:
            ValueError: an input that cannot be meant.
            RuntimeError: PISA is not installed in the UNet.
        """
        self.check_ready(generator, output_type)
        image = as_image_batch(image)
        batch_size, _, height, width = image.shape
        df, K = check_focus_and_strength(df, K, batch_size, metric=metric)
        disparity = as_disparity_batch(disparity, batch_size, height, width, metric=metric)
        return image, disparity, df, K

    def check_ready(self, generator: torch.Generator | None, output_type: str) -> None:
        """Checks what does not depend on the picture.

        Raises:
            ValueError: unknown ``output_type``, something that is no generator, a scheduler of
                another kind, no prompt.
            RuntimeError: PISA is not installed in the UNet.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(
                f"output_type is {output_type!r}; it must be one of "
                f"{', '.join(repr(known) for known in OUTPUT_TYPES)}."
            )
        if generator is not None and not isinstance(generator, torch.Generator):
            raise ValueError(
                f"generator is a {type(generator).__name__}; it must be a torch.Generator, for "
                "instance torch.Generator().manual_seed(0), or None."
            )
        self.verify_pisa()
        self.closed_form_step()
        if not self._has_text_encoders and self.stored_prompt is None:
            raise ValueError(
                "There is nothing to make the prompt embedding from. Load the folder with both "
                "text encoders and tokenizers, or pass "
                "stored_prompt=StoredPrompt.from_embeddings(...)."
            )

    @torch.no_grad()
    def prepare(self, image: ImageInput, disparity: ImageInput, metric: bool = False) -> BokehScene:
        """Does the part of the work that focus and blur do not change: reading, checking, encoding.

        Args:
            image, disparity, metric: as of :meth:`__call__`.

        Returns:
            A :class:`BokehScene` for :meth:`render`.

        Raises:
            ValueError: an input that cannot be meant.
        """
        device = self._execution_device
        image = as_image_batch(image)
        batch_size, _, height, width = image.shape
        disparity = as_disparity_batch(disparity, batch_size, height, width, metric=metric)
        image, disparity = image.to(device), disparity.to(device)
        padded, _ = pad_to_multiple(image, self.image_multiple)
        latents = self.encode_latents(2 * padded - 1)
        self.maybe_free_model_hooks()
        return BokehScene(image=image, disparity=disparity, latents=latents, metric=metric)

    @torch.no_grad()
    def render(
        self,
        scene: BokehScene,
        df: PerImage,
        K: PerImage = 20.0,
        *,
        preserve_detail: bool = True,
        generator: torch.Generator | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> BokehDiffPipelineOutput | tuple[Any]:
        """Renders a prepared scene; nothing is encoded again, so refocusing is cheap.

        Args:
            scene: what :meth:`prepare` returned.
            df, K, preserve_detail, generator, output_type, return_dict: as of :meth:`__call__`.

        Returns:
            As of :meth:`__call__`.

        Raises:
            ValueError: an input that cannot be meant.
            RuntimeError: PISA is not installed in the UNet.
        """
        if not isinstance(scene, BokehScene):
            raise ValueError(
                f"render got a {type(scene).__name__}; it takes the scene that "
                "prepare(image, disparity) returns. To render a photo at once, call the pipeline."
            )
        self.check_ready(generator, output_type)
        focus, strength = check_focus_and_strength(df, K, scene.batch_size, metric=scene.metric)
        device = self._execution_device
        disparity = scene.disparity.to(device)
        focus, strength = focus.to(device), strength.to(device)
        if scene.metric:
            disparity, focus, strength = normalise_disparity(disparity, focus, strength)

        padded, _ = pad_to_multiple(disparity, self.image_multiple)
        defocus = signed_defocus(padded, focus, strength)
        latents = self.predict_latents(scene.latents.to(device), padded, defocus, generator)
        images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
        if output_type == "latent":
            images = latents
        else:
            rendered = crop_to(self.decode_latents(latents, generator), scene.size) / 2 + 0.5
            if preserve_detail:
                defocus = crop_to(defocus, scene.size)
                if scene.codec_image is None and bool((defocus.abs() < RESIDUAL_GONE_RADIUS).any()):
                    decoded = self.decode_latents(scene.latents.to(device))
                    scene.codec_image = crop_to(decoded, scene.size) / 2 + 0.5
                rendered = put_back_detail(
                    rendered, scene.image.to(device), scene.codec_image, defocus
                )
            images = self._as_output_type(rendered.clamp(0, 1).float(), output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images,)
        return BokehDiffPipelineOutput(images=images)

    # -- The differentiable core, shared by training and inference -------------------------------

    def render_tensors(
        self,
        image: torch.Tensor,
        disparity: torch.Tensor,
        df: torch.Tensor,
        K: torch.Tensor,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """The model's own rendering, differentiable, without checks and without detail put back.

        Args:
            image: (B, 3, H, W) display sRGB in [-1, 1], on the device of the pipeline; any size.
            disparity: (B, 1, H, W) in [0, 1], larger is nearer.
            df: (B,), disparity of the plane in focus.
            K: (B,), pixels of circle-of-confusion radius per unit of disparity.
            generator: as of :meth:`__call__`.

        Returns:
            (B, 3, H, W), around [-1, 1], not clamped.
        """
        padded_image, size = pad_to_multiple(image, self.image_multiple)
        padded_disparity, _ = pad_to_multiple(disparity, self.image_multiple)
        defocus = signed_defocus(padded_disparity, df, K)
        latents = self.encode_latents(padded_image)
        latents = self.predict_latents(latents, padded_disparity, defocus, generator)
        return crop_to(self.decode_latents(latents, generator), size)

    def encode_latents(self, image: torch.Tensor) -> torch.Tensor:
        """Scaled latents of an image, the mode of the posterior; differentiable.

        Args:
            image: (B, 3, H, W) in [-1, 1]; sides multiples of :attr:`image_multiple`.

        Returns:
            (B, C, H / s, W / s), at least float32.
        """
        with self._vae_in_safe_precision(image.device):
            latents = self.vae.encode(image.to(self.vae.dtype)).latent_dist.mode()
        latents = _at_least_float32(latents)
        mean, deviation = self._latent_statistics(latents)
        return (latents - mean) * (self.vae.config.scaling_factor / deviation)

    def predict_latents(
        self,
        latents: torch.Tensor,
        disparity: torch.Tensor,
        defocus: torch.Tensor,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Latents of the blurred picture, by one call of the UNet and the closed-form step (Eq. 1).

        Args:
            latents: (B, C, h, w), scaled, of the padded image.
            disparity: (B, 1, H, W) in [0, 1], of the padded image, H = h * s.
            defocus: (B, 1, H, W), signed circle-of-confusion radius in pixels, positive nearer than
                the plane in focus.
            generator: source of randomness for PISA presets that draw.

        Returns:
            (B, C, h, w).
        """
        context = self.verify_pisa()
        batch_size, _, height, width = latents.shape
        scale = self.vae_scale_factor
        occluders = disparity.clamp(0, NEAREST_DISPARITY)
        prompt_embeds, pooled_prompt_embeds = self.bokeh_prompt(batch_size, latents.device)
        # (original height and width, crop top and left, target height and width), pixels.
        # In float32 whatever the UNet's dtype: bfloat16 cannot tell 1001 from 1000.
        image_size = (height * scale, width * scale)
        time_ids = latents.new_tensor([(*image_size, 0, 0, *image_size)]).repeat(batch_size, 1)

        sample = latents
        if self.unet.config.in_channels != latents.shape[1]:
            maps = [F.pixel_unshuffle(one, scale).to(latents.dtype) for one in (occluders, defocus)]
            sample = torch.cat([latents, *maps], dim=1)
        timestep = torch.full((batch_size,), self.config.timestep, device=latents.device)

        context.set_scene(occluders, defocus.abs(), height, width, scale)
        context.generator = generator
        try:
            noise = self.unet(
                sample.to(self.unet.dtype),
                timestep,
                encoder_hidden_states=prompt_embeds,
                added_cond_kwargs={"text_embeds": pooled_prompt_embeds, "time_ids": time_ids},
                return_dict=False,
            )[0]
        finally:
            # Checkpointed and compiled layers look at the scene again during the backward pass.
            if not torch.is_grad_enabled():
                context.clear()
                context.generator = None
        of_latents, of_noise = self.closed_form_step()
        return of_latents * latents - of_noise * noise.to(latents.dtype)

    def decode_latents(
        self, latents: torch.Tensor, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """Image of scaled latents (B, C, h, w): (B, 3, H, W) around [-1, 1]; differentiable."""
        mean, deviation = self._latent_statistics(latents)
        latents = latents * (deviation / self.vae.config.scaling_factor) + mean
        with self._vae_in_safe_precision(latents.device):
            image = self.vae.decode(
                latents.to(self.vae.dtype), return_dict=False, generator=generator
            )[0]
        return _at_least_float32(image)

    def closed_form_step(self) -> tuple[float, float]:
        """The factors (a, b) of ``z0 = a * z - b * noise`` at the configured timestep.

        With alpha-bar from the betas of the scheduler, a = 1 / sqrt(alpha-bar) and
        b = sqrt(1 - alpha-bar) / sqrt(alpha-bar): 1.8977 and 1.6129 for SDXL at T = 499. Nothing is
        clipped.

        Raises:
            ValueError: the scheduler has no betas or does not predict noise, or the timestep is
                outside its range.
        """
        config = self.scheduler.config
        if config.get("prediction_type", "epsilon") != "epsilon":
            raise ValueError(
                f"The scheduler is set up for prediction_type {config['prediction_type']!r}. This "
                "pipeline removes predicted noise in one step and needs a model of prediction_type "
                "'epsilon'."
            )
        names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
        betas = {name: config[name] for name in names if name in config}
        if "beta_start" not in betas:
            raise ValueError(
                f"{type(self.scheduler).__name__} has no noise schedule in betas. Use the "
                "scheduler of an SDXL checkpoint, for instance DDPMScheduler or "
                "EulerDiscreteScheduler."
            )
        alphas_cumprod = DDPMScheduler(
            **betas, rescale_betas_zero_snr=bool(config.get("rescale_betas_zero_snr", False))
        ).alphas_cumprod
        if not 0 <= self.config.timestep < len(alphas_cumprod):
            raise ValueError(
                f"The timestep is {self.config.timestep}; the schedule has steps 0 to "
                f"{len(alphas_cumprod) - 1}."
            )
        alpha_bar = float(alphas_cumprod[self.config.timestep])
        return alpha_bar**-0.5, ((1 - alpha_bar) / alpha_bar) ** 0.5

    # -- The prompt ------------------------------------------------------------------------------

    @property
    def _has_text_encoders(self) -> bool:
        parts = (self.text_encoder, self.text_encoder_2, self.tokenizer, self.tokenizer_2)
        return all(part is not None for part in parts)

    def bokeh_prompt(
        self, batch_size: int = 1, device: torch.device | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings of the one prompt in the UNet's dtype: (B, tokens, channels) and (B,
        channels).

        Encoded once by the text encoders if there are any, else taken from ``stored_prompt``.
        """
        device = device or self._execution_device
        if self._has_text_encoders:
            made_by = (self.config.prompt, id(self.text_encoder), id(self.text_encoder_2))
            if self._encoded_prompt is None or self._encoded_prompt[0] != made_by:
                with torch.no_grad():
                    embeds, _, pooled, _ = self.encode_prompt(
                        self.config.prompt, device=device, do_classifier_free_guidance=False
                    )
                self._encoded_prompt = (made_by, embeds, pooled)
            _, prompt_embeds, pooled_prompt_embeds = self._encoded_prompt
        else:
            prompt_embeds, pooled_prompt_embeds = self.stored_prompt()
        prompt_embeds = prompt_embeds.to(device, self.unet.dtype).expand(batch_size, -1, -1)
        return prompt_embeds, pooled_prompt_embeds.to(device, self.unet.dtype).expand(
            batch_size, -1
        )

    def make_stored_prompt(self) -> StoredPrompt:
        """The prompt's embedding as a component, with which the text encoders can be left out."""
        return StoredPrompt.from_embeddings(self.config.prompt, *self.bokeh_prompt())

    # -- Sizes and precision ---------------------------------------------------------------------

    @property
    def latent_multiple(self) -> int:
        """What height and width of the latents must be multiples of.

        A UNet may say so (``token_multiple``). Otherwise it is the down-sampling in front of the
        deepest PISA layer, so that its tokens cover the latents exactly: 2 for SDXL's
        ``down_blocks.1``.
        """
        if getattr(self.unet, "token_multiple", None):
            return int(self.unet.token_multiple)
        deepest = len(self.unet.config.block_out_channels) - 1
        levels = [0]
        for layer in self.pisa_layer_names:
            down = re.match(r"down_blocks\.(\d+)", layer)
            up = re.match(r"up_blocks\.(\d+)", layer)
            if down:
                levels.append(min(int(down[1]), deepest))
            elif up:
                levels.append(max(deepest - int(up[1]), 0))
            else:
                levels.append(deepest)
        return 2 ** max(levels)

    @property
    def image_multiple(self) -> int:
        """What height and width of an image are padded to a multiple of, in pixels: 16 for SDXL."""
        return self.vae_scale_factor * self.latent_multiple

    def _latent_statistics(
        self, latents: torch.Tensor
    ) -> tuple[torch.Tensor | float, torch.Tensor | float]:
        """Mean and deviation (1, C, 1, 1) by which some SDXL codecs standardise their latents."""
        mean = getattr(self.vae.config, "latents_mean", None)
        deviation = getattr(self.vae.config, "latents_std", None)
        if mean is None or deviation is None:
            return 0.0, 1.0
        shape = (1, -1, 1, 1)
        return latents.new_tensor(mean).view(shape), latents.new_tensor(deviation).view(shape)

    @contextlib.contextmanager
    def _vae_in_safe_precision(self, device: torch.device) -> Iterator[None]:
        """Runs the codec in its own dtype whatever autocast says, since the 8 bits of bfloat16 are
        too few for a photo; one in float16 that would overflow (``force_upcast``) in float32, and
        puts it back."""
        upcast = self.vae.dtype == torch.float16 and self.vae.config.force_upcast
        if upcast:
            self.vae.float()
        try:
            with torch.autocast(device.type, enabled=False):
                yield
        finally:
            if upcast:
                self.vae.half()

    def _as_output_type(
        self, images: torch.Tensor, output_type: str
    ) -> list[PIL.Image.Image] | np.ndarray | torch.Tensor:
        """(B, 3, H, W) in [0, 1] as the user wants it."""
        if output_type == "pt":
            return images
        arrays = images.permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "np":
            return arrays
        return [PIL.Image.fromarray(one) for one in np.rint(arrays * 255).astype(np.uint8)]


def check_model_folder(folder: str, given: Collection[str] = ()) -> None:
    """Raises ``ValueError`` unless ``folder`` holds a pipeline with the parts BokehDiff needs.

    Args:
        folder: an existing folder.
        given: names of parts that come from elsewhere and need not be in it.
    """
    index = os.path.join(folder, "model_index.json")
    try:
        with open(index, encoding="utf-8") as file:
            parts = json.load(file)
    except FileNotFoundError:
        inside = sorted(os.listdir(folder))
        raise ValueError(
            f"{folder!r} holds no pipeline: it has no model_index.json "
            f"({'it is empty' if not inside else 'it has ' + ', '.join(inside[:5])}). Give the "
            "folder that save_pretrained wrote, or bokehdiff.TINY for the checkpoint inside this "
            "package."
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{index!r} is damaged ({error}). Copy or download the folder again."
        ) from None
    missing = [
        part
        for part in ("vae", "unet", "scheduler")
        if part not in given
        and (not isinstance(parts, dict) or (parts.get(part) or [None])[0] is None)
    ]
    if missing:
        kind = (
            parts.get("_class_name", "something else") if isinstance(parts, dict) else "no pipeline"
        )
        raise ValueError(
            f"{folder!r} holds {kind}, without {', '.join(missing)}. BokehDiffPipeline loads its "
            "own folders and those of Stable Diffusion XL."
        )


def _at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
