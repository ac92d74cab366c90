"""Writing transparent foregrounds: checks, retries, resuming, processes, the command line.

The generator here paints discs; the networks are in test_foregrounds_layerdiffuse.py.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForText2Image
from PIL import Image

from data_synthesis import foregrounds
from data_synthesis.cutouts import PictureFolders
from data_synthesis.foregrounds import Checks, perceptual_hash, write_foregrounds
from data_synthesis.matting import BackdropError
from data_synthesis.prompts import PromptBank
from data_synthesis.transparent_generators import BackdropGenerator, Sampling
from tests.tiny_models import tiny_stock_pipeline

SIDE = 64


def disc(
    x: float = 32, y: float = 32, radius: float = 16, opacity: float = 1.0, stripes: float = 0.3
) -> Image.Image:
    rows, columns = np.mgrid[0:SIDE, 0:SIDE]
    alpha = opacity * np.clip(radius - np.hypot(columns - x, rows - y) + 0.5, 0, 1)
    shade = 0.5 + 0.4 * np.sin(stripes * columns + stripes * stripes * 7 * rows)
    rgba = np.dstack([shade, 1 - shade, shade**2, alpha])
    return Image.fromarray(np.rint(255 * rgba).astype(np.uint8))


class DiscGenerator:
    """Paints what the prompt's first word says; "lucky" fails until its third attempt."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.provenance: Mapping[str, Any] = {"class": "DiscGenerator", "version": 1}
        self.stop_after = stop_after
        self.asked: list[tuple[str, int]] = []

    def generate(
        self, prompt: str, generator: torch.Generator
    ) -> tuple[Image.Image, dict[str, Any]]:
        if len(self.asked) == self.stop_after:
            raise KeyboardInterrupt
        self.asked.append((prompt, generator.initial_seed()))
        kind = prompt.split()[0]
        if kind == "lucky":
            tries = sum(asked == prompt for asked, _ in self.asked)
            kind = "good" if tries % 3 == 0 else "empty"
        if kind == "backdrop":
            raise BackdropError("The backdrop is not plain.")
        places = torch.rand(3, generator=generator).tolist()
        made = {
            "good": lambda: disc(26 + 12 * places[0], 32, 12, stripes=0.1 + 2 * places[1]),
            "same": lambda: disc(),
            "empty": lambda: disc(opacity=0),
            "tiny": lambda: disc(radius=3),
            "full": lambda: disc(radius=100),
            "cut": lambda: disc(x=2, radius=24),
            "soft": lambda: disc(opacity=0.6),
        }
        return made[kind](), {"places": places}


def bank(*prompts: str) -> PromptBank:
    category = {"count": len(prompts), "template": "{x}", "slots": {"x": list(prompts)}}
    return PromptBank({"categories": {"things": category}})


def rejections(folder: Path) -> list[dict[str, Any]]:
    logs = sorted(folder.glob("rejected-*.jsonl"))
    return [json.loads(line) for log in logs for line in log.read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# --- Checks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("picture", "reason"),
    [
        (disc(), None),
        (disc(opacity=0), "empty"),
        (disc(radius=3), "tiny"),
        (disc(radius=100), "full"),
        (disc(x=2, radius=24), "cut by the frame"),
        (disc(opacity=0.6), "semi-transparent"),
    ],
)
def test_each_reason(picture: Image.Image, reason: str | None) -> None:
    problem = Checks().problem(np.asarray(picture))
    assert (problem and problem[0]) == reason


