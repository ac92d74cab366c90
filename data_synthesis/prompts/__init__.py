"""Prompts for transparent foregrounds: a bank of categories, or a person's own list.

A bank is a JSON or YAML file (``bank.json`` beside this module is the one that is used by
default)::

    {"suffix": "added to every prompt", "negative": "what no picture shall show",
     "slots": {"light": ["soft daylight", "studio light"]},
     "categories": {
         "birds": {"count": 200, "template": "{subject} {action}, {light}",
                   "slots": {"subject": ["a robin", "a swan"], "action": ["standing", "calling"]}}}}

Every category makes all combinations of the phrases of its template's slots; a slot is looked up
in the category first, then in the bank. The phrases of a single slot come in their order,
combinations of several well mixed. ``count`` is how many pictures the category asks for, or its
share where another total is wanted; ``"translucent": true`` lets its subjects be mostly
semi-transparent, as glass is. A text file holds one prompt per line, ``#`` begins a comment
line.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import string
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Prompt", "PromptBank"]

BUILT_IN = Path(__file__).with_name("bank.json")
GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
CATEGORY_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
BANK_KEYS = {"suffix", "negative", "slots", "categories"}
CATEGORY_KEYS = {"count", "template", "slots", "translucent"}


@dataclass(frozen=True)
class Prompt:
    """A prompt and the category it counts for; ``translucent``: its subjects let light through."""

    text: str
    category: str
    translucent: bool


@dataclass(frozen=True)
class _Category:
    count: int
    template: str
    phrases: Mapping[str, Sequence[str]]  # by slot, in the order of the template
    translucent: bool

    @property
    def distinct(self) -> int:
        return math.prod(len(phrases) for phrases in self.phrases.values())

    def text(self, number: int, shift: int) -> str:
        """The prompt of this number; all differ until every combination has been used."""
        if len(self.phrases) == 1:
            ((slot, phrases),) = self.phrases.items()
            return self.template.format(**{slot: phrases[number % len(phrases)]})
        # Steps of about the golden ratio visit a range evenly from the first one on, and visit all
        # of it because step and range have no common divisor.
        step = max(1, round(GOLDEN_RATIO * self.distinct))
        while math.gcd(step, self.distinct) > 1:
            step += 1
        position = (number * step + shift) % self.distinct
        chosen = {}
        for slot, phrases in reversed(list(self.phrases.items())):
            position, place = divmod(position, len(phrases))
            chosen[slot] = phrases[place]
        return self.template.format(**chosen)


class PromptBank:
    """Prompts by category. ``counts``: pictures each category asks for; ``negative``: what no
    picture shall show; ``fingerprint``: changes with the bank's content."""

    def __init__(self, content: Mapping[str, Any], name: str = "the prompt bank") -> None:
        """``content``: as in the file; ``name``: what errors call it. Raises ValueError."""
        if not isinstance(content, Mapping) or not isinstance(content.get("categories"), Mapping):
            raise ValueError(f"{name} has no 'categories'; see data_synthesis/prompts/bank.json.")
        _no_other_keys(content, BANK_KEYS, name)
        self.negative = str(content.get("negative", ""))
        self._suffix = str(content.get("suffix", ""))
        self._categories: dict[str, _Category] = {}
        for category, entry in content["categories"].items():
            where = f"category {category!r} of {name}"
            if not CATEGORY_NAME.fullmatch(str(category)):
                raise ValueError(f"{where}: wanted a name of a-z, 0-9 and single hyphens.")
            if not isinstance(entry, Mapping) or not isinstance(entry.get("template"), str):
                raise ValueError(f"{where} has no template, like '{{subject}}, {{light}}'.")
            _no_other_keys(entry, CATEGORY_KEYS, where)
            count = entry.get("count")
            if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                raise ValueError(
                    f"{where}: count is {count!r}; wanted a whole number of 1 or more."
                )
            slots = {**content.get("slots", {}), **entry.get("slots", {})}
            phrases = {}
            for slot in _slots_of(entry["template"], where):
                values = slots.get(slot)
                if not isinstance(values, list) or not values or len(set(values)) < len(values):
                    raise ValueError(
                        f"{where}: slot {slot!r} is {values!r}; wanted a list of phrases, none "
                        "of them twice."
                    )
                phrases[slot] = [str(value) for value in values]
            translucent = entry.get("translucent", False)
            if not isinstance(translucent, bool):
                raise ValueError(f"{where}: translucent is {translucent!r}; wanted true or false.")
            self._categories[category] = _Category(count, entry["template"], phrases, translucent)
        if not self._categories:
            raise ValueError(f"{name} has no categories; see data_synthesis/prompts/bank.json.")
        canonical = json.dumps(content, sort_keys=True, ensure_ascii=False)
        self.fingerprint = hashlib.sha256(canonical.encode()).hexdigest()[:16]

    @classmethod
    def load(cls, path: str | os.PathLike[str] | None = None) -> PromptBank:
        """The bank in a JSON, YAML or text file; without a path, the built-in one.

        Raises FileNotFoundError, or ValueError where the file is no bank.
        """
        file = BUILT_IN if path is None else Path(path).expanduser()
        if not file.is_file():
            raise FileNotFoundError(
                f"There is no file {file}; wanted prompts, one per line, or a JSON or YAML bank."
            )
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file.name} is not UTF-8 text ({error}); save it as such.") from None
        if file.suffix.lower() == ".json":
            try:
                return cls(json.loads(text), file.name)
            except json.JSONDecodeError as error:
                raise ValueError(f"{file.name} is no valid JSON: {error}") from None
        if file.suffix.lower() in (".yaml", ".yml"):
            return cls(_parse_yaml(text, file.name), file.name)
        lines = [line.strip() for line in text.splitlines()]
        prompts = list(dict.fromkeys(line for line in lines if line and line[0] != "#"))
        if not prompts:
            raise ValueError(f"{file.name} holds no prompts; write one per line.")
        return cls._of_lines(prompts, file.name)

    @classmethod
    def _of_lines(cls, prompts: list[str], name: str) -> PromptBank:
        negative = json.loads(BUILT_IN.read_text(encoding="utf-8"))["negative"]
        category = {
            "count": len(prompts),
            "template": "{prompt}",
            "slots": {"prompt": prompts},
        }
        return cls({"negative": negative, "categories": {"prompts": category}}, name)

    @property
    def counts(self) -> dict[str, int]:
        return {name: category.count for name, category in self._categories.items()}

    @property
    def distinct(self) -> dict[str, int]:
        """How many different prompts each category can make."""
        return {name: category.distinct for name, category in self._categories.items()}

    def schedule(self, count: int | None = None, seed: int = 0) -> list[Prompt]:
        """The first ``count`` prompts (by default, as many as the categories ask for).

        The categories take turns in the ratio of their counts: none is ever a whole picture ahead
        of its share, and the default length meets every count. A longer schedule begins with the
        shorter one. ``seed`` shifts which combinations of several slots come first.
        """
        total = sum(self.counts.values())
        count = total if count is None else count
        if count < 1:
            raise ValueError(f"{count} prompts are asked for; wanted 1 or more.")
        made = dict.fromkeys(self._categories, 0)
        prompts = []
        for index in range(count):
            # The category that is farthest behind its share; the first of equals.
            name = max(
                self._categories,
                key=lambda name: self._categories[name].count * (index + 1) - total * made[name],
            )
            category = self._categories[name]
            # Categories with the same number of combinations are shifted differently.
            shift = seed * 7919 + zlib.crc32(name.encode())
            text = ", ".join(filter(None, [category.text(made[name], shift), self._suffix]))
            prompts.append(Prompt(text, name, category.translucent))
            made[name] += 1
        return prompts


def _slots_of(template: str, where: str) -> list[str]:
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(template)]
    except ValueError as error:
        raise ValueError(f"{where}: the template {template!r} is broken: {error}.") from None
    slots = [field for field in fields if field is not None]
    wrong = [slot for slot in slots if not slot.isidentifier()]
    if wrong:
        raise ValueError(f"{where}: {wrong[0]!r} is no name of a slot in {template!r}.")
    return list(dict.fromkeys(slots))


def _no_other_keys(content: Mapping[str, Any], known: set[str], where: str) -> None:
    other = set(content) - known
    if other:
        raise ValueError(f"{where} has unknown entries {sorted(other)}; known: {sorted(known)}.")


def _parse_yaml(text: str, name: str) -> Any:
    try:
        import yaml
    except ImportError:
        raise ValueError(
            f"{name}: reading YAML needs PyYAML; pip install pyyaml, or write the bank as JSON."
        ) from None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{name} is no valid YAML: {error}") from None
