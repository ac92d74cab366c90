"""Documents that quote numbers, and the registry of what makes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from evaluation.reports.documented_numbers import DOCUMENTED_NUMBERS
from evaluation.reports.markers import blocks_in
from evaluation.reports.measuring import Measurement
from evaluation.reports.quoted_numbers import Block, QuotedNumbers

DOCUMENT = "# A\r\n<!-- numbers: one -->\r\ntiny 36.17 dB\r\n<!-- end -->\r\nB\r\n"


def one(results: dict[str, Any]) -> str:
    return f"tiny {results['psnr']:.2f} dB"


@pytest.fixture
def numbers(tmp_path: Path) -> QuotedNumbers:
    (tmp_path / "a.md").write_bytes(DOCUMENT.encode())
    (tmp_path / "b.md").write_text("<!-- numbers: two -->\n0.95\n<!-- end -->\n")
    return QuotedNumbers(
        tmp_path,
        {
            "one": Block("a.md", "first", one),
            "two": Block("b.md", "second", lambda results: f"{results['ssim']:.2f}"),
        },
        {
            "first": Measurement("one thing", 1, ("compare", "DATA")),
            "second": Measurement("another", 1, ("compare", "DATA", "--method", "a b")),
        },
    )


def test_only_what_the_chosen_blocks_need_is_measured(numbers: QuotedNumbers) -> None:
    assert list(numbers.measurements_for(["two"])) == ["second"]
    assert list(numbers.measurements_for(["two", "one", "two"])) == ["first", "second"]
    second = numbers.measurements["second"]
    assert second.command == "python -m evaluation compare DATA --method 'a b'"
    assert second.arguments_in({"DATA": Path("/x")}) == ["compare", "/x", "--method", "a b"]


def test_what_is_quoted_is_compared_with_what_was_measured(numbers: QuotedNumbers) -> None:
    quoted = numbers.quoted(["one", "two"])
    results = {"first": {"psnr": 36.174}, "second": {"ssim": 0.951}}
    assert numbers.differences(quoted, numbers.texts(["one", "two"], results)) == []
    results = {"first": {"psnr": 36.15}, "second": {"ssim": 0.955001}}
    found = numbers.differences(quoted, numbers.texts(["one", "two"], results))
    assert [(d.place, d.quoted, d.measured, d.rounding) for d in found] == [
        ("a.md:3 (one)", "36.17", "36.15", False),
        ("b.md:2 (two)", "0.95", "0.96", True),
    ]


def test_writing_changes_the_block_alone_and_then_nothing_differs(numbers: QuotedNumbers) -> None:
    texts = numbers.texts(["one", "two"], {"first": {"psnr": 36.2}, "second": {"ssim": 0.95}})
    assert numbers.write(texts) == ["a.md"]
    written = (numbers.folder / "a.md").read_bytes().decode()
    assert written.replace("tiny 36.20 dB\n", "tiny 36.17 dB\r\n") == DOCUMENT
    assert numbers.differences(numbers.quoted(["one", "two"]), texts) == []
    assert numbers.write(texts) == []


def test_documents_and_registry_have_to_fit(numbers: QuotedNumbers) -> None:
    file = numbers.folder / "b.md"
    file.write_text("<!-- numbers: one -->\n0.95\n<!-- end -->\n")
    with pytest.raises(ValueError, match="b.md:1: nothing is measured for a block one here; wante"):
        numbers.quoted(["one"])
    file.write_text("0.95\n")
    with pytest.raises(ValueError, match="b.md has no block two; wanted the lines <!-- numbers: "):
        numbers.quoted(["two"])
    assert list(numbers.quoted(["one"])) == ["one"], "what is not asked for need not be there"


def test_every_block_of_our_documents_is_known_and_every_known_one_is_there() -> None:
    quoted = DOCUMENTED_NUMBERS.quoted(list(DOCUMENTED_NUMBERS.blocks))
    assert all(block.text.strip() for block in quoted.values())


def test_no_other_document_has_blocks() -> None:
    documents = {block.file for block in DOCUMENTED_NUMBERS.blocks.values()}
    folder = DOCUMENTED_NUMBERS.folder
    for file in (*folder.glob("*.md"), *(folder / "docs").rglob("*.md")):
        name = file.relative_to(folder).as_posix()
        if name not in documents:
            assert not blocks_in(file.read_text(encoding="utf-8"), name), file


def test_every_measurement_is_quoted_and_every_block_is_measured() -> None:
    measured = {block.measurement for block in DOCUMENTED_NUMBERS.blocks.values()}
    assert measured == set(DOCUMENTED_NUMBERS.measurements)
