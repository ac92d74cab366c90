"""app.py, requirements.txt and bokehdiff/ are a Hugging Face Space as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

from .running import REPOSITORY, free_port, wait_until_it_answers

if sys.version_info >= (3, 11):
    import tomllib
else:  # there pytest brings it
    import tomli as tomllib

INCLUDED = ("app.py", "requirements.txt", "bokehdiff/*")
EXCLUDED = ("*.pyc",)
"""The patterns of ``hf upload``'s --include and --exclude that make a Space."""

# Python runs this before app.py. It hides what a Space would not have: the checkout, which an
# editable install puts on the path, and packages that requirements.txt does not bring.
SITE = """
import importlib.machinery, sys

sys.path[:] = [place for place in sys.path if place != {checkout!r}]

class OfTheSpace(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name in {hidden!r} else super().find_spec(name, path, target)

places = sys.meta_path.index(importlib.machinery.PathFinder)
sys.meta_path[places] = OfTheSpace
"""


def requirements() -> list[Requirement]:
    """What requirements.txt lists."""
    lines = (REPOSITORY / "requirements.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def needed(project: dict[str, Any], extra: str | None = None) -> Iterator[Requirement]:
    """What the package, or one of its extras with all that it names, depends on."""
    found = project["dependencies"] if extra is None else project["optional-dependencies"][extra]
    for requirement in map(Requirement, found):
        if requirement.name != project["name"]:
            yield requirement
        for drawn_in in requirement.extras if requirement.name == project["name"] else ():
            yield from needed(project, drawn_in)


def test_the_requirements_are_those_of_the_package_and_of_its_page():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    wanted = {str(one) for extra in (None, "app") for one in needed(project, extra)}
    listed = [str(one) for one in requirements()]
    assert set(listed) == wanted
    assert len(listed) == len(wanted)
    # Installed before the rest of the Space is there, so neither "." nor the package itself.
    assert project["name"] not in {one.name for one in requirements()}


# --- A folder as a Space has it -------------------------------------------------------------------


def installed_by_requirements() -> set[str]:
    """The packages that ``pip install -r requirements.txt`` leaves, of those that are here."""
    names: set[str] = set()
    waiting = requirements()
    while waiting:
        name = canonicalize_name(waiting.pop().name)
        if name in names:
            continue
        try:
            parts = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # of another system
            continue
        names.add(name)
        drawn_in = map(Requirement, parts)
        waiting += [one for one in drawn_in if not one.marker or one.marker.evaluate({"extra": ""})]
    return names


def hidden_modules() -> set[str]:
    """The modules of packages that are here and would not be in a Space."""
    kept = installed_by_requirements() | {"bokehdiff", "pip", "setuptools"}
    return {
        module
        for module, packages in metadata.packages_distributions().items()
        if not {canonicalize_name(package) for package in packages} & kept
    }


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``hf upload`` would send, in a folder."""
    hub = pytest.importorskip("huggingface_hub.utils", reason="tells what would be uploaded")
    folder = tmp_path_factory.mktemp("space")
    candidates = [
        str(file.relative_to(REPOSITORY))
        for name in ("app.py", "requirements.txt", "README.md", "bokehdiff", "tests/page")
        for file in [REPOSITORY / name, *(REPOSITORY / name).rglob("*")]
        if file.is_file()
    ]
    sent = hub.filter_repo_objects(
        candidates, allow_patterns=list(INCLUDED), ignore_patterns=list(EXCLUDED)
    )
    for name in sent:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((REPOSITORY / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables of the environment of a process that has no more than a Space."""
    folder = tmp_path_factory.mktemp("surroundings")
    hidden = sorted(hidden_modules())
    (folder / "sitecustomize.py").write_text(SITE.format(checkout=str(REPOSITORY), hidden=hidden))
    return {**os.environ, "PYTHONPATH": str(folder), "TMPDIR": str(folder), "HF_HUB_OFFLINE": "1"}


@pytest.mark.slow
def test_nothing_but_the_three_is_there(space: Path, surroundings: dict[str, str]) -> None:
    # The README of a Space is its settings, which an upload must leave alone.
    assert sorted(file.name for file in space.iterdir()) == [
        "app.py", "bokehdiff", "requirements.txt",
    ]  # fmt: skip
    assert not list(space.rglob("*.pyc"))
    code = (
        "import bokehdiff, importlib.util as u; "
        "print(bokehdiff.__file__); print(*map(u.find_spec, ['training', 'evaluation'])); "
        "import pytest"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=space, env=surroundings, capture_output=True, text=True
    )
    assert said.stdout.splitlines() == [str(space / "bokehdiff" / "__init__.py"), "None None"]
    assert "No module named 'pytest'" in said.stderr


@pytest.mark.slow
def test_the_space_shows_its_first_picture(space: Path, surroundings: dict[str, str]) -> None:
    gradio_client = pytest.importorskip("gradio_client", reason="comes with gradio")
    pytest.importorskip("skimage", reason="the sample photograph comes with scikit-image")
    port = free_port()
    # The two that a Space sets; there the name is 0.0.0.0.
    address = f"http://127.0.0.1:{port}/"
    served = {"GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port)}
    log = Path(surroundings["TMPDIR"]) / "log.txt"
    with open(log, "w") as output:
        server = subprocess.Popen(
            [sys.executable, "app.py"],
            cwd=space, env={**surroundings, **served}, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            wait_until_it_answers(address, server, log)
            client = gradio_client.Client(address, verbose=False)
            answer = client.predict(api_name="/start")
        finally:
            server.terminate()
            server.wait(30)
    assert not re.search("Traceback|Error", log.read_text()), log.read_text()
    picture = np.asarray(Image.open(first_file(answer)).convert("RGB"))
    assert picture.shape[1] == 512  # the preview of the sample photograph
    assert picture.std() > 20


def first_file(answer: Any) -> str:
    """The first picture in what the page answers."""
    parts = [answer]
    while parts:
        part = parts.pop(0)
        if isinstance(part, str) and part.endswith((".png", ".webp", ".jpg", ".jpeg")):
            return part
        if isinstance(part, dict):
            part = tuple(part.values())
        parts[:0] = part if isinstance(part, (list, tuple)) else ()
    raise AssertionError(f"no picture in {answer}")
