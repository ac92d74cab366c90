"""A process that makes one picture and tells when each stage was done, for ``speed start``.

For instance: ``python -m evaluation.first_picture tiny photo.png disparity.npy 0.5 16``.
"""

import time


def now() -> tuple[float, float]:
    """Seconds on the clock that all processes of this machine share, and of the processor."""
    return time.monotonic(), time.process_time()


MOMENTS = {"python": now()}
"""By stage: when it was done."""


def done(stage: str) -> None:
    MOMENTS[stage] = now()


def main(by: str, photo: str, disparity_map: str, df: float, K: float) -> None:
    """Makes the picture as a person would and prints the moments.

    Args:
        by: "tiny", "flow_nano" or a method of ``render_bokeh``.
        photo, disparity_map: files.
        df, K: focus and blur strength.
    """
    from bokehdiff import read_disparity, read_image

    done("torch")
    if by == "tiny":
        from bokehdiff import TINY as folder
        from bokehdiff import BokehDiffPipeline as Pipeline
    elif by == "flow_nano":
        from bokehdiff import FLOW_NANO as folder
        from bokehdiff import BokehFlowPipeline as Pipeline
    else:
        from bokehdiff import render_bokeh
    done("import")
    image, disparity = read_image(photo), read_disparity(disparity_map)
    done("read")
    if by in ("tiny", "flow_nano"):
        pipe = Pipeline.from_pretrained(folder)
        done("load")
        scene = pipe.prepare(image, disparity)
        done("prepare")
        pipe.render(scene, df, K)
    else:
        render_bokeh(image, disparity, df, K, method=by)
    done("render")


if __name__ == "__main__":
    import sys

    main(*sys.argv[1:4], *map(float, sys.argv[4:6]))
    print("stages", *(f"{stage}={wall}={used}" for stage, (wall, used) in MOMENTS.items()))
