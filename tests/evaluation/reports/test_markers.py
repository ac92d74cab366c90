"""Blocks of numbers in Markdown: found where they are, compared as they are printed, replaced."""

from __future__ import annotations

import pytest

from evaluation.reports.markers import Difference, QuotedBlock, blocks_in, compare, with_blocks

DOCUMENT = """# Title

Words.

<!-- numbers: table -->
| | PSNR |
|---|---|
| tiny | **36.17** |
| scatter | 34.96 |
<!-- end -->

More words, 35.00 of them.
<!-- numbers: sentence -->
Over 21 images tiny reaches 36.17 dB (scatter 34.96), a change of -0.45.
<!-- end -->
Last words.
"""


def quoted(name: str) -> QuotedBlock:
    return blocks_in(DOCUMENT, "a.md")[name]


def test_blocks_are_found_with_their_lines() -> None:
    assert list(blocks_in(DOCUMENT, "a.md")) == ["table", "sentence"]
    assert quoted("table").line == 6 and quoted("sentence").line == 14
    assert quoted("table").text.startswith("| | PSNR |\n") and "<!--" not in quoted("table").text
    assert quoted("sentence").text.startswith("Over 21") and "\n" not in quoted("sentence").text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- numbers: a -->\n1.0\n", r"a.md:1: the block a has no <!-- end -->"),
        ("1.0\n<!-- end -->\n", r"a.md:2 ends a block that does not begin"),
        ("<!-- numbers: a -->\n<!-- numbers: b -->\n", r"a.md:2 begins the block b inside .* a;"),
        ("<!-- numbers: a -->\n<!-- end -->\n" * 2, r"a.md:3 has a second block a; wanted one"),
    ],
)
def test_broken_markers_are_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        blocks_in(text, "a.md")


def test_what_is_the_same_has_no_differences() -> None:
    for name in ("table", "sentence"):
        assert compare(name, "a.md", quoted(name), quoted(name).text) == []
    rewrapped = quoted("sentence").text.replace(" (scatter", "\n(scatter")
    assert compare("sentence", "a.md", quoted("sentence"), rewrapped) == []


def test_one_unit_of_the_last_digit_is_rounding_and_two_are_not() -> None:
    (one,) = compare(
        "table", "a.md", quoted("table"), quoted("table").text.replace("34.96", "34.97")
    )
    assert (one.place, one.quoted, one.measured) == ("a.md:9 (table)", "34.96", "34.97")
    assert one.rounding
    (two,) = compare(
        "table", "a.md", quoted("table"), quoted("table").text.replace("34.96", "34.98")
    )
    assert not two.rounding
    # 10.00 - 9.99 has another digit everywhere, and is still one unit.
    block = QuotedBlock("9.99", 1)
    assert compare("x", "a.md", block, "10.00")[0].rounding


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("34.96", "-34.96"),  # the sign
        ("-0.45", "0.45"),
        ("21 images", "22 images"),  # whole numbers are counted
        ("36.17 dB", "36.2 dB"),  # another number of places
        ("tiny", "scatter"),
        (" dB", ""),
    ],
)
def test_everything_else_is_a_difference(before: str, after: str) -> None:
    block = quoted("sentence")
    found = compare("sentence", "a.md", block, block.text.replace(before, after, 1))
    assert found and not any(difference.rounding for difference in found)
    assert all(difference.place == "a.md:14 (sentence)" for difference in found)


def test_rows_that_are_missing_or_new_do_not_hide_the_others() -> None:
    lines = quoted("table").text.splitlines()
    lines[2:3] = ["| identity | 19.32 |", "| tiny | **36.10** |"]
    found = compare("table", "a.md", quoted("table"), "\n".join(lines))
    assert found[0].quoted == "" and "identity" in found[0].measured
    assert found[1] == Difference("a.md:8 (table)", "36.17", "36.10")
    assert not any(difference.rounding for difference in found)


def test_bold_type_is_compared_unless_rounding_moved_it() -> None:
    text = "| a | **36.17** |\n| b | 36.16 |"
    block = QuotedBlock(text, 1)
    moved = compare("x", "a.md", block, "| a | 36.17 |\n| b | **36.16** |")
    assert [d.quoted for d in moved] == ["**36.17**", "36.16"]
    assert not any(difference.rounding for difference in moved)
    rounded = compare("x", "a.md", block, "| a | 36.16 |\n| b | **36.17** |")
    assert len(rounded) == 2 and all(difference.rounding for difference in rounded)


def test_new_texts_go_into_their_blocks_and_nowhere_else() -> None:
    written = with_blocks(DOCUMENT, {"table": "| | SSIM |\n|---|---|\n| tiny | 0.957 |"})
    assert blocks_in(written, "a.md")["table"].text == "| | SSIM |\n|---|---|\n| tiny | 0.957 |"
    assert blocks_in(written, "a.md")["sentence"].text == quoted("sentence").text
    assert written.replace("| | SSIM |\n|---|---|\n| tiny | 0.957 |", quoted("table").text) == (
        DOCUMENT
    )
    same = {name: block.text for name, block in blocks_in(DOCUMENT, "a.md").items()}
    assert with_blocks(DOCUMENT, same) == DOCUMENT
