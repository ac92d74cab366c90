"""Parts of a loaded pipeline switched off, one at a time, and on again.

Nothing is trained again: a variant says what the part is worth to the model as it is. Where the
paper trains each variant, the model had a chance to make up for the loss.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from bokehdiff import BokehDiffPipeline
from bokehdiff.attention import PisaAttnProcessor, PisaConfig
from bokehdiff.checkpoints import codec_parameters
from bokehdiff.models import light_transport
from bokehdiff.models.light_transport_unet import LightTransportUNet
from evaluation.key_softmax import KeySoftmaxProcessor

__all__ = ["FULL", "TIMESTEPS", "Variant", "variants_of"]

FULL = "full"
"""Name of the model as it is."""

TIMESTEPS = (249, 499, 749)
"""Those of the paper's ablation."""


@dataclass(frozen=True)
class Variant:
    """A model with a part missing."""

    name: str
    description: str
    applied: Callable[[BokehDiffPipeline], AbstractContextManager[None]]
    """While the context lasts, the pipeline is the variant; afterwards it is as before."""


def variants_of(
    pipeline: BokehDiffPipeline, weights: str | None = None
) -> tuple[list[Variant], dict[str, str]]:
    """The variants of a loaded pipeline, :data:`FULL` first; and why others are missing, by name.

    Args:
        pipeline: of the embedded checkpoint's kind, or of Stable Diffusion XL's.
        weights: name of the trained weights in it (``load_bokeh_weights``), whose encoder can be
            exchanged for the base model's.
    """
    full = Variant(FULL, "the model as it is", lambda _: contextlib.nullcontext())
    query_softmax = Variant(
        "no query softmax",
        "PISA's softmax runs over the keys, as in ordinary attention: a source no longer shares "
        "its energy out",
        key_softmax,
    )
    if isinstance(pipeline.unet, LightTransportUNet):
        same = "the network writes its clean prediction as noise of whatever timestep it is told"
        missing = {f"T = {one}": f"{same}: the picture is the same" for one in TIMESTEPS
                   if one != pipeline.config.timestep}  # fmt: skip
        missing["fixed encoder"] = "the codec is lossless and has no weights"
        variants = [full, query_softmax, *LIGHT_TRANSPORT_VARIANTS]
        if pipeline.unet.refiner is None:
            missing[AS_GIVEN.name] = "this network takes the disparity as it is"
        else:
            variants.append(AS_GIVEN)
        return variants, missing

    found = [full, query_softmax, *PISA_VARIANTS]
    for timestep in TIMESTEPS:
        if timestep != pipeline.config.timestep:
            found.append(
                Variant(
                    f"T = {timestep}",
                    f"the one step at timestep {timestep} instead of {pipeline.config.timestep}",
                    functools.partial(another_timestep, timestep=timestep),
                )
            )
    reason = why_no_other_encoder(pipeline, weights)
    if reason:
        return found, {"fixed encoder": reason}
    encoder = Variant(
        "fixed encoder",
        "the encoder of the base model in the place of the trained one",
        functools.partial(base_encoder, weights=weights),
    )
    return [*found, encoder], {}


# -- Stable Diffusion XL ---------------------------------------------------------------------------


@contextlib.contextmanager
def key_softmax(pipeline: BokehDiffPipeline) -> Iterator[None]:
    """Every PISA layer normalises over keys."""
    installed = {
        layer: layer.processor
        for layer in pipeline.unet.modules()
        if isinstance(layer, Attention) and isinstance(layer.processor, PisaAttnProcessor)
    }
    for layer, processor in installed.items():
        layer.set_processor(KeySoftmaxProcessor(processor.context, processor.ordinary))
    try:
        yield
    finally:
        for layer, processor in installed.items():
            layer.set_processor(processor)


@contextlib.contextmanager
def other_pisa(
    pipeline: BokehDiffPipeline, change: Callable[[PisaConfig], PisaConfig]
) -> Iterator[None]:
    """PISA with other settings."""
    context = pipeline.verify_pisa()
    config = context.config
    context.config = change(config)
    try:
        yield
    finally:
        context.config = config


def without_circles(config: PisaConfig) -> PisaConfig:
    """A mask that is the same everywhere, and no softer occlusion than before."""
    hard = config.hardness >= config.occlusion_ceiling_until
    until = 1.0 if hard else config.occlusion_ceiling_until
    return config.replace(hardness=1.0, occlusion_ceiling_until=until)


@contextlib.contextmanager
def another_timestep(pipeline: BokehDiffPipeline, timestep: int) -> Iterator[None]:
    """The one step at another timestep."""
    before = pipeline.config.timestep
    pipeline.register_to_config(timestep=timestep)
    try:
        yield
    finally:
        pipeline.register_to_config(timestep=before)


@contextlib.contextmanager
def base_encoder(pipeline: BokehDiffPipeline, weights: str) -> Iterator[None]:
    """Trained weights in the UNet alone."""
    pipeline.set_adapters(weights, {"unet": 1.0, "vae": 0.0})
    try:
        yield
    finally:
        pipeline.set_adapters(weights, {"unet": 1.0, "vae": 1.0})


def why_no_other_encoder(pipeline: BokehDiffPipeline, weights: str | None) -> str | None:
    """Why the trained encoder cannot be exchanged for the base model's, or None if it can."""
    if weights is None:
        return (
            "the folder does not say which weights were trained; give the base model as --model, "
            "and what was trained as --bokeh-weights"
        )
    if weights in getattr(pipeline.vae, "peft_config", {}):
        return None
    trained = {name: value.clone() for name, value in codec_parameters(pipeline.vae).items()}
    with base_encoder(pipeline, weights):
        base = codec_parameters(pipeline.vae)
        if all(torch.equal(base[name], value) for name, value in trained.items()):
            return "the encoder was not trained"
    return None


