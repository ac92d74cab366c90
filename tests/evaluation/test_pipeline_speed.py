"""``python -m evaluation speed pipeline`` in each of its modes, on networks of a few thousand
parameters; the arithmetic of the full ones is counted, not done."""

import dataclasses
import json
import os

import pytest
import torch
import torch.nn.functional as F

from bokehdiff.attention import PisaGeometry, remove_pisa
from evaluation import pipeline_flops, pipeline_report, pipeline_scale, pipeline_speed
from evaluation.__main__ import main
from evaluation.pipeline_speed import LayerShape, Photographed
from training.speed import SDXL_UNET


@pytest.fixture(scope="module")
def pipe():
    return pipeline_speed.random_pipeline("tiny", "cpu", torch.float32)


@pytest.fixture(scope="module")
def photo(pipe):
    return Photographed(pipe, 96, 128, radius=24.0)


@pytest.fixture(scope="module")
def full_size():
    return pipeline_flops.pipeline_flops("sdxl", 1024, 1024, 32.0)


# -- arithmetic ------------------------------------------------------------------------------------


def test_convolutions_products_and_attention_are_counted_on_the_meta_device():
    picture = torch.empty(2, 3, 8, 10, device="meta")
    weight = torch.empty(5, 3, 3, 3, device="meta")
    convolution = pipeline_flops.flops_of(lambda: F.conv2d(picture, weight, padding=1))
    assert convolution == 2 * (2 * 5 * 8 * 10) * (3 * 9)

    matrix = torch.empty(7, 11, device="meta")
    product = pipeline_flops.flops_of(lambda: F.linear(matrix, torch.empty(13, 11, device="meta")))
    assert product == 2 * 7 * 11 * 13

    q, k = torch.empty(1, 2, 16, 4, device="meta"), torch.empty(1, 2, 9, 4, device="meta")
    attention = pipeline_flops.flops_of(lambda: F.scaled_dot_product_attention(q, k, k))
    assert attention == 2 * (2 * 2 * 16 * 9 * 4)
    square = pipeline_flops.flops_of(lambda: F.scaled_dot_product_attention(q, q, q))
    assert square == pipeline_flops.attention_flops(LayerShape(2, 16, 4), pairs=16**2)


def test_the_stock_unet_is_that_of_sdxl(full_size):
    # Level by level: transformer layers, tokens, channels.
    assert SDXL_UNET["transformer_layers_per_block"] == (1, 2, 10)
    levels = [((2 + 3) * 2, 64 * 64, 640), ((2 + 1 + 3) * 10, 32 * 32, 1280)]
    attention = sum(
        layers * 4 * tokens * channels * (tokens + 77) for layers, tokens, channels in levels
    )
    # 2.98e12 multiplications and additions without those of attention are reported everywhere.
    assert full_size.stock_unet - attention == pytest.approx(2 * 2.98e12, rel=0.01)
    assert full_size.pisa_layers == 2 and full_size.pisa_tokens == 64 * 64
    assert full_size.ordinary_attention == 2 * 4 * 4096**2 * 640


def test_the_prompt_of_sdxl_is_that_of_its_two_text_encoders(full_size):
    def layers_of(count, channels):
        return count * (2 * 77 * 12 * channels**2 + 4 * 77**2 * channels)

    projection = 2 * 1280 * 1280
    assert full_size.prompt == layers_of(12, 768) + layers_of(32, 1280) + projection


def test_pisa_takes_less_arithmetic_than_what_it_replaces_and_the_dense_formula_more(full_size):
    shares = full_size.pair_share
    assert 0 < shares["circles"] < shares["tiles"] < shares["blocks"] < shares["dense"] == 1
    for way, share in shares.items():
        assert full_size.attention[way] == pytest.approx(share * full_size.ordinary_attention)
        difference = full_size.attention[way] - full_size.ordinary_attention + full_size.rays[way]
        assert full_size.overhead[way] == pytest.approx(difference / full_size.stock_unet)
    assert full_size.overhead["blocks"] < 0 < full_size.overhead["dense"] < 0.05
    # All pairs, five rays of seven samples.
    assert full_size.rays["dense"] == 4096**2 * 35 * pipeline_flops.FLOPS_PER_RAY_SAMPLE
    assert full_size.first_picture == full_size.encode + full_size.refocus + full_size.decode


