"""A bokeh stack from one photo by FLUX.1-Kontext: ``BokehStackPipeline``.

The way of a picture: the photo is brought to the size on which the network works and becomes the
reference of FLUX.1-Kontext; one picture for each blur strength K is painted from the same noise,
with K in the prompt and, through :class:`~bokehdiff.models.bokeh_adapter.BokehAdapter`, in every
attention module; the results are brought back to the size of the photo. No depth is estimated.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxTransformer2DModel,
)
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
    T5EncoderModel,
    T5TokenizerFast,
)

from ..bokeh_adapter_files import read_bokeh_adapter, write_bokeh_adapter
from ..camera import Camera
from ..checkpoints import is_no_hub_id
from ..colour_transfer import COLOUR_TRANSFERS, ColourTransfer, transfer_colours
from ..images import ImageInput, as_image_batch, crop_to, pad_to_multiple

# A component is found again at loading only if its module is imported by then.
from ..models.bokeh_adapter import LARGEST_STRENGTH, BokehAdapter, BokehCondition
from ..stack_strengths import check_strengths, strengths_of_camera
from .picture_output import pictures_as
from .stack_inputs import (
    check_generators,
    check_prompts,
    network_strengths,
    working_size,
)

OUTPUT_TYPES = ("pil", "np", "pt")

StepCallback = Callable[[Any, int, torch.Tensor, dict[str, Any]], dict[str, Any]]


@dataclass
class BokehStackOutput(BaseOutput):
    """What :class:`BokehStackPipeline` returns.

    Args:
        images: one picture for each K, in the order they were given, display sRGB, of the size of
            the photo. By ``output_type``: ``"pil"`` a list of N images of 8 bits; ``"np"`` float32
            (N, H, W, 3) in [0, 1]; ``"pt"`` float32 (N, 3, H, W) in [0, 1].
        K: N blur strengths of the photo, pixels of blur radius per 1/metre.
        network_K: the same of the picture on which the network works, as it was told.
        network_size: (height, width) of that picture, without its padding.
        prompts: N texts, of which those of K = 0 are not used; None if embeddings were given.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    K: list[float]
    network_K: list[float]
    network_size: tuple[int, int]
    prompts: list[str] | None = None


