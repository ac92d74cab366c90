"""Lens blur by one step of a diffusion model: ``BokehDiffPipeline``.

The way of a picture: the photo is encoded (``prepare``), the UNet predicts noise at one timestep
with physics-inspired self-attention (PISA) told how wide every circle of confusion is, the noise is
removed in closed form, and the result is decoded (``render``). Focusing elsewhere repeats
``render`` only.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
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

from ..attention import PisaConfig, PisaContext, install_pisa
from ..camera import Camera
from ..checkpoints import BOKEH_PISA_LAYERS, BOKEH_PROMPT, BOKEH_TIMESTEP, is_no_hub_id
from ..depth import DepthEstimator
from ..images import ImageInput, as_disparity_batch, as_image_batch, crop_to, pad_to_multiple
from ..lens import LensSetting, check_lens_arguments, choose_lens

# Components are found again at loading only if their modules are imported by then.
from ..models.light_transport_unet import LightTransportUNet
from ..models.space_to_depth import AutoencoderSpaceToDepth
from ..models.stored_prompt import StoredPrompt
from ..optics import PerImage, normalise_disparity, signed_defocus
from ..overlay import coc_overlay
from ..windows import Window
from .base_models import check_all_loaded, check_plain_variant, check_single_file
from .detail import RESIDUAL_GONE_RADIUS, put_back_detail
from .picture_output import pictures_as
from .switches import PipelineWithSwitches, one_at_a_time
from .tiled_codec import codec_strip_for, decode_in_tiles, encode_in_tiles
from .tiling import Tiling, check_tiling, tiles_for, window_pixels_for
from .weights import PipelineWithBokehWeights

OUTPUT_TYPES = ("pil", "np", "pt", "latent")

StepCallback = Callable[[Any, int, torch.Tensor, dict[str, Any]], dict[str, Any]]
"""What diffusers calls after a step: ``callback(pipeline, step, timestep, tensors)``."""

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
        coc: with ``return_coc``, the photo with its circles of confusion painted over it (green in
            focus, blue in front, red behind; see :func:`bokehdiff.overlay.coc_overlay`), in the
            form of ``images``, or as for ``"pt"`` beside latents.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    coc: list[PIL.Image.Image] | np.ndarray | torch.Tensor | None = None


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
        codec_of: whose parameters the codec had: the name of the trained weights, None for those of
            the base model, and their weight.
    """

    image: torch.Tensor
    disparity: torch.Tensor
    latents: torch.Tensor
    metric: bool = False
    codec_image: torch.Tensor | None = None
    codec_of: tuple[str | None, float] = (None, 1.0)

    @property
    def batch_size(self) -> int:
        """Number of photos, B."""
        return self.image.shape[0]

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the photos and of everything rendered from them, in pixels."""
        return self.image.shape[-2], self.image.shape[-1]


class BokehDiffPipeline(PipelineWithBokehWeights, PipelineWithSwitches):
    """Adds the blur of a real lens to an all-in-focus photo, in one step of a diffusion model.

    Load with ``BokehDiffPipeline.from_pretrained(folder_or_hub_id)``: a folder saved by this class
    (``bokehdiff.TINY`` ships with the package) or any SDXL folder.
    ``DiffusionPipeline.from_pretrained`` does not know this class.

    **PISA lives in the UNet.** The constructor puts PISA processors into the self-attentions named
    by ``pisa_layers`` and leaves them there; a UNet shared with another pipeline carries them too.
    Switches such as ``enable_attention_slicing`` change all other layers, see ``docs/switches.md``.
    ``bokehdiff.attention.remove_pisa(unet)`` is the way back. Every call first verifies that PISA
    is there, and raises ``RuntimeError`` if not; :meth:`install_pisa` puts it in again.

    **How the UNet learns about the lens.** PISA gets disparity and circle-of-confusion radii. If
    the UNet has ``latent_channels + 2 * s**2`` input channels, s being the pixels per latent side,
    disparity and signed defocus in pixels are also concatenated to the latents, each rearranged by
    ``torch.nn.functional.pixel_unshuffle``.

    **Photos without disparity.** ``depth_estimator`` estimates it: a
    :class:`bokehdiff.depth.DepthEstimator`, to be set to any other; it is no component and is not
    saved.

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
        self.depth_estimator: DepthEstimator | None = None
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
            if kwargs.get("variant") is None:
                check_plain_variant(name, given=kwargs)
        elif os.path.exists(name):
            raise ValueError(
                f"{name!r} is a file. from_pretrained takes the folder that holds "
                "model_index.json; a whole SDXL model in one .safetensors file is loaded by "
                "BokehDiffPipeline.from_single_file."
            )
        elif is_no_hub_id(name):
            raise ValueError(
                f"There is no folder {name!r}. Give a folder written by save_pretrained, "
                "bokehdiff.TINY for the checkpoint inside this package, or the name of an SDXL "
                "model on the Hub such as 'stabilityai/stable-diffusion-xl-base-1.0'."
            )
        return super().from_pretrained(name, **kwargs)

    @classmethod
    def from_single_file(
        cls, pretrained_model_link_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> BokehDiffPipeline:
        """The pipeline of an SDXL model in one ``.safetensors`` file, as its makers publish it.

        Args:
            pretrained_model_link_or_path: the file, or its page on the Hub,
                ``"https://huggingface.co/owner/name/blob/main/file.safetensors"``.
            kwargs: as of diffusers. ``config="folder"`` takes configurations and tokenizers, a few
                small files, from the folder of any SDXL model; without it they are fetched from the
                Hub once. Parts that the file lacks are passed, ``vae=...``.

        Raises:
            ValueError: a file that is damaged, or holds something other than a base model of SDXL
                that predicts noise; configurations that cannot be had.
        """
        name, config = os.fspath(pretrained_model_link_or_path), kwargs.get("config")
        if config is not None:
            kwargs["config"] = config = os.fspath(config)
            if os.path.isdir(config):
                check_model_folder(config)
        if os.path.isfile(name):
            check_single_file(name, given=kwargs)
        elif os.path.isdir(name):
            raise ValueError(f"{name!r} is a folder. BokehDiffPipeline.from_pretrained loads it.")
        elif not name.startswith(("https://", "http://")):
            raise ValueError(
                f"There is no file {name!r}. Give a .safetensors file, or the address of its page "
                "on the Hub."
            )
        try:
            pipe = super().from_single_file(name, **kwargs)
        except OSError as error:
            raise ValueError(
                f"Something that belongs to {name!r} could not be fetched from the Hub "
                f"({str(error).strip().splitlines()[0]}). To load a file without the Hub, give "
                "config=, the folder of any SDXL model, for instance with only the .json and .txt "
                "files of 'stabilityai/stable-diffusion-xl-base-1.0' in it."
            ) from error
        except NotImplementedError as error:
            # A layer that got no numbers was to be moved out of the meta device.
            raise ValueError(
                f"{name!r} lacks tensors of the UNet or the codec that its configuration calls "
                "for. Copy or download it again, or give the config of the model it was made from."
            ) from error
        check_all_loaded(pipe, name)
        return pipe

    # -- PISA ------------------------------------------------------------------------------------

    @property
    def pisa_layer_names(self) -> list[str]:
        """Fragments of names of the attention modules that use PISA."""
        return [layer for layer in self.config.pisa_layers.split(",") if layer]

    def install_pisa(self) -> PisaContext:
        """Puts PISA into the configured layers of the UNet (again) and returns its context."""
        config = PisaConfig.from_dict(dict(self.config.pisa))
        self._pisa_context = install_pisa(self.unet, self.pisa_layer_names, config)
        self._pisa_context.of_pipeline = True
        return self._pisa_context

    # -- The call --------------------------------------------------------------------------------

    @one_at_a_time
    @torch.no_grad()
    def __call__(
        self,
        image: ImageInput,
        disparity: ImageInput | None = None,
        df: PerImage | None = None,
        K: PerImage | None = None,
        *,
        focus: Any = None,
        focus_range: Sequence[PerImage] | None = None,
        whole_subject: bool = False,
        f_number: float | None = None,
        focal_length_mm: float | None = None,
        focal_length_35mm: float | None = None,
        sensor_width_mm: float | None = None,
        camera: Camera | None = None,
        focus_distance_m: float | None = None,
        farthest_distance_m: float = math.inf,
        metric: bool = False,
        tiling: Tiling = "auto",
        preserve_detail: bool = True,
        return_coc: bool = False,
        generator: torch.Generator | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> BokehDiffPipelineOutput | tuple[Any, ...]:
        """Renders all-in-focus photos as a lens would have taken them.

        What is in focus is said by one of ``df``, ``focus`` and ``focus_range``; how strong the
        blur is by ``K`` or by a camera. One photo may be given several values of them and then
        comes back as often.

        Args:
            image: PIL image, numpy array (H, W, 3), tensor (3, H, W) or (B, 3, H, W), path, or a
                list of them of one size; display sRGB, floats in [0, 1].
            disparity: one map per photo, of its size: numpy array, tensor, path, or a list. Larger
                is nearer, in [0, 1] unless ``metric``. NaN and infinity are holes and get filled.
                Without one, :attr:`depth_estimator` estimates it.
            df: disparity of the plane in focus, in the unit of the map; one number, or one per
                picture.
            K: blur strength, pixels of circle-of-confusion radius per unit of disparity; one
                number, or one per picture; 20 without a camera. The radius is
                ``K * |disparity - df|``.
            focus: a pixel ``(x, y)``, a box ``(x0, y0, x1, y1)``, a mask of the photo's size,
                ``"auto"``, or ``"sharpest"`` for a photo that is shallow already; a list holds one
                per picture. See :func:`bokehdiff.focus.find_focus`.
            focus_range: ``(from, to)``, disparities between which everything stays sharp.
            whole_subject: keep all that the box or mask of ``focus`` holds sharp, not one plane.
            f_number, focal_length_mm, focal_length_35mm, sensor_width_mm: a camera; what is not
                given is taken from the EXIF data of the (first) photo, a path or PIL image. See
                :meth:`bokehdiff.camera.Camera.from_photo`.
            camera: a :class:`bokehdiff.camera.Camera`, instead of these four.
            focus_distance_m: distance of what is in focus. It ties relative disparity to metres, as
                a camera needs; metric disparity knows it.
            farthest_distance_m: distance of relative disparity 0.
            metric: disparity, df and focus_range are in 1/metres.
            tiling: how large photos are cut, see :mod:`bokehdiff.pipelines.tiling`.
            preserve_detail: put back what the codec lost where nothing is blurred, see
                :func:`bokehdiff.pipelines.detail.put_back_detail`. K = 0 then returns the photo.
            return_coc: also return the photo with its circles of confusion painted over it.
            generator: source of randomness; the default PISA preset draws nothing.
            output_type: ``"pil"``, ``"np"``, ``"pt"`` or ``"latent"``.
            return_dict: return a plain tuple when false.
            callback_on_step_end: ``callback(pipeline, step, timestep, tensors)`` after the one
                step, step 0; a dictionary that it returns replaces tensors.
            callback_on_step_end_tensor_inputs: names of the tensors it gets; ``"latents"``.

        Returns:
            :class:`BokehDiffPipelineOutput` with the rendered ``images``, of the size of the input.

        Raises:
            ValueError: an input that cannot be meant; the message says what to do.
            RuntimeError: PISA is not installed in the UNet.
        """
        # 1. Check inputs before any work is done.
        self.check_ready(generator, output_type, tiling)
        self.check_callback(callback_on_step_end, callback_on_step_end_tensor_inputs)
        lens_parts = (f_number, focal_length_mm, focal_length_35mm, sensor_width_mm)
        if any(part is not None for part in lens_parts):
            if camera is not None:
                raise ValueError("camera was given, and parts of another one; give one of them.")
            camera = Camera.from_photo(
                image[0] if isinstance(image, (list, tuple)) and image else image,
                f_number=f_number,
                focal_length_mm=focal_length_mm,
                focal_length_35mm=focal_length_35mm,
                sensor_width_mm=sensor_width_mm,
            )
        check_lens_arguments(df, K, focus, focus_range, whole_subject, camera, focus_distance_m)
        # 2. Read, estimate the disparity if there is none.
        photo, disparity_map, metric = self.read_inputs(image, disparity, metric)
        lens = choose_lens(
            disparity_map,
            df=df,
            K=K,
            focus=focus,
            focus_range=focus_range,
            whole_subject=whole_subject,
            camera=camera,
            focus_distance_m=focus_distance_m,
            farthest_distance_m=farthest_distance_m,
            metric=metric,
            image=photo,
        )
        # 3. Pad and encode.
        scene = self._encoded(photo, disparity_map, metric, tiling)
        # 4. One step of the UNet, decode, put detail back, output.
        output = self._rendered(
            scene,
            lens,
            tiling=tiling,
            preserve_detail=preserve_detail,
            return_coc=return_coc,
            generator=generator,
            output_type=output_type,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        return output if return_dict else output.to_tuple()

    @one_at_a_time
    @torch.no_grad()
    def prepare(
        self,
        image: ImageInput,
        disparity: ImageInput | None = None,
        metric: bool = False,
        *,
        tiling: Tiling = "auto",
    ) -> BokehScene:
        """Does the part of the work that focus and blur do not change: reading, checking, encoding.

        Args:
            image, disparity, metric, tiling: as of :meth:`__call__`.

        Returns:
            A :class:`BokehScene` for :meth:`render`.

        Raises:
            ValueError: an input that cannot be meant.
        """
        check_tiling(tiling)
        return self._encoded(*self.read_inputs(image, disparity, metric), tiling)

    @one_at_a_time
    @torch.no_grad()
    def render(
        self,
        scene: BokehScene,
        df: PerImage | None = None,
        K: PerImage | None = None,
        *,
        focus: Any = None,
        focus_range: Sequence[PerImage] | None = None,
        whole_subject: bool = False,
        camera: Camera | None = None,
        focus_distance_m: float | None = None,
        farthest_distance_m: float = math.inf,
        tiling: Tiling = "auto",
        preserve_detail: bool = True,
        return_coc: bool = False,
        generator: torch.Generator | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> BokehDiffPipelineOutput | tuple[Any, ...]:
        """Renders a prepared scene; nothing is encoded again, so refocusing is cheap.

        A scene of one photo is rendered as often as there are values of focus and blur, all in one
        batch.

        Args:
            scene: what :meth:`prepare` returned.
            df, K, focus, focus_range, whole_subject, camera, focus_distance_m, farthest_distance_m,
                tiling, preserve_detail, return_coc, generator, output_type, return_dict,
                callback_on_step_end, callback_on_step_end_tensor_inputs: as of :meth:`__call__`.

        Returns:
            As of :meth:`__call__`.

        Raises:
            ValueError: an input that cannot be meant.
            RuntimeError: PISA is not installed in the UNet.
        """
        self.check_ready(generator, output_type, tiling)
        self.check_callback(callback_on_step_end, callback_on_step_end_tensor_inputs)
        output = self._rendered(
            scene,
            self.choose_lens(
                scene,
                df=df,
                K=K,
                focus=focus,
                focus_range=focus_range,
                whole_subject=whole_subject,
                camera=camera,
                focus_distance_m=focus_distance_m,
                farthest_distance_m=farthest_distance_m,
            ),
            tiling=tiling,
            preserve_detail=preserve_detail,
            return_coc=return_coc,
            generator=generator,
            output_type=output_type,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        return output if return_dict else output.to_tuple()

    @one_at_a_time
    @torch.no_grad()
    def focus_stack(
        self,
        image: ImageInput,
        disparity: ImageInput | None = None,
        dfs: PerImage | None = None,
        Ks: PerImage | None = None,
        *,
        metric: bool = False,
        batch_size: int = 1,
        tiling: Tiling = "auto",
        generator: torch.Generator | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        **lens: Any,
    ) -> BokehDiffPipelineOutput | tuple[Any, ...]:
        """One photo rendered with many settings of the lens; it is encoded once.

        Args:
            image, disparity, metric, tiling, generator, output_type, return_dict: as of
                :meth:`__call__`, of one photo.
            dfs: disparities of the planes in focus, one per picture, or one for all.
            Ks: strengths of the blur, one per picture, or one for all.
            batch_size: how many pictures are rendered at a time; more need more memory.
            lens: further settings of :meth:`render`: ``focus`` (a list) or ``focus_range`` in the
                place of ``dfs``, ``camera`` in the place of ``Ks``, ``preserve_detail``,
                ``return_coc``.

        Returns:
            :class:`BokehDiffPipelineOutput` whose ``images`` are in the order of the settings.

        Raises:
            ValueError: more than one photo, or an input that cannot be meant.
            RuntimeError: PISA is not installed in the UNet.
        """
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size is {batch_size!r}; wanted a whole number of at least 1.")
        self.check_ready(generator, output_type, tiling)
        scene = self.prepare(image, disparity, metric, tiling=tiling)
        if scene.batch_size != 1:
            raise ValueError(
                f"focus_stack got {scene.batch_size} photos; it renders one photo many times. "
                "Call it for each."
            )
        kept = ("preserve_detail", "return_coc")
        output = {name: lens.pop(name) for name in kept if name in lens}
        setting = self.choose_lens(scene, df=dfs, K=Ks, **lens)
        parts = [
            self._rendered(
                scene,
                setting.part(first, first + batch_size),
                tiling=tiling,
                generator=generator,
                output_type=output_type,
                **output,
            )
            for first in range(0, setting.count, batch_size)
        ]
        stack = BokehDiffPipelineOutput(
            images=_joined([part.images for part in parts]),
            coc=None if parts[0].coc is None else _joined([part.coc for part in parts]),
        )
        return stack if return_dict else stack.to_tuple()

    def check_ready(
        self,
        generator: torch.Generator | None,
        output_type: str,
        tiling: Tiling = "auto",
    ) -> None:
        """Checks what does not depend on the picture.

        Raises:
            ValueError: unknown ``output_type`` or ``tiling``, something that is no generator,
                a scheduler of another kind, no prompt.
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
        check_tiling(tiling)
        self.verify_pisa()
        self.check_no_ip_adapter()
        self.closed_form_step()
        if not self._has_text_encoders and self.stored_prompt is None:
            raise ValueError(
                "There is nothing to make the prompt embedding from. Load the folder with both "
                "text encoders and tokenizers, or pass "
                "stored_prompt=StoredPrompt.from_embeddings(...)."
            )

    def read_inputs(
        self, image: ImageInput, disparity: ImageInput | None, metric: bool
    ) -> tuple[torch.Tensor, torch.Tensor, bool]:
        """Photos (B, 3, H, W), their disparity (B, 1, H, W), and whether it is in 1/metres.

        Without a disparity, :attr:`depth_estimator` estimates it; it is loaded if there is none.

        Raises:
            ValueError: an input that cannot be meant.
        """
        image = as_image_batch(image)
        batch_size, _, height, width = image.shape
        if disparity is None:
            if self.depth_estimator is None:
                self.depth_estimator = DepthEstimator.from_pretrained()
            estimate = self.depth_estimator(image)
            if metric and not estimate.metric:
                raise ValueError(
                    "metric=True, but the depth model estimates relative disparity. Leave metric "
                    "out, or set pipe.depth_estimator to DepthEstimator.from_pretrained("
                    "'depth-anything/Depth-Anything-V2-Metric-Outdoor-Small-hf')."
                )
            disparity, metric = estimate.disparity, estimate.metric
        return image, as_disparity_batch(disparity, batch_size, height, width, metric), metric

    def choose_lens(self, scene: BokehScene, **settings: Any) -> LensSetting:
        """Focus and blur of the pictures that :meth:`render` makes with these settings; see
        :func:`bokehdiff.lens.choose_lens`.

        Raises:
            ValueError: settings that cannot be meant, or no scene.
        """
        if not isinstance(scene, BokehScene):
            raise ValueError(
                f"render got a {type(scene).__name__}; it takes the scene that "
                "prepare(image, disparity) returns. To render a photo at once, call the pipeline."
            )
        if scene.codec_of != self._shown:
            raise ValueError(
                "The scene was prepared with the codec of other weights than those in effect now. "
                "Prepare it again."
            )
        return choose_lens(scene.disparity, image=scene.image, metric=scene.metric, **settings)

    def _encoded(
        self, image: torch.Tensor, disparity: torch.Tensor, metric: bool, tiling: Tiling
    ) -> BokehScene:
        device = self._execution_device
        image, disparity = image.to(device), disparity.to(device)
        padded, _ = pad_to_multiple(image, self.image_multiple)
        latents = self.encode_latents(2 * padded - 1, tiling=tiling)
        self.maybe_free_model_hooks()
        return BokehScene(
            image=image,
            disparity=disparity,
            latents=latents,
            metric=metric,
            codec_of=self._shown,
        )

    def _rendered(
        self,
        scene: BokehScene,
        lens: LensSetting,
        *,
        tiling: Tiling,
        generator: torch.Generator | None,
        output_type: str,
        preserve_detail: bool = True,
        return_coc: bool = False,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> BokehDiffPipelineOutput:
        device = self._execution_device
        lens = lens.to(device)
        image, latents = (
            part.to(device).expand(lens.count, -1, -1, -1) for part in (scene.image, scene.latents)
        )
        padded, _ = pad_to_multiple(scene.disparity.to(device), self.image_multiple)
        defocus = lens.signed_defocus(padded)
        # PISA looks up who hides whom in [0, 1], whatever the unit.
        occluders = normalise_disparity(padded)[0] if scene.metric else padded
        occluders = occluders.expand(lens.count, -1, -1, -1)
        latents = self.predict_latents(latents, occluders, defocus, generator, tiling=tiling)
        latents = self.call_back(latents, callback_on_step_end, callback_on_step_end_tensor_inputs)
        defocus = crop_to(defocus, scene.size)
        images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
        if output_type == "latent":
            images = latents
        else:
            decoded = self.decode_latents(latents, generator, tiling=tiling)
            rendered = crop_to(decoded, scene.size) / 2 + 0.5
            if preserve_detail:
                if scene.codec_image is None and bool((defocus.abs() < RESIDUAL_GONE_RADIUS).any()):
                    own = self.decode_latents(scene.latents.to(device), tiling=tiling)
                    scene.codec_image = crop_to(own, scene.size) / 2 + 0.5
                codec_image = scene.codec_image
                if codec_image is not None:
                    codec_image = codec_image.to(device).expand_as(image)
                rendered = put_back_detail(rendered, image, codec_image, defocus)
            images = pictures_as(rendered.clamp(0, 1).float(), output_type)
        coc = None
        if return_coc:
            overlay = coc_overlay(image, defocus)
            coc = pictures_as(overlay, "pt" if output_type == "latent" else output_type)
        self.maybe_free_model_hooks()
        return BokehDiffPipelineOutput(images=images, coc=coc)

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

    def encode_latents(self, image: torch.Tensor, *, tiling: Tiling = None) -> torch.Tensor:
        """Scaled latents of an image, the mode of the posterior; differentiable.

        Args:
            image: (B, 3, H, W) in [-1, 1]; sides multiples of :attr:`image_multiple`.
            tiling: as of :meth:`__call__`; changes memory, not the result.

        Returns:
            (B, C, H / s, W / s), at least float32.
        """
        with self._vae_in_safe_precision(image.device):
            image = image.to(self.vae.dtype)
            strip = codec_strip_for(self.vae, tiling, *image.shape[-2:])
            if strip is None:
                latents = self.vae.encode(image).latent_dist.mode()
            else:
                latents = encode_in_tiles(self.vae, image, strip)
        latents = _at_least_float32(latents)
        mean, deviation = self._latent_statistics(latents)
        return (latents - mean) * (self.vae.config.scaling_factor / deviation)

    def predict_latents(
        self,
        latents: torch.Tensor,
        disparity: torch.Tensor,
        defocus: torch.Tensor,
        generator: torch.Generator | None = None,
        tiling: Tiling = "auto",
    ) -> torch.Tensor:
        """Latents of the blurred picture, by one call of the UNet and the closed-form step (Eq. 1).

        Args:
            latents: (B, C, h, w), scaled, of the padded image.
            disparity: (B, 1, H, W) in [0, 1], of the padded image, H = h * s.
            defocus: (B, 1, H, W), signed circle-of-confusion radius in pixels, positive nearer than
                the plane in focus.
            generator: source of randomness for PISA presets that draw.
            tiling: as of :meth:`__call__`. While gradients are recorded the picture is taken whole.

        Returns:
            (B, C, h, w).
        """
        check_tiling(tiling)
        if torch.is_grad_enabled():
            tiling = None
        occluders = disparity.clamp(0, NEAREST_DISPARITY)
        window_pixels = window_pixels_for(self.unet, tiling, latents.device)
        if window_pixels is not None or tiling in ("auto", None):
            noise = self.predict_noise(
                latents, occluders, defocus, generator, window_pixels=window_pixels
            )
        else:
            # One after the other, as how much a part sees around it depends on the picture's blur.
            pictures = zip(latents.split(1), occluders.split(1), defocus.split(1), strict=True)
            noise = torch.cat(
                [self.predict_noise_in_tiles(*one, generator, tiling) for one in pictures]
            )
        of_latents, of_noise = self.closed_form_step()
        return (of_latents * latents).sub_(noise.to(latents.dtype), alpha=of_noise)

    def predict_noise(
        self,
        latents: torch.Tensor,
        occluders: torch.Tensor,
        defocus: torch.Tensor,
        generator: torch.Generator | None = None,
        *,
        tile: Window | None = None,
        window_pixels: int | None = None,
    ) -> torch.Tensor:
        """What the UNet predicts in one call, (B, C, h, w).

        Args:
            latents, occluders, defocus, generator: as of :meth:`predict_latents`; disparity at most
                ``NEAREST_DISPARITY``.
            tile: where on the latents of a larger picture these lie. Their origin is what the UNet
                is told as the crop, in latent pixels as the authors do.
            window_pixels: side of the windows in which a local UNet works.
        """
        context = self.verify_pisa()
        batch_size, _, height, width = latents.shape
        scale = self.vae_scale_factor
        prompt_embeds, pooled_prompt_embeds = self.bokeh_prompt(batch_size, latents.device)
        # (original height and width, crop top and left, target height and width), pixels.
        # In float32 whatever the UNet's dtype: bfloat16 cannot tell 1001 from 1000.
        tile = tile or Window(0, 0, height, width, height, width)
        image_size = (tile.height * scale, tile.width * scale)
        time_ids = latents.new_tensor([(*image_size, tile.top, tile.left, *image_size)])
        time_ids = time_ids.repeat(batch_size, 1)

        sample = latents
        if self.unet.config.in_channels != latents.shape[1]:
            maps = F.pixel_unshuffle(torch.cat([occluders, defocus], 1), scale).to(latents.dtype)
            sample = torch.cat([latents, maps], dim=1)
            del maps  # a large picture needs their memory
        timestep = torch.full((batch_size,), self.config.timestep, device=latents.device)

        if window_pixels is None:  # in windows a UNet finds the scene of each in its own input
            context.set_scene(occluders, defocus.abs(), height, width, scale)
        context.generator = generator
        options = {} if window_pixels is None else {"window_pixels": window_pixels}
        try:
            noise: torch.Tensor = self.unet(
                sample.to(self.unet.dtype),
                timestep,
                encoder_hidden_states=prompt_embeds,
                added_cond_kwargs={"text_embeds": pooled_prompt_embeds, "time_ids": time_ids},
                return_dict=False,
                **options,
            )[0]
        finally:
            # Checkpointed and compiled layers look at the scene again during the backward pass.
            if not torch.is_grad_enabled():
                context.clear()
                context.generator = None
        return noise

    def predict_noise_in_tiles(
        self,
        latents: torch.Tensor,
        occluders: torch.Tensor,
        defocus: torch.Tensor,
        generator: torch.Generator | None,
        tiling: Tiling,
    ) -> torch.Tensor:
        """The noise of one picture (1, C, h, w), predicted in tiles and blended in float32."""
        height, width = latents.shape[-2:]
        scale = self.vae_scale_factor
        radius = float(defocus.abs().max())
        tiles = tiles_for(tiling, height, width, self.latent_multiple, scale, radius)
        if not tiles:
            return self.predict_noise(latents, occluders, defocus, generator)
        total = latents.new_zeros(latents.shape, dtype=torch.float32)
        weights = total.new_zeros(height, width)
        for tile, weight in tiles:
            pixels = tile.scaled(scale)
            noise = self.predict_noise(
                tile.crop(latents),
                pixels.crop(occluders),
                pixels.crop(defocus),
                generator,
                tile=tile,
            )
            weight = weight.to(total.device)
            tile.crop(total).addcmul_(noise.float(), weight)
            tile.crop(weights).add_(weight)
        return total.div_(weights)

    def decode_latents(
        self,
        latents: torch.Tensor,
        generator: torch.Generator | None = None,
        *,
        tiling: Tiling = None,
    ) -> torch.Tensor:
        """Image of scaled latents (B, C, h, w): (B, 3, H, W) around [-1, 1]; differentiable.

        ``tiling``, as of :meth:`__call__`, changes memory, not the result.
        """
        mean, deviation = self._latent_statistics(latents)
        latents = latents * (deviation / self.vae.config.scaling_factor) + mean
        with self._vae_in_safe_precision(latents.device):
            latents = latents.to(self.vae.dtype)
            height, width = (side * self.vae_scale_factor for side in latents.shape[-2:])
            strip = codec_strip_for(self.vae, tiling, height, width)
            if strip is not None:
                image = decode_in_tiles(self.vae, latents, strip)
            else:
                # Pictures at once gain nothing, and need as many times the memory.
                batches = [latents] if torch.is_grad_enabled() else latents.split(1)
                image = torch.cat(
                    [
                        self.vae.decode(batch, return_dict=False, generator=generator)[0]
                        for batch in batches
                    ]
                )
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
        device, dtype = device or self._execution_device, self.unet.dtype
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
        prompt_embeds = prompt_embeds.to(device, dtype).expand(batch_size, -1, -1)
        return prompt_embeds, pooled_prompt_embeds.to(device, dtype).expand(batch_size, -1)

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


def _joined(parts: list[Any]) -> Any:
    """Several outputs of one type as one."""
    if isinstance(parts[0], list):
        return [image for part in parts for image in part]
    return np.concatenate(parts) if isinstance(parts[0], np.ndarray) else torch.cat(parts)


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
