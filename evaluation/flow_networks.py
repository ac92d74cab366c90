"""BokehFlow networks as commands ask for them: a folder, the shipped one, or random weights."""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from evaluation.methods import SHIPPED
from evaluation.photographs import Photograph

if TYPE_CHECKING:
    from bokehdiff.models.bokehflow import BokehFlowModel

__all__ = [
    "add_networks",
    "blurred_by",
    "described",
    "networks_asked_for",
    "random_network",
    "read_network",
]


def read_network(folder: str | Path, device: str = "cpu") -> BokehFlowModel:
    """The network in a folder of its own or of a pipeline; ``"flow"`` is that inside the package.

    Raises:
        ValueError: no BokehFlow there, or a damaged one.
    """
    from bokehdiff.pipelines.bokehflow_loading import read_bokehflow

    if str(folder) == SHIPPED and not Path(folder).is_dir():
        import bokehdiff

        folder = bokehdiff.FLOW_NANO
    return read_bokehflow(str(folder)).to(device)


def random_network(variant: str, mixer: str, seed: int = 0, **options: Any) -> BokehFlowModel:
    """A published size with random weights that depend on `seed` alone."""
    from bokehdiff.models.bokehflow import BokehFlowModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = BokehFlowModel.from_variant(variant, mixer=mixer, **options)
    return network.eval().requires_grad_(False)


def described(network: BokehFlowModel) -> str:
    """Its parameters and what its options are, in words."""
    from bokehdiff.models.bokehflow import REFERENCE_WIDTH

    options = network.config
    return (
        f"{options.mixer}, {options.channels} channels, {options.blocks} + {options.blocks} "
        f"blocks, {sum(value.numel() for value in network.parameters()):,} parameters, fusion "
        f"{options.fusion}, renderer {network.renderer}, temporal {options.temporal}, circles of "
        f"confusion up to {options.max_coc_radius:g} px in {REFERENCE_WIDTH}"
    )


@torch.inference_mode()
def blurred_by(
    network: BokehFlowModel, photograph: Photograph, physics_alone: bool = False
) -> np.ndarray:
    """(H, W, 3) float64 display-encoded sRGB in [0, 1] of a photograph with its true disparity.

    The range of the scene, df in it, is mapped to disparity from 0 to 1, and K is divided by the
    same factor, so that every circle of confusion keeps its radius.

    Args:
        network: on any device.
        photograph: with a K.
        physics_alone: what the network renders before it adds anything of its own.
    """
    low, high = photograph.disparity_range
    low, high = min(low, photograph.df), max(high, photograph.df)
    unit = high - low or 1.0
    image = torch.from_numpy(photograph.image / np.float32(255)).permute(2, 0, 1)[None]
    disparity = torch.from_numpy(((photograph.disparity - low) / unit).clip(0, 1))[None, None]
    output = network.blur(
        image.to(network.device),
        (photograph.df - low) / unit,
        photograph.K * unit,
        disparity=disparity.float().to(network.device),
        return_physics=physics_alone,
    )
    picture = output.physics if physics_alone else output.bokeh
    return picture[0].permute(1, 2, 0).cpu().double().numpy()


def add_networks(
    parser: argparse.ArgumentParser, variants: Sequence[str], mixers: Sequence[str]
) -> None:
    """``--model``, and ``--variant``, ``--mixer`` and ``--option`` of random weights."""
    parser.add_argument(
        "--model",
        metavar="FOLDER",
        help=f"a trained network; {SHIPPED} is the one inside the package",
    )
    parser.add_argument(
        "--variant",
        action="append",
        metavar="NAME",
        help="a published size with random weights, nano, small or base; may be given several "
        f"times. Default: {', '.join(variants)}",
    )
    parser.add_argument(
        "--mixer",
        action="append",
        metavar="NAME",
        help="its blocks, gated_conv or bigdr; may be given several times. Default: "
        f"{', '.join(mixers)}",
    )
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an argument of BokehFlowModel for random weights, for instance "
        "fusion=depth_to_bokeh; may be given several times",
    )
    parser.set_defaults(default_variants=tuple(variants), default_mixers=tuple(mixers))


def networks_asked_for(arguments: argparse.Namespace) -> dict[str, BokehFlowModel]:
    """The networks of :func:`add_networks` by name, on ``--device``.

    Raises:
        ValueError: options that exclude each other, or do not exist.
    """
    if arguments.model:
        if arguments.variant or arguments.mixer or arguments.option:
            raise ValueError(
                "--model is a network as it is; leave out --variant, --mixer and --option, which "
                "choose random weights."
            )
        name = arguments.model if arguments.model == SHIPPED else Path(arguments.model).name
        return {name: read_network(arguments.model, arguments.device)}
    options = options_from(arguments.option)
    return {
        f"{mixer} {variant}": random_network(variant, mixer, **options).to(arguments.device)
        for mixer in arguments.mixer or arguments.default_mixers
        for variant in arguments.variant or arguments.default_variants
    }


def options_from(texts: Sequence[str]) -> dict[str, Any]:
    """Arguments of BokehFlowModel from ``NAME=VALUE``; values are JSON, or words.

    Raises:
        ValueError: no such argument, or no ``=``.
    """
    from bokehdiff.models.bokehflow import BokehFlowModel

    known = set(inspect.signature(BokehFlowModel.__init__).parameters) - {"self", "mixer"}
    options = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or name not in known:
            raise ValueError(
                f"--option is {text!r}; wanted NAME=VALUE with one of {', '.join(sorted(known))}."
            )
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options
