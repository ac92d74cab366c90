"""Each kind of damage to each data set is found, and named by the file that has it."""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_synthesis.benchmark import write_benchmark
from evaluation.datasets import DATASETS, open_dataset
from evaluation.datasets.verify import add_arguments, run
from tests.evaluation.datasets import miniatures
from tests.evaluation.datasets.miniatures import WRITERS

# Without these a data set is another one, but complete.
OPTIONAL = ("mask",)


def problems_of(name: str, folder: Path) -> list[str]:
    """What verifying says, also when the data set cannot even be opened."""
    try:
        return open_dataset(name, folder).verify()
    except ValueError as problem:
        return [str(problem)]


def a_file_of_each_kind(folder: Path) -> list[Path]:
    """One file for each suffix and folder name."""
    kinds: dict[tuple[str, ...], Path] = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            kind = (file.suffix, file.parent.name, file.name.split("_")[0])
            kinds.setdefault(kind, file)
    return list(kinds.values())


@pytest.mark.parametrize("name", DATASETS)
def test_missing_and_truncated_files_are_found(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path)
    files = a_file_of_each_kind(tmp_path)
    assert len(files) >= 3
    for file in files:
        content = file.read_bytes()
        file.unlink()
        if file.parent.name not in OPTIONAL:
            problems = problems_of(name, tmp_path)
            # A map may have several names; missing settings are told by those that lack them.
            stem = file.stem.removesuffix("_pred").removesuffix("_disparity")
            assert any(stem in problem for problem in problems), file
        # Cut in the middle, within what the first bytes announce, and to nothing.
        for length in (len(content) // 2, 30, 0):
            file.write_bytes(content[:length])
            problems = problems_of(name, tmp_path)
            assert any(file.name in problem for problem in problems), (file, length, problems)
        file.write_bytes(content)
    assert problems_of(name, tmp_path) == []


@pytest.mark.parametrize("name", DATASETS)
def test_pictures_of_another_size_are_found(name: str, tmp_path: Path) -> None:
    if name == "blb":
        miniatures.write_blb(tmp_path)
        file = tmp_path / "277" / "depth.exr"
        miniatures.write_channels(file, {"V": np.ones((20, 30), np.float32)})
        assert any("depth.exr is 30 x 20 pixels" in one for one in problems_of(name, tmp_path))
        return
    WRITERS[name](tmp_path)
    pictures = [file for file in a_file_of_each_kind(tmp_path) if file.suffix in (".png", ".JPG")]
    for file in pictures:
        content = file.read_bytes()
        with Image.open(file) as picture:
            smaller = picture.resize((30, 20))
        smaller.save(file)
        # Beside a small photograph all that belongs to it has the wrong size.
        assert any("30 x 20" in problem for problem in problems_of(name, tmp_path)), file
        file.write_bytes(content)


def change_json(file: Path, **changes: object) -> None:
    content = json.loads(file.read_text())
    content.update(changes)
    file.write_text(json.dumps(content))


def damage_settings(folder: Path, **changes: object) -> None:
    file = folder / "s02" / "meta.json"
    settings = json.loads(file.read_text())["configs"]
    settings[1].update(changes)
    change_json(file, configs=settings)


def unknown_in(file: Path, **arrays: str) -> None:
    """Puts a NaN into an array file, or into one of its arrays."""
    loaded = np.load(file)
    if isinstance(loaded, np.ndarray):
        loaded[3, 4] = np.nan
        np.save(file, loaded)
        return
    changed = dict(loaded)
    for name in arrays.values():
        changed[name][3, 4] = np.nan
    np.savez(file, **changed)


def rewrite_csv(folder: Path, column: str, value: str) -> None:
    """Moves the settings of triples to a table, with this value in the first row."""
    rows = json.loads((folder / "settings.json").read_text())
    (folder / "settings.json").unlink()
    table = [{"name": name, **row} for name, row in rows.items()]
    table[0][column] = value
    with (folder / "settings.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["name", "df", "K", "scene"])
        writer.writeheader()
        writer.writerows(table)


def scenes_json(folder: Path) -> Path:
    return folder / "277" / "info.json"


DAMAGES: list[tuple[str, Callable[[Path], object], str]] = [
    ("raytraced", lambda data: unknown_in(data / "s01" / "disp.npz", a="disp"),
     "disp.npz has 1 NaN"),
    ("raytraced", lambda data: unknown_in(data / "s01" / "aif_lin.npz", a="aif"),
     "aif_lin.npz has 3 NaN"),
    ("raytraced", lambda data: np.savez(data / "s01" / "aif_lin.npz", light=np.ones(3)),
     "no array 'aif'; it has light"),
    ("raytraced", lambda data: np.savez(data / "s01" / "aif_lin.npz", aif=np.ones((40, 56))),
     "shape (40, 56); wanted (H, W, 3)"),
    ("raytraced", lambda data: (data / "s02" / "meta.json").write_text("[]"), "JSON list"),
    ("raytraced", lambda data: change_json(data / "s02" / "meta.json", configs=["f0"]),
     "configs is no list of objects"),
    ("raytraced", lambda data: change_json(data / "s02" / "meta.json", disp_max=0.0),
     "disp_max has to be larger"),
    ("raytraced", lambda data: damage_settings(data, df="near"), "df of f0_r06 is 'near'"),
    ("raytraced", lambda data: damage_settings(data, K=float("nan")), "K of f0_r06 is nan"),
    ("raytraced", lambda data: damage_settings(data, id="f9_r99"), "gt_f9_r99.png is missing"),
    ("ebb", lambda data: unknown_in(data / "depth" / "IMG_1_pred.npy"), "IMG_1_pred.npy has 1 NaN"),
    ("ebb", lambda data: np.save(data / "depth" / "IMG_1_pred.npy", np.ones((40, 56))),
     "IMG_1_pred.npy is 1 everywhere"),
    ("ebb", lambda data: miniatures.write_json(data / "depth" / "convention.json", {"near": 0}),
     "says that the nearest is None"),
    ("ebb", lambda data: miniatures.save(data / "bokeh" / "IMG_3.png", miniatures.picture(3)),
     "IMG_3.jpg is missing"),
    ("ebb_aligned", lambda data: (data / "input/IMG_1.jpg").rename(data / "input/IMG_9.jpg"),
     "bokeh/IMG_9.jpg is missing"),
    ("blb", lambda data: miniatures.write_channels(
        data / "277" / "depth.exr", {"V": np.full((40, 56), np.nan, np.float32)}),
     "depth.exr has 2240 values that are NaN or not above 0"),
    ("blb", lambda data: miniatures.write_channels(
        data / "277" / "depth.exr", {"V": np.zeros((40, 56), np.float32)}), "not above 0"),
    ("blb", lambda data: change_json(scenes_json(data), blur_parameters=[1, 2]),
     "lacks blur_parameters; wanted a list of at least 5"),
    ("blb", lambda data: change_json(scenes_json(data), focus_distances=[1.0, 2.0, 5.0, 8.0]),
     "bokeh_04_03.exr is missing"),
    ("blb", lambda data: change_json(scenes_json(data), focus_distances=[1.0, 0, 5.0]),
     "focus_distances has 0; wanted values above 0"),
    ("realbokeh", lambda data: change_json(data / "metadata" / "7.json", target_avs=[2.0]),
     "7.json has 2 target_images"),
    ("realbokeh", lambda data: change_json(data / "metadata" / "7.json", target_avs=[2.0, "f/8"]),
     "is 'f/8'; wanted a finite number"),
    ("realbokeh", lambda data: change_json(data / "metadata" / "7.json", source_image="in/1.JPG"),
     "in/1.JPG is missing"),
    ("realbokeh", lambda data: miniatures.write_json(data / "metadata" / "9.json", {"id": 9}),
     "9.json lacks source_image, target_images, target_avs"),
    ("realbokeh", lambda data: miniatures.save(data / "in" / "8_f22.JPG", miniatures.picture(8)),
     "8_f22.JPG is the source_image of no file in metadata"),
    ("light_fields", lambda data: unknown_in(data / "planes" / "disparity.npy"),
     "disparity.npy has 1 NaN"),
    ("light_fields", lambda data: [file.unlink() for file in (data / "planes").rglob("08_*.png")],
     "8 x 9 views"),
    ("triples", lambda data: unknown_in(data / "disparity" / "pan.npy"), "pan.npy has 1 NaN"),
    ("triples", lambda data: change_json(data / "settings.json", pan={"df": "far"}),
     "df of pan is 'far'"),
    ("triples", lambda data: change_json(data / "settings.json", pan={"K": 3}),
     "df of pan is None"),
    ("triples", lambda data: change_json(data / "settings.json", pan={"df": 1, "K": -3}),
     "K of pan is -3; wanted 0 or more"),
    ("triples", lambda data: change_json(data / "settings.json", pan=4),
     "pan is 4; wanted an object"),
    ("triples", lambda data: change_json(data / "settings.json", cup={"df": 1}),
     "image/cup.png is missing"),
    ("triples", lambda data: miniatures.save(data / "image" / "cup.png", miniatures.picture(3)),
     "cup.png is in no settings.json"),
    ("triples", lambda data: (data / "settings.csv").write_text("name,df\n"), "wanted one of them"),
    ("triples", lambda data: (data / "settings.json").rename(data / "settings.csv").write_bytes(
        b"name,df\n\xff,1\n"), "settings.csv is no table as CSV"),
    ("triples", lambda data: (data / "settings.json").rename(data / "settings.csv").write_text(
        "name,focus\npan,1\n"), "has the columns name, focus; wanted name and df"),
    ("triples", lambda data: rewrite_csv(data, "df", "far"), "df of sill is 'far'"),
    ("triples", lambda data: rewrite_csv(data, "K", "inf"), "K of sill is inf"),
    ("triples", lambda data: rewrite_csv(data, "name", "pan"), "has 'pan' twice"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "damage", "words"), DAMAGES)
def test_damage_is_told(
    name: str, damage: Callable[[Path], object], words: str, tmp_path: Path
) -> None:
    WRITERS[name](tmp_path)
    damage(tmp_path)
    problems = problems_of(name, tmp_path)
    assert any(words in problem for problem in problems), problems
    if words.endswith("is missing") or "NaN" in words:
        with pytest.raises(ValueError, match="wanted|is missing"):
            list(open_dataset(name, tmp_path).photographs())


def test_every_problem_is_told_at_once(tmp_path: Path) -> None:
    miniatures.write_raytraced(tmp_path)
    (tmp_path / "s01" / "meta.json").write_text("{")
    (tmp_path / "s02" / "aif.png").unlink()
    unknown_in(tmp_path / "s02" / "disp.npz", a="disp")
    (tmp_path / "s02" / "gt_f0_r06.png").write_bytes(b"no picture")
    problems = open_dataset("raytraced", tmp_path).verify()
    words = ("s01/meta.json", "s02/aif.png", "s02/disp.npz", "s02/gt_f0_r06.png")
    assert [word for word, problem in zip(words, problems, strict=True) if word in problem] == [
        *words
    ]
    assert open_dataset("raytraced", tmp_path, ["s02"]).verify() == problems[1:]


def test_checksums_of_synbokeh300(tmp_path: Path) -> None:
    write_benchmark("synbokeh300", tmp_path / "data", count=1, size=128)
    scene = tmp_path / "data" / "s000"
    assert problems_of("synbokeh300", tmp_path / "data") == []
    # A picture that is whole, but another.
    truth = next(scene.glob("gt_*.png"))
    truth.write_bytes((scene / "aif.png").read_bytes())
    (problem,) = problems_of("synbokeh300", tmp_path / "data")
    assert truth.name in problem and "checksum" in problem
    sums = scene / "SHA256SUMS"
    kept = "".join(line for line in sums.read_text().splitlines(True) if truth.name not in line)
    sums.write_text(kept + "0" * 64 + "  gone.png\nnonsense\n")
    gone, nonsense = problems_of("synbokeh300", tmp_path / "data")
    assert "gone.png is missing" in gone and "'nonsense'" in nonsense

    description = tmp_path / "data" / "benchmark.json"
    sums.unlink()
    change_json(description, levels=[2, 3])
    (problem,) = problems_of("synbokeh300", tmp_path / "data")
    assert "has the levels [2, 3, 6, 12]" in problem and "[2, 3]" in problem
    change_json(description, name="another")
    assert "is of 'another'" in problems_of("synbokeh300", tmp_path / "data")[0]
    description.write_text("{")
    assert "not valid JSON" in problems_of("synbokeh300", tmp_path / "data")[0]


def test_a_file_that_scenes_share_is_wrong_once(tmp_path: Path) -> None:
    miniatures.write_ebb(tmp_path)
    (tmp_path / "depth" / "convention.json").write_text("{")
    assert len(problems_of("ebb", tmp_path)) == 1


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(words)


def test_the_command_prints_problems(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    miniatures.write_raytraced(tmp_path)
    assert run(arguments("raytraced", str(tmp_path))) == 0
    assert capsys.readouterr().out == "Photographs: 3, scenes: 2; all as they should be.\n"
    (tmp_path / "s01" / "gt_f0_r14.png").unlink()
    assert run(arguments("raytraced", str(tmp_path))) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"{tmp_path / 's01' / 'gt_f0_r14.png'} is missing.", "1 problem."]
    assert run(arguments("raytraced", str(tmp_path), "--scenes", "s02")) == 0
    with pytest.raises(ValueError, match="no scene s03"):
        run(arguments("raytraced", str(tmp_path), "--scenes", "s02,s03"))
