"""Command line of the evaluation room: ``python -m evaluation PROTOCOL ...``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import bokehdiff

RAYTRACED_COLUMNS = [
    ("nohl", "overall", "psnr_nohl"),
    ("SSIM", "overall", "ssim_nohl"),
    ("r06", "level_06", "psnr_nohl"),
    ("r14", "level_14", "psnr_nohl"),
    ("r28", "level_28", "psnr_nohl"),
    ("common3", "common3", "psnr_nohl"),
    ("edge", "overall", "psnr_edge_nohl"),
    ("blurred", "overall", "psnr_blurred_nohl"),
    ("infocus", "overall", "psnr_infocus"),
    ("| all", "overall", "psnr"),
    ("SSIM", "overall", "ssim"),
    ("edge", "overall", "psnr_edge"),
    ("blurred", "overall", "psnr_blurred"),
]

EXAMPLES = """examples:
  python -m evaluation raytraced bench/raytraced/data --method tiny --out tiny.json
  python -m evaluation raytraced bench/raytraced/data --method scatter --scenes s01,s03
  python -m evaluation raytraced bench/raytraced/data --method path/to/checkpoint --save pictures
  python -m evaluation raytraced bench/raytraced/data --predictions pictures
  python -m evaluation speed render --megapixels 1
"""


def parser() -> argparse.ArgumentParser:
    """The command line's arguments."""
    whole = argparse.ArgumentParser(
        prog="python -m evaluation",
        description="Measure lens blur against a truth.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    protocols = whole.add_subparsers(dest="protocol", required=True, metavar="PROTOCOL")
    raytraced = protocols.add_parser(
        "raytraced",
        help="3D scenes ray-traced with a thin lens",
        description="Score methods on 3D scenes ray-traced with a thin lens (PSNR in dB, SSIM).",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    raytraced.add_argument("data", metavar="DATA", help="folder that holds the scene folders")
    raytraced.add_argument(
        "--method",
        action="append",
        default=[],
        metavar="NAME",
        help="tiny (the checkpoint inside the package), scatter, gaussian, identity, or a model "
        "folder; may be given several times. The identity is always in the table.",
    )
    raytraced.add_argument(
        "--predictions", metavar="DIR", help="score finished pictures DIR/<scene>_<setting>.png"
    )
    raytraced.add_argument("--scenes", metavar="A,B", help="only these scenes, e.g. s01,s03")
    raytraced.add_argument("--save", metavar="DIR", help="keep the rendered pictures here")
    raytraced.add_argument("--out", metavar="FILE", help="write all figures to this JSON file")
    raytraced.add_argument("--device", default="cpu", help="cpu (default), cuda, mps")
    speed = protocols.add_parser(
        "speed",
        help="seconds and memory",
        description="Measure seconds and peak memory on scikit-image's motorcycle photograph.",
    )
    speed.add_argument(
        "what", choices=["render"], help="render: prepare, first render and refocus of a photograph"
    )
    speed.add_argument("--model", metavar="FOLDER", help="default: the one inside the package")
    speed.add_argument("--megapixels", type=float, default=1.0, help="default %(default)s")
    speed.add_argument("--repeats", type=int, default=5, help="refocusings, default %(default)s")
    speed.add_argument("--threads", type=int, help="CPU threads; default: all cores")
    speed.add_argument("--out", metavar="FILE", help="write the figures to this JSON file")
    speed.add_argument("--device", default="cpu", help="cpu (default), cuda, mps")
    return whole


def check_before_work(arguments: argparse.Namespace) -> None:
    """Raises ValueError for what would fail only after minutes of work, in any protocol."""
    try:
        import scipy.ndimage  # noqa: F401
        import skimage  # noqa: F401
    except ImportError as missing:
        raise ValueError(
            f"{missing.name} is not installed; the evaluation needs pip install 'bokehdiff[data]'."
        ) from missing

    from evaluation import methods

    if arguments.out and not Path(arguments.out).resolve().parent.is_dir():
        raise ValueError(f"There is no folder {Path(arguments.out).parent} for --out.")
    methods.check_device(arguments.device)


def measure_speed(arguments: argparse.Namespace) -> None:
    """Times the pipeline on one photograph; prints a sentence and writes the JSON."""
    import torch

    from evaluation import report, speed

    if not 0.01 <= arguments.megapixels <= 100:
        raise ValueError(f"--megapixels must be in [0.01, 100], got {arguments.megapixels:g}.")
    if arguments.repeats < 1:
        raise ValueError(f"--repeats must be at least 1, got {arguments.repeats}.")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    model = arguments.model or bokehdiff.TINY
    pipe = bokehdiff.BokehDiffPipeline.from_pretrained(model).to(arguments.device)
    measured = speed.render_speed(pipe, arguments.megapixels, arguments.repeats)
    machine = report.hardware(arguments.device)
    print(
        f"{speed.sentence(measured)}. {machine['processor']}, {machine['torch_threads']} "
        f"thread(s), {machine['dtype']}, device {machine['device']}."
    )
    if arguments.out:
        report.write_json(arguments.out, {"hardware": machine, "render": vars(measured)})


def evaluate_raytraced(arguments: argparse.Namespace) -> None:
    """Runs the ray-traced benchmark; prints the table and writes the JSON."""
    from evaluation import methods, raytraced, report

    names = arguments.scenes.split(",") if arguments.scenes else None
    scenes = raytraced.find_scenes(arguments.data, names)
    if not arguments.method and not arguments.predictions:
        raise ValueError("Nothing to evaluate; wanted --method NAME or --predictions DIR.")
    wanted = dict.fromkeys(["identity", *arguments.method])
    chosen = [methods.method_by_name(name, arguments.device) for name in wanted]
    if arguments.predictions:
        chosen.append(methods.predictions_in(arguments.predictions))
    results = raytraced.evaluate(scenes, chosen, arguments.save)

    machine = report.hardware(arguments.device)
    print(report.table(results, RAYTRACED_COLUMNS))
    print()
    for name, result in results.items():
        print(f"{name}: {result['description']}.")
    images = sum(len(scene.meta["configs"]) for scene in scenes)
    print(
        f"{images} images of {len(scenes)} scenes ({', '.join(scene.name for scene in scenes)}). "
        "PSNR in dB. Left of the bar: pixels that no clipped highlight reaches (infocus: all); "
        "right of it: all pixels. "
        f"Seconds on {machine['processor']}, {machine['torch_threads']} thread(s), device "
        f"{machine['device']}."
    )
    print(raytraced.PROTOCOL)
    if arguments.out:
        report.write_json(
            arguments.out,
            {
                "benchmark": "raytraced",
                "protocol": raytraced.PROTOCOL,
                "data": str(Path(arguments.data).resolve()),
                "scenes": [scene.name for scene in scenes],
                "hardware": machine,
                "results": results,
            },
        )
        print(f"All figures: {arguments.out}")


PROTOCOLS = {"raytraced": evaluate_raytraced, "speed": measure_speed}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status (2 for a mistake of the caller)."""
    parsed = parser().parse_args(arguments)
    try:
        check_before_work(parsed)
        PROTOCOLS[parsed.protocol](parsed)
    except (ValueError, FileNotFoundError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