def test_limits_are_where_they_say() -> None:
    quarter = np.zeros((64, 64, 4), np.uint8)
    quarter[0:32, 16:48] = 255  # a quarter of the picture; 32 of 252 pixels of the frame
    assert Checks(largest_border=32 / 252).problem(quarter) is None
    assert Checks(largest_border=31 / 252).problem(quarter)[0] == "cut by the frame"
    loose = {"largest_border": 1.0}
    assert Checks(smallest_area=0.25, **loose).problem(quarter) is None
    assert Checks(smallest_area=0.2501, **loose).problem(quarter)[0] == "tiny"
    assert Checks(largest_area=0.25, **loose).problem(quarter) is None
    assert Checks(largest_area=0.2499, **loose).problem(quarter)[0] == "full"
    quarter[0:24, :, 3] //= 2  # three quarters of the subject become translucent
    assert Checks(largest_soft=0.75, **loose).problem(quarter) is None
    assert Checks(largest_soft=0.74, **loose).problem(quarter)[0] == "semi-transparent"
    assert Checks(largest_soft=0.74, **loose).problem(quarter, translucent=True) is None
    for wrong in ({"largest_soft": 1.5}, {"smallest_area": -0.1}, {"smallest_difference": 129}):
        with pytest.raises(ValueError, match="wanted 0 to"):
            Checks(**wrong)


def bits_between(a: Image.Image, b: Image.Image) -> int:
    one, other = (int(perceptual_hash(np.asarray(picture)), 16) for picture in (a, b))
    return (one ^ other).bit_count()


def test_perceptual_hash_knows_a_picture_again_but_not_another() -> None:
    first = disc(30, 30, 18, stripes=0.4)
    moved = Image.new("RGBA", (90, 80))
    moved.paste(first, (20, 9))
    assert bits_between(first, moved) == 0
    darker = np.array(first)
    darker[..., :3] = np.rint(0.92 * darker[..., :3])
    darker[..., :3][darker[..., 3] == 0] = 77  # colours that nobody sees
    assert bits_between(first, Image.fromarray(darker)) <= 3
    assert bits_between(first, disc(30, 30, 18, stripes=1.1)) > Checks().smallest_difference
    wide = np.array(disc(30, 30, 18, stripes=0.4))
    wide[:, 30:32] = 0
    assert bits_between(first, Image.fromarray(wide)) > Checks().smallest_difference


# --- Writing --------------------------------------------------------------------------------------


def test_rejections_are_retried_counted_and_recorded(tmp_path: Path) -> None:
    words = ["good one", "empty", "tiny", "full", "cut", "soft", "backdrop", "same a", "same b"]
    words += ["lucky", "good two"]
    generator = DiscGenerator()
    summary = write_foregrounds(generator, bank(*words), tmp_path, attempts=3)
    # Both good, the lucky and the first of the same; the rest was rejected three times.
    assert summary.written == 4 and summary.shortfall == {"things": 7}
    log = rejections(tmp_path)
    reasons = Counter(entry["reason"] for entry in log)
    assert reasons == summary.rejected
    assert set(reasons) == {
        "empty", "tiny", "full", "cut by the frame", "semi-transparent", "backdrop", "duplicate",
    }  # fmt: skip
    lucky = [e for e in log if e["prompt"] == "lucky"]
    assert [e["attempt"] for e in lucky] == [0, 1]
    duplicate = next(e for e in log if e["reason"] == "duplicate")
    assert duplicate["prompt"] == "same b" and duplicate["detail"] == "equals 00000007-things"
    # Every seed was used once, and is the one that was recorded.
    assert len({seed for _, seed in generator.asked}) == len(generator.asked)
    assert {e["seed"] for e in log} < {seed for _, seed in generator.asked}

    names = sorted(path.stem for path in tmp_path.glob("*.png"))
    assert names == [f"{index:08d}-things" for index in (0, 7, 9, 10)]
    for name in names:
        record = json.loads((tmp_path / f"{name}.json").read_text())
        assert record["index"] == int(name[:8]) and (record["prompt"], record["seed"]) in (
            generator.asked
        )
        assert record["generator"] == generator.provenance and len(record["places"]) == 3
        if record["prompt"] == "lucky":
            assert record["attempt"] == 2


def test_glass_may_be_semi_transparent(tmp_path: Path) -> None:
    category = {"count": 1, "template": "soft {x}", "slots": {"x": ["glass"]}}
    glass = PromptBank({"categories": {"glass": {**category, "translucent": True}}})
    assert write_foregrounds(DiscGenerator(), glass, tmp_path / "glass").written == 1
    solid = PromptBank({"categories": {"solid": category}})
    assert write_foregrounds(DiscGenerator(), solid, tmp_path / "solid").written == 0