@pytest.mark.parametrize(("height", "width", "radius"), [(9, 14, 2.5), (16, 16, 0.0), (5, 30, 9)])
def test_pairs_are_those_that_the_mask_lets_through(height, width, radius):
    geometry = PisaGeometry.build(torch.full((1, 1, height, width), float(radius)))
    linked = int(geometry.log_soft_mask(torch.float64).isfinite().sum())
    shares = pipeline_flops.pair_shares(height, width, float(radius))
    assert shares["circles"] * (height * width) ** 2 == pytest.approx(linked)
    assert shares["circles"] <= shares["tiles"]


def test_pairs_within_nothing_and_everything():
    assert pipeline_flops.pairs_within(0.0, 7, 11) == 77
    assert pipeline_flops.pairs_within(1.0, 7, 11) == 77 + 2 * (6 * 11 + 7 * 10)
    assert pipeline_flops.pairs_within(100.0, 7, 11) == 77**2


# -- stages ----------------------------------------------------------------------------------------


def test_full_size_networks_take_no_memory_on_the_meta_device():
    pipe = pipeline_speed.random_pipeline("sdxl", "meta", torch.bfloat16)
    weights = list(pipe.unet.parameters())
    assert sum(value.numel() for value in weights) == 2_567_463_684
    assert all(value.is_meta and value.dtype == torch.bfloat16 for value in weights)


def test_the_stages_are_those_of_the_pipeline(pipe, photo):
    rendered = pipe(photo.photo, photo.disparity, pipeline_speed.FOCUS_DISPARITY, photo.K)
    whole, again = photo.first().images[0], photo.refocus().images[0]
    assert whole.tobytes() == again.tobytes() == rendered.images[0].tobytes()
    assert photo.output()[0].tobytes() == whole.tobytes()
    torch.testing.assert_close(photo.encode(), photo.scene.latents)
    of_latents, of_noise = pipe.closed_form_step()
    latents = pipe.predict_latents(photo.scene.latents, photo.padded_disparity, photo.defocus)
    by_hand = of_latents * photo.scene.latents - of_noise * photo.unet()
    torch.testing.assert_close(latents, by_hand, rtol=1e-5, atol=1e-5)
    assert float(photo.defocus.abs().max()) == pytest.approx(24.0)


def test_the_dense_formula_computes_the_same_and_leaves_the_backend_alone(pipe, photo):
    before = pipe.verify_pisa().backend
    torch.testing.assert_close(photo.dense_unet(), photo.unet(), rtol=1e-4, atol=1e-4)
    assert pipe.verify_pisa().backend == before
    assert not pipe.verify_pisa().has_scene


def test_the_stock_unet_has_the_same_weights_in_the_same_memory(pipe, photo):
    stock = pipeline_speed.without_pisa(pipe.unet)
    for own, shared in zip(pipe.unet.parameters(), stock.parameters(), strict=True):
        assert own.data_ptr() == shared.data_ptr()
    ordinary = stock(**photo.unet_inputs, return_dict=False)[0]
    assert (ordinary - photo.unet()).abs().max() > 1e-6
    try:
        remove_pisa(pipe.unet)
        bare = pipe.unet(**photo.unet_inputs, return_dict=False)[0]
    finally:
        photo.context = pipe.install_pisa()
    torch.testing.assert_close(ordinary, bare)


def test_one_pisa_layer_is_timed_at_the_shapes_of_the_unet(photo):
    # 128 x 96 pixels, 16 of them for a token's side; 32 channels in 4 heads.
    assert photo.layers == [LayerShape(heads=4, tokens=8 * 6, channels=8)] * 2
    torch.testing.assert_close(photo.first_pisa_layer(), photo.one_pisa_layer())


