"""Trained weights in and out of a pipeline: ``load_bokeh_weights`` and its way back."""

from __future__ import annotations

import os
from typing import Any

from peft import get_peft_model_state_dict
from torch import nn

from ..attention import PisaConfig
from ..attention.processor import pisa_layer_names
from ..checkpoints import (
    SETTINGS,
    BokehWeights,
    check_adapter,
    check_codec,
    codec_parameters,
    download_bokeh_weights,
    is_no_hub_id,
    read_bokeh_weights,
    write_bokeh_weights,
)
from .adapters import BokehSet, PipelineWithAdapters


class PipelineWithBokehWeights(PipelineWithAdapters):
    """What :class:`BokehDiffPipeline` can do with trained weights."""

    def load_bokeh_weights(
        self,
        folder_or_hub_id: str | os.PathLike[str],
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        adapter_name: str = "bokehdiff",
    ) -> None:
        """Puts trained weights into the base model: adapters of the UNet, the codec, the settings.

        Takes what :meth:`save_bokeh_weights` and training write, and the authors' two files. The
        adapters become the only active ones, parameters of the codec are replaced in its dtype, and
        ``pisa``, ``timestep``, ``prompt`` and ``pisa_layers`` of the configuration become those the
        weights were trained for. If an error is raised, nothing has changed.
        :meth:`unload_lora_weights` is the way back. (:meth:`load_lora_weights` loads adapters
        alone, of any SDXL model.)

        Several sets can be loaded under names of their own; ``set_adapters("name")`` goes from one
        to another. What is not in use of their codecs is kept on the CPU.

        Args:
            folder_or_hub_id: folder with ``pytorch_lora_weights.safetensors``, or ``"owner/name"``
                on the Hub.
            subfolder: the folder in it that holds the files.
            revision: branch, tag or commit on the Hub.
            token: of the Hub, for repositories that are not public.
            adapter_name: name of the adapters, for ``set_adapters``.

        Raises:
            ValueError: files that are missing or damaged; tensors that do not fit UNet and codec,
                or too few of them; settings that this pipeline cannot have; a name that is taken;
                adapters that are fused; a codec that is offloaded.
            RuntimeError: PISA is not installed in the UNet.
        """
        # Adapters are submodules, so that torch has a say in their names.
        if not adapter_name or "." in adapter_name or hasattr(nn.ModuleDict(), adapter_name):
            raise ValueError(
                f"adapter_name {adapter_name!r} cannot be used: it must be a text without dots, "
                "and no attribute of torch modules, as 'half' is."
            )
        for part in (self.unet, self.vae):
            if adapter_name in getattr(part, "peft_config", {}):
                raise ValueError(
                    f"There is an adapter named {adapter_name!r} already. Choose another "
                    "adapter_name, or call delete_adapters() or unload_lora_weights() first."
                )
        name = os.fspath(folder_or_hub_id)
        if os.path.isdir(name):
            weights = read_bokeh_weights(os.path.join(name, subfolder or ""))
        elif os.path.exists(name):
            raise ValueError(
                f"{name!r} is a file. load_bokeh_weights takes the folder that holds it."
            )
        elif is_no_hub_id(name):
            raise ValueError(
                f"There is no folder {name!r}. Give a folder that save_bokeh_weights or training "
                "wrote, or the name of weights on the Hub, 'owner/name'."
            )
        else:
            weights = read_bokeh_weights(
                download_bokeh_weights(name, subfolder=subfolder, revision=revision, token=token)
            )

        # Everything is checked before anything is changed.
        settings = self._checked_settings(weights.settings)
        self.verify_pisa()
        self._check_can_switch()
        adapters = [
            (
                self.unet,
                weights.unet_lora,
                check_adapter(weights.unet_lora, weights.unet_lora_config, self.unet),
            )
        ]
        if weights.vae_lora:
            vae_config = check_adapter(weights.vae_lora, weights.vae_lora_config, self.vae)
            adapters.append((self.vae, weights.vae_lora, vae_config))
        parameters = codec_parameters(self.vae) if weights.vae else {}
        if weights.vae:
            check_codec(weights.vae, self.vae)
            self._check_codec_is_here()

        for model, tensors, config in adapters:
            # On the meta device first: nothing is drawn from torch's global generator.
            model.load_lora_adapter(
                dict(tensors),
                prefix=None,
                adapter_name=adapter_name,
                metadata=config.to_dict(),
                low_cpu_mem_usage=True,
                _pipeline=self,
            )
            # New layers begin in training mode, in which adapters may drop their input.
            model.train(model.training)
        base = self._base or BokehSet({}, {name: self.config[name] for name in SETTINGS})
        if not base.codec:
            base.codec = {key: one.detach().cpu().clone() for key, one in parameters.items()}
        codec = {key: value.to(parameters[key].dtype) for key, value in weights.vae.items()}
        self._base = base
        self._bokeh_sets = {**self._bokeh_sets, adapter_name: BokehSet(codec, settings)}
        self._activate(adapter_name)
        self.enable_lora()

    def save_bokeh_weights(
        self,
        folder: str | os.PathLike[str],
        *,
        layout: str = "diffusers",
        adapter_name: str = "bokehdiff",
    ) -> None:
        """Saves what :meth:`load_bokeh_weights` loads, to the last bit.

        That is the adapters of this name, whatever their weight, and the settings and parameters of
        the codec that ``load_bokeh_weights`` brought with them. Parameters of a codec that was
        trained in place are written by :func:`bokehdiff.checkpoints.write_bokeh_weights`.

        Args:
            folder: where to; made if it is not there.
            layout: ``"diffusers"``, which stock SDXL pipelines load the UNet's half of, or
                ``"official"``, the authors'; see :mod:`bokehdiff.checkpoints`.
            adapter_name: name of the adapters.

        Raises:
            ValueError: no such adapter, or something that the layout has no place for.
        """
        configs = getattr(self.unet, "peft_config", {})
        if adapter_name not in configs:
            raise ValueError(
                f"The UNet has no adapter {adapter_name!r}; it has {list(configs) or 'none'}."
            )
        weights = BokehWeights(
            unet_lora=get_peft_model_state_dict(self.unet, adapter_name=adapter_name),
            vae={},
            vae_lora={},
            unet_lora_config=configs[adapter_name].to_dict(),
            vae_lora_config=None,
            settings={name: self.config[name] for name in SETTINGS},
        )
        vae_configs = getattr(self.vae, "peft_config", {})
        if adapter_name in vae_configs:
            weights.vae_lora = get_peft_model_state_dict(self.vae, adapter_name=adapter_name)
            weights.vae_lora_config = vae_configs[adapter_name].to_dict()
        if self._base is not None and adapter_name in self._bokeh_sets:
            one = self._bokeh_sets[adapter_name]
            weights.vae = dict(one.codec)
            if adapter_name != self._shown[0]:
                weights.settings = {**self._base.settings, **one.settings}
        write_bokeh_weights(weights, folder, layout)

    def _checked_settings(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Settings that came with weights, in the form of the configuration.

        Raises:
            ValueError: settings that this pipeline cannot have.
        """
        checked = dict(settings)
        for name in ("prompt", "pisa_layers"):
            if not isinstance(settings.get(name, ""), str):
                raise ValueError(f"{name} of the weights is {settings[name]!r}; it must be a text.")
        if "pisa" in settings:
            try:
                checked["pisa"] = PisaConfig.from_dict(dict(settings["pisa"])).to_dict()
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"The PISA settings of the weights cannot be used: {error}"
                ) from None
        if "pisa_layers" in settings:
            pisa_layer_names(self.unet, settings["pisa_layers"].split(","))
        if "timestep" in settings:
            timestep, steps = settings["timestep"], self.scheduler.config.num_train_timesteps
            if type(timestep) is not int or not 0 <= timestep < steps:
                raise ValueError(
                    f"The weights were trained for timestep {timestep!r}; the schedule of this "
                    f"pipeline has steps 0 to {steps - 1}."
                )
        prompt = settings.get("prompt", self.config.prompt)
        if prompt != self.config.prompt and not self._has_text_encoders:
            stored = None if self.stored_prompt is None else self.stored_prompt.config.prompt
            if prompt != stored:
                raise ValueError(
                    f"The weights were trained with the prompt {prompt!r}. This pipeline has no "
                    f"text encoders, only the embedding of {stored!r}. Load the base model with "
                    "its text encoders, or with stored_prompt of that prompt."
                )
        return checked
