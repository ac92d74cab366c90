"""What ComfyUI does with a pack of nodes, as far as the tests of ours need it.

A workflow of its editor becomes a prompt, {node: class and inputs}; the prompt is checked against
what the nodes declare, and run: upstream nodes first, each instance kept for the next run, under
``torch.inference_mode``.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image

WIDGETS = {"INT": int, "FLOAT": (int, float), "STRING": str, "BOOLEAN": bool}
"""Types of inputs that the editor shows as fields, and what Python makes of their JSON."""

Prompt = dict[str, dict[str, Any]]


def load_pack(folder: Path) -> ModuleType:
    """The module of a folder in ``custom_nodes``, under the name that ComfyUI gives it."""
    name = str(folder).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def core_nodes(input_folder: Path) -> dict[str, type]:
    """ComfyUI's own nodes for pictures."""

    class LoadImage:
        RETURN_TYPES = ("IMAGE", "MASK")
        FUNCTION = "load_image"

        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:
            files = sorted(file.name for file in input_folder.iterdir())
            return {"required": {"image": (files, {"image_upload": True})}}

        def load_image(self, image: str) -> tuple[torch.Tensor, torch.Tensor]:
            picture = Image.open(input_folder / image)
            pixels = np.array(picture.convert("RGB")).astype(np.float32) / 255
            mask = torch.zeros(1, 64, 64)
            if "A" in picture.getbands():
                alpha = np.array(picture.getchannel("A")).astype(np.float32) / 255
                mask = 1 - torch.from_numpy(alpha)[None]
            return torch.from_numpy(pixels)[None], mask

    class SaveImage:
        RETURN_TYPES = ()
        FUNCTION = "save_images"
        OUTPUT_NODE = True

        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:
            return {
                "required": {
                    "images": ("IMAGE", {}),
                    "filename_prefix": ("STRING", {"default": "ComfyUI"}),
                }
            }

        def save_images(self, images: torch.Tensor, filename_prefix: str) -> dict[str, Any]:
            return {"ui": {"images": [image.numpy() for image in images]}}

    class PreviewImage(SaveImage):
        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:
            return {"required": {"images": ("IMAGE", {})}}

        def save_images(self, images: torch.Tensor) -> dict[str, Any]:
            return super().save_images(images, "")

    class SaveAnimatedWEBP(SaveImage):
        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:
            return {
                "required": {
                    "images": ("IMAGE", {}),
                    "filename_prefix": ("STRING", {"default": "ComfyUI"}),
                    "fps": ("FLOAT", {"default": 6.0, "min": 0.01, "max": 1000.0}),
                    "lossless": ("BOOLEAN", {"default": True}),
                    "quality": ("INT", {"default": 80, "min": 0, "max": 100}),
                    "method": (["default", "fastest", "slowest"], {}),
                }
            }

        def save_images(self, images: torch.Tensor, **_: Any) -> dict[str, Any]:
            return super().save_images(images, "")

    nodes = (LoadImage, SaveImage, PreviewImage, SaveAnimatedWEBP)
    return {node.__name__: node for node in nodes}