def test_the_folder_is_a_source_of_cutouts(tmp_path: Path) -> None:
    write_foregrounds(DiscGenerator(), bank("good a", "good b", "empty"), tmp_path, attempts=1)
    cutouts = PictureFolders(tmp_path, "cutout")
    assert len(cutouts) == 2 and not cutouts.problems
    with Image.open(sorted(tmp_path.glob("*.png"))[0]) as picture:
        assert cutouts[0].tobytes() == picture.tobytes()


def test_same_seed_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    words = bank("good a", "good b", "empty", "lucky")
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_foregrounds(DiscGenerator(), words, tmp_path / name, seed=seed)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    pictures = [sorted((tmp_path / name).glob("*.png")) for name in "ac"]
    assert {p.read_bytes() for p in pictures[0]}.isdisjoint(p.read_bytes() for p in pictures[1])


@pytest.mark.parametrize("stop_after", range(0, 10, 2))
def test_an_interrupted_run_goes_on_to_the_same_bytes(stop_after: int, tmp_path: Path) -> None:
    words = bank("good a", "empty", "good b", "same a", "same b", "good c")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    first = DiscGenerator()
    write_foregrounds(first, words, whole, attempts=3)
    assert len(first.asked) == 10
    stopped = DiscGenerator(stop_after)
    with pytest.raises(KeyboardInterrupt):
        write_foregrounds(stopped, words, broken, attempts=3)
    rest = DiscGenerator()
    write_foregrounds(rest, words, broken, attempts=3)
    assert contents(broken) == contents(whole)
    assert stopped.asked + rest.asked == first.asked  # nothing was made twice


def test_a_line_cut_short_is_made_again(tmp_path: Path) -> None:
    words = bank("good a", "empty")
    write_foregrounds(DiscGenerator(), words, tmp_path, attempts=2)
    log = tmp_path / "rejected-0-of-1.jsonl"
    log.write_bytes(log.read_bytes()[:-20])
    again = DiscGenerator()
    write_foregrounds(again, words, tmp_path, attempts=2)
    assert len(again.asked) == 1
    lines = log.read_text().splitlines()
    assert len(lines) == 3 and json.loads(lines[0])["attempt"] == 0
    assert json.loads(lines[2])["attempt"] == 1  # the second is the torn one


def test_longer_and_more_patient_runs_continue(tmp_path: Path) -> None:
    words = bank("good a", "lucky", "good b")
    first = write_foregrounds(DiscGenerator(), words, tmp_path, count=2, attempts=1)
    assert first.written == 1 and first.shortfall == {"things": 1}
    before = contents(tmp_path)
    generator = DiscGenerator()
    generator.asked.append(("lucky", -1))  # it counts its attempts
    second = write_foregrounds(generator, words, tmp_path, count=3, attempts=3)
    assert second.finished == 1 and second.written == 2 and not second.shortfall
    after = contents(tmp_path)
    assert all(after[name] == data for name, data in before.items() if "rejected" not in name)


def test_processes_share_the_work(tmp_path: Path) -> None:
    words = bank(*(f"good {i}" for i in range(7)))
    write_foregrounds(DiscGenerator(), words, tmp_path / "one")
    done: list[int] = []
    for rank in (2, 0, 1):
        summary = write_foregrounds(
            DiscGenerator(),
            words,
            tmp_path / "three",
            rank=rank,
            world_size=3,
            progress=done.append,
        )
        assert summary.written == len(range(rank, 7, 3))
    assert sum(done) == 7
    assert contents(tmp_path / "one") == contents(tmp_path / "three")


def test_likeness_between_processes_is_said(tmp_path: Path) -> None:
    words = bank("same a", "same b", "good")
    for rank in (0, 1):
        summary = write_foregrounds(DiscGenerator(), words, tmp_path, rank=rank, world_size=2)
    assert summary.alike == [("00000000-things", "00000001-things")]