def test_a_dense_formula_that_does_not_fit_is_left_out():
    assert pipeline_speed.dense_formula_fits(LayerShape(heads=10, tokens=64, channels=64), "cpu")
    huge = LayerShape(heads=10, tokens=1 << 18, channels=64)
    assert not pipeline_speed.dense_formula_fits(huge, "cpu")
    assert pipeline_speed.in_words(None, ".2f") == "-"


@pytest.mark.gpu
def test_stages_on_a_gpu():
    pipe = pipeline_speed.random_pipeline("tiny", "cuda", torch.bfloat16)
    row = pipeline_speed.stage_speed(pipe, 256, 384, radius=32.0, repeats=2)
    assert set(row.milliseconds) == set(pipeline_speed.STAGES)
    assert row.peak_megabytes > row.weights_megabytes > 0


def test_times_are_medians_of_the_rounds_that_count():
    calls = []
    spent = pipeline_speed.time_in_turns(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3, "cpu", "test"
    )
    assert calls == ["a", "b"] * (pipeline_speed.WARM_UPS + 3)
    assert set(spent) == {"a", "b"} and all(value >= 0 for value in spent.values())


# -- the command -----------------------------------------------------------------------------------


def run(capsys, out, *arguments):
    """The report that the command writes, after checking that its table holds the same figures."""
    words = ["speed", "pipeline", *arguments, "--out", str(out)]
    assert main(words) == 0
    printed = capsys.readouterr().out
    report = json.loads(out.read_text())
    assert report["command"] == f"python -m evaluation {' '.join(words)}"
    assert report["command"] in printed and report["protocol"] in printed
    assert report["hardware"]["torch_threads"] == 1
    table = [line for line in printed.splitlines() if line.startswith("|")]
    assert len({len(line) for line in table}) == 1
    return report, table


TINY_SHAPES = ("--shapes", "tiny", "--size", "128x96")


def test_flops_of_a_photo_as_it_is_padded_as_table_and_json(capsys, tmp_path):
    report, table = run(
        capsys, tmp_path / "out.json", "--flops", "--shapes", "tiny", "--size", "250x130"
    )
    (row,) = report["pipeline"]
    assert row == dataclasses.asdict(pipeline_flops.pipeline_flops("tiny", 144, 256, 32.0))
    assert row["prompt"] is None
    assert "256 x 144" in table[0]
    assert any(f"{row['overhead']['dense']:+.2%}" in line for line in table)


def test_stages_as_table_and_json(capsys, tmp_path):
    report, table = run(capsys, tmp_path / "out.json", *TINY_SHAPES, "--repeats", "1",
                        "--dtype", "bfloat16")  # fmt: skip
    assert report["hardware"]["dtype"] == "bfloat16"
    (row,) = report["pipeline"]
    spent = row["milliseconds"]
    assert set(spent) == set(pipeline_speed.STAGES)
    assert all(spent[name] > 0 for name in spent if name not in ("geometry", "rest"))
    assert row["overhead"] == pytest.approx(spent["unet"] / spent["stock_unet"] - 1)
    assert row["dense_overhead"] == pytest.approx(spent["dense_unet"] / spent["stock_unet"] - 1)
    assert row["pisa_share"] == pytest.approx((spent["geometry"] + spent["pisa"]) / spent["unet"])
    # A process that has imported torch is never below 100 MB.
    assert row["peak_megabytes"] > 100 and 0 < row["weights_megabytes"] < 2
    assert any(f"{row['overhead']:+.1%}" in line for line in table)


def test_refocus_as_table_and_json(capsys, tmp_path):
    report, table = run(capsys, tmp_path / "out.json", "--refocus", *TINY_SHAPES, "--repeats", "1")
    (row,) = report["pipeline"]
    first = row["prepare_milliseconds"] + row["first_render_milliseconds"]
    assert row["ratio"] == pytest.approx(row["second_render_milliseconds"] / first)
    at_once, one_by_one = row["sweep_milliseconds"], row["singles_milliseconds"]
    assert row["sweep_ratio"] == pytest.approx(at_once / one_by_one)
    assert f"{row['ratio']:.2f}" in table[-1]


