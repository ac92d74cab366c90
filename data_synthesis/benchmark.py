"""Benchmarks of layer scenes: ground truth for every method that blurs a photograph.

``python -m data_synthesis benchmark --name synbokeh300 --out FOLDER`` writes our counterpart of the
benchmark in the BokehDiff paper, whose own pictures were not published. The layout is that of the
ray-traced benchmark, so ``python -m evaluation raytraced FOLDER --method scatter`` reads it: a
folder for each scene with ``aif.png``, ``aif_lin.npz`` (linear light), ``disp.npz``,
``gt_<setting>.png`` and ``meta.json``, and ``SHA256SUMS`` (which ``sha256sum -c`` reads too).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from bokehdiff.images import linear_to_srgb
from data_synthesis.layer_scenes import LayerScenes, add_source_arguments, lens_grid_side
from data_synthesis.shards import file_sha256

__all__ = ["BENCHMARKS", "add_arguments", "run", "write_benchmark"]

PathLike = str | os.PathLike[str]

CHECKSUMS = "SHA256SUMS"
DESCRIPTION = "benchmark.json"
# Scenes grow in here, two levels deep, where the reader of benchmarks does not look for them.
UNFINISHED = ".unfinished"
SMALLEST_SIZE = 128


@dataclass(frozen=True)
class _Benchmark:
    """Number of scenes, largest blur radii in pixels of 512 x 512 pictures, seed."""

    scenes: int
    levels: tuple[int, ...]
    seed: int


BENCHMARKS = {"synbokeh300": _Benchmark(scenes=300, levels=(6, 12, 24, 48), seed=300)}


def write_benchmark(
    name: str,
    folder: PathLike,
    *,
    count: int | None = None,
    size: int = 512,
    foregrounds: PathLike | Sequence[PathLike] | None = None,
    backgrounds: PathLike | Sequence[PathLike] | None = None,
    processes: int = 1,
    progress: Callable[[int], Any] | None = None,
) -> list[Path]:
    """Writes the scenes that the folder lacks; returns their folders.

    Each scene is one to three cut-outs over a background, with the disparity of a foreground or
    of the background in focus (half of the scenes each), photographed with a disc at each level
    of blur. The same name, size and sources give the same bytes with any number of processes. A
    scene's folder appears when it is complete, so after an interruption of any kind the same call
    goes on where the last one stopped; the scenes that are there are checked against their
    checksums.

    Args:
        name: "synbokeh300".
        folder: made if need be; it holds this benchmark alone.
        count: only the first scenes; default all.
        size: H = W, pixels, at least 128; levels of blur are in proportion to it.
        foregrounds, backgrounds: folders of RGBA cut-outs and of photographs; None makes them
            from nothing.
        processes: how many share the work.
        progress: is told of every n scenes that are done or were there.

    Raises:
        ValueError: an argument is out of its range, the folder holds another benchmark or a
            damaged scene, or a folder of sources is of no use.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"name is {name!r}; wanted one of {', '.join(BENCHMARKS)}.")
    benchmark = BENCHMARKS[name]
    count = benchmark.scenes if count is None else count
    if not 1 <= count <= benchmark.scenes:
        raise ValueError(f"count is {count}; {name} has 1 to {benchmark.scenes} scenes.")
    if size < SMALLEST_SIZE:
        raise ValueError(f"size is {size}; wanted at least {SMALLEST_SIZE} pixels.")
    if processes < 1:
        raise ValueError(f"processes is {processes}; wanted at least 1.")
    scenes = LayerScenes(
        benchmark.seed,
        size,
        foregrounds=foregrounds,
        backgrounds=backgrounds,
        focus={"foreground": 0.5, "background": 0.5},
        exposure=(0.0, 0.0),
        length=benchmark.scenes,
    )
    levels = [round(level * size / 512) for level in benchmark.levels]
    folder = Path(folder)
    _claim(folder, {"name": name, "levels": levels, "settings": scenes.settings})

    missing = [index for index in range(count) if not _is_finished(folder / _scene_name(index))]
    report = progress or (lambda scenes: None)
    report(count - len(missing))
    writer = _SceneWriter(scenes, levels, folder)
    written = []
    for index in _done(writer, missing, min(processes, len(missing))):
        written.append(folder / _scene_name(index))
        report(1)
    _remove_leftovers(folder)
    return sorted(written)


@dataclass
class _SceneWriter:
    """Writes one scene at a time."""

    scenes: LayerScenes
    levels: list[int]
    folder: Path

    def __call__(self, index: int) -> int:
        """Gives the benchmark scene ``index`` and returns the number."""
        finished = self.folder / _scene_name(index)
        unfinished = self.folder / UNFINISHED / f"{finished.name}-{uuid.uuid4().hex}"
        try:
            unfinished.mkdir(parents=True)
            self._write(index, unfinished)
            unfinished.rename(finished)
        except OSError:
            # Another run may have been faster; its scene has the same bytes.
            if not _is_finished(finished):
                raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        return index

    def _write(self, index: int, folder: Path) -> None:
        scene = self.scenes.compose(index, max(self.levels))
        light = scene.light(0.0)
        disparity = scene.hard_disparity()
        settings = []
        for level in self.levels:
            K = self.scenes.strength(scene, level)
            side = lens_grid_side(level)
            identifier = f"{scene.provenance['focus']}_r{level:02d}"
            _save_png(folder / f"gt_{identifier}.png", scene.light(K, samples_per_side=side))
            settings.append(
                {
                    "id": identifier,
                    "level": level,
                    "df": scene.df,
                    "K": K,
                    "max_radius_px": float(K * np.abs(disparity - scene.df).max()),
                    "samples_per_side": side,
                }
            )
        _save_png(folder / "aif.png", light)
        np.savez_compressed(folder / "aif_lin.npz", aif=light.astype(np.float16))
        np.savez_compressed(folder / "disp.npz", disp=disparity)
        low, high = np.percentile(disparity, [0.1, 99.9])
        _save_json(
            folder / "meta.json",
            {
                "scene": _scene_name(index),
                "width": scene.size,
                "height": scene.size,
                "alpha_cards": True,
                "n_lights": 0,
                "disp_min": float(disparity.min()),
                "disp_max": float(disparity.max()),
                "disp_p001": float(low),
                "disp_p999": float(high),
                "configs": settings,
                "provenance": scene.provenance,
            },
        )
        sums = "".join(f"{file_sha256(file)}  {file.name}\n" for file in sorted(folder.iterdir()))
        (folder / CHECKSUMS).write_text(sums)


