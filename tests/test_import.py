"""The top level: light, lazy, complete."""

from __future__ import annotations

import ast
import importlib.metadata
import subprocess
import sys
import time
from pathlib import Path

import pytest

import bokehdiff

HEAVY = ("torch", "diffusers", "transformers", "numpy", "PIL")


def loaded_after(statement: str) -> set[str]:
    """The top-level modules a fresh interpreter has after a statement."""
    code = (
        f"{statement}\nimport sys\nprint(' '.join({{name.split('.')[0] for name in sys.modules}}))"
    )
    repository = Path(bokehdiff.__file__).parent.parent
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=repository
    )
    return set(result.stdout.split())


def test_import_loads_nothing_heavy():
    assert loaded_after("import bokehdiff").isdisjoint(HEAVY)


def test_command_line_module_loads_nothing_heavy():
    assert loaded_after("import bokehdiff.cli").isdisjoint(HEAVY)


def test_listing_names_loads_nothing_heavy():
    assert loaded_after("import bokehdiff; dir(bokehdiff); bokehdiff.TINY").isdisjoint(HEAVY)


def test_import_is_fast():
    code = (
        "import time; start = time.perf_counter(); import bokehdiff; "
        "print(time.perf_counter() - start)"
    )
    repository = Path(bokehdiff.__file__).parent.parent
    best = min(
        float(subprocess.check_output([sys.executable, "-c", code], text=True, cwd=repository))
        for _ in range(3)
    )
    assert best < 0.3


@pytest.mark.parametrize("name", bokehdiff.__all__)
def test_every_public_name_loads(name):
    assert getattr(bokehdiff, name) is not None
    assert name in dir(bokehdiff)


def test_lazy_names_and_type_checker_imports_agree():
    tree = ast.parse(Path(bokehdiff.__file__).read_text())
    (checking,) = [node for node in tree.body if isinstance(node, ast.If)]
    imported = {
        alias.name: node.module
        for node in checking.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imported == bokehdiff._HOME_OF
    assert set(bokehdiff.__all__) == {*imported, "TINY", "FLOW_NANO", "COMPACT_TINY", "__version__"}


def test_rooms_are_attributes():
    assert bokehdiff.optics.signed_defocus is bokehdiff.signed_defocus
    assert bokehdiff.images.read_image is bokehdiff.read_image


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'bokeh'"):
        _ = bokehdiff.bokeh


def test_version_is_that_of_the_installed_package():
    try:
        installed = importlib.metadata.version("bokehdiff")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("running from the checkout, not installed")
    assert installed == bokehdiff.__version__


def test_help_is_quick():
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "bokehdiff", "--help"], check=True, capture_output=True,
        cwd=Path(bokehdiff.__file__).parent.parent,
    )  # fmt: skip
    assert time.perf_counter() - start < 3
