"""The judge of adversarial training: how much each part of an image looks like a photograph."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn as nn
from safetensors import SafetensorError
from torch import Tensor
from torch.func import functional_call
from torch.nn.utils.parametrizations import spectral_norm
from transformers import ConvNextModel

HIDDEN_CHANNELS = 256
LEAK = 0.2


class BokehDiscriminator(nn.Module):
    """A frozen ConvNeXt, and a small trained head that judges each location of its last features.

    The head is ``Linear(C, 256)``, ``LeakyReLU(0.2)``, ``Linear(256, 1)``. The weights of both
    linear layers are divided by their largest singular value (spectral normalisation), which one
    power iteration per training step keeps track of.

    Nothing depends on the mode of the module this is a part of: the backbone never drops a path,
    and the state changes in ``forward(update=True)`` alone. The parameters that ask for a gradient
    are those of the head.

    Args:
        backbone: a ``transformers.ConvNextModel``, which is frozen. :meth:`from_backbone` loads it.
            The head's first weights come from torch's global generator.
    """

    def __init__(self, backbone: ConvNextModel) -> None:
        super().__init__()
        self.backbone = backbone.requires_grad_(False)
        self.head = nn.Sequential(
            spectral_norm(nn.Linear(backbone.config.hidden_sizes[-1], HIDDEN_CHANNELS)),
            nn.LeakyReLU(LEAK),
            spectral_norm(nn.Linear(HIDDEN_CHANNELS, 1)),
        )
        self.train()

    @classmethod
    def from_backbone(cls, name_or_path: str) -> BokehDiscriminator:
        """Return a discriminator with an untrained head, in float32 on the CPU.

        Args:
            name_or_path: a ConvNeXt on the Hugging Face Hub or in a folder that
                ``save_pretrained`` wrote. The authors use ``facebook/convnext-base-224-22k``.

        Raises:
            ValueError: it cannot be loaded, or is no ConvNeXt.
        """
        way_out = (
            "Name another by loss.adversarial_backbone, or set loss.adversarial_weight: 0 to train "
            "without a discriminator."
        )
        try:
            backbone, loading = ConvNextModel.from_pretrained(
                name_or_path, dtype=torch.float32, output_loading_info=True
            )
        except (OSError, RuntimeError, SafetensorError) as error:
            raise ValueError(
                f"The ConvNeXt {name_or_path!r} could not be loaded ({error}). Without a network, "
                f"fetch it elsewhere by `hf download {name_or_path} --local-dir FOLDER` and set "
                f"loss.adversarial_backbone: FOLDER. {way_out}"
            ) from error
        if missing := sorted(loading["missing_keys"]):
            raise ValueError(
                f"{name_or_path!r} is not a whole ConvNeXt: {len(missing)} of its tensors are "
                f"missing, among them {', '.join(missing[:3])}. {way_out}"
            )
        return cls(backbone)

    @property
    def stride(self) -> int:
        """Pixels a side that one location of the feature map stands for; 32 of a usual ConvNeXt."""
        config = self.backbone.config
        return config.patch_size * 2 ** (len(config.hidden_sizes) - 1)

    def train(self, mode: bool = True) -> BokehDiscriminator:
        """Stay in eval mode."""
        return super().train(False)

    def forward(self, images: Tensor, update: bool = False) -> Tensor:
        """Return logits (B, H // 32, W // 32) of being a photograph, in float32 even in autocast.

        A rendering and what judges it can be differentiated together, in either order of calls:

        - without `update`, for whoever renders, the head is a constant. Gradients reach `images`
          alone, and no state changes;
        - with `update`, for the discriminator's own step, gradients reach the head alone, and one
          power iteration is made.

        Args:
            images: (B, 3, H, W) display-encoded sRGB in [-1, 1], at least 32 pixels a side. The
                backbone sees them in [0, 1], at their own size, without the mean and deviation of
                ImageNet: so the authors do.
            update: whether this is a training step of the head.

        Raises:
            ValueError: images of another shape, or too small.
        """
        if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[-2:]) < self.stride:
            raise ValueError(
                f"The discriminator judges images (B, 3, H, W) of at least {self.stride} pixels a "
                f"side, got {tuple(images.shape)}. Use larger crops, or set "
                "loss.adversarial_weight: 0."
            )
        with torch.autocast(images.device.type, enabled=False):
            if update:
                features = self._features(images.detach())
                # In this mode, and in it alone, spectral_norm makes its power iteration. It goes on
                # with copies of its vectors, so graphs made before are left intact.
                self.head.train()
                try:
                    return self.head(features).squeeze(-1)
                finally:
                    self.head.eval()
            constants = {name: value.detach() for name, value in self.head.named_parameters()}
            return functional_call(self.head, constants, self._features(images)).squeeze(-1)

    def _features(self, images: Tensor) -> Tensor:
        """(B, h, w, C) last feature map of images in [-1, 1]."""
        pixels = images.to(self.backbone.dtype) / 2 + 0.5
        return self.backbone(pixels).last_hidden_state.movedim(1, -1)

    def head_state_dict(self) -> dict[str, Tensor]:
        """Return all that training changes: weights and biases, and the vectors of the power
        iterations. As of ``state_dict``, they are no copies."""
        return self.head.state_dict()

    def load_head_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`head_state_dict` returned.

        Raises:
            ValueError: tensors are missing, left over, or of other shapes, which the backbone
            decides.
        """
        try:
            self.head.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(
                f"The state does not fit this discriminator's head ({error}). Resume with the "
                "loss.adversarial_backbone it was trained with."
            ) from error
