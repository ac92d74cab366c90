"""A bokeh stack in a folder comes back as it was, wherever the folder is; so do the authors'."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from bokehdiff.images import write_image
from bokehdiff.stack_folder import read_stack_folder, write_stack_folder


def pictures(count: int, width: int = 9, height: int = 5, seed: int = 0) -> torch.Tensor:
    """(count, 3, H, W) of 8 bits, which files keep."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, height, width), generator=generator) / 255


@pytest.fixture
def written(tmp_path: Path) -> Path:
    folder = tmp_path / "stack"
    write_stack_folder(
        folder, pictures(1), pictures(3, seed=1), [10, 0, 30.5], df=0.5, details={"seed": 42}
    )
    return folder


def test_a_stack_comes_back_from_wherever_the_folder_is(written: Path, tmp_path: Path) -> None:
    names = ["0.png", "1.png", "2.png", "ref.png", "summary.json"]
    assert sorted(file.name for file in written.iterdir()) == names
    moved = tmp_path / "elsewhere" / "moved"
    moved.parent.mkdir()
    shutil.move(written, moved)
    image, stack, K, df = read_stack_folder(moved)
    assert torch.equal(image, pictures(1)) and torch.equal(stack, pictures(3, seed=1))
    assert K == [10.0, 0.0, 30.5] and df == 0.5
    summary = json.loads((moved / "summary.json").read_text())
    assert summary["seed"] == 42 and summary["size"] == [9, 5]
    assert str(tmp_path) not in (moved / "summary.json").read_text()


def test_the_focus_may_be_unknown(tmp_path: Path) -> None:
    write_stack_folder(tmp_path, pictures(1), pictures(1, seed=1), [10])
    assert read_stack_folder(tmp_path).df is None


def test_a_focal_stack_has_a_focus_for_each_picture(written: Path) -> None:
    summary = json.loads((written / "summary.json").read_text())
    (written / "summary.json").write_text(json.dumps({**summary, "df": [0.1, 0.2, 0.0]}))
    assert read_stack_folder(written).df == [0.1, 0.2, 0.0]
    (written / "summary.json").write_text(json.dumps({**summary, "df": [0.1, 0.2]}))
    with pytest.raises(ValueError, match="3 pictures and df"):
        read_stack_folder(written)


def test_nothing_is_written_over_unasked(written: Path) -> None:
    before = {file: file.read_bytes() for file in written.iterdir()}
    with pytest.raises(FileExistsError, match=r"--force"):
        write_stack_folder(written, pictures(1), pictures(2, seed=2), [1, 2])
    assert {file: file.read_bytes() for file in written.iterdir()} == before
    write_stack_folder(written, pictures(1), pictures(2, seed=2), [1, 2], overwrite=True)
    read = read_stack_folder(written)
    assert torch.equal(read.stack, pictures(2, seed=2)) and read.K == [1.0, 2.0]
    (written.parent / "file").write_text("mine")
    with pytest.raises(ValueError, match="is a file"):
        write_stack_folder(written.parent / "file", pictures(1), pictures(1), [1], overwrite=True)


def test_an_interrupted_write_leaves_no_summary(written: Path) -> None:
    """A summary speaks of pictures that are all there."""
    (written / "1.png").unlink()
    (written / "1.png").mkdir()  # where no file can be put
    with pytest.raises(OSError):
        write_stack_folder(written, pictures(1), pictures(3, seed=2), [1, 2, 3], overwrite=True)
    with pytest.raises(ValueError, match="holds no bokeh stack"):
        read_stack_folder(written)


@pytest.mark.parametrize(
    ("image", "stack", "K"),
    [
        (pictures(2), pictures(2), [1, 2]),
        (pictures(1), pictures(2), [1]),
        (pictures(1), pictures(1, width=8), [1]),
        (pictures(1), pictures(1), [-1]),
    ],
)
def test_what_does_not_belong_together_is_not_written(
    tmp_path: Path, image: torch.Tensor, stack: torch.Tensor, K: list[float]
) -> None:
    with pytest.raises(ValueError, match="wanted"):
        write_stack_folder(tmp_path / "stack", image, stack, K)
    assert not (tmp_path / "stack").exists()