def test_sizes_as_table_and_json(capsys, tmp_path):
    pytest.importorskip("skimage", reason="the photograph is in scikit-image ('.[data]')")
    report, table = run(capsys, tmp_path / "out.json", "--megapixels", "0.02", "--model", "tiny",
                        "--radius", "4")  # fmt: skip
    (row,) = report["pipeline"]
    assert row["width"] * row["height"] / 1e6 == row["megapixels"] == pytest.approx(0.02, rel=0.02)
    seconds = row["prepare_seconds"] + row["render_seconds"]
    assert row["seconds_per_megapixel"] == pytest.approx(seconds / row["megapixels"])
    assert row["peak_megabytes"] >= 100
    assert f"{row['width']} x {row['height']}" in table[-1]


class Fatal(pipeline_scale.Case):
    """A case that ends the process which receives it."""

    def __reduce__(self):
        return os._exit, (9,)


@pytest.mark.slow
def test_a_size_whose_process_is_ended_loses_no_other_figures():
    cases = pipeline_scale.cases(
        None, [0.01], 4.0, False, tiling=None, dtype="float32", device="cpu", threads=1
    )
    rows, left_out = pipeline_scale.measure([Fatal(**vars(cases[0]))])
    assert rows == [] and "ended by the system" in left_out["0.01 megapixels"]
    assert len(pipeline_scale.table(rows).splitlines()) == 2
    assert pipeline_scale.protocol(rows, cases[0])


def test_circles_stay_or_grow_with_the_photo():
    rest = dict(tiling="official", dtype="float32", device="cpu", threads=1)
    fixed = pipeline_scale.cases("tiny", [1.0, 4.0], 10.0, False, **rest)
    growing = pipeline_scale.cases("tiny", [1.0, 4.0], 10.0, True, **rest)
    assert [case.radius for case in fixed] == [10.0, 10.0]
    assert [case.radius for case in growing] == [10.0, 20.0]
    assert fixed[0].options == {"tiling": "official"}
    assert dataclasses.replace(fixed[0], tiling="none").options == {"tiling": None}
    assert dataclasses.replace(fixed[0], tiling=None).options == {}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--size 1024", "--size takes WIDTHxHEIGHT in pixels, each at least 64, e.g. 1536x1024"),
        ("--size 32x512", "each at least 64"),
        ("--flops --compile", "--compile means nothing with --flops"),
        ("--flops --dtype bfloat16", "--dtype means nothing with --flops"),
        ("--refocus --model tiny", "--model means nothing with --refocus"),
        ("--tiling official", "--tiling means nothing without a mode"),
        ("--megapixels 1 --shapes tiny", "--shapes means nothing with --megapixels"),
        ("--megapixels 0", "--megapixels must be in [0.01, 100], got 0"),
        ("--megapixels many", "--megapixels takes numbers with commas between them"),
        ("--radius 0", "--radius must be positive, got 0"),
        ("--repeats 0", "--repeats must be at least 1, got 0"),
        ("--threads 0", "--threads must be at least 1, got 0"),
        ("--device meta", "--device must be cpu or cuda here, got meta"),
        ("--device abacus", "--device abacus cannot be used here"),
        ("--out no/such/folder/out.json", "There is no folder no/such/folder for --out"),
    ],
)
def test_mistakes_get_a_sentence_before_any_work(arguments, sentence, capsys):
    assert main(["speed", "pipeline", *arguments.split()]) == 2
    assert sentence in capsys.readouterr().err


def test_every_option_belongs_to_a_mode_or_to_all():
    from evaluation.__main__ import parser

    parsed = vars(parser().parse_args(["speed", "pipeline"]))
    modes = {"flops", "refocus", "megapixels"}
    everywhere = {"protocol", "subject", "threads", "device", "out", *modes}
    assert set(parsed) - everywhere == set().union(*pipeline_report.OPTIONS.values())
