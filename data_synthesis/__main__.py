"""Command line: ``python -m data_synthesis procedural --count 6000 --size 160 --out FOLDER``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

EXAMPLES = """examples:
  python -m data_synthesis procedural --preview sheet.png
  python -m data_synthesis procedural --count 6000 --size 160 --seed 1 --out data/train
  python -m data_synthesis procedural --count 64 --size 160 --seed 1000 --out data/validation

A run that was interrupted goes on where it stopped when the same command is given again.
Several processes may share the work with --start, each with a folder of its own."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status (0, or 2 after a mistake)."""
    parser = argparse.ArgumentParser(
        prog="python -m data_synthesis", description="Makes training scenes with true lens blur."
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    procedural = kinds.add_parser(
        "procedural",
        help="random layered scenes, ray traced; no downloads",
        description="Random layered scenes with true disparity and ray-traced lens blur.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    procedural.add_argument("--count", type=int, default=24, help="samples (default 24)")
    procedural.add_argument("--size", type=int, default=128, help="height = width (default 128)")
    procedural.add_argument("--seed", type=int, default=0, help="which data set (default 0)")
    procedural.add_argument("--start", type=int, default=0, help="index of the first sample")
    procedural.add_argument("--shard-size", type=int, default=64, help="samples in a file")
    procedural.add_argument("--out", type=Path, help="folder for the shards")
    procedural.add_argument("--preview", type=Path, help="write a contact sheet of the first 24")
    options = parser.parse_args(arguments)
    if options.out is None and options.preview is None:
        procedural.error("nothing to do: give --out FOLDER, --preview FILE.png or both")

    from data_synthesis.preview import write_contact_sheet
    from data_synthesis.procedural import ProceduralScenes
    from data_synthesis.shards import write_shards

    try:
        scenes = ProceduralScenes(options.seed, options.size)
        if options.out is not None:
            with tqdm(total=options.count, unit="sample", smoothing=0.05) as bar:
                written = write_shards(
                    scenes.arrays,
                    options.out,
                    count=options.count,
                    start=options.start,
                    shard_size=options.shard_size,
                    settings=scenes.settings,
                    progress=bar.update,
                )
            print(f"{len(written)} new shards in {options.out}")
        if options.preview is not None:
            shown = range(options.start, options.start + min(options.count, 24))
            write_contact_sheet((scenes[i] for i in tqdm(shown, unit="sample")), options.preview)
            print(f"image, disparity and target of {len(shown)} samples: {options.preview}")
    except (ValueError, FileExistsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
