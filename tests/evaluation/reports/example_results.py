"""Results written by hand, of each kind that reports read, with figures that are easy to check."""

from __future__ import annotations

from typing import Any

Results = dict[str, Any]

METRICS = {
    "psnr": {"better": "higher", "unit": "dB", "description": "on sRGB in [0, 1]"},
    "lpips": {"better": "lower", "unit": "", "description": "distance of features"},
}
HARDWARE = {"processor": "A processor", "torch_threads": 1, "dtype": "float32", "torch": "2.14"}


def row(scene: str, setting: str, psnr: float, lpips: float, **more: Any) -> dict[str, Any]:
    return {
        "scene": scene,
        "setting": setting,
        "K": 20.0,
        "seconds": 0.5,
        "peak_memory_bytes": None,
        "psnr": psnr,
        "lpips": lpips,
        **more,
    }


def comparison() -> Results:
    """Two scenes of two settings each: tiny is the best by psnr, scatter by lpips."""
    figures = {
        "tiny": ([35.0, 37.0, 30.0, 38.0], [0.10, 0.12, 0.2, 0.1], [33.0, 36.5], 0.8),
        "identity": ([18.0, 20.0, 19.0, 21.0], [0.4, 0.4, 0.4, 0.4], [19.0, 20.0], 0.001),
        "scatter": ([34.0, 36.0, 31.0, 35.0], [0.1, 0.1, 0.1, 0.1], None, 0.2),
    }
    photographs = [("s01", "f0_r06"), ("s01", "f1_r14"), ("s02", "f0_r06"), ("s02", "f1_r14")]
    methods = {}
    for name, (psnr, lpips, interval, seconds) in figures.items():
        rows = [
            row(scene, setting, a, b, level=int(setting[-2:]))
            for (scene, setting), a, b in zip(photographs, psnr, lpips, strict=True)
        ]
        methods[name] = {
            "description": f"the method {name}",
            "rows": rows,
            "mean": {"psnr": sum(psnr) / 4, "lpips": sum(lpips) / 4},
            "interval": {"psnr": interval, "lpips": None},
            "seconds_per_image": seconds,
            "peak_memory_bytes": None,
        }
    return {
        "kind": "comparison",
        "title": "Two scenes",
        "protocol": "Each method is given the photograph.",
        "command": "python -m evaluation compare raytraced DATA --method tiny",
        "dataset": {"name": "raytraced", "scenes": ["s01", "s02"], "images": 4},
        "hardware": HARDWARE,
        "metrics": METRICS,
        "methods": methods,
    }


def robustness() -> Results:
    """tiny loses 0.1 dB for each pixel of erosion and 0.2 of dilation, scatter twice as much."""
    results = comparison()
    results |= {"kind": "robustness", "title": "Corrupted disparities"}
    results["metrics"] = {"psnr": METRICS["psnr"]}
    del results["methods"]["identity"]
    for name, factor in (("tiny", 1.0), ("scatter", 2.0)):
        results["methods"][name]["drops"] = {
            corruption: {
                str(level): {
                    "psnr": {
                        "lower_quartile": 0.5 * each * factor * level,
                        "median": each * factor * level,
                        "upper_quartile": 2 * each * factor * level,
                        "mean": 1.1 * each * factor * level,
                    }
                }
                for level in (8, 1, 2, 4)
            }
            for corruption, each in (("erode", 0.1), ("dilate", 0.2))
        }
    return results


def ablations() -> Results:
    """The full method, one variant that is worse, and one that prints as the same."""
    results = comparison()
    results |= {"kind": "ablations", "title": "Parts taken away"}
    full = results["methods"].pop("tiny")
    del results["methods"]["identity"]
    worse = results["methods"].pop("scatter")
    same = {**full, "mean": {"psnr": 34.999, "lpips": 0.13}}
    results["methods"] = {
        "full": {**full, "change": {"psnr": 0.0, "lpips": 0.0}},
        "no_occlusion": {**worse, "change": {"psnr": -1.0, "lpips": -0.03}},
        "T_249": {**same, "change": {"psnr": -0.001, "lpips": 0.0}},
    }
    return results


def controllability() -> Results:
    """tiny, whose blur is 1 px more than K asks for, in the photograph that has a figure."""
    results = comparison()
    results |= {"kind": "controllability", "title": "Control", "metrics": {}}
    results["methods"] = {
        "tiny": {
            "description": "the method tiny",
            "rows": [
                {"scene": "s01", "setting": "f0", "radius": 8.0, "blur_by_K": [1, 3, 5, 7, 9]},
                {"scene": "s02", "setting": "f0"},
            ],
            "K_correlation": 0.99868,
            "K_correlation_minimum": 0.991,
            "focus_follows": 1.0,
        }
    }
    return results


EVERY_KIND = [comparison, robustness, ablations, controllability]
