"""Pull the focus of a photograph from one thing to another, as an animated picture.

    python examples/focus_pull.py
    python examples/focus_pull.py --photo photo.jpg --from 512 300 --to 900 420 --frames 48

The network looks at the photo once; each frame then costs one refocus. Without --photo it takes
the Middlebury motorcycle with its measured disparity, which scikit-image carries.
"""

import argparse
import sys
import time
from pathlib import Path

import bokehdiff


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photo", type=Path, help="a photograph, all in focus")
    parser.add_argument("--disparity", type=Path, help="its map, larger is nearer, in [0, 1]")
    point = dict(type=int, nargs=2, metavar=("X", "Y"))
    parser.add_argument("--from", dest="start", help="pixel in focus first", **point)
    parser.add_argument("--to", dest="end", help="pixel in focus last", **point)
    parser.add_argument("--frames", type=int, default=24, help="number of them")
    parser.add_argument("--K", type=float, default=30, help="pixels of blur radius per disparity")
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/focus_pull"), help="folder; replaces earlier ones"
    )
    asked = parser.parse_args()
    if asked.photo is None and asked.disparity is not None:
        parser.error("--disparity goes with --photo, the photograph that it belongs to.")
    if asked.photo is not None and None in (asked.start, asked.end):
        parser.error("--photo goes with --from X Y and --to X Y, pixels of what is in focus.")
    if asked.frames < 2:
        parser.error(f"--frames is {asked.frames}; wanted at least 2.")
    started = time.perf_counter()
    asked.out.mkdir(parents=True, exist_ok=True)

    photo, disparity = asked.photo, asked.disparity
    if photo is None:
        from skimage.data import stereo_motorcycle

        photo, _, measured = stereo_motorcycle()
        disparity = bokehdiff.normalise_disparity(measured)[0]

    pipe = bokehdiff.BokehFlowPipeline.from_pretrained(bokehdiff.FLOW_NANO)
    scene = pipe.prepare(photo, disparity)
    headlight, wall = (537, 157), (60, 60)
    first = bokehdiff.focus_disparity_at(scene.disparity, *(asked.start or headlight))
    last = bokehdiff.focus_disparity_at(scene.disparity, *(asked.end or wall))
    dfs = [first + (last - first) * frame / (asked.frames - 1) for frame in range(asked.frames)]
    frames = [pipe.render(scene, df, asked.K).images[0] for df in dfs]

    film = asked.out / "focus_pull.webp"
    frames[0].save(film, save_all=True, append_images=frames[1:], duration=1000 // 24, loop=0)
    took = f"{time.perf_counter() - started:.0f} s"
    print(f"{len(frames)} frames, df {first:.2f} to {last:.2f}: {film.resolve()} ({took})")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as mistake:
        sys.exit(f"focus_pull.py: {mistake}")
