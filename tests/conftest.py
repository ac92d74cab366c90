"""What every test shares: threads, the golden fixtures, and the `slow` and `gpu` markers."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported: at test sizes threads wait for each other longer than they compute, and
# several times as long where another program has one of the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# No test goes to the network, or to the disparities that the person has estimated.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["BOKEHDIFF_CACHE"] = tempfile.mkdtemp(prefix="bokehdiff-cache-")
atexit.register(shutil.rmtree, os.environ["BOKEHDIFF_CACHE"], ignore_errors=True)

import pytest  # noqa: E402

REPOSITORY = Path(__file__).resolve().parent.parent


def fixtures_folder() -> Path:
    """The golden fixtures: $BOKEHDIFF_FIXTURES, or shared/fixtures beside the repository."""
    chosen = os.environ.get("BOKEHDIFF_FIXTURES")
    return Path(chosen) if chosen else REPOSITORY.parent / "shared" / "fixtures"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))
    needing_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if needing_gpu:
        import torch

        if not torch.cuda.is_available():
            for item in needing_gpu:
                item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums in one order, so that runs can be compared bit by bit, and no threads for tiny sizes."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def fixtures_root() -> Path:
    """The folder of golden fixtures; the test is skipped where there is none."""
    folder = fixtures_folder()
    if not folder.is_dir():
        pytest.skip(f"no golden fixtures at {folder}; set BOKEHDIFF_FIXTURES to their folder")
    return folder


@pytest.fixture(scope="session")
def shared_root() -> Path:
    """The folder of photographs and benchmarks beside the repository; skipped if absent."""
    folder = REPOSITORY.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder}")
    return folder
