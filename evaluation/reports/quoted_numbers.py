"""Documents that quote measured numbers: which blocks they have, compared, rewritten."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.reports.markers import Difference, QuotedBlock, blocks_in, compare, with_blocks
from evaluation.reports.measuring import Measurement

__all__ = ["Block", "QuotedNumbers"]

Results = dict[str, Any]


@dataclass(frozen=True)
class Block:
    """A text made of measured numbers.

    Attributes:
        file: the document that holds it, relative to the folder of :class:`QuotedNumbers`.
        measurement: name of what it is made of.
        text: makes Markdown of the results of that.
    """

    file: str
    measurement: str
    text: Callable[[Results], str]


@dataclass(frozen=True)
class QuotedNumbers:
    """The blocks of numbers in the documents of a folder, and how they are measured.

    Attributes:
        folder: of the documents.
        blocks: by name.
        measurements: by name.
    """

    folder: Path
    blocks: Mapping[str, Block]
    measurements: Mapping[str, Measurement]

    def measurements_for(self, names: Sequence[str]) -> dict[str, Measurement]:
        """What has to be measured for the blocks of these names, each once."""
        wanted = {self.blocks[name].measurement for name in names}
        return {name: made for name, made in self.measurements.items() if name in wanted}

    def quoted(self, names: Sequence[str]) -> dict[str, QuotedBlock]:
        """What the documents say in the blocks of these names.

        Raises:
            ValueError: markers that do not match, a block in a document that nothing here makes,
                or a document without one of these blocks.
        """
        found: dict[str, QuotedBlock] = {}
        for file in sorted({block.file for block in self.blocks.values()}):
            known = [name for name, block in self.blocks.items() if block.file == file]
            inside = blocks_in((self.folder / file).read_text(encoding="utf-8"), file)
            for name, quoted in inside.items():
                if name not in known:
                    raise ValueError(
                        f"{file}:{quoted.line - 1}: nothing is measured for a block {name} here; "
                        f"wanted one of {', '.join(known)}."
                    )
            found |= inside
        for name in names:
            if name not in found:
                raise ValueError(
                    f"{self.blocks[name].file} has no block {name}; wanted the lines "
                    f"<!-- numbers: {name} --> and <!-- end --> where its numbers belong."
                )
        return {name: found[name] for name in names}

    def texts(self, names: Sequence[str], results: Mapping[str, Results]) -> dict[str, str]:
        """The blocks of these names as the results, by name of the measurement, make them."""
        chosen = {name: self.blocks[name] for name in names}
        return {name: block.text(results[block.measurement]) for name, block in chosen.items()}

    def differences(
        self, quoted: Mapping[str, QuotedBlock], texts: Mapping[str, str]
    ) -> list[Difference]:
        """Where the documents do not say what the texts say."""
        return [
            difference
            for name, text in texts.items()
            for difference in compare(name, self.blocks[name].file, quoted[name], text)
        ]

    def write(self, texts: Mapping[str, str]) -> list[str]:
        """Puts the texts into their blocks; returns the documents that changed by it."""
        from bokehdiff.whole_files import write_whole

        changed = []
        for file in sorted({self.blocks[name].file for name in texts}):
            here = {name: text for name, text in texts.items() if self.blocks[name].file == file}
            # As bytes: another kind of line end stays as it is.
            before = (self.folder / file).read_bytes().decode()
            after = with_blocks(before, here)
            if after != before:
                write_whole(self.folder / file, after.encode())
                changed.append(file)
        return changed
