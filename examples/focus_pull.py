"""Pull the focus of a photograph from one thing to another, as an animated picture.

    python examples/focus_pull.py
    python examples/focus_pull.py --photo photo.jpg --from 512 300 --to 900 420 --frames 48

The network looks at the photo once; each frame then costs one refocus. Without --photo it takes
the Middlebury motorcycle with its measured disparity, which scikit-image carries.
"""

import argparse
from pathlib import Path

import numpy as np
from skimage.data import stereo_motorcycle

import bokehdiff


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photo", type=Path, help="a photograph, all in focus")
    parser.add_argument("--disparity", type=Path, help="its map, larger is nearer, in [0, 1]")
    point = dict(type=int, nargs=2, metavar=("X", "Y"))
    parser.add_argument("--from", dest="start", default=(537, 157), **point)
    parser.add_argument("--to", dest="end", default=(60, 60), **point)
    parser.add_argument("--frames", type=int, default=24)
    parser.add_argument("--K", type=float, default=30, help="pixels of blur radius per disparity")
    parser.add_argument("--out", type=Path, default=Path("outputs/focus_pull"), help="folder")
    asked = parser.parse_args()

    if asked.photo is not None:
        photo, disparity = asked.photo, asked.disparity
    else:
        photo, _, measured = stereo_motorcycle()
        disparity = bokehdiff.normalise_disparity(measured)[0]

    pipe = bokehdiff.BokehFlowPipeline.from_pretrained(bokehdiff.FLOW_NANO)
    scene = pipe.prepare(photo, disparity)
    start, end = (
        bokehdiff.focus_disparity_at(scene.disparity, *at) for at in (asked.start, asked.end)
    )
    dfs = np.linspace(start, end, asked.frames)
    frames = [pipe.render(scene, df, asked.K).images[0] for df in dfs]

    asked.out.mkdir(parents=True, exist_ok=True)
    film = asked.out / "focus_pull.webp"
    frames[0].save(film, save_all=True, append_images=frames[1:], duration=1000 // 24, loop=0)
    print(f"{len(frames)} frames, df {start:.2f} to {end:.2f}: {film.resolve()}")


if __name__ == "__main__":
    main()
