"""Networks that judge pictures, with weights read from files that are checked by name and shape.

No package brings them. torchvision publishes its ImageNet classifiers at
https://download.pytorch.org/models/: ``vgg16-397923af.pth`` (528 MB), ``vgg19-dcbb9e9d.pth``
(548 MB) and ``alexnet-owt-7be5be79.pth`` (233 MB).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
from safetensors.torch import load_file
from torch import Tensor

__all__ = ["BACKBONES", "Published", "lpips_network", "read_weights", "vgg19_features"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_DEVIATION = (0.229, 0.224, 0.225)
"""Of red, green and blue in [0, 1] in the images that torchvision's networks were trained with."""

SUFFIXES = (".pth", ".pt", ".safetensors")


@dataclass(frozen=True)
class Published:
    """A file of weights as it is published."""

    url: str
    content: str

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


BACKBONES = {
    "vgg": Published(
        "https://download.pytorch.org/models/vgg16-397923af.pth", "the VGG-16 of torchvision"
    ),
    "vgg19": Published(
        "https://download.pytorch.org/models/vgg19-dcbb9e9d.pth", "the VGG-19 of torchvision"
    ),
    "alex": Published(
        "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth", "the AlexNet of torchvision"
    ),
}


def lpips_network(backbone: str, weights: str | Path | None, named_by: str) -> nn.Module:
    """The ``lpips.LPIPS`` in float32 on the CPU, frozen, in eval mode. Draws no random number.

    Args:
        backbone: one of ``BACKBONES``.
        weights, named_by: as of :func:`read_weights`.

    Raises:
        ImportError: the lpips package is missing.
        ValueError: the weights cannot be had, or are not those of this backbone.
    """
    try:
        import lpips
    except ImportError as missing:
        raise ImportError(
            "LPIPS needs the lpips package: pip install 'bokehdiff[train]'."
        ) from missing
    # On the meta device a network costs neither time nor memory nor random numbers. All its values
    # come from two files: the convolutions, and the weights of its layers that lpips ships.
    with warnings.catch_warnings(), torch.device("meta"):
        # lpips calls torchvision by arguments that torchvision has renamed.
        warnings.filterwarnings("ignore", module=r"torchvision\.models\._utils")
        network = lpips.LPIPS(net=backbone, pnet_rand=True, pretrained=False, verbose=False)
    parameters = dict(network.named_parameters())
    # What torchvision calls features.5.weight is net.slice2.5.weight here.
    names = {
        "features." + ".".join(name.split(".")[-2:]): name
        for name in parameters
        if name.startswith("net.")
    }
    shapes = {name: tuple(parameters[names[name]].shape) for name in names}
    convolutions = read_weights(BACKBONES[backbone], weights, shapes, named_by)
    learned = torch.load(
        Path(lpips.__file__).with_name("weights") / "v0.1" / f"{backbone}.pth",
        map_location="cpu",
        weights_only=True,
    )
    network.load_state_dict(
        {
            **{names[name]: value for name, value in convolutions.items()},
            **learned,
            # LPIPS holds each of its linear layers twice, as lin0 and as lins.0.
            **{name.replace("lin", "lins.", 1): value for name, value in learned.items()},
            **dict(network.named_buffers()),
        },
        assign=True,
    )
    return network.requires_grad_(False).eval()


RELU5_4 = 35
"""Index in the ``features`` of torchvision's VGG-19 of the last ReLU before the last pooling."""


def vgg19_features(weights: str | Path | None, named_by: str) -> nn.Sequential:
    """The layers of VGG-19 up to relu5_4 in float32 on the CPU, frozen, in eval mode. Draws no
    random number.

    Args:
        weights, named_by: as of :func:`read_weights`.

    Raises:
        ValueError: the weights cannot be had, or are not those of VGG-19.
    """
    from torchvision.models import vgg19

    with torch.device("meta"):
        layers: nn.Sequential = vgg19(weights=None).features[: RELU5_4 + 1]
    shapes = {f"features.{name}": tuple(one.shape) for name, one in layers.named_parameters()}
    state = read_weights(BACKBONES["vgg19"], weights, shapes, named_by)
    layers.load_state_dict(
        {name.removeprefix("features."): value for name, value in state.items()}, assign=True
    )
    return layers.requires_grad_(False).eval()


def read_weights(
    published: Published,
    weights: str | Path | None,
    shapes: dict[str, tuple[int, ...]],
    named_by: str,
) -> dict[str, Tensor]:
    """The float32 tensors that ``shapes`` names, from a file, a folder, or else torch's cache.

    Args:
        published: what the weights are, and where they are published.
        weights: a file, ``.pth`` or ``.safetensors``, with these tensors among others; a folder
            that it lies in under its published name; or None for torch's cache, into which it is
            downloaded if it is not there.
        shapes: of the tensors, by name.
        named_by: how errors say that files are named, ``by --weights``.

    Raises:
        ValueError: the weights cannot be had, or are others.
    """
    way_out = f"Fetch {published.url} and name it, or the folder it lies in, {named_by}."
    # A file of another kind, given to an unpickler, raises whatever its bytes happen to mean: hence
    # `except Exception`, twice.
    if weights is None:
        source = published.url
        try:
            state = torch.hub.load_state_dict_from_url(
                published.url,
                map_location="cpu",
                weights_only=True,
                # The names of torchvision's files hold the beginning of their SHA-256.
                check_hash="-" in published.name,
            )
        except Exception as problem:
            raise ValueError(
                f"{published.content} could neither be read from {torch.hub.get_dir()}/checkpoints "
                f"nor downloaded ({problem}). {way_out}"
            ) from problem
    else:
        file = _file_in(Path(weights), published, way_out)
        source = str(file)
        try:
            if file.suffix == ".safetensors":
                state = load_file(file)
            else:
                state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as problem:
            raise ValueError(
                f"{file} cannot be read as {published.content} ({problem}). {way_out}"
            ) from problem
        if not isinstance(state, dict):
            raise ValueError(
                f"{file} holds a {type(state).__name__}; wanted is the state dict of "
                f"{published.content}. {way_out}"
            )
    found = {
        name: tuple(value.shape) for name, value in state.items() if isinstance(value, torch.Tensor)
    }
    wrong = [
        f"{name} is {found[name]}" if name in found else f"{name} is missing"
        for name, shape in shapes.items()
        if found.get(name) != shape
    ]
    if wrong:
        raise ValueError(
            f"{source} does not hold {published.content}: of its {len(shapes)} tensors "
            f"{len(wrong)} do not fit ({', '.join(wrong)}). {way_out}"
        )
    return {name: state[name].float() for name in shapes}


def _file_in(weights: Path, published: Published, way_out: str) -> Path:
    """The file itself, or the one of the published name, whatever its suffix, in the folder."""
    if weights.is_file():
        return weights
    if not weights.is_dir():
        raise ValueError(f"There is no file or folder {weights} of weights. {way_out}")
    for suffix in SUFFIXES:
        file = weights / (Path(published.name).stem + suffix)
        if file.is_file():
            return file
    raise ValueError(
        f"{weights} holds no {published.name} (nor another of {', '.join(SUFFIXES)}), that is, "
        f"{published.content}. {way_out}"
    )