def test_other_settings_and_lost_provenance_are_refused(tmp_path: Path) -> None:
    words = bank("good a", "good b")
    write_foregrounds(DiscGenerator(), words, tmp_path)
    before = contents(tmp_path)
    other = DiscGenerator()
    other.provenance = {"class": "DiscGenerator", "version": 2}
    for named, arguments in (
        ("seed", (DiscGenerator(), words, {"seed": 1})),
        ("generator", (other, words, {})),
        ("prompts", (DiscGenerator(), bank("good c"), {})),
        ("checks", (DiscGenerator(), words, {"checks": Checks(smallest_area=0.1)})),
    ):
        generator, prompts, more = arguments
        with pytest.raises(ValueError, match=rf"other settings \({named}"):
            write_foregrounds(generator, prompts, tmp_path, **more)
    assert contents(tmp_path) == before
    sidecar = sorted(tmp_path.glob("0*.json"))[0]
    sidecar.unlink()
    with pytest.raises(ValueError, match="no readable provenance"):
        write_foregrounds(DiscGenerator(), words, tmp_path)
    with pytest.raises(ValueError, match="rank 3 of 2"):
        write_foregrounds(DiscGenerator(), words, tmp_path / "new", rank=3, world_size=2)
    assert not (tmp_path / "new").exists()


def test_a_picture_that_appeared_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    class Racing(DiscGenerator):
        def generate(
            self, prompt: str, generator: torch.Generator
        ) -> tuple[Image.Image, dict[str, Any]]:
            (tmp_path / "00000000-things.png").write_bytes(b"theirs")
            return super().generate(prompt, generator)

    with pytest.raises(FileExistsError, match="another run"):
        write_foregrounds(Racing(), bank("good a"), tmp_path)
    assert (tmp_path / "00000000-things.png").read_bytes() == b"theirs"
    assert not list(tmp_path.glob(".*"))


# --- Before a backdrop ----------------------------------------------------------------------------


