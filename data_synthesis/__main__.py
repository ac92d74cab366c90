"""Command line: ``python -m data_synthesis procedural --count 4096 --size 160 --out FOLDER``."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

if TYPE_CHECKING:
    from data_synthesis.writer import Scenes

PROGRAM = "python -m data_synthesis"
# Samples on a contact sheet.
PREVIEWED = 24

OVERVIEW = """commands that write training samples in shards:
  procedural    random layered scenes, made from nothing
  layers        cut-outs over photographs, slanted in space, as in the BokehDiff paper

commands that write files of their own:
  stacks        one scene at several strengths of blur, with true depth in metres
  clips         a few frames in which things move, with true depth, motion and lens blur

other commands:
  benchmark     scenes at several blur levels, for python -m evaluation raytraced
  foregrounds   transparent cut-outs from text, for layers
  preview       a contact sheet of a folder of shards, or of samples made on the fly
  verify        compares the shards of a folder with its checksums

Each has its own --help."""

WRITING = """An interrupted run goes on where it stopped when the same command is given again.

Several processes share the work, and the shards are the same bytes for any number of them:
  {program} {kind} ... --processes 4
  accelerate launch --multi_gpu --num_processes 4 -m data_synthesis {kind} ...
  RANK=0 WORLD_SIZE=2 {program} {kind} ...
The last is for machines that share the folder: RANK=1 on the second one. accelerate's --multi_gpu
asks for no GPU; its --cpu starts one process, whatever --num_processes says."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 1 when shards are bad, 2 after a mistake."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Makes training scenes with true lens blur.",
        epilog=OVERVIEW,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    parser.add_argument("options", nargs=argparse.REMAINDER, metavar="...")
    chosen = parser.parse_args(arguments)
    try:
        return COMMANDS[chosen.command](chosen.command, chosen.options)
    except (ValueError, FileExistsError, ChildProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130


# --- Scenes ---------------------------------------------------------------------------------------


def _add_scene_arguments(kind: str, parser: argparse.ArgumentParser) -> None:
    size = 128 if kind == "procedural" else 512
    parser.add_argument("--size", type=int, default=size, help=f"height = width (default {size})")
    parser.add_argument("--seed", type=int, default=0, help="which data set (default 0)")
    if kind == "layers":
        from data_synthesis import layer_scenes

        layer_scenes.add_arguments(parser)
    else:
        from data_synthesis.apertures import add_aperture_argument
        from data_synthesis.procedural import IMPERFECT_SHARE

        add_aperture_argument(parser)
        parser.add_argument(
            "--imperfect-share",
            type=float,
            default=IMPERFECT_SHARE,
            metavar="SHARE",
            help="share of scenes whose disparity map is not exact: edges are anti-aliased, or "
            f"wrong as in estimated maps (default {IMPERFECT_SHARE})",
        )


def _scenes(kind: str, options: argparse.Namespace) -> Any:
    if kind == "layers":
        from data_synthesis import layer_scenes

        return layer_scenes.from_options(options)
    from data_synthesis.procedural import ProceduralScenes

    return ProceduralScenes(
        options.seed,
        options.size,
        imperfect_share=options.imperfect_share,
        aperture=options.aperture,
    )


# --- Commands -------------------------------------------------------------------------------------


def _write(kind: str, arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} {kind}",
        description="Training samples with true disparity and ray-traced lens blur, in shards.",
        epilog=WRITING.format(program=PROGRAM, kind=kind),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--count", type=int, default=24, help="samples (default 24)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="folder for the shards")
    parser.add_argument("--num-shards", type=int, help="files (default: 64 samples in each)")
    parser.add_argument("--processes", type=int, default=1, help="on this machine (default 1)")
    parser.add_argument(
        "--preview", type=Path, metavar="FILE.png", help=f"contact sheet of the first {PREVIEWED}"
    )
    _add_scene_arguments(kind, parser)
    options = parser.parse_args(arguments)
    if options.out is None and options.preview is None:
        parser.error("nothing to do: give --out FOLDER, --preview FILE.png or both")
    if options.processes < 1:
        parser.error(f"--processes is {options.processes}; wanted at least 1")

    from accelerate.utils import get_cpu_distributed_information

    launched = get_cpu_distributed_information()
    scenes = _scenes(kind, options)
    if options.out is not None:
        _write_shards(scenes, options, launched.rank, launched.world_size)
    if options.preview is not None and launched.rank == 0:
        _draw(scenes, min(options.count, PREVIEWED), options.preview)
    return 0