def _remove_leftovers(folder: Path) -> None:
    """Removes what killed runs left of scenes that are finished by now."""
    unfinished = folder / UNFINISHED
    for leftover in unfinished.iterdir() if unfinished.exists() else ():
        if (folder / leftover.name.partition("-")[0]).exists():
            shutil.rmtree(leftover, ignore_errors=True)
    with contextlib.suppress(OSError):
        unfinished.rmdir()


def _scene_name(index: int) -> str:
    return f"s{index:03d}"


def _claim(folder: Path, description: dict[str, Any]) -> None:
    """Makes the folder that of this benchmark, or raises ValueError because it is another's."""
    file = folder / DESCRIPTION
    wanted = json.loads(json.dumps(description))
    if not file.exists():
        there = folder.iterdir() if folder.exists() else ()
        if any(not entry.name.startswith(DESCRIPTION) for entry in there):
            raise ValueError(
                f"{folder} is not empty and holds no {DESCRIPTION}, so it is no benchmark that "
                "could be continued; choose another folder."
            )
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / f"{DESCRIPTION}.{uuid.uuid4().hex}"
        _save_json(unfinished, description)
        os.replace(unfinished, file)
    held = json.loads(file.read_text())
    if held != wanted:
        differences = [
            f"{key} {before.get(key)!r}, not {asked.get(key)!r}"
            for before, asked in ((held, wanted), (held["settings"], wanted["settings"]))
            for key in asked
            if key != "settings" and before.get(key) != asked.get(key)
        ]
        raise ValueError(
            f"{folder} holds another benchmark than the one asked for: {'; '.join(differences)}. "
            "Choose another folder."
        )


def _is_finished(scene: Path) -> bool:
    """Whether the scene is there. Raises ValueError if it is and its checksums are not right."""
    if not scene.exists():
        return False
    try:
        lines = (scene / CHECKSUMS).read_text().splitlines()
        sums = dict(reversed(line.split("  ", 1)) for line in lines)
        damaged = [name for name, wanted in sums.items() if file_sha256(scene / name) != wanted]
    except (OSError, ValueError) as problem:
        raise ValueError(
            f"{scene} is not as it was written ({problem}); delete it to have it made again."
        ) from problem
    if damaged:
        raise ValueError(
            f"{', '.join(damaged)} of {scene} is not as it was written (its checksum differs); "
            "delete that folder to have it made again."
        )
    return True


def _done(writer: _SceneWriter, indices: list[int], processes: int) -> Iterator[int]:
    """The indices, each when its scene is written."""
    if processes <= 1:
        yield from map(writer, indices)
        return
    pool = ProcessPoolExecutor(
        processes,
        multiprocessing.get_context("spawn"),
        initializer=_start_process,
        initargs=(writer,),
    )
    try:
        for task in as_completed([pool.submit(_write_in_process, index) for index in indices]):
            yield task.result()
    finally:
        pool.shutdown(cancel_futures=True)


_process_writer: _SceneWriter


def _start_process(writer: _SceneWriter) -> None:
    global _process_writer
    _process_writer = writer
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        # A killed parent tells its children nothing; they would wait for work for ever.
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _write_in_process(index: int) -> int:
    return _process_writer(index)


def _save_png(file: Path, light: np.ndarray) -> None:
    display = linear_to_srgb(np.clip(light, 0, 1))
    Image.fromarray(np.rint(display * 255).astype(np.uint8)).save(file)


def _save_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``python -m data_synthesis benchmark``."""
    parser.add_argument(
        "--name", choices=sorted(BENCHMARKS), default="synbokeh300", help="default %(default)s"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--count", type=int, help="only the first scenes (default: all)")
    parser.add_argument("--size", type=int, default=512, help="height = width (default 512)")
    add_source_arguments(parser)
    parser.add_argument("--processes", type=int, default=1, help="default 1")


def run(options: argparse.Namespace) -> None:
    """Writes the benchmark that the parsed :func:`add_arguments` ask for."""
    count = BENCHMARKS[options.name].scenes if options.count is None else options.count
    with tqdm(total=count, unit="scene", smoothing=0.05, disable=None) as bar:
        written = write_benchmark(
            options.name,
            options.out,
            count=options.count,
            size=options.size,
            foregrounds=options.foregrounds,
            backgrounds=options.backgrounds,
            processes=options.processes,
            progress=bar.update,
        )
    print(f"{len(written)} new scenes in {options.out}; {count} in all.")
