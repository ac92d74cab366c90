"""Every Python block of the README and the documentation runs, as it stands."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from diffusers.utils import logging

from tests.docs.pages import PAGES, Block, blocks
from tests.docs.stand_ins import NEEDS_A_GPU, PLACES, make_models, names_given, write_files

NOT_RUN: dict[str, str] = {}
"""Words of blocks that are compiled alone, and why. Everything else runs."""

PYTHON_PAGES = [page for page in PAGES if any(block.language == "python" for block in blocks(page))]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that pages name, in which their code runs."""
    pytest.importorskip("pillow_heif", reason="needs pip install 'bokehdiff[heic]'")
    pytest.importorskip("av", reason="needs pip install 'bokehdiff[video]'")
    write_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    logging.disable_progress_bar()
    return tmp_path


def as_run_here(code: str) -> str:
    """Code without a GPU, with places that lie in the photograph."""
    for words, instead in {**NEEDS_A_GPU, **PLACES}.items():
        code = code.replace(words, instead)
    return code


def compiled(block: Block, code: str) -> Any:
    """With the line numbers of the page, for the traceback."""
    return compile("\n" * (block.line - 1) + code, PAGES[block.page], "exec")


@pytest.mark.parametrize("page", PYTHON_PAGES)
@pytest.mark.filterwarnings("ignore")
def test_python_of_a_page_runs_from_top_to_bottom(page: str, workplace: Path):
    found = [block for block in blocks(page) if block.language == "python"]
    whole = "\n".join(block.code for block in found)
    make_models(whole, workplace)
    namespace: dict[str, Any] = {"__name__": "__main__", **names_given(whole, workplace)}
    for block in found:
        if any(words in block.code for words in NOT_RUN):
            compiled(block, block.code)
            continue
        try:
            exec(compiled(block, as_run_here(block.code)), namespace)
        except Exception as error:
            lines = [
                entry.tb_lineno
                for entry in _entries(error)
                if entry.tb_frame.f_code.co_filename == str(PAGES[page])
            ]
            where = lines[-1] if lines else getattr(error, "lineno", block.line)
            raise AssertionError(f"{page}:{where}: {type(error).__name__}: {error}") from error


def _entries(error: BaseException) -> list[Any]:
    entries, entry = [], error.__traceback__
    while entry is not None:
        entries.append(entry)
        entry = entry.tb_next
    return entries


def test_every_block_says_its_language_or_is_a_shell():
    known = {"", "python", "sh", "bash", "console", "json", "yaml", "text"}
    for page in PAGES:
        for block in blocks(page):
            assert block.language in known, f"{page}:{block.line}: {block.language}"


def test_what_is_not_run_is_there():
    text = "".join(block.code for page in PAGES for block in blocks(page))
    for words in NOT_RUN:
        assert words in text, f"NOT_RUN names {words!r}, which no page has"


def test_a_block_that_fails_is_found(workplace: Path):
    block = Block("README.md", 7, "python", "import bokehdiff\nbokehdiff.no_such_name")
    with pytest.raises(AttributeError) as caught:
        exec(compiled(block, as_run_here(block.code)), {})
    assert _entries(caught.value)[-2].tb_lineno == 8
    assert os.getcwd() == str(workplace) and "bokehdiff" in sys.modules
