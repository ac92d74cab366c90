"""The prompt bank: combinations, turns of the categories, files of a person's own."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_synthesis.prompts import PromptBank


def small_bank(**changes: Any) -> dict[str, Any]:
    birds = {
        "count": 3,
        "template": "{subject} {action}, {light}",
        "slots": {"subject": ["a robin", "a swan"], "action": ["calling", "standing", "asleep"]},
    }
    tools = {"count": 1, "template": "{subject}", "slots": {"subject": ["a saw", "a rope"]}}
    content = {
        "suffix": "sharp",
        "negative": "text",
        "slots": {"light": ["daylight", "dusk"]},
        "categories": {"birds": birds, "tools": tools},
    }
    return {**content, **changes}


def test_built_in_bank_meets_its_counts_without_repeating_a_prompt() -> None:
    bank = PromptBank.load()
    schedule = bank.schedule()
    assert len(schedule) >= 2000 and len(bank.counts) >= 12
    assert Counter(prompt.category for prompt in schedule) == bank.counts
    assert len({prompt.text for prompt in schedule}) == len(schedule)
    for name, count in bank.counts.items():
        assert bank.distinct[name] >= 10 * count
    # The text encoders read 77 tokens, about four letters each; the end must not be cut off.
    assert max(len(prompt.text) for prompt in schedule) < 280
    assert "bokeh" in bank.negative
    assert {prompt.category for prompt in schedule if prompt.translucent} == {"glass"}


def test_first_prompts_of_a_category_differ_in_subject() -> None:
    texts = [p.text for p in PromptBank.load().schedule(1000) if p.category == "statues"][:16]
    assert len({" ".join(text.split(",")[0].split()[:4]) for text in texts}) >= 14


def test_every_combination_comes_before_any_returns() -> None:
    bank = PromptBank(small_bank())
    texts = [p.text for p in bank.schedule(40) if p.category == "birds"]
    assert bank.distinct == {"birds": 12, "tools": 2}
    assert len(texts) == 30 and len(set(texts[:12])) == 12
    assert texts[12:24] == texts[:12]
    assert all(text.endswith(", sharp") for text in texts)


@settings(max_examples=30, deadline=None)
@given(
    counts=st.lists(st.integers(1, 50), min_size=1, max_size=8),
    length=st.integers(1, 200),
    seed=st.integers(0, 2**31),
)
def test_turns_follow_the_counts_at_any_length(counts: list[int], length: int, seed: int) -> None:
    category = {"template": "{x}", "slots": {"x": ["a", "b", "c"]}}
    content = {"categories": {f"c{i}": {**category, "count": n} for i, n in enumerate(counts)}}
    bank = PromptBank(content)
    assert Counter(p.category for p in bank.schedule(seed=seed)) == bank.counts
    schedule = bank.schedule(length, seed)
    assert schedule == bank.schedule(length + 7, seed)[:length]
    for name, made in Counter(p.category for p in schedule).items():
        assert made < length * bank.counts[name] / sum(counts) + 1


def test_seeds_begin_elsewhere() -> None:
    bank = PromptBank.load()
    first = {prompt.text for prompt in bank.schedule(500)}
    second = {prompt.text for prompt in bank.schedule(500, seed=1)}
    assert len(first & second) < 50


def test_files(tmp_path: Path) -> None:
    content = small_bank()
    (tmp_path / "bank.json").write_text(json.dumps(content))
    bank = PromptBank.load(tmp_path / "bank.json")
    assert bank.schedule() == PromptBank(content).schedule() and bank.negative == "text"

    lines = "# my prompts\na red kite\n\n  a {braced} cup  \na red kite\n"
    (tmp_path / "lines.txt").write_text(lines)
    own = PromptBank.load(tmp_path / "lines.txt")
    texts = [prompt.text for prompt in own.schedule(3, seed=8)]
    assert texts == ["a red kite", "a {braced} cup", "a red kite"]  # the order of the lines
    assert own.counts == {"prompts": 2} and own.negative == PromptBank.load().negative
    assert own.fingerprint != bank.fingerprint


def test_yaml_is_the_same_bank(tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    (tmp_path / "bank.yaml").write_text(yaml.safe_dump(small_bank()))
    assert PromptBank.load(tmp_path / "bank.yaml").schedule() == (
        PromptBank(small_bank()).schedule()
    )


def mistaken_category(**changes: Any) -> dict[str, Any]:
    content = small_bank()
    content["categories"]["birds"].update(changes)
    return content


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([], "no 'categories'"),
        ({"categories": {}}, "no categories"),
        (small_bank(sufix="x"), "unknown entries .'sufix'."),
        (mistaken_category(count=0), "'birds'.*count is 0"),
        (mistaken_category(count=True), "count is True"),
        (mistaken_category(translucent="yes"), "wanted true or false"),
        (mistaken_category(template=None), "no template"),
        (mistaken_category(template="{missing}"), "slot 'missing'"),
        (mistaken_category(template="{subject"), "is broken"),
        (mistaken_category(template="{}"), "no name of a slot"),
        (mistaken_category(slots={"subject": ["a", "a"], "action": ["b"]}), "none of them twice"),
        (mistaken_category(slots={"subject": [], "action": ["b"]}), "none of them twice"),
        ({"categories": {"../birds": {"count": 1, "template": "x"}}}, "wanted a name of a-z"),
    ],
)
def test_mistakes_in_a_bank_are_named(content: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PromptBank(content)


def test_mistakes_in_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="wanted prompts"):
        PromptBank.load(tmp_path / "none.txt")
    for name, text, words in (
        ("a.json", b"{", "no valid JSON"),
        ("a.yaml", b"a: [", "no valid YAML"),
        ("a.txt", b"# only this\n", "no prompts"),
        ("b.txt", b"\xff\xfe\x00", "not UTF-8"),
    ):
        (tmp_path / name).write_bytes(text)
        with pytest.raises(ValueError, match=words):
            PromptBank.load(tmp_path / name)
    with pytest.raises(ValueError, match="wanted 1 or more"):
        PromptBank(small_bank()).schedule(0)
