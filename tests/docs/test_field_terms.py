"""The terms of the field are spelled alike in the README and on every page."""

from __future__ import annotations

import re

import pytest

from tests.docs.pages import PAGES, prose

# Wanted: what must not stand instead of it, as a regular expression without regard to case.
TERMS = {
    "circle of confusion": r"blur[- ]circles?|confusion circles?|circle[- ]of[- ]confusions",
    "f-number": r"f[ -]?stops?|f numbers?|fnumbers?|aperture numbers?",
    "all in focus": r"all[- ]focus\b|all[- ]infocus|everywhere[- ]sharp|(?:is|are|be) all-in-focus",
    "plane in focus": r"focal planes?|focusing planes?",
    "focal length": r"focal[-]lengths?|focallength",
    "disparity": r"disparitys|inverse-depth|parallax maps?",
    "linear light": r"linear[- ](?:rgb|space|colou?rs?)|linear-light",
    "ray-traced": r"raytrac\w*|ray traced",
    "cat-eye": r"cat'?s[- ]eyes?|cateyes?",
    "depth of field": r"depth-of-field|depth of focus",
    "data set": r"datasets?",
    "cut-out": r"cutouts?",
    "UNet": r"u-nets?",
    "35 mm": r"35mm",
    "colour": r"colors?",
    "centre": r"centers?",
    "neighbour": r"neighbors?",
    "normalise": r"normalize[ds]?",
    # But for the names of licences.
    "licence": r"(?<!S-Lab )(?<!Non-Commercial )licenses?",
    "grayscale": r"greyscale",
}


@pytest.mark.parametrize("wanted", TERMS)
def test_a_term_is_spelled_in_one_way(wanted: str):
    unwanted = re.compile(rf"\b(?:{TERMS[wanted]})\b", re.IGNORECASE)
    found = [
        f"{page}:{number}: {match[0]!r}; wanted {wanted!r}"
        for page in PAGES
        for number, line in enumerate(prose(page).splitlines(), 1)
        for match in unwanted.finditer(line)
    ]
    assert not found, "\n".join(found)


def test_every_unwanted_spelling_can_be_found():
    wrong = {
        "circle of confusion": "a blur circle",
        "f-number": "an f-stop",
        "all in focus": "the photo is all-in-focus",
        "ray-traced": "raytraced scenes",
        "data set": "a dataset",
        "colour": "the color",
    }
    for wanted, sentence in wrong.items():
        assert re.search(rf"\b(?:{TERMS[wanted]})\b", sentence, re.IGNORECASE), wanted
    assert not re.search(rf"\b(?:{TERMS['all in focus']})\b", "an all-in-focus photo")
