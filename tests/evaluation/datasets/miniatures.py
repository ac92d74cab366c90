"""Tiny data sets on disk, one function for each layout. The same call writes the same pixels.

Each returns what it put in: by scene and, where there are several, by lens setting.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bokehdiff.images import linear_to_srgb, write_linear_image

HEIGHT, WIDTH = 40, 56

VIEWS = 9
"""Rows and columns of a light field."""
NEAR_DISPARITY, FAR_DISPARITY = 0.8, -0.4
"""Of the two planes of a light field, pixels from one view to the next."""


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).random(shape, np.float32)


def picture(seed: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """(height, width, 3) uint8 of smooth noise."""
    coarse = torch.from_numpy(noise(seed, 1, 3, 5, 7))
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return (smooth[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)


def steps(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """(height, width) float32 disparity in [0, 1]: far on the left, near on the right."""
    return np.repeat(np.linspace(0, 1, 8, dtype=np.float32), width // 8)[None].repeat(height, 0)


def save(file: Path, image: np.ndarray) -> np.ndarray:
    """Returns what the file holds: of JPEG not quite what was put in."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(file)
    with Image.open(file) as saved:
        return np.asarray(saved)


def write_json(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def write_raytraced(folder: Path) -> dict[str, dict[str, Any]]:
    """Two scenes, the second with two settings; also a miniature of synbokeh300's scenes."""
    put_in = {}
    for number, levels in ((1, [14]), (2, [14, 6])):
        scene = folder / f"s{number:02d}"
        image, light = picture(number), 3 * noise(10 + number, HEIGHT, WIDTH, 3)
        light = light.astype(np.float16)
        disparity = 0.1 + 0.4 * steps()
        save(scene / "aif.png", image)
        np.savez(scene / "aif_lin.npz", aif=light)
        np.savez(scene / "disp.npz", disp=disparity, disp_aa=disparity + 1)
        settings = [
            {"id": f"f0_r{level:02d}", "level": level, "df": 0.3, "K": level / 0.2}
            for level in levels
        ]
        truths = [picture(100 * number + level) for level in levels]
        for setting, truth in zip(settings, truths, strict=True):
            save(scene / f"gt_{setting['id']}.png", truth)
        write_json(
            scene / "meta.json",
            {
                "alpha_cards": number == 1,
                "n_lights": number - 1,
                "disp_min": float(disparity.min()),
                "disp_max": float(disparity.max()),
                "disp_p001": float(disparity.min()),
                "disp_p999": float(disparity.max()),
                "configs": settings,
            },
        )
        put_in[scene.name] = {
            "image": image,
            "light": light,
            "disparity": disparity,
            "settings": settings,
            "truths": truths,
        }
    return put_in


def write_ebb(folder: Path, nearest: int = 1, masks: bool = True) -> dict[str, dict[str, Any]]:
    """Two pairs, ``IMG_1`` as JPEG and with a map in npy, ``IMG_2`` as PNG, its map 16-bit PNG.

    The maps hold disparity between 0.25 and 0.75, or one minus it if ``nearest`` is 0.
    """
    put_in = {}
    for number, suffix in ((1, ".jpg"), (2, ".png")):
        name = f"IMG_{number}"
        image, truth = picture(number), (0.8 * picture(20 + number)).astype(np.uint8)
        stored = 0.25 + 0.5 * steps()
        stored = stored if nearest == 1 else 1 - stored
        image = save(folder / "input" / (name + suffix), image)
        truth = save(folder / "bokeh" / (name + suffix), truth)
        (folder / "depth").mkdir(exist_ok=True)
        if number == 1:
            np.save(folder / "depth" / f"{name}_pred.npy", stored)
        else:
            save(folder / "depth" / f"{name}_pred.png", (stored * 65535).round().astype(np.uint16))
        if masks:
            mask = np.zeros((HEIGHT, WIDTH), np.uint8)
            mask[5:30, 44:48] = 255
            save(folder / "mask" / f"{name}.png", mask)
        put_in[name] = {"image": image, "truth": truth, "disparity": steps()}
    if nearest == 0:
        write_json(folder / "depth" / "convention.json", {"nearest": 0})
    return put_in


def write_blb(folder: Path) -> dict[str, dict[str, Any]]:
    """One scene named 277, red brighter than blue, with three focus distances; depth of 1 to 8 m.

    Its depth map has one channel.
    """
    scene = folder / "277"
    scene.mkdir(parents=True)
    tint = np.array([1.5, 0.5, 0.1], np.float32)
    light = tint * noise(1, HEIGHT, WIDTH, 3)
    depth = 1 + 7 * (1 - steps())
    depth[0, 0] = np.inf
    truths = [tint * noise(2 + index, HEIGHT, WIDTH, 3) for index in range(3)]
    for name, values in [
        ("image", light),
        *((f"bokeh_04_{index:02d}", truth) for index, truth in enumerate(truths)),
    ]:
        write_linear_image(scene / f"{name}.exr", torch.from_numpy(values).permute(2, 0, 1))
    write_channels(scene / "depth.exr", {"V": depth})
    info = {"blur_parameters": [6.0, 12.0, 18.0, 24.0, 30.0], "focus_distances": [1.0, 2.0, 5.0]}
    write_json(scene / "info.json", info)
    return {"277": {"light": light, "depth": depth, "truths": truths, **info}}


def write_channels(file: Path, channels: dict[str, np.ndarray]) -> None:
    """An OpenEXR file with these channels of (H, W) float32."""
    import OpenImageIO

    height, width = next(iter(channels.values())).shape
    description = OpenImageIO.ImageSpec(width, height, len(channels), OpenImageIO.FLOAT)
    description.channelnames = tuple(channels)
    output = OpenImageIO.ImageOutput.create(str(file))
    assert output.open(str(file), description)
    assert output.write_image(np.stack(list(channels.values()), axis=2)) and output.close()


def write_realbokeh(folder: Path) -> dict[str, dict[str, Any]]:
    """A part (``test``) with scene 7 at f/2 and f/11, and scene 12 at f/2.8."""
    put_in = {}
    for identifier, f_numbers in ((7, [11, 2.0]), (12, [2.8])):
        source = f"in/{identifier}_f22.JPG"
        image = save(folder / source, picture(identifier))
        targets = {number: f"gt/{identifier}/{identifier}_f{number}.JPG" for number in f_numbers}
        truths = {
            number: save(folder / target, picture(200 + int(10 * number) + identifier))
            for number, target in targets.items()
        }
        write_json(
            folder / "metadata" / f"{identifier}.json",
            {
                "id": identifier,
                "source_image": source,
                "target_images": list(targets.values()),
                "target_avs": f_numbers,
            },
        )
        disparity = folder / "disparity" / f"{identifier}_f22_disparity.png"
        save(disparity, (steps() * 65535).round().astype(np.uint16))
        put_in[str(identifier)] = {"image": image, "truths": truths, "disparity": steps()}
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[:, 21:28] = 255
    save(folder / "mask" / "7_f22.png", mask)
    return put_in


def write_triples(folder: Path, settings: str = "settings.json") -> dict[str, dict[str, Any]]:
    """``sill`` with K, a scene of its own; ``pan`` and ``pot``, one scene, without K."""
    put_in: dict[str, dict[str, Any]] = {
        "sill": {"df": 12.5, "K": 0.75, "scene": None},
        "pan": {"df": 20.0, "K": None, "scene": "kitchen"},
        "pot": {"df": 30.0, "K": None, "scene": "kitchen"},
    }
    for seed, (name, row) in enumerate(put_in.items()):
        size = (HEIGHT, WIDTH) if name != "pot" else (WIDTH, HEIGHT)
        row.update(image=picture(seed, *size), truth=picture(seed + 50, *size))
        row["disparity"] = 10 + 25 * noise(seed, *size)
        save(folder / "image" / f"{name}.png", row["image"])
        save(folder / "bokeh" / f"{name}.png", row["truth"])
        (folder / "disparity").mkdir(exist_ok=True)
        np.save(folder / "disparity" / f"{name}.npy", row["disparity"])
    rows = {
        name: {key: row[key] for key in ("df", "K", "scene") if row[key] is not None}
        for name, row in put_in.items()
    }
    if settings.endswith(".json"):
        write_json(folder / settings, rows)
    else:
        lines = [f"{name},{row['df']},{row.get('K', '')},{row.get('scene', '')}"
                 for name, row in rows.items()]  # fmt: skip
        (folder / settings).write_text("\n".join(["name,df,K,scene", *lines, ""]))
    return put_in


def two_planes(across: float, down: float, df: float | None = None) -> np.ndarray:
    """(HEIGHT + 24, WIDTH + 24, 3) float64 linear light: a near disc before a far plane.

    Seen from ``across`` views to the right of the centre and ``down`` views below it, as a camera
    there sees it, or, if df is given, as that point of a lens focused on df adds to the picture.
    """
    y, x = np.mgrid[: HEIGHT + 24, : WIDTH + 24].astype(np.float64)
    in_focus = 0.0 if df is None else df

    def plane(disparity: float) -> tuple[np.ndarray, np.ndarray]:
        """Where on the plane, in pixels of the central view, each pixel looks."""
        return y + (disparity - in_focus) * down, x + (disparity - in_focus) * across

    (far_y, far_x), (near_y, near_x) = plane(FAR_DISPARITY), plane(NEAR_DISPARITY)
    phase = np.array([0.0, 1.0, 2.0])
    far = 0.3 + 0.2 * np.cos(0.35 * far_x + 0.2 * far_y)[..., None] * np.cos(phase)
    near = 0.5 + 0.3 * np.sin(0.3 * near_y - 0.15 * near_x)[..., None] * np.cos(phase + 0.5)
    distance = np.hypot(near_y - 30, near_x - 34)
    covered = near_coverage(distance)[..., None]
    return covered * near + (1 - covered) * far


def near_coverage(distance: np.ndarray) -> np.ndarray:
    """1 inside the near disc, 0 outside, with a soft edge, by the distance from its centre."""
    return 1 / (1 + np.exp((distance - 14) / 0.7))


def write_light_field(folder: Path, numbered: bool = False) -> dict[str, np.ndarray]:
    """The scene ``planes`` of :func:`two_planes`, in one of the two layouts.

    The far plane has disparity -0.4, the near disc 0.8.
    """
    scene = folder / "planes"
    centre = VIEWS // 2
    for row in range(VIEWS):
        for column in range(VIEWS):
            light = two_planes(column - centre, row - centre)
            view = (linear_to_srgb(light) * 255).round().astype(np.uint8)
            name = f"views/{row:02d}_{column:02d}.png"
            save(scene / (f"input_Cam{row * VIEWS + column:03d}.png" if numbered else name), view)
            if row == column == centre:
                image = view
    y, x = np.mgrid[: image.shape[0], : image.shape[1]]
    is_near = near_coverage(np.hypot(y - 30, x - 34)) > 0.5
    disparity = np.where(is_near, NEAR_DISPARITY, FAR_DISPARITY).astype(np.float32)
    if numbered:
        header = f"Pf\n{disparity.shape[1]} {disparity.shape[0]}\n-1.0\n".encode()
        (scene / "gt_disp_lowres.pfm").write_bytes(header + disparity[::-1].astype("<f4").tobytes())
    else:
        np.save(scene / "disparity.npy", disparity)
    return {"image": image, "disparity": disparity}


WRITERS: dict[str, Callable[[Path], Any]] = {
    "raytraced": write_raytraced,
    "synbokeh300": write_raytraced,
    "ebb": write_ebb,
    "ebb_aligned": write_ebb,
    "blb": write_blb,
    "realbokeh": write_realbokeh,
    "light_fields": write_light_field,
    "triples": write_triples,
}
"""What writes a miniature of each data set of ``evaluation.datasets.DATASETS``."""
