"""`bokehdiff info`: versions, devices, and the model inside the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from .. import TINY, __version__


def info() -> None:
    """Show versions, devices, and the model inside the package."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    lines = [("bokehdiff", __version__), ("python", platform.python_version())]
    for package in (
        "torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "numpy",
        "pillow",
    ):  # fmt: skip
        try:
            lines.append((package, version(package)))
        except PackageNotFoundError:
            lines.append((package, "not installed"))
    lines += _device_lines()
    lines += _checkpoint_lines(Path(TINY))
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        typer.echo(f"{name:<{width}}  {value}")


def _device_lines() -> list[tuple[str, str]]:
    import torch

    lines = [("device", f"cpu ({torch.get_num_threads()} threads)")]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        lines.append(("device", f"cuda:{index} ({properties.name}, {memory:.0f} GiB)"))
    return lines


def _checkpoint_lines(folder: Path) -> list[tuple[str, str]]:
    """What model_index.json and the component configs of the embedded checkpoint say."""
    index_file = folder / "model_index.json"
    if not index_file.is_file():
        return [("model", f"missing ({folder})")]
    index = json.loads(index_file.read_text())
    weights = list(folder.rglob("*.safetensors"))
    size = sum(file.stat().st_size for file in weights)
    lines = [("model", str(folder)), ("size", f"{size / 1e6:.1f} MB of safetensors")]
    lines.append(("pipeline", str(index.get("_class_name"))))
    codec = _component_config(folder, "vae")
    unet = _component_config(folder, "unet")
    lines.append(("codec", _described(codec, ("block_size", "latent_channels", "scaling_factor"))))
    lines.append(("unet", _described(unet, ("in_channels", "out_channels", "block_out_channels"))))
    for key in ("timestep", "pisa_layers"):
        if key in index:
            lines.append((key, json.dumps(index[key])))
    for key, value in (index.get("pisa") or {}).items():
        lines.append((f"pisa.{key}", json.dumps(value)))
    return lines


def _component_config(folder: Path, component: str) -> dict[str, Any]:
    file = folder / component / "config.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def _described(config: dict[str, Any], keys: tuple[str, ...]) -> str:
    facts = ", ".join(f"{key} {json.dumps(config[key])}" for key in keys if key in config)
    return f"{config.get('_class_name', 'unknown')} ({facts})"