def declared_inputs(node: type) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Type and options of every input, in the order of the editor."""
    types = node.INPUT_TYPES()
    assert set(types) <= {"required", "optional", "hidden"}
    entries = {**types.get("required", {}), **types.get("optional", {})}
    return {name: (entry[0], entry[1] if len(entry) > 1 else {}) for name, entry in entries.items()}


def is_widget(kind: Any) -> bool:
    return isinstance(kind, list) or kind in WIDGETS


def check_format(workflow: dict[str, Any]) -> None:
    """Asserts that the editor can read a workflow: its format 0.4."""
    assert workflow["version"] == 0.4 and isinstance(workflow["extra"], dict)
    for link in workflow["links"]:
        assert [type(part) for part in link] == [int, int, int, int, int, str]
    for node in workflow["nodes"]:
        assert all(isinstance(node[name], int) for name in ("id", "order", "mode"))
        assert len(node["pos"]) == len(node["size"]) == 2
        assert node["properties"] == {"Node name for S&R": node["type"]}
        assert node["flags"] == {} and isinstance(node["widgets_values"], list)
        for socket in node["inputs"]:
            assert set(socket) == {"name", "type", "link"}
        for number, socket in enumerate(node["outputs"]):
            assert set(socket) == {"name", "type", "links", "slot_index"}
            assert socket["slot_index"] == number
    # What runs first comes first.
    order = {node["id"]: node["order"] for node in workflow["nodes"]}
    assert sorted(order.values()) == list(range(len(order)))
    assert all(order[source] < order[target] for _, source, _, target, _, _ in workflow["links"])


def prompt_of(workflow: dict[str, Any], classes: dict[str, type]) -> Prompt:
    """The prompt that the editor makes of a workflow in its format 0.4, links checked."""
    check_format(workflow)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    assert len(nodes) == len(workflow["nodes"]) and max(nodes) <= workflow["last_node_id"]
    links = {link[0]: link for link in workflow["links"]}
    assert len(links) == len(workflow["links"])
    assert max(links, default=0) <= workflow["last_link_id"]
    prompt: Prompt = {}
    for node in nodes.values():
        inputs = {}
        values = iter(node["widgets_values"])
        declared = declared_inputs(classes[node["type"]])
        for name, (kind, options) in declared.items():
            if is_widget(kind):
                inputs[name] = next(values)
                if options.get("image_upload"):
                    next(values)  # of the button
                if options.get("control_after_generate"):
                    assert next(values) in ("fixed", "increment", "decrement", "randomize")
        assert not list(values), f"{node['type']} has more values than fields"
        sockets = [name for name, (kind, _) in declared.items() if not is_widget(kind)]
        assert [socket["name"] for socket in node["inputs"]] == sockets
        for slot, socket in enumerate(node["inputs"]):
            if socket["link"] is not None:
                _, source, output, target, its_slot, kind = links[socket["link"]]
                assert (target, its_slot, kind) == (node["id"], slot, socket["type"])
                assert nodes[source]["outputs"][output]["type"] == kind
                assert socket["link"] in nodes[source]["outputs"][output]["links"]
                inputs[socket["name"]] = [str(source), output]
        returned = list(classes[node["type"]].RETURN_TYPES)
        assert [output["type"] for output in node["outputs"]] == returned
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def check(prompt: Prompt, classes: dict[str, type]) -> None:
    """Raises ``ValueError`` for what ComfyUI refuses to queue."""
    for node in prompt.values():
        name = node["class_type"]
        declared = declared_inputs(classes[name])
        missing = set(classes[name].INPUT_TYPES()["required"]) - set(node["inputs"])
        if missing or set(node["inputs"]) - set(declared):
            raise ValueError(f"{name}: inputs are {sorted(node['inputs'])}, not {list(declared)}")
        for key, value in node["inputs"].items():
            kind, options = declared[key]
            if isinstance(value, list):
                came = classes[prompt[value[0]]["class_type"]].RETURN_TYPES[value[1]]
                if came != kind:
                    raise ValueError(f"{name}: {key} is {came}, wanted {kind}")
            elif isinstance(kind, list):
                if value not in kind:
                    raise ValueError(f"{name}: {key} is {value!r}, wanted one of {kind}")
            elif not isinstance(value, WIDGETS[kind]):
                raise ValueError(f"{name}: {key} is {value!r}, wanted {kind}")
            elif not options.get("min", value) <= value <= options.get("max", value):
                raise ValueError(f"{name}: {key} is {value}, out of range")


class Executor:
    """Runs prompts; instances of nodes live as long as it.

    Args:
        classes: nodes by name.
    """

    def __init__(self, classes: dict[str, type]) -> None:
        self.classes = classes
        self.instances: dict[tuple[str, str], Any] = {}

    @torch.inference_mode()
    def run(self, prompt: Prompt) -> dict[str, tuple[Any, ...]]:
        """What every node returned; of an output node the pictures that it shows."""
        check(prompt, self.classes)
        results: dict[str, tuple[Any, ...]] = {}
        for node_id in prompt:
            self._run(node_id, prompt, results)
        return results

    def _run(self, node_id: str, prompt: Prompt, results: dict[str, Any]) -> None:
        if node_id in results:
            return
        node = prompt[node_id]
        inputs = dict(node["inputs"])
        for name, value in inputs.items():
            if isinstance(value, list):
                self._run(value[0], prompt, results)
                inputs[name] = results[value[0]][value[1]]
        kind = self.classes[node["class_type"]]
        instance = self.instances.setdefault((node_id, node["class_type"]), kind())
        returned = getattr(instance, kind.FUNCTION)(**inputs)
        if getattr(kind, "OUTPUT_NODE", False):
            results[node_id] = returned["ui"]["images"]
            return
        assert isinstance(returned, tuple) and len(returned) == len(kind.RETURN_TYPES)
        for value, declared in zip(returned, kind.RETURN_TYPES, strict=True):
            check_value(value, declared)
        results[node_id] = returned


def check_value(value: Any, declared: str) -> None:
    """What every node downstream relies on."""
    if declared in WIDGETS:
        assert isinstance(value, WIDGETS[declared])
    if declared in ("IMAGE", "MASK"):
        assert value.ndim == (4 if declared == "IMAGE" else 3) and value.dtype == torch.float32
        assert value.device.type == "cpu" and 0 <= float(value.min()) <= float(value.max()) <= 1
    if declared == "IMAGE":
        assert value.shape[-1] == 3
