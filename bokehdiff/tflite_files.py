"""TFLite files of networks: converted for one size of picture, labelled, tried out, written whole.

Nothing here knows a network. The packages for TFLite need an older torch than the rest of the
library, hence an environment of their own: ``make tflite``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import os
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn as nn

from .whole_files import PathLike, file_to_write, write_whole

__all__ = [
    "RunningTFLite",
    "converted_to_tflite",
    "labelled_tflite",
    "tflite_file_to_write",
    "with_half_weights",
    "with_int8_weights",
    "write_tflite",
]

METADATA = "bokehdiff"
"""Name of the metadata in which a file tells facts, as JSON."""

HALF_WEIGHTS: list[dict[str, Any]] = [
    {
        "regex": ".*",
        "operation": "*",
        "algorithm_key": "float_casting",
        "op_config": {
            "weight_tensor_config": {"num_bits": 16, "dtype": "FLOAT"},
            "compute_precision": "FLOAT",
            "explicit_dequantize": True,
        },
    }
]
"""What ai-edge-quantizer is told: weights are stored as float16 and read as float32."""


def require_tflite() -> None:
    """Raises ``ImportError`` with a sentence that helps if a package for TFLite is missing."""
    for package in ("litert_torch", "ai_edge_litert", "ai_edge_quantizer"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(
                f"Writing TFLite files needs the {package.replace('_', '-')} package, which needs "
                "an older torch and so an environment of its own. `make tflite` makes one; then "
                "run `.venv-tflite/bin/bokehdiff export compact ...` from it. ONNX files (.onnx) "
                "can be written here."
            )


def tflite_file_to_write(path: PathLike, overwrite: bool) -> None:
    """Refuses, before any work, a file that could not be written.

    Raises:
        ValueError: the name does not end in .tflite.
        FileNotFoundError: there is no such folder.
        FileExistsError: the file exists, without ``overwrite``.
        ImportError: a package for TFLite is missing.
    """
    file_to_write(path, (".tflite",), overwrite)
    require_tflite()


def converted_to_tflite(module: nn.Module, examples: Mapping[str, torch.Tensor]) -> bytes:
    """A file of a module, for inputs of these sizes and no others.

    Args:
        module: takes the inputs by name and gives the outputs, a dictionary; the file has both
            under the same names, in its one signature.
        examples: of the inputs, float32.
    """
    # Or else the compiler speaks of its own affairs; torch and the converter do so below.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    speaking = logging.getLogger("torch")
    level = speaking.level
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        speaking.setLevel(logging.ERROR)
        try:
            import litert_torch

            litert_torch.config.show_progress = False
            model = litert_torch.convert(module.eval(), sample_kwargs=dict(examples))
        finally:
            speaking.setLevel(level)
    return bytes(model.model_content())


def with_half_weights(file: bytes, exact: str) -> bytes:
    """The file with weights in float16, half as large.

    Args:
        file: of :func:`converted_to_tflite`.
        exact: class of the modules whose weights stay float32.
    """
    return _quantized(file, HALF_WEIGHTS, exact)


def with_int8_weights(file: bytes, exact: str) -> bytes:
    """The file with weights of 8 bits, a quarter as large; arguments as of
    :func:`with_half_weights`.

    Arithmetic stays float32: networks that act on small differences lose too much when what the
    layers take is rounded to 8 bits as well.
    """
    from ai_edge_quantizer import recipe

    return _quantized(file, recipe.weight_only_wi8_afp32(), exact)


def _quantized(file: bytes, recipe: list[dict[str, Any]], exact: str) -> bytes:
    from ai_edge_quantizer import quantizer

    # What is computed in a module has its class in its name; the last entry that fits counts.
    left_out = {"regex": f".*{exact}.*", "operation": "*", "algorithm_key": "no_quantize"}
    recipe = [*recipe, left_out]

    # One of its bars is shown even so.
    with contextlib.redirect_stderr(io.StringIO()):
        result = quantizer.Quantizer(file, recipe).quantize(
            enable_progress_bar=False, enable_progress_report=False
        )
    return bytes(result.quantized_model)


def labelled_tflite(file: bytes, description: str, metadata: Mapping[str, Any]) -> bytes:
    """The file, which now says what it is.

    Args:
        file: of the functions above.
        description: what it computes and how it is used.
        metadata: more facts, for :attr:`RunningTFLite.metadata`.
    """
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.tools import flatbuffer_utils

    model = flatbuffer_utils.convert_bytearray_to_object(file)
    for one in model.buffers:
        # The quantizer lays large buffers behind the rest, where older runtimes do not look.
        if one.offset > 1:
            one.data = np.frombuffer(file, np.uint8, one.size, one.offset)
            one.offset = one.size = 0
    model.description = description
    entry, buffer = schema.MetadataT(), schema.BufferT()
    buffer.data = np.frombuffer(json.dumps(dict(metadata)).encode(), np.uint8)
    entry.name, entry.buffer = METADATA, len(model.buffers)
    model.buffers.append(buffer)
    model.metadata = [*(model.metadata or []), entry]
    return bytes(flatbuffer_utils.convert_object_to_bytearray(model))


class RunningTFLite:
    """A file in LiteRT: a dictionary of arrays by name goes in, another one comes out.

    Args:
        file: its bytes.
        threads: how many.
    """

    def __init__(self, file: bytes, threads: int = 1) -> None:
        from ai_edge_litert.interpreter import Interpreter

        self._file = file
        self.interpreter = Interpreter(model_content=file, num_threads=threads)
        self._run = self.interpreter.get_signature_runner()

    @property
    def input_sizes(self) -> dict[str, tuple[int, ...]]:
        """Of the inputs by name, which take these sizes and no others."""
        details = self._run.get_input_details()
        return {name: tuple(map(int, one["shape"])) for name, one in details.items()}

    @property
    def metadata(self) -> dict[str, Any]:
        """What the file says of itself: facts, and its ``description``."""
        from ai_edge_litert import schema_py_generated as schema

        model = schema.ModelT.InitFromPackedBuf(self._file, 0)
        facts: dict[str, Any] = {"description": model.description.decode()}
        for entry in model.metadata or []:
            if entry.name.decode() == METADATA:
                facts |= json.loads(bytes(model.buffers[entry.buffer].data))
        return facts

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All outputs by name."""
        return dict(self._run(**inputs))


def write_tflite(file: bytes, path: PathLike, overwrite: bool) -> None:
    """Writes the file as a whole or not at all; errors as of :func:`tflite_file_to_write`."""
    write_whole(file_to_write(path, (".tflite",), overwrite), file)