class StubPipeline:
    """A text-to-image pipeline that paints a warm disc before the backdrop it is asked for."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def __call__(
        self,
        prompt: str,
        height: int,
        width: int,
        num_inference_steps: int,
        generator: torch.Generator,
        output_type: str,
    ) -> argparse.Namespace:
        self.calls.append((prompt, {"height": height, "steps": num_inference_steps}))
        colours = {"green": (30, 180, 50), "blue": (40, 60, 190), "magenta": (200, 30, 180)}
        words = prompt.split("plain solid ")[1].split()
        backdrop = Image.new("RGB", (width, height), colours[words[0]])
        subject = disc(radius=14).resize((width, height))
        warm = Image.new("RGB", (width, height), (230, 150, 60))
        backdrop.paste(warm, mask=subject.getchannel("A"))
        return argparse.Namespace(images=[backdrop])


def test_backdrop_generator_asks_for_a_backdrop_and_removes_it(tmp_path: Path) -> None:
    pipeline = StubPipeline()
    generator = BackdropGenerator(pipeline, Sampling(SIDE, 3), {"model": "stub"})
    # This pipeline knows neither guidance nor negative prompts.
    assert generator.provenance == {
        "class": "BackdropGenerator", "model": "stub",
        "height": SIDE, "width": SIDE, "num_inference_steps": 3,
    }  # fmt: skip
    for seed in range(6):
        picture, facts = generator.generate("a GREEN frog", torch.Generator().manual_seed(seed))
        alpha = np.asarray(picture)[..., 3] / 255
        truth = np.asarray(disc(radius=14))[..., 3] / 255
        assert picture.mode == "RGBA" and np.abs(alpha - truth).mean() < 0.01
        assert facts["full_prompt"] == pipeline.calls[-1][0]
    asked = {prompt.split("plain solid ")[1] for prompt, _ in pipeline.calls}
    assert asked == {"blue background", "magenta background"}
    assert Checks().problem(np.asarray(picture)) is None


# --- Command line ---------------------------------------------------------------------------------


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    foregrounds.add_arguments(parser)
    return foregrounds.run(parser.parse_args(words))


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    pipeline = tiny_stock_pipeline(folder / "vocabulary")
    pipeline.save_pretrained(folder / "tiny-sdxl")
    return folder / "tiny-sdxl"


def blotches_before_green(model: Path, folder: Path) -> Path:
    """The tiny SDXL with a decoder that paints red where its first feature is large, else green."""
    pipeline = AutoPipelineForText2Image.from_pretrained(model)
    last = pipeline.vae.decoder.conv_out
    with torch.no_grad():
        last.weight.zero_()
        last.weight[0, 0, 1, 1], last.weight[1, 0, 1, 1] = 100.0, -100.0
        last.bias.copy_(torch.tensor([-170.0, 170.0, -1.0]))
    pipeline.save_pretrained(folder)
    return folder


def test_a_real_sdxl_before_a_backdrop(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = blotches_before_green(tiny_model, tmp_path / "blotches")
    words = ["--generator", "backdrop", "--model", str(model), "--size", str(SIDE)]
    words += ["--steps", "2", "--n", "2", "--out", str(tmp_path / "out"), "--device", "cpu"]
    words += ["--largest-border", "1", "--smallest-area", "0", "--largest-soft", "1"]
    assert run(*words) == 0, capsys.readouterr()
    pictures = sorted((tmp_path / "out").glob("*.png"))
    assert len(pictures) == 2
    with Image.open(pictures[0]) as picture:
        rgba = np.asarray(picture).astype(int)
    solid = rgba[..., 3] > 250
    assert solid.any() and (rgba[..., 3] == 0).any()
    assert (rgba[solid][:, 0] > rgba[solid][:, 1] + 100).mean() > 0.9  # red stayed, green went


def test_untrained_noise_is_rejected_and_the_shortfall_said(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--generator", "backdrop", "--model", str(tiny_model), "--size", str(SIDE)]
    words += ["--steps", "1", "--n", "2", "--out", str(tmp_path / "out"), "--attempts", "2"]
    assert run(*words, "--device", "cpu") == 1
    said = capsys.readouterr().out
    assert "2 pictures lack (" in said and "raise --attempts" in said and "4 rejected" in said
    assert {entry["reason"] for entry in rejections(tmp_path / "out")} == {"backdrop"}
    assert not list((tmp_path / "out").glob("*.png"))


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--list", "--n", "500") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    bank = PromptBank.load()
    assert lines[0] == ["category", "pictures", "prompts"]
    assert {line[0]: int(line[2]) for line in lines[1:-1]} == bank.distinct
    assert sum(int(line[1]) for line in lines[1:-1]) == int(lines[-1][1]) == 500


def test_mistakes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def says(*words: str) -> str:
        assert run(*words) == 2
        return capsys.readouterr().err

    out = str(tmp_path / "out")
    assert "--out FOLDER" in says()
    assert "There is no file" in says("--out", out, "--prompts", str(tmp_path / "none.txt"))
    assert "0 prompts" in says("--out", out, "--n", "0")
    assert "multiple of 8" in says("--out", out, "--size", "100")
    assert "1 step" in says("--out", out, "--steps", "0")
    assert "wanted 0 to 1" in says("--out", out, "--largest-soft", "7")
    monkeypatch.setenv("RANK", "first")
    assert "RANK is 'first'" in says("--out", out)
    assert not Path(out).exists()


def test_ranks_come_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(foregrounds, "_load_generator", lambda options, bank: DiscGenerator())
    (tmp_path / "prompts.txt").write_text("\n".join(f"good {i}" for i in range(5)))
    words = ["--out", str(tmp_path / "out"), "--prompts", str(tmp_path / "prompts.txt")]
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, count in (("0", 3), ("1", 2)):
        monkeypatch.setenv("RANK", rank)
        assert run(*words) == 0
        assert f"{count} new pictures" in capsys.readouterr().out
    assert len(list((tmp_path / "out").glob("*.png"))) == 5
    shutil.rmtree(tmp_path / "out")
