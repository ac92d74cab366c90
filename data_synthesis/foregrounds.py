"""Transparent foregrounds from text, the cut-outs of layer scenes.

``python -m data_synthesis foregrounds --n 4000 --out cutouts`` writes RGBA pictures with straight
colours, ``00000012-birds.png``, each with its provenance in ``00000012-birds.json``. Whatever was
generated and rejected is listed, with its reason, in ``rejected-*.jsonl``.

A picture depends on the folder's settings, its index, and how often it was tried. A rejection for
likeness depends on the earlier pictures of the same process too.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image
from scipy import fft
from tqdm import tqdm

from bokehdiff import __version__
from bokehdiff.whole_files import whole_or_not_at_all
from data_synthesis.matting import BackdropError
from data_synthesis.prompts import Prompt, PromptBank

if TYPE_CHECKING:
    from data_synthesis.transparent_generators import TransparentGenerator

__all__ = ["Checks", "Summary", "add_arguments", "perceptual_hash", "run", "write_foregrounds"]

SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
SETTINGS_FILE = "foregrounds.json"
LIBRARIES = ("diffusers", "numpy", "pillow", "scipy", "torch", "transformers")


@dataclass(frozen=True)
class Checks:
    """What makes a picture a usable cut-out. All are shares, but for the last."""

    smallest_area: float = field(default=0.03, metadata={"help": "mean alpha of a subject"})
    largest_area: float = field(default=0.85, metadata={"help": "mean alpha of a subject"})
    largest_border: float = field(
        default=0.05, metadata={"help": "share of the frame's pixels that cut the subject"}
    )
    largest_soft: float = field(
        default=0.7,
        metadata={
            "help": "share of the subject's pixels with alpha in 0.1 .. 0.9; translucent "
            "categories are free"
        },
    )
    smallest_difference: int = field(
        default=10, metadata={"help": "bits of 128 that differ between any two pictures' hashes"}
    )

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            largest = 128 if item.name == "smallest_difference" else 1
            if not 0 <= value <= largest:
                raise ValueError(f"{item.name} is {value}; wanted 0 to {largest}.")

    def problem(self, rgba: np.ndarray, translucent: bool = False) -> tuple[str, str] | None:
        """The reason to reject a picture uint8 (H, W, 4) and its detail, or None.

        ``translucent``: it may be soft all over.
        """
        alpha = rgba[..., 3] / 255
        area = float(alpha.mean())
        if area < 0.001:
            return "empty", f"mean alpha is {area:.5f}"
        if area < self.smallest_area:
            return "tiny", f"mean alpha is {area:.4f}; wanted {self.smallest_area} or more"
        if area > self.largest_area:
            return "full", f"mean alpha is {area:.4f}; wanted {self.largest_area} or less"
        visible = alpha > 0.1
        border = float(np.concatenate([*visible[[0, -1]], *visible[1:-1, [0, -1]].T]).mean())
        if border > self.largest_border:
            return (
                "cut by the frame",
                f"on {border:.3f} of the border; wanted {self.largest_border} or less",
            )
        soft = float((alpha[visible] < 0.9).mean())
        if soft > self.largest_soft and not translucent:
            return (
                "semi-transparent",
                f"{soft:.3f} of the subject; wanted {self.largest_soft} or less",
            )
        return None


@dataclass
class Summary:
    """What a run did: pictures ``written`` now and ``finished`` before, ``rejected`` by reason,
    pictures lacking by category (``shortfall``), names of likenesses across processes."""

    written: int = 0
    finished: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    shortfall: Counter[str] = field(default_factory=Counter)
    alike: list[tuple[str, str]] = field(default_factory=list)


def write_foregrounds(
    generator: TransparentGenerator,
    bank: PromptBank,
    folder: str | os.PathLike[str],
    *,
    count: int | None = None,
    seed: int = 0,
    checks: Checks | None = None,
    attempts: int = 4,
    rank: int = 0,
    world_size: int = 1,
    progress: Callable[[int], Any] | None = None,
) -> Summary:
    """Writes every ``world_size``-th of ``count`` pictures, from ``rank`` on; what it did.

    Pictures that the folder holds are skipped and none is replaced, so an interrupted run is
    simply started again, or continued with a larger ``count``. A rejected picture is tried again
    with its next seed, ``attempts`` times in all; raising ``attempts`` later continues there.
    ``progress(n)`` is told of every n pictures done.

    Raises ValueError when the folder holds pictures of other settings.
    """
    import torch

    if attempts < 1 or world_size < 1 or not 0 <= rank < world_size or seed < 0:
        raise ValueError(
            f"attempts is {attempts}, rank {rank} of {world_size}, seed {seed}; wanted at least 1 "
            "attempt, a rank below the number of processes, no negative seed."
        )
    checks = Checks() if checks is None else checks
    schedule = bank.schedule(count, seed)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "seed": seed,
        "prompts": bank.fingerprint,
        "generator": dict(generator.provenance),
        "checks": asdict(checks),
    }
    _check_settings(folder, settings)
    versions = {"bokehdiff": __version__}
    versions |= {name: importlib.metadata.version(name) for name in LIBRARIES}
    tried = {(entry["index"], entry["attempt"]) for entry in _rejections(folder)}
    log = folder / f"rejected-{rank}-of-{world_size}.jsonl"
    summary = Summary()
    kept: dict[str, _Hashes] = {}  # by the picture's name

    for index in range(rank, len(schedule), world_size):
        prompt = schedule[index]
        picture = folder / f"{index:08d}-{prompt.category}.png"
        if picture.exists():
            kept[picture.stem] = _stored_hashes(picture)
            summary.finished += 1
        else:
            for attempt in range(attempts):
                if (index, attempt) in tried:
                    continue
                record: dict[str, Any] = {
                    "index": index,
                    "category": prompt.category,
                    "prompt": prompt.text,
                    "attempt": attempt,
                    "seed": _seed(seed, index, attempt),
                }
                random = torch.Generator().manual_seed(record["seed"])
                try:
                    made, details = generator.generate(prompt.text, random)
                except BackdropError as error:
                    problem: tuple[str, str] | None = ("backdrop", str(error))
                else:
                    rgba = np.asarray(made.convert("RGBA"))
                    hashes = _Hashes(
                        hashlib.sha256(rgba.tobytes()).hexdigest(), perceptual_hash(rgba)
                    )
                    problem = checks.problem(rgba, prompt.translucent)
                    problem = problem or _likeness(hashes, kept, checks)
                if problem is None:
                    record |= {**details, **hashes._asdict()}
                    record |= {"generator": settings["generator"], "versions": versions}
                    _write(picture.with_suffix(".json"), json.dumps(record, indent=1) + "\n")
                    _write(picture, Image.fromarray(rgba))
                    kept[picture.stem] = hashes
                    summary.written += 1
                    break
                _append(log, {**record, "reason": problem[0], "detail": problem[1]})
                summary.rejected[problem[0]] += 1
            else:
                summary.shortfall[prompt.category] += 1
        if progress is not None:
            progress(1)
    if world_size > 1:
        summary.alike = _alike(folder, checks)
    return summary


def perceptual_hash(rgba: np.ndarray) -> str:
    """128 bits in hexadecimal that differ little between pictures that look alike.

    Signs of the 64 lowest frequencies, against their median, of brightness times alpha and of
    alpha, over the box around the subject: neither place nor size of the subject matter.
    """
    alpha = rgba[..., 3] / 255
    rows, columns = (np.flatnonzero((alpha > 0.1).any(axis=axis)) for axis in (1, 0))
    box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] if len(rows) else np.s_[:, :]
    bits = []
    for plane in (alpha * (rgba[..., :3] @ np.array([0.299, 0.587, 0.114])), 255 * alpha):
        small = Image.fromarray(plane[box].astype(np.float32)).resize(
            (32, 32), Image.Resampling.BOX
        )
        frequencies = fft.dctn(np.asarray(small, np.float64), norm="ortho")[:8, :8].ravel()
        # Numbers that are zero but for rounding shall not decide bits.
        frequencies[np.abs(frequencies) < 1e-3] = 0
        bits.append(frequencies > np.median(frequencies[1:]))
    return np.packbits(np.concatenate(bits)).tobytes().hex()


class _Hashes(NamedTuple):
    pixels_sha256: str
    perceptual_hash: str


def _likeness(
    own: _Hashes, others: Mapping[str, _Hashes], checks: Checks
) -> tuple[str, str] | None:
    for name, other in others.items():
        if own.pixels_sha256 == other.pixels_sha256:
            return "duplicate", f"equals {name}"
        differing = (int(own.perceptual_hash, 16) ^ int(other.perceptual_hash, 16)).bit_count()
        if differing < checks.smallest_difference:
            return (
                "duplicate",
                f"differs from {name} in {differing} bits; wanted {checks.smallest_difference}",
            )
    return None


def _alike(folder: Path, checks: Checks) -> list[tuple[str, str]]:
    pairs = []
    seen: dict[str, _Hashes] = {}
    for picture in sorted(folder.glob(f"{'[0-9]' * 8}-*.png")):
        hashes = _stored_hashes(picture)
        pairs += [
            (name, picture.stem)
            for name, other in seen.items()
            if _likeness(hashes, {name: other}, checks)
        ]
        seen[picture.stem] = hashes
    return pairs


def _seed(seed: int, index: int, attempt: int) -> int:
    return int(np.random.SeedSequence([seed, index, attempt]).generate_state(1)[0])


def _check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    file = folder / SETTINGS_FILE
    wanted = json.loads(json.dumps(settings))
    if not file.exists():
        _write(file, json.dumps(wanted, indent=1) + "\n")
        return
    given = json.loads(file.read_text(encoding="utf-8"))
    other = sorted(key for key in wanted if given.get(key) != wanted[key])
    if other:
        raise ValueError(
            f"{folder} already holds pictures with other settings ({', '.join(other)}; see "
            f"{SETTINGS_FILE}). Choose another folder."
        )


def _rejections(folder: Path) -> Iterator[dict[str, Any]]:
    for log in sorted(folder.glob("rejected-*.jsonl")):
        for line in log.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue  # cut short by an interruption; that picture is tried again


def _append(log: Path, entry: Mapping[str, Any]) -> None:
    with log.open("a+b") as file:
        # A line that was cut short must not swallow this one.
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
        broken = file.read(1) not in (b"", b"\n")
        file.write(b"\n" * broken + json.dumps(entry).encode() + b"\n")


def _stored_hashes(picture: Path) -> _Hashes:
    try:
        record = json.loads(picture.with_suffix(".json").read_text(encoding="utf-8"))
        return _Hashes(*(record[name] for name in _Hashes._fields))
    except (OSError, json.JSONDecodeError, KeyError) as error:
        raise ValueError(
            f"{picture} has no readable provenance beside it ({error}); move the picture away and "
            "it is made again."
        ) from None


def _write(path: Path, content: str | Image.Image) -> None:
    """Writes a file that appears only when it is complete."""
    with whole_or_not_at_all(path) as unfinished:
        if isinstance(content, str):
            unfinished.write_text(content, encoding="utf-8")
        else:
            content.save(unfinished, format="PNG")
        if path.suffix == ".png" and path.exists():
            raise FileExistsError(f"{path} appeared meanwhile; is another run writing there?")


# --- Command line ---------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``python -m data_synthesis foregrounds``."""
    parser.description = (
        "Makes transparent foregrounds (RGBA cut-outs) from text. Nothing is downloaded: models "
        "are folders, or hub ids in the local cache. An interrupted run goes on where it stopped "
        "when the same command is given again. Several processes share the work when RANK and "
        "WORLD_SIZE are set, as torchrun does."
    )
    add = parser.add_argument
    add("--out", type=Path, metavar="FOLDER", help="folder for the pictures")
    add(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="text file, one prompt per line, or a JSON or YAML bank",
    )
    add("--list", action="store_true", help="print categories, counts and prompts, then stop")
    add("--n", type=int, help="pictures (default: as many as the prompts ask for)")
    add("--seed", type=int, default=0, help="which set of pictures (default 0)")
    add(
        "--generator",
        choices=["layerdiffuse", "backdrop"],
        default="layerdiffuse",
        help="native transparency (default), or any model before a plain backdrop that is removed",
    )
    add("--model", default=SDXL, help=f"folder or hub id of the pipeline (default {SDXL})")
    add("--revision", help="branch, tag or commit of a hub id")
    add("--variant", help="of the weights, such as fp16")
    add(
        "--layerdiffuse",
        help="folder or hub id of its two files (default LayerDiffusion/layerdiffusion-v1)",
    )
    add("--negative-prompt", help="what no picture shall show (default: the prompt bank's)")
    add("--size", type=int, default=1024, help="height = width (default 1024)")
    add("--steps", type=int, default=25, help="denoising steps (default 25)")
    add("--guidance-scale", type=float, default=7.0, help="default 7")
    add("--attempts", type=int, default=4, help="seeds tried for one picture (default 4)")
    add("--device", help="default: a GPU where there is one")
    add(
        "--dtype",
        choices=["float16", "bfloat16", "float32"],
        help="default: float16 on a GPU, float32 on a CPU",
    )
    for item in fields(Checks):
        add(
            "--" + item.name.replace("_", "-"),
            type=type(item.default),
            default=item.default,
            metavar="BITS" if item.name == "smallest_difference" else "SHARE",
            help=f"{item.metadata['help']} (default {item.default})",
        )


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns the exit status: 1 when pictures lack, 2 after a mistake."""
    try:
        return _run(options)
    except (ValueError, FileExistsError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    bank = PromptBank.load(options.prompts)
    schedule = bank.schedule(options.n, options.seed)
    if options.list:
        _print_categories(bank, schedule)
        return 0
    if options.out is None:
        raise ValueError("nothing to do: give --out FOLDER, or --list.")
    rank, world_size = _from_environment("RANK", 0), _from_environment("WORLD_SIZE", 1)
    checks = Checks(**{item.name: getattr(options, item.name) for item in fields(Checks)})
    generator = _load_generator(options, bank)
    indices = range(rank, len(schedule), world_size)
    with tqdm(total=len(indices), unit="picture", smoothing=0.05, position=rank) as bar:
        summary = write_foregrounds(
            generator,
            bank,
            options.out,
            count=options.n,
            seed=options.seed,
            checks=checks,
            attempts=options.attempts,
            rank=rank,
            world_size=world_size,
            progress=bar.update,
        )
    print(
        f"{summary.written} new pictures in {options.out}, {summary.finished} were there, "
        f"{sum(summary.rejected.values())} rejected"
        + "".join(f"; {reason}: {number}" for reason, number in summary.rejected.most_common())
    )
    for one, other in summary.alike:
        print(f"alike: {one} and {other}")
    if summary.shortfall:
        lacking = ", ".join(f"{name} {number}" for name, number in summary.shortfall.items())
        print(
            f"{sum(summary.shortfall.values())} pictures lack ({lacking}): all of "
            f"{options.attempts} attempts were rejected; raise --attempts to go on."
        )
        return 1
    return 0


def _from_environment(name: str, default: int) -> int:
    value = os.environ.get(name, str(default))
    if not value.isdecimal():
        raise ValueError(f"The environment variable {name} is {value!r}; wanted a whole number.")
    return int(value)


def _load_generator(options: argparse.Namespace, bank: PromptBank) -> TransparentGenerator:
    import torch

    from data_synthesis.transparent_generators import (
        LAYERDIFFUSE,
        BackdropGenerator,
        LayerDiffuseGenerator,
        Sampling,
    )

    sampling = Sampling(
        options.size,
        options.steps,
        options.guidance_scale,
        bank.negative if options.negative_prompt is None else options.negative_prompt,
    )
    device = options.device
    if device is None:
        here = _from_environment("LOCAL_RANK", 0)
        device = f"cuda:{here}" if torch.cuda.is_available() else "cpu"
    dtype = options.dtype or ("float16" if device.startswith("cuda") else "float32")
    common: dict[str, Any] = {
        "revision": options.revision,
        "variant": options.variant,
        "device": device,
        "dtype": getattr(torch, dtype),
    }
    if options.generator == "backdrop":
        return BackdropGenerator.load(options.model, sampling, **common)
    return LayerDiffuseGenerator.load(
        options.model, sampling, layerdiffuse=options.layerdiffuse or LAYERDIFFUSE, **common
    )


def _print_categories(bank: PromptBank, schedule: list[Prompt]) -> None:
    counts = Counter(prompt.category for prompt in schedule)
    width = max(map(len, ("category", *bank.counts)))
    print(f"{'category':{width}}  pictures  prompts")
    for name, distinct in bank.distinct.items():
        print(f"{name:{width}}  {counts[name]:8}  {distinct:7}")
    print(f"{'total':{width}}  {len(schedule):8}  {sum(bank.distinct.values()):7}")