class BokehStackPipeline(FluxKontextPipeline):
    """Paints one photo with several strengths of lens blur, without a depth map.

    Load with ``BokehStackPipeline.from_pretrained("black-forest-labs/FLUX.1-Kontext-dev",
    dtype=torch.bfloat16)`` and :meth:`load_bokeh_adapter`, or from a folder that this class saved,
    in which the adapter is. ``DiffusionPipeline.from_pretrained`` does not know this class;
    ``FluxKontextPipeline.from_pretrained`` loads its folders and leaves the adapter out.

    **K is that of the photo given**: a thing at disparity d (1/metres) is blurred over a radius of
    ``K |d - d_focus|`` of its pixels. The network, which works on a smaller picture of it, is told
    ``K * its width / width of the photo``; that must lie within [1, 30].

    **The adapter lives beside the transformer.** Its processors are in the attention modules and
    compute what stock FLUX computes unless this pipeline calls them, so a transformer may be shared
    with other pipelines. Offloading leaves the adapter, which is small, on the device.

    There is no true classifier-free guidance (``true_cfg_scale``, ``negative_prompt``): the
    guidance of FLUX.1-Kontext is embedded.

    Args:
        scheduler, vae, transformer, text_encoder, tokenizer, text_encoder_2, tokenizer_2,
            image_encoder, feature_extractor: of FLUX.1-Kontext. Text encoders and tokenizers may be
            absent where every call brings embeddings of its prompt.
        bokeh_adapter: what makes the transformer follow K; :meth:`load_bokeh_adapter` brings it
            too.

    Raises:
        ValueError: an adapter of another size than the transformer.
    """

    # The processors use the adapter inside the transformer's forward pass, where no hook of its own
    # would bring it to the device.
    _exclude_from_cpu_offload = ["bokeh_adapter"]
    _optional_components = [
        *FluxKontextPipeline._optional_components,
        "text_encoder",
        "tokenizer",
        "text_encoder_2",
        "tokenizer_2",
        "bokeh_adapter",
    ]

    def __init__(
        self,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKL,
        transformer: FluxTransformer2DModel,
        text_encoder: CLIPTextModel | None = None,
        tokenizer: CLIPTokenizer | None = None,
        text_encoder_2: T5EncoderModel | None = None,
        tokenizer_2: T5TokenizerFast | None = None,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        feature_extractor: CLIPImageProcessor | None = None,
        bokeh_adapter: BokehAdapter | None = None,
    ) -> None:
        super().__init__(
            scheduler=scheduler,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            transformer=transformer,
            image_encoder=image_encoder,
            feature_extractor=feature_extractor,
        )
        self.register_modules(bokeh_adapter=bokeh_adapter)
        if bokeh_adapter is not None:
            self._install(bokeh_adapter)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> BokehStackPipeline:
        """The pipeline in a folder or on the Hub: saved by this class, or FLUX.1-Kontext's own.

        Args:
            pretrained_model_name_or_path: folder, or ``"owner/name"`` on the Hub.
            kwargs: as of ``DiffusionPipeline.from_pretrained``; ``dtype=torch.bfloat16`` for
                instance.

        Raises:
            ValueError: a path that does not exist, or a folder without the parts needed here.
        """
        name = os.fspath(pretrained_model_name_or_path)
        if os.path.exists(name):
            _check_kontext_folder(name, given=kwargs)
        elif is_no_hub_id(name):
            raise ValueError(
                f"There is no folder {name!r}. Give a folder written by save_pretrained, or the "
                "name of FLUX.1-Kontext on the Hub, 'black-forest-labs/FLUX.1-Kontext-dev'."
            )
        return super().from_pretrained(name, **kwargs)

    # -- The adapter -----------------------------------------------------------------------------

    def load_bokeh_adapter(
        self,
        path_or_hub_id: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> None:
        """Reads a trained adapter; it takes the place of one that is there.

        It goes to the device of the pipeline and gets the dtype of the transformer. If an error is
        raised, nothing has changed.

        Args:
            path_or_hub_id: the authors' ``bokeh_lora.bin``, a ``.safetensors`` file, a folder with
                either, or ``"owner/name"`` on the Hub; see :mod:`bokehdiff.bokeh_adapter_files`.
            revision: branch, tag or commit on the Hub.
            token: of the Hub, for repositories that are not public.

        Raises:
            ValueError: nothing there, a damaged file, or an adapter that does not fit the
                transformer.
        """
        adapter = read_bokeh_adapter(
            path_or_hub_id, transformer=self.transformer, revision=revision, token=token
        )
        self._install(adapter.to(self._execution_device, self.transformer.dtype))
        self.register_modules(bokeh_adapter=adapter)

    def save_bokeh_adapter(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Writes the adapter alone, for :meth:`load_bokeh_adapter`; ``save_pretrained`` writes it
        with the whole pipeline.

        Args:
            path: file that ends in ``.safetensors``, or ``.bin`` as the authors' does.
            overwrite: replace a file that is there.

        Raises:
            FileExistsError: the file is there, and ``overwrite`` is off.
            FileNotFoundError: its folder is not there.
            ValueError: there is no adapter, or another suffix.
        """
        write_bokeh_adapter(self._adapter(), path, overwrite=overwrite)

    def unload_bokeh_adapter(self) -> None:
        """Takes the adapter out; the transformer is that of FLUX.1-Kontext again."""
        BokehAdapter.remove(self.transformer)
        self.register_modules(bokeh_adapter=None)

    def _install(self, adapter: BokehAdapter) -> None:
        """Puts the adapter beside the transformer, in place of one that is there."""
        if adapter.is_installed(self.transformer):
            return
        BokehAdapter.remove(self.transformer)
        try:
            adapter.install(self.transformer)
        except ValueError:
            if self.bokeh_adapter is not None and self.bokeh_adapter is not adapter:
                self.bokeh_adapter.install(self.transformer)
            raise

    def _adapter(self) -> BokehAdapter:
        if self.bokeh_adapter is None:
            raise ValueError(
                "No adapter is loaded, without which FLUX.1-Kontext knows nothing of K. Call "
                "load_bokeh_adapter('weights/bokeh_lora.bin') first, with a file, a folder or a "
                "name on the Hub."
            )
        return self.bokeh_adapter

    def enable_group_offload(
        self, *arguments: Any, exclude_modules: str | list[str] | None = None, **options: Any
    ) -> None:
        """As of diffusers; the adapter stays on the device, as no hook would bring it there."""
        excluded = [exclude_modules] if isinstance(exclude_modules, str) else exclude_modules or []
        super().enable_group_offload(
            *arguments, exclude_modules=[*excluded, "bokeh_adapter"], **options
        )

    # -- The call --------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        image: ImageInput,
        K: float | Sequence[float] | np.ndarray | torch.Tensor | None = None,
        *,
        camera: Camera | None = None,
        f_numbers: float | Sequence[float] | None = None,
        focus_distance_m: float | None = None,
        prompt: str | Sequence[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.0,
        lora_scale: float = 1.0,
        bokeh_scale: float = 1.0,
        colour_transfer: ColourTransfer | None = "lab",
        max_area: int = 1024 * 1024,
        batch_size: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = 512,
    ) -> BokehStackOutput | tuple[Any, ...]:
        """Paints an all-in-focus photo once for each blur strength.

        How strong the blur is, is said by ``K``; by a camera and f-numbers; or by the EXIF data of
        the photo (a path or PIL image), if they say at which distance it was focused.

        Args:
            image: one photo: PIL image, numpy array (H, W, 3), tensor (3, H, W) or (1, 3, H, W), or
                path; display sRGB, floats in [0, 1].
            K: blur strengths of this photo, pixels of blur radius per 1/metre; one or many. 0 gives
                the photo itself.
            camera: whose blur to paint; by default the camera in the EXIF data.
            f_numbers: of that camera, a picture for each; default its own.
            focus_distance_m: distance of what is in focus, for a camera; default that in the EXIF
                data.
            prompt: the text, or one for each K; ``{K}`` in it becomes the K that the network is
                told, with two decimals. Default ``STACK_PROMPT``.
            prompt_embeds, pooled_prompt_embeds: (1 or N, tokens, channels) and (1 or N, channels)
                in place of a text, from :meth:`encode_prompt`.
            num_inference_steps: steps of denoising.
            guidance_scale: embedded guidance.
            lora_scale: times what the adapter adds to queries and keys.
            bokeh_scale: times what K adds to attention.
            colour_transfer: the colours of the photo are put back, in 8 bits: ``"lab"`` mean and
                deviation in LAB, ``"lab_mean"`` the mean, None leaves them as they were painted.
            max_area: pixels on which the network works, padding included; a larger photo is made
                smaller, and the results larger again.
            batch_size: number of pictures painted at once; default all. It changes memory, and
                results by no more than rounding.
            generator: of the noise; one generator gives the same noise to every K, as the authors
                do, a list one for each K. Default one with the seed ``STACK_SEED``.
            output_type: ``"pil"``, ``"np"`` or ``"pt"``.
            return_dict: return a plain tuple when false.
            callback_on_step_end: ``callback(pipeline, step, timestep, tensors)`` after each step of
                each batch.
            callback_on_step_end_tensor_inputs: names of the tensors it gets, ``"latents"`` or
                ``"prompt_embeds"``.
            max_sequence_length: tokens of the prompt.

        Returns:
            :class:`BokehStackOutput` with the ``images``, of the size of the photo.

        Raises:
            ValueError: an input that cannot be meant, K beyond what the network can do, no adapter.
            torch.OutOfMemoryError: a batch that does not fit the device.
        """
        # 1. Check inputs before any work is done.
        adapter = self._adapter()
        check_options(output_type, colour_transfer, num_inference_steps, batch_size, max_area)
        photo = as_image_batch(image).float()
        if len(photo) != 1:
            raise ValueError(
                f"There are {len(photo)} photos; wanted one, of which a stack is made. Call the "
                "pipeline once for each."
            )
        height, width = photo.shape[-2:]
        if K is None:
            K = strengths_of_camera(image, (height, width), camera, f_numbers, focus_distance_m)
        elif camera is not None or f_numbers is not None or focus_distance_m is not None:
            raise ValueError(
                "K was given, and a camera or its f-numbers or focus distance; the blur is said by "
                "one of them."
            )
        strengths = check_strengths(K)
        working = working_size(width, height, max_area, self.image_multiple)
        told = network_strengths(strengths, (width, height), working)
        prompts = check_prompts(prompt, prompt_embeds, pooled_prompt_embeds, told)
        if prompts is not None and not self._has_text_encoders:
            raise ValueError(
                "This pipeline has no text encoders; wanted prompt_embeds and "
                "pooled_prompt_embeds, from encode_prompt of a pipeline that has them."
            )
        generators = check_generators(generator, len(strengths))
        self._install(adapter)
        device = self._execution_device
        photo = photo.to(device)
        stack = photo.repeat(len(strengths), 1, 1, 1)

        # K = 0 is the photo itself; the others are painted.
        painted = [number for number, strength in enumerate(strengths) if strength > 0]
        if painted:
            # 2. The photo at the size on which the network works.
            reference, size = pad_to_multiple(_resized(photo, working[::-1]), self.image_multiple)

            # 3. Text, strength and noise of each picture, whatever the batches.
            if prompts is not None:
                prompt_embeds, pooled_prompt_embeds, _ = self.encode_prompt(
                    [prompts[number] for number in painted],
                    device=device,
                    max_sequence_length=max_sequence_length,
                )
            else:
                assert prompt_embeds is not None and pooled_prompt_embeds is not None
                prompt_embeds, pooled_prompt_embeds = (
                    embeds.expand(len(strengths), *embeds.shape[1:])[painted].to(device)
                    for embeds in (prompt_embeds, pooled_prompt_embeds)
                )
            adapter.to(device)  # whatever offloading does with the rest
            strength = torch.tensor([told[number] for number in painted], device=device)
            embedding = adapter.embed(strength / LARGEST_STRENGTH)
            if len(generators) > 1:
                generators = [generators[number] for number in painted]
            noise = self._noise(reference, generators, prompt_embeds.dtype)
            noise = noise.expand(len(painted), -1, -1)

            # 4. Denoise and decode, batch after batch; back to the size of the photo.
            for first in range(0, len(painted), batch_size or len(painted)):
                batch = slice(first, first + (batch_size or len(painted)))
                pictures = self._painted(
                    reference,
                    prompt_embeds[batch],
                    pooled_prompt_embeds[batch],
                    noise[batch],
                    BokehCondition(embedding[batch], lora_scale, bokeh_scale),
                    num_inference_steps=num_inference_steps,
                    guidance_scale=guidance_scale,
                    callback_on_step_end=callback_on_step_end,
                    callback_on_step_end_tensor_inputs=list(callback_on_step_end_tensor_inputs),
                )
                stack[painted[batch]] = _resized(crop_to(pictures, size), (height, width))
            self.maybe_free_model_hooks()

        # 5. The colours of the photo; output.
        if colour_transfer is not None:
            colours = _eight_bits(photo)[0]
            for number in painted:
                picture = _eight_bits(stack[number : number + 1])[0]
                picture = transfer_colours(picture, colours, colour_transfer)
                stack[number] = torch.from_numpy(picture).to(device).permute(2, 0, 1) / 255
        output = BokehStackOutput(
            images=pictures_as(stack, output_type),
            K=strengths,
            network_K=told,
            network_size=(working[1], working[0]),
            prompts=prompts,
        )
        return output if return_dict else output.to_tuple()

    def _painted(
        self,
        reference: torch.Tensor,
        prompt_embeds: torch.Tensor,
        pooled_prompt_embeds: torch.Tensor,
        noise: torch.Tensor,
        condition: BokehCondition,
        **options: Any,
    ) -> torch.Tensor:
        """One batch of pictures of the size of the reference, (B, 3, h, w) float32 in [0, 1].

        Args:
            reference: (1, 3, h, w) in [0, 1], its sides multiples of :attr:`image_multiple`.
            prompt_embeds, pooled_prompt_embeds: (B, ...).
            noise: (B, tokens, channels) packed latents.
            condition: of B pictures.
            options: as of ``FluxKontextPipeline.__call__``.
        """
        height, width = reference.shape[-2:]
        try:
            latents = super().__call__(
                image=reference,
                prompt_embeds=prompt_embeds,
                pooled_prompt_embeds=pooled_prompt_embeds,
                height=height,
                width=width,
                # The size is chosen already; without these the photo would be squashed.
                max_area=height * width,
                _auto_resize=False,
                latents=noise,
                joint_attention_kwargs={"bokeh": condition},
                output_type="latent",
                return_dict=False,
                **options,
            )[0]
            latents = self._unpack_latents(latents, height, width, self.vae_scale_factor)
            latents = latents / self.vae.config.scaling_factor + self.vae.config.shift_factor
            # Pictures at once gain nothing in the codec, and need as many times the memory.
            decoded = [
                self.vae.decode(one.to(self.vae.dtype), return_dict=False)[0]
                for one in latents.split(1)
            ]
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(
                f"{len(noise)} pictures of {width} x {height} at once do not fit the memory of "
                f"{reference.device} ({error}). Give a smaller batch_size (1 is the least) or "
                "max_area, or call enable_model_cpu_offload()."
            ) from error
        finally:
            self._joint_attention_kwargs = None
        return torch.cat(decoded).float().mul(0.5).add(0.5).clamp(0, 1)

    def _noise(
        self, reference: torch.Tensor, generators: list[torch.Generator], dtype: torch.dtype
    ) -> torch.Tensor:
        """Packed latents (number of generators, tokens, channels) to begin with."""
        channels = self.transformer.config.in_channels // 4
        height, width = (side // self.vae_scale_factor for side in reference.shape[-2:])
        shape = (1, channels, height, width)
        noise = [
            randn_tensor(shape, generator=one, device=reference.device, dtype=dtype)
            for one in generators
        ]
        packed: torch.Tensor = self._pack_latents(
            torch.cat(noise), len(noise), channels, height, width
        )
        return packed

    @property
    def image_multiple(self) -> int:
        """What height and width of a picture are padded to a multiple of: 16 pixels for FLUX."""
        return 2 * int(self.vae_scale_factor)

    @property
    def _has_text_encoders(self) -> bool:
        parts = (self.text_encoder, self.text_encoder_2, self.tokenizer, self.tokenizer_2)
        return all(part is not None for part in parts)


def check_options(
    output_type: str,
    colour_transfer: str | None,
    num_inference_steps: int,
    batch_size: int | None,
    max_area: int,
) -> None:
    """Raises ``ValueError`` for options that cannot be meant."""
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type is {output_type!r}; wanted one of {OUTPUT_TYPES}.")
    if colour_transfer not in (None, *COLOUR_TRANSFERS):
        raise ValueError(
            f"colour_transfer is {colour_transfer!r}; wanted one of {COLOUR_TRANSFERS}, or None to "
            "leave the colours as they were painted."
        )
    for name, value in (
        ("num_inference_steps", num_inference_steps),
        ("batch_size", 1 if batch_size is None else batch_size),
        ("max_area", max_area),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}; wanted a whole number of at least 1.")


def _check_kontext_folder(folder: str, given: Any) -> None:
    """Raises ``ValueError`` unless a folder holds the parts of FLUX.1-Kontext."""
    index = os.path.join(folder, "model_index.json")
    try:
        with open(index, encoding="utf-8") as file:
            parts = json.load(file)
    except OSError:
        raise ValueError(
            f"{folder!r} holds no pipeline: it has no model_index.json. Give the folder that "
            "save_pretrained wrote, or that of FLUX.1-Kontext."
        ) from None
    except ValueError as error:
        raise ValueError(
            f"{index!r} is damaged ({error}). Copy or download the folder again."
        ) from None
    if not isinstance(parts, dict):
        parts = {}
    missing = [
        part
        for part in ("vae", "transformer", "scheduler")
        if part not in given and (parts.get(part) or [None])[0] is None
    ]
    if missing:
        raise ValueError(
            f"{folder!r} holds {parts.get('_class_name', 'something else')}, without "
            f"{', '.join(missing)}. BokehStackPipeline loads its own folders and those of "
            "FLUX.1-Kontext."
        )


def _resized(picture: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(B, 3, H, W) in [0, 1] at another (height, width), smoothed when made smaller."""
    if picture.shape[-2:] == size:
        return picture
    resized = F.interpolate(picture, size, mode="bicubic", antialias=True, align_corners=False)
    return resized.clamp(0, 1)


def _eight_bits(pictures: torch.Tensor) -> np.ndarray:
    """(B, H, W, 3) uint8 of (B, 3, H, W) in [0, 1], rounded to nearest."""
    return (pictures.permute(0, 2, 3, 1) * 255).round().byte().cpu().numpy()
