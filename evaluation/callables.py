"""Any Python function as a method: ``module:function`` or ``file.py:function``."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from evaluation.photographs import Photograph

__all__ = ["function_named", "is_callable_name", "rendering_with"]

# Beyond it a float picture is no sRGB in [0, 1] with a little overshoot, but one of 255 levels.
LARGEST_OVERSHOOT = 2.0


def is_callable_name(name: str) -> bool:
    """Whether a name has the form ``module:function`` or ``file.py:function``."""
    place, colon, function = name.rpartition(":")
    return bool(place and colon) and function.isidentifier()


def function_named(name: str) -> Callable[..., Any]:
    """The function of ``module:function`` or ``file.py:function``, which is imported.

    Modules are found as Python finds them: in the folder where it was started, in PYTHONPATH, and
    among what is installed. A file may import what lies beside it.

    Raises:
        ValueError: there is no such file, module or function, or it cannot be imported.
    """
    place, _, function = name.rpartition(":")
    module = _module_of_file(Path(place)) if place.endswith(".py") else _module(place)
    found = getattr(module, function, None)
    if not callable(found):
        functions = [n for n, value in vars(module).items() if callable(value) and n[0] != "_"]
        raise ValueError(
            f"{place} has no function {function}; it has {', '.join(functions) or 'none at all'}."
        )
    return found


def rendering_with(function: Callable[..., Any]) -> Callable[[Photograph], np.ndarray]:
    """A method's ``render`` that calls ``function(image, disparity, df, K)``.

    image: (H, W, 3) uint8 sRGB; disparity: (H, W) float32, larger is nearer, in the unit of the
    data set, which is also that of ``df``; ``K * |disparity - df|`` pixels is the radius of the
    circle of confusion. It returns (H, W, 3), floats in [0, 1] or uint8, sRGB.

    ``render`` raises ValueError for a result of another kind, shape or range.
    """

    def render(photograph: Photograph) -> np.ndarray:
        # Copies: what one function writes into them the next method must not see.
        image, disparity = photograph.image.copy(), photograph.disparity.copy()
        result = function(image, disparity, photograph.df, photograph.K)
        picture = np.asarray(result)
        wanted = (
            f"wanted an array of shape {photograph.image.shape}, floats in [0, 1] or uint8 (sRGB)"
        )
        if picture.shape != photograph.image.shape or picture.dtype.kind not in "uf":
            raise ValueError(
                f"The function returned a {type(result).__name__} of shape {picture.shape} and "
                f"type {picture.dtype}; {wanted}."
            )
        if picture.dtype == np.uint8:
            return picture / 255.0
        if picture.dtype.kind == "u" or float(picture.max()) > LARGEST_OVERSHOOT:
            raise ValueError(
                f"The function returned {picture.dtype} values up to {picture.max():g}; {wanted}."
            )
        return picture

    return render


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as problem:
        raise ValueError(
            f"The module {name} cannot be imported ({problem}); wanted one that Python finds here "
            "or in PYTHONPATH, or path/to/file.py:function."
        ) from problem


def _module_of_file(file: Path) -> ModuleType:
    file = file.resolve()
    if not file.is_file():
        raise ValueError(f"There is no file {file}; wanted path/to/file.py:function.")
    # Under a name that shadows no installed module; data classes look their module up by it.
    name = f"evaluated_{file.stem}"
    loaded = sys.modules.get(name)
    if loaded is not None and loaded.__file__ == str(file):
        return loaded
    specification = importlib.util.spec_from_file_location(name, file)
    if specification is None or specification.loader is None:
        raise ValueError(f"{file} cannot be imported; wanted a Python file.")
    module = importlib.util.module_from_spec(specification)
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    sys.modules[name] = module
    try:
        specification.loader.exec_module(module)
    except (ImportError, SyntaxError) as problem:
        del sys.modules[name]
        raise ValueError(f"{file} cannot be imported: {problem}.") from problem
    return module