# -- The authors' folders --------------------------------------------------------------------------


def run_of_the_authors(folder: Path, root: str, aliases: str) -> Path:
    """A run's folder as the authors' script leaves it, with `root` for where it was made."""
    (folder / "defocus_stack").mkdir(parents=True)
    write_image(folder / "ref.png", pictures(1))
    for number, picture in enumerate(pictures(3, seed=1)):
        write_image(folder / "defocus_stack" / f"{number}.png", picture)
    index = {
        "ids": ["0", "1", "2"],
        "k_values": {"0": 10.0, "1": 20.0, "2": 30.0},
        "ref_image": f"{root}/ref.png",
        "source_rgb": f"{root}/ref.png",
        "size": [9, 5],
    }
    (folder / "defocus_stack" / "stack_index.json").write_text(json.dumps(index))
    frames = [f"{root}/defocus_stack/{number}.png" for number in range(3)]
    manifests: dict[str, dict[str, Any]] = {
        "stack and k": {"ref": f"{root}/ref.png", "stack": frames, "k": [10.0, 20.0, 30.0]},
        "ids": {
            "source_rgb": f"{root}/ref.png",
            "ids": [0, 1, 2],
            "k_values": {"0": 10.0, "1": 20.0, "2": 30.0},
            "stack_dir": f"{root}/defocus_stack",
        },
        "index": {
            "image_path": f"{root}/ref.png",
            "stack_index": f"{root}/defocus_stack/stack_index.json",
        },
    }
    if aliases in manifests:
        (folder / "manifest.jsonl").write_text(json.dumps(manifests[aliases]) + "\n")
    return folder


@pytest.mark.parametrize("aliases", ["stack and k", "ids", "index", "no manifest"])
@pytest.mark.parametrize("root", ["/home/author/run_1", "runs/run_1", "."])
def test_folders_of_the_authors_are_read(tmp_path: Path, aliases: str, root: str) -> None:
    folder = run_of_the_authors(tmp_path / "run_1", root, aliases)
    image, stack, K, df = read_stack_folder(folder)
    assert torch.equal(image, pictures(1)) and torch.equal(stack, pictures(3, seed=1))
    assert K == [10.0, 20.0, 30.0] and df is None
    # The inner folder alone, in which the index lies, finds the sharp picture beside it.
    assert read_stack_folder(folder / "defocus_stack").K == [10.0, 20.0, 30.0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "damaged"),
        ("[1]", "holds list"),
        ('{"ref": "ref.png"}', "tells of no stack"),
        ('{"ref": "ref.png", "stack": [], "k": []}', "at least one file"),
        ('{"ref": "ref.png", "stack": ["0.png"], "k": [1, 2]}', "wanted as many"),
        ('{"ref": "ref.png", "stack": ["0.png"], "k": [-1]}', "K is"),
        ('{"ref": "ref.png", "ids": ["0"], "k_values": {"1": 3}}', "no k_values for"),
        ('{"stack": ["0.png"], "k": [1]}', "names no sharp picture"),
    ],
)
def test_folders_that_say_something_else_are_refused(
    written: Path, text: str, message: str
) -> None:
    (written / "summary.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_stack_folder(written)


def test_what_is_missing_is_named(written: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no folder"):
        read_stack_folder(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no bokeh stack.*bokehdiff stack"):
        read_stack_folder(tmp_path / "empty")
    (written / "1.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1\.png"):
        read_stack_folder(written)
    write_image(written / "1.png", pictures(1, width=8))
    with pytest.raises(ValueError, match="8 x 5.*9 x 5"):
        read_stack_folder(written)


def test_a_manifest_of_many_stacks_is_refused(tmp_path: Path) -> None:
    folder = run_of_the_authors(tmp_path / "run", ".", "stack and k")
    line = (folder / "manifest.jsonl").read_text()
    (folder / "manifest.jsonl").write_text(line * 2)
    with pytest.raises(ValueError, match="tells of 2 stacks"):
        read_stack_folder(folder)
