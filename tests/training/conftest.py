"""What the tests of training share."""

from __future__ import annotations

import pytest

from tests.training.runs import save_random_judges, save_tiny_sdxl


@pytest.fixture(autouse=True)
def every_test_on_one_thread(one_thread: None) -> None:
    """Training is compared bit by bit."""


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of an untrained SDXL with a stored prompt."""
    return save_tiny_sdxl(tmp_path_factory.mktemp("tiny_sdxl"))


@pytest.fixture(scope="session")
def judges(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Settings that name a VGG-16 and a ConvNeXt with random weights."""
    return save_random_judges(tmp_path_factory.mktemp("judges"))
