"""What the calls of diffusers that switch adapters mean for trained weights of BokehDiff.

A set that ``load_bokeh_weights`` loaded is more than adapters: it has parameters of the codec and
settings of its own. They follow the adapters: ``set_adapters``, ``disable_lora``, ``fuse_lora``,
``delete_adapters`` and their kin leave the codec and the settings of the one set that is in effect,
or those of the base model.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..checkpoints import codec_parameters

AdapterWeight = float | dict[str, Any] | None


@dataclass
class BokehSet:
    """What belongs to a name of adapters besides them; or what there was before any were loaded.

    Args:
        codec: parameters of the codec, on the CPU; none if they are those of the base model.
        settings: values of the configuration; others are those of the base model.
        codec_scale: how far the parameters have moved from the base model's to ``codec``.
    """

    codec: dict[str, Tensor]
    settings: dict[str, Any]
    codec_scale: float = 1.0


class PipelineWithAdapters(StableDiffusionXLPipeline):
    """The calls of diffusers that switch adapters, for :class:`BokehDiffPipeline`."""

    _encoded_prompt: tuple[Any, Tensor, Tensor] | None

    # What there was before the first set; None while there is no set.
    _base: BokehSet | None = None
    _bokeh_sets: Mapping[str, BokehSet] = {}
    # Whose codec, how far, and whose settings are in the pipeline now.
    _shown: tuple[str | None, float] = (None, 1.0)

    # -- Which adapters are in effect ------------------------------------------------------------

    def set_adapters(
        self,
        adapter_names: Sequence[str] | str,
        adapter_weights: AdapterWeight | list[AdapterWeight] = None,
    ) -> None:
        """As of diffusers; codec and settings become those of the set among the adapters.

        Without a set among them, codec and settings are those of the base model. A weight w counts
        for the set's parameters of the codec as for its adapters: base + w * (trained - base). In a
        weight by parts, ``{"unet": 0.5, "vae": 1.0}``, it is that of ``"vae"``. Settings have no
        weight: they are the set's.

        Raises:
            ValueError: a name that is not there; two sets at once; a weight of the codec that is no
                number; adapters are fused; the codec is offloaded.
            RuntimeError: PISA is not installed in the UNet.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        sets = [name for name in names if name in self._bokeh_sets]
        if len(sets) > 1:
            raise ValueError(
                f"{' and '.join(map(repr, sets))} are trained weights of BokehDiff, each with "
                "a codec and settings of its own. Only one of them can be active; adapters that "
                "load_lora_weights loaded can be active beside it."
            )
        self._check_can_switch()
        if isinstance(adapter_weights, list):
            weights = list(adapter_weights)
        else:
            weights = [adapter_weights] * len(names)
        scales = {}
        for i, (name, weight) in enumerate(zip(names, weights, strict=False)):
            if name in sets and self._bokeh_sets[name].codec:
                scales[name] = _codec_scale(name, weight)
                if isinstance(weight, dict) and name not in getattr(self.vae, "peft_config", {}):
                    # diffusers would warn that the part has no adapters and is ignored.
                    weights[i] = {part: one for part, one in weight.items() if part != "vae"}
        super().set_adapters(names, weights)
        for name, scale in scales.items():
            self._bokeh_sets[name].codec_scale = scale
        self._follow_adapters()

    def disable_lora(self) -> None:
        """As of diffusers; codec and settings become those of the base model.

        Adapters that are fused are taken out of the weights first.

        Raises:
            ValueError: the codec is offloaded.
            RuntimeError: PISA is not installed in the UNet.
        """
        self._check_can_follow()
        if self._fused_adapters():
            # The layers would do so when they are called next, with the parameters of another
            # codec in them.
            self.unfuse_lora()
        super().disable_lora()
        self._follow_adapters()

    def enable_lora(self) -> None:
        """As of diffusers; codec and settings become those of the set that is active, if any is.

        Raises:
            ValueError: the codec is offloaded.
            RuntimeError: PISA is not installed in the UNet.
        """
        self._check_can_follow()
        super().enable_lora()
        self._follow_adapters()

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike[str] | dict[str, Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        **options: Any,
    ) -> None:
        """As of diffusers: adapters alone, of any SDXL model.

        They become the active ones, beside the set of :meth:`load_bokeh_weights` that is active, if
        one is.

        Raises:
            ValueError: nothing in the file fits UNet and text encoders; other adapters are fused;
                a set is to be hot-swapped.
        """
        self._check_can_switch()
        if hotswap and adapter_name in self._bokeh_sets:
            raise ValueError(
                f"{adapter_name!r} is a set of load_bokeh_weights, with a codec and settings that "
                "cannot be hot-swapped. Load the other set under a name of its own and call "
                "set_adapters()."
            )
        active = self._set_in_effect()
        before = self.get_list_adapters()
        super().load_lora_weights(
            pretrained_model_name_or_path_or_dict, adapter_name, hotswap, **options
        )
        loaded = {
            name
            for part, names in self.get_list_adapters().items()
            for name in names
            if name not in before.get(part, [])
        }
        if not loaded and not hotswap:
            raise ValueError(
                "No adapters were loaded: names must begin with unet., text_encoder. or "
                "text_encoder_2., or be in a layout that diffusers knows. For trained weights of "
                "BokehDiff, the authors' too, there is load_bokeh_weights."
            )
        if active is not None and loaded:
            self._activate(active, *sorted(loaded))
        self._follow_adapters()

    # -- Fused into the weights ------------------------------------------------------------------

    def fuse_lora(
        self,
        components: list[str] | None = None,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: list[str] | None = None,
        **options: Any,
    ) -> None:
        """As of diffusers, but ``components`` are all parts with adapters, the codec too.

        ``lora_scale`` counts for the set's parameters of the codec as for its adapters, if the
        codec is among the components. Until :meth:`unfuse_lora` no other adapters can be activated;
        :meth:`unload_lora_weights` keeps what is fused for good.

        Raises:
            ValueError: ``adapter_names`` leave the set that is active out, or name another.
        """
        active = self._set_in_effect()
        if adapter_names is not None:
            sets = [name for name in adapter_names if name in self._bokeh_sets]
            if sets != ([] if active is None else [active]):
                raise ValueError(
                    f"adapter_names are {adapter_names}, while of the trained weights of BokehDiff "
                    f"{'none is' if active is None else repr(active) + ' is'} active. Layers with "
                    "fused adapters take no notice of others: choose those to fuse by "
                    "set_adapters(), and call fuse_lora() without names."
                )
        parts = self._lora_loadable_modules if components is None else components
        if active is not None and "vae" in parts and lora_scale != 1.0:
            self._check_can_follow()
            self._bokeh_sets[active].codec_scale *= lora_scale
            self._follow_adapters()
        super().fuse_lora(list(parts), lora_scale, safe_fusing, adapter_names, **options)
        self._follow_adapters()

    def unfuse_lora(self, components: list[str] | None = None, **options: Any) -> None:
        """As of diffusers, but ``components`` are all parts with adapters, the codec too."""
        parts = self._lora_loadable_modules if components is None else components
        super().unfuse_lora(list(parts), **options)
        self._follow_adapters()

    # -- Out again -------------------------------------------------------------------------------

    def delete_adapters(self, adapter_names: Sequence[str] | str) -> None:
        """As of diffusers; with a set go its codec and its settings.

        Raises:
            ValueError: adapters are fused; the codec is offloaded.
            RuntimeError: PISA is not installed in the UNet.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._check_can_switch()
        super().delete_adapters(names)
        self._bokeh_sets = {
            name: one for name, one in self._bokeh_sets.items() if name not in names
        }
        self._follow_adapters()
        if not self._bokeh_sets:
            self._forget_base()
        if not self.get_list_adapters():
            # Takes the empty layers of adapters away, without which a model can be saved.
            super().unload_lora_weights()

    def unload_lora_weights(self) -> None:
        """Takes out all adapters; the codec and the settings become what they were before
        :meth:`load_bokeh_weights`.

        Adapters that are fused (``fuse_lora``) stay in the weights, as in diffusers; then codec and
        settings stay with them.

        Raises:
            ValueError: the codec is offloaded.
            RuntimeError: weights are loaded, and PISA is not installed in the UNet.
        """
        self._check_can_follow()
        active = self._set_in_effect()
        stays = any(active in layer.merged_adapters for layer in adapter_layers(self.unet))
        super().unload_lora_weights()
        self._bokeh_sets = {}
        if stays:
            self._forget_base()
        self._follow_adapters()
        self._forget_base()

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> None:
        """As of diffusers, for a pipeline without adapters in it.

        Raises:
            ValueError: there are adapters, with which what is saved could not be loaded.
        """
        with_adapters = [
            name
            for name, part in self.components.items()
            if isinstance(part, nn.Module) and adapter_layers(part)
        ]
        if with_adapters:
            raise ValueError(
                f"There are adapters in {', '.join(with_adapters)}, with which a saved pipeline "
                "could not be loaded. To save the whole model, call fuse_lora() and "
                "unload_lora_weights() first; to save trained weights alone, there is "
                "save_bokeh_weights."
            )
        super().save_pretrained(save_directory, **options)

    # -- Codec and settings follow ---------------------------------------------------------------

    def _set_in_effect(self) -> str | None:
        """The set that the layers of the UNet compute with, fused or not."""
        names: set[str] = set()
        for layer in adapter_layers(self.unet):
            if not layer.disable_adapters:
                # A layer with fused adapters takes no notice of those that are active.
                names.update(layer.merged_adapters or layer.active_adapters)
        sets = sorted(names & self._bokeh_sets.keys())
        if len(sets) > 1:
            raise ValueError(f"Only one of {sets} can be active. Call set_adapters() with it.")
        return sets[0] if sets else None

    def _fused_adapters(self) -> set[str]:
        """Names of the adapters that are fused into UNet or codec."""
        return {
            name
            for part in (self.unet, self.vae)
            for layer in adapter_layers(part)
            for name in layer.merged_adapters
        }

    def _activate(self, *names: str) -> None:
        """Makes adapters the active ones in all parts, and leaves their weights as they are."""
        for part in self._lora_loadable_modules:
            model = getattr(self, part, None)
            for layer in [] if model is None else adapter_layers(model):
                layer.set_adapter(list(names))

    def _check_can_switch(self) -> None:
        """Raises if other adapters cannot take effect, before anything is changed."""
        fused = self._fused_adapters()
        if fused:
            raise ValueError(
                f"The adapters {', '.join(map(repr, sorted(fused)))} are fused into the weights, "
                "and layers with fused adapters take no notice of others. Call unfuse_lora() "
                "first, or unload_lora_weights() to keep what is fused for good."
            )
        self._check_can_follow()

    def _check_can_follow(self) -> None:
        """Raises if codec and settings cannot be changed, before anything is."""
        if self._base is None:
            return
        self.verify_pisa()
        if self._base.codec:
            self._check_codec_is_here()

    def _check_codec_is_here(self) -> None:
        if any(parameter.is_meta for parameter in codec_parameters(self.vae).values()):
            raise ValueError(
                "The codec is offloaded and has no tensors to replace. Call remove_all_hooks() "
                "first, and enable_sequential_cpu_offload() again afterwards."
            )

    def _follow_adapters(self) -> None:
        """Makes codec and settings those of the set in effect, or of the base model."""
        # The text encoders may have other adapters now.
        self._encoded_prompt = None
        if self._base is None:
            return
        name = self._set_in_effect()
        one = self._base if name is None else self._bokeh_sets[name]
        if self._shown == (name, one.codec_scale):
            return
        parameters = codec_parameters(self.vae) if self._base.codec else {}
        with torch.no_grad():
            for key, value in self._base.codec.items():
                trained = one.codec.get(key, value)
                # In float32, which lerp needs of some dtypes. Exact at 0 and 1.
                parameters[key].copy_(value.float().lerp(trained.float(), one.codec_scale))
        if self._shown[0] != name:
            backend = self.verify_pisa().backend
            self.register_to_config(**{**self._base.settings, **one.settings})
            self.install_pisa().backend = backend
        self._shown = (name, one.codec_scale)

    def _forget_base(self) -> None:
        """What the pipeline is now is the base model from here on."""
        self._base = None
        self._shown = (None, 1.0)


def adapter_layers(model: nn.Module) -> list[BaseTunerLayer]:
    """The layers of a model that hold adapters."""
    return [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]


def _codec_scale(name: str, weight: Any) -> float:
    if isinstance(weight, dict):
        weight = weight.get("vae")
    if weight is None:
        return 1.0
    if not isinstance(weight, (int, float)):
        raise ValueError(
            f"The weight of {name!r} for the codec is {weight!r}; it must be one number, since "
            "parameters of the codec are replaced as a whole."
        )
    return float(weight)
