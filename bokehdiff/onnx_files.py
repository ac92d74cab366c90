"""ONNX files of networks: traced for pictures of any size, labelled, tried out, and written whole.

Nothing here knows a network. What goes in and comes out of one is told as :class:`Value`; the file
tells it again, to people and to programs.
"""

from __future__ import annotations

import importlib
import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn as nn

from . import __version__
from .whole_files import PathLike, file_to_write, write_whole

if TYPE_CHECKING:
    import onnx

__all__ = [
    "DIFFERENCES_KEY",
    "RunningModel",
    "Value",
    "check_differences",
    "labelled",
    "onnx_file_to_write",
    "traced_to_onnx",
    "write_onnx",
]

OPSET = 18
"""Operators of ONNX that a file may use; runtimes since 2023 know them."""

DESCRIPTION_KEY = "description"
DIFFERENCES_KEY = "largest_differences"
"""Entries of the metadata that every file has, beside those of :class:`Value` by name."""


@dataclass(frozen=True)
class Value:
    """One tensor that a graph takes or gives.

    Args:
        name: in the file.
        axes: names of the axes whose length is free, by number.
        meaning: what it holds, its unit and range, for those who open the file.
    """

    name: str
    axes: Mapping[int, str]
    meaning: str


def require_onnx() -> None:
    """Raises ``ImportError`` with a sentence that helps if a package for ONNX is missing."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(package)
        except ImportError:
            raise ImportError(
                f"Writing ONNX files needs the {package} package: pip install 'bokehdiff[onnx]'."
            ) from None


def onnx_file_to_write(path: PathLike, overwrite: bool) -> None:
    """Refuses, before any work, a file that could not be written.

    Raises:
        ValueError: the name does not end in .onnx.
        FileNotFoundError: there is no such folder.
        FileExistsError: the file exists, without ``overwrite``.
        ImportError: a package for ONNX is missing.
    """
    file_to_write(path, (".onnx",), overwrite)
    require_onnx()


def traced_to_onnx(
    module: nn.Module,
    examples: Sequence[torch.Tensor],
    inputs: Sequence[Value],
    outputs: Sequence[Value],
) -> onnx.ModelProto:
    """The graph of a module, without a word about the machine on which it was traced.

    Args:
        module: takes the inputs in this order, each for itself, and gives the outputs, a tuple.
        examples: of the inputs; only their sizes count, apart from the axes that are free. What
            the module does for these sizes the graph does for all: let them be large and odd.
        inputs, outputs: what they are.
    """
    # Tracing speaks of its own affairs, for instance of axes that share a name.
    speaking = logging.getLogger("torch.onnx")
    level = speaking.level
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        speaking.setLevel(logging.ERROR)
        try:
            program = torch.onnx.export(
                Positional(module).eval(),
                tuple(examples),
                input_names=[value.name for value in inputs],
                output_names=[value.name for value in outputs],
                dynamic_shapes=(tuple(dict(value.axes) for value in inputs),),
                dynamo=True,
                opset_version=OPSET,
                external_data=False,
                verbose=False,
            )
        finally:
            speaking.setLevel(level)
    assert program is not None
    model = program.model_proto
    graph = model.graph
    for given, output in zip(outputs, graph.output, strict=True):
        for axis, name in given.axes.items():
            output.type.tensor_type.shape.dim[axis].dim_param = name
    # Shapes in between follow from these; the places in the source from which each node comes name
    # folders of this machine.
    del graph.value_info[:]
    for part in (graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    return model


class Positional(nn.Module):
    """A module whose arguments have no names, so that their axes are told in one way for all."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *given: torch.Tensor) -> Any:
        return self.module(*given)


def labelled(
    model: onnx.ModelProto,
    description: str,
    values: Sequence[Value],
    metadata: Mapping[str, Any],
) -> onnx.ModelProto:
    """The model, which now says what it is; it is changed in place.

    Args:
        model: of :func:`traced_to_onnx`.
        description: what it computes and how it is used.
        values: inputs and outputs.
        metadata: more facts; what is no text is written as JSON.
    """
    model.producer_name, model.producer_version = "bokehdiff", __version__
    model.doc_string = description
    meanings = {value.name: value.meaning for value in values}
    for part in (*model.graph.input, *model.graph.output):
        part.doc_string = meanings[part.name]
    for key, fact in {DESCRIPTION_KEY: description, **meanings, **metadata}.items():
        text = fact if isinstance(fact, str) else json.dumps(fact)
        model.metadata_props.add(key=key, value=text)
    return model


class RunningModel:
    """A model in onnxruntime: a dictionary of arrays by name goes in, another one comes out.

    Args:
        source: a file, or the bytes of one.
        threads: how many; 0 leaves it to onnxruntime.
    """

    def __init__(self, source: str | bytes, threads: int = 0) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(
            source, options, providers=["CPUExecutionProvider"]
        )
        self.outputs = [value.name for value in self.session.get_outputs()]

    @property
    def metadata(self) -> dict[str, str]:
        """What the file says of itself."""
        return dict(self.session.get_modelmeta().custom_metadata_map)

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All outputs by name."""
        return dict(zip(self.outputs, self.session.run(None, dict(inputs)), strict=True))


def check_differences(
    differences: Mapping[str, float], largest_allowed: float, runtime: str = "onnxruntime"
) -> None:
    """Raises ``ValueError`` if a file answers otherwise than the network it was made of.

    Args:
        differences: largest absolute difference of each output, as a share of its range.
        largest_allowed: of them.
        runtime: what ran the file.
    """
    # Written so that NaN, which compares as false, is refused too.
    worse = {name: one for name, one in differences.items() if not one <= largest_allowed}
    if worse:
        told = ", ".join(f"{name} by {difference:.2g}" for name, difference in worse.items())
        raise ValueError(
            f"Run by {runtime}, the file would answer otherwise than the network: {told} of its "
            f"range, more than {largest_allowed:g}. Nothing was written. Another version of "
            f"{runtime} or torch may help; float32 is closer than float16."
        )


def write_onnx(model: onnx.ModelProto, path: PathLike, overwrite: bool) -> None:
    """Writes one file with graph and weights, as a whole or not at all; errors as of
    :func:`onnx_file_to_write`, and what is no valid model is refused."""
    import onnx

    file = file_to_write(path, (".onnx",), overwrite)
    onnx.checker.check_model(model, full_check=True)
    write_whole(file, model.SerializeToString())
