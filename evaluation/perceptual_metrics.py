"""LPIPS and DISTS, with networks whose weights are read from files that are checked.

None of the packages brings the networks. Their files are published under

- ``vgg16-397923af.pth`` (528 MB) and ``alexnet-owt-7be5be79.pth`` (233 MB) at
  https://download.pytorch.org/models/, torchvision's ImageNet classifiers,
- ``dists_weights.pt``, the 2 x 1475 weights of DISTS, among the releases of piq.

A folder with files of these names serves every metric; ``.safetensors`` is read as well.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bokehdiff.backbones import BACKBONES, Published, lpips_network, read_weights

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["dists_distance", "lpips_distance"]

Distance = Callable[[np.ndarray, np.ndarray], float | None]
"""Of two float images (H, W, 3) of display-encoded sRGB in [0, 1]; None if they are too small."""

NAMED_BY = "by --weights (weights= in Python)"
# Pixels a side that leave each network one location of its last features.
SMALLEST_SIDE = {"vgg": 16, "alex": 31}
# Channels of the image and of the five layers of VGG-16 that DISTS compares.
DISTS_CHANNELS = (3, 64, 128, 256, 512, 512)


DISTS_WEIGHTS = Published(
    "https://github.com/photosynthesis-team/piq/releases/download/v0.4.1/dists_weights.pt",
    "the alpha and beta of DISTS",
)


def lpips_distance(
    backbone: str = "vgg", weights: str | Path | None = None, device: str = "cpu"
) -> Distance:
    """LPIPS 0.1 (Zhang et al. 2018, Equation 1), in float32; 0 for identical images.

    The images pass through the network in [-1, 1], at their own size. What people's judgements
    weigh its layers with comes with the lpips package.

    Args:
        backbone: ``vgg`` or ``alex``.
        weights: the file of the backbone, or the folder it lies in under its published name. None:
            torchvision's cache, or a download into it.
        device: where the network runs.

    Raises:
        ImportError: the lpips package is missing.
        ValueError: the weights cannot be had, or are not those of this backbone.
    """
    import torch

    network = lpips_network(backbone, weights, NAMED_BY).to(device)

    def distance(prediction: np.ndarray, truth: np.ndarray) -> float | None:
        if min(truth.shape[:2]) < SMALLEST_SIDE[backbone]:
            return None
        with torch.no_grad():
            images = (2 * _as_tensor(image, device) - 1 for image in (prediction, truth))
            return float(network(*images))

    return distance


def dists_distance(weights: str | Path | None = None, device: str = "cpu") -> Distance:
    """DISTS (Ding et al. 2020) as piq computes it, in float32; 0 for identical images.

    Images whose shorter side is above 256 px are scaled down to 256, bilinearly and without
    antialiasing. alpha and beta are divided by the sum of both, as in the publication.

    Args:
        weights: the folder that VGG-16 and ``dists_weights.pt`` lie in, or the file of VGG-16, with
            ``dists_weights.pt`` beside it. None: torch's cache, or downloads into it.
        device: where the network runs.

    Raises:
        ImportError: the piq package is missing.
        ValueError: the weights cannot be had, or are others.
    """
    import torch

    network = dists_network(weights)

    def distance(prediction: np.ndarray, truth: np.ndarray) -> float:
        with torch.no_grad():
            images = (_as_tensor(image, device) for image in (prediction, truth))
            return float(network(*images))

    return distance


def dists_network(weights: str | Path | None) -> torch.nn.Module:
    """The ``piq.DISTS`` with these weights; it follows the device and dtype of the images."""
    try:
        import piq
        from piq.perceptual import VGG16_LAYERS, ContentLoss
    except ImportError as missing:
        raise ImportError(
            "DISTS needs the piq package: pip install 'bokehdiff[train]'."
        ) from missing
    import torch
    from torchvision.models import vgg16

    class Dists(piq.DISTS):
        """``piq.DISTS`` whose constructor downloads nothing."""

        def __init__(self, features: torch.nn.Module, layer_weights: list[Tensor]) -> None:
            ContentLoss.__init__(
                self,
                feature_extractor=features,
                layers=[
                    VGG16_LAYERS[f"relu{name}"] for name in ("1_2", "2_2", "3_3", "4_3", "5_3")
                ],
                weights=layer_weights,
                replace_pooling=True,
                allow_layers_weights_mismatch=True,
            )

    with torch.device("meta"):
        features = vgg16().features
    prefix = "features."
    shapes = {prefix + name: tuple(value.shape) for name, value in features.state_dict().items()}
    convolutions = read_weights(BACKBONES["vgg"], weights, shapes, NAMED_BY)
    features.load_state_dict(
        {name.removeprefix(prefix): value for name, value in convolutions.items()}, assign=True
    )
    # Beside a backbone that was named by its file.
    if weights is not None and not Path(weights).is_dir():
        weights = Path(weights).parent
    shape = (1, sum(DISTS_CHANNELS), 1, 1)
    learned = read_weights(DISTS_WEIGHTS, weights, {"alpha": shape, "beta": shape}, NAMED_BY)
    total = learned["alpha"].sum() + learned["beta"].sum()
    layer_weights = [
        part
        for name in ("alpha", "beta")
        for part in torch.split(learned[name] / total, list(DISTS_CHANNELS), dim=1)
    ]
    return Dists(features, layer_weights).eval()


def _as_tensor(image: np.ndarray, device: str) -> Tensor:
    """(1, 3, H, W) float32."""
    import torch

    return torch.from_numpy(image).permute(2, 0, 1)[None].to(device, torch.float32)