def _write_shards(scenes: Scenes, options: argparse.Namespace, rank: int, world_size: int) -> None:
    from data_synthesis.shards import shard_layout
    from data_synthesis.writer import default_shards, write_shards

    count, folder = options.count, options.out
    num_shards = default_shards(count) if options.num_shards is None else options.num_shards
    layout = shard_layout(count, num_shards)
    workers = world_size * options.processes
    if num_shards < workers and rank == 0:
        print(
            f"note: {num_shards} shards keep no more than {num_shards} of {workers} processes "
            "busy; --num-shards makes more",
            file=sys.stderr,
        )
    share = layout[rank * options.processes :: workers]
    with tqdm(
        total=sum(len(shard.indices) for shard in share),
        desc=f"process 1 of {workers}" if workers > 1 else None,
        unit="sample",
        smoothing=0.05,
        disable=rank > 0,
    ) as bar:
        finished = write_shards(
            scenes,
            folder,
            count=count,
            num_shards=num_shards,
            rank=rank,
            world_size=world_size,
            processes=options.processes,
            progress=bar.update,
        )
    if finished:
        print(f"{folder} is finished: {count} samples in {num_shards} shards.")
    else:
        there = sum((folder / shard.name).exists() for shard in layout)
        print(
            f"{there} of {num_shards} shards are in {folder} so far; the others are left to other "
            "processes, or to this command given again."
        )


def _preview(command: str, arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} {command}",
        description="A contact sheet: image, disparity and target of every sample.",
        epilog=f"examples:\n  {PROGRAM} preview scenes/train --out sheet.png\n"
        f"  {PROGRAM} preview layers --size 256 --aperture random --out sheet.png",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source", help=f"folder of shards, or {' or '.join(KINDS)} and the options of that command"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.png")
    parser.add_argument(
        "--count", type=int, default=PREVIEWED, help=f"samples (default {PREVIEWED})"
    )
    kind = next((word for word in arguments if word in KINDS), None)
    if kind is not None:
        _add_scene_arguments(kind, parser)
    options = parser.parse_args(arguments)
    if options.count < 1:
        parser.error(f"--count is {options.count}; wanted at least 1")
    if options.source in KINDS:
        _draw(_scenes(options.source, options), options.count, options.out)
        return 0
    from data_synthesis.reader import ShardedScenes

    scenes = ShardedScenes(options.source, verify=False)
    _draw(scenes, min(options.count, len(scenes)), options.out)
    return 0


def _draw(scenes: Any, count: int, path: Path) -> None:
    from data_synthesis.preview import write_contact_sheet

    shown = tqdm(range(count), unit="sample", disable=None)
    write_contact_sheet((scenes[index] for index in shown), path)
    print(f"image, disparity and target of {count} samples: {path}")


def _verify(command: str, arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} {command}",
        description="Compares the shards of a folder with the checksums in its manifest.json.",
    )
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(arguments).folder

    from data_synthesis.reader import verify_shards

    problems = verify_shards(folder)
    for problem in problems:
        print(problem)
    if problems:
        print(
            f"{len(problems)} shards of {folder} are bad. Delete them and give the command that "
            "wrote the data set again: it writes what is missing."
        )
        return 1
    print(f"All shards of {folder} are as they were written.")
    return 0


def _run_module(command: str, arguments: Sequence[str]) -> int:
    module: Any = importlib.import_module(MODULES[command])
    parser = argparse.ArgumentParser(prog=f"{PROGRAM} {command}")
    module.add_arguments(parser)
    return module.run(parser.parse_args(arguments)) or 0


KINDS = ("procedural", "layers")
MODULES = {
    "stacks": "data_synthesis.stack_files",
    "clips": "data_synthesis.clip_files",
    "benchmark": "data_synthesis.benchmark",
    "foregrounds": "data_synthesis.foregrounds",
}
"""Of the commands that have a module with ``add_arguments`` and ``run``."""
COMMANDS: dict[str, Callable[[str, Sequence[str]], int]] = {
    **dict.fromkeys(KINDS, _write),
    **dict.fromkeys(MODULES, _run_module),
    "preview": _preview,
    "verify": _verify,
}


if __name__ == "__main__":
    sys.exit(main())