PISA_VARIANTS = [
    Variant(
        "no CoC",
        "PISA without circles of confusion: light may go everywhere",
        functools.partial(other_pisa, change=without_circles),
    ),
    Variant(
        "no occlusion",
        "PISA without self-occlusion: nothing is in the way of light",
        functools.partial(other_pisa, change=lambda config: config.replace(segments=0)),
    ),
]


# -- The embedded checkpoint -----------------------------------------------------------------------


@contextlib.contextmanager
def silenced(pipeline: BokehDiffPipeline, layer: str) -> Iterator[None]:
    """A layer of the UNet, by name, whose output is zero."""
    hook = pipeline.unet.get_submodule(layer).register_forward_hook(
        lambda module, given, output: torch.zeros_like(output)
    )
    try:
        yield
    finally:
        hook.remove()


@contextlib.contextmanager
def one_circle(pipeline: BokehDiffPipeline) -> Iterator[None]:
    """Every circle of confusion as wide as the mean of the picture; sides of the focus stay."""

    def evened(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        *others, defocus, windows = given
        mean = defocus.abs().mean((1, 2, 3), keepdim=True)
        return *others, torch.where(defocus < 0, -mean, mean), windows

    hook = pipeline.unet.light_transport.register_forward_pre_hook(evened)
    try:
        yield
    finally:
        hook.remove()


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute with another value; one that only the class has is uncovered again."""
    was_there, before = name in vars(owner), getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if was_there:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


@contextlib.contextmanager
def no_compositing(pipeline: BokehDiffPipeline) -> Iterator[None]:
    """Light of all slabs summed up and divided by their coverage: nothing covers anything."""
    transport = pipeline.unet.light_transport
    add_arrived = transport.add_arrived

    def add_all(accepted: Tensor, groups: dict[str, Tensor], arrived: Tensor, step: Tensor) -> None:
        summed = accepted + arrived
        add_arrived(accepted, groups, arrived, step)
        accepted.copy_(summed)

    with replaced(transport, "add_arrived", add_all):
        yield


@contextlib.contextmanager
def whole_lens(pipeline: BokehDiffPipeline) -> Iterator[None]:
    """Every part of the lens sees what the whole lens sees."""
    transport = pipeline.unet.light_transport
    add_arrived = transport.add_arrived

    def add_even(
        accepted: Tensor, groups: dict[str, Tensor], arrived: Tensor, step: Tensor
    ) -> None:
        add_arrived(accepted, groups, arrived.mean(1, keepdim=True).expand_as(arrived), step)

    with replaced(transport, "add_arrived", add_even):
        yield


@contextlib.contextmanager
def no_slopes(pipeline: BokehDiffPipeline) -> Iterator[None]:
    """Every pixel sends its light as if its surface faced the lens."""

    def flat(defocus: Tensor) -> Tensor:
        return defocus.new_zeros(2, *defocus.shape)

    with replaced(light_transport, "slope_of", flat):
        yield


@contextlib.contextmanager
def disparity_as_given(pipeline: BokehDiffPipeline) -> Iterator[None]:
    """No edge of the disparity map is moved."""
    hook = pipeline.unet.refiner.register_forward_hook(lambda module, given, output: given[1])
    try:
        yield
    finally:
        hook.remove()


@contextlib.contextmanager
def nothing_hidden(pipeline: BokehDiffPipeline) -> Iterator[None]:
    """No guess of what lies behind occluders: what no light reaches is filled from the photo."""
    guess = light_transport.hidden_surfaces

    def unseen(*arguments: Any) -> tuple[Tensor, ...]:
        *surface, seen = guess(*arguments)
        return *surface, torch.zeros_like(seen)

    with replaced(light_transport, "hidden_surfaces", unseen):
        yield


@contextlib.contextmanager
def no_lamps(pipeline: BokehDiffPipeline) -> Iterator[None]:
    """Clipped highlights have no light back."""
    with replaced(pipeline.unet, "emission_of", lambda photo, *_: torch.ones_like(photo[:, :1])):
        yield


LIGHT_TRANSPORT_VARIANTS = [
    Variant(
        "no CoC",
        "every circle of confusion as wide as the mean of the picture: blur does not follow depth",
        one_circle,
    ),
    Variant(
        "no occlusion",
        "the light of all depths averaged by energy instead of composited front to back",
        no_compositing,
    ),
    Variant(
        "no lens parts",
        "an occluder hides a share of the light from all of the lens, not all light from a part",
        whole_lens,
    ),
    Variant("no slopes", "slanted surfaces send light as if they faced the lens", no_slopes),
    Variant("no hidden surfaces", "nothing is guessed behind edges", nothing_hidden),
    Variant("no highlights", "clipped pixels are as bright as they look", no_lamps),
    Variant(
        "no correction",
        "the picture of light transport alone; the convolutional network's output is zero",
        functools.partial(silenced, layer="correction.conv_out"),
    ),
]
"""They reach into the models at: ``unet.light_transport``, called with (light, emission, disparity,
defocus, windows); its method ``add_arrived(accepted, groups, arrived, step)``; the method
``unet.emission_of(photo, ...)``; the layer ``unet.correction.conv_out``; and the function
``hidden_surfaces`` that ``light_transport.py`` calls, whose last result says where a guess is
used, and ``slope_of`` there."""

AS_GIVEN = Variant(
    "no refinement", "the edges of the disparity stay where they were given", disparity_as_given
)
"""For networks with a refiner."""
