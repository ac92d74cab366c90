"""Lens blur in ComfyUI: nodes that hand pictures to the bokehdiff library and back."""

from .blur_nodes import BLUR_NODES
from .depth_nodes import DEPTH_NODES
from .stack_nodes import STACK_NODES

_NODES = {**BLUR_NODES, **STACK_NODES, **DEPTH_NODES}

NODE_CLASS_MAPPINGS = {name: node for name, (node, _) in _NODES.items()}
NODE_DISPLAY_NAME_MAPPINGS = {name: shown for name, (_, shown) in _NODES.items()}

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
