"""``python -m evaluation speed``: seconds and memory."""

from __future__ import annotations

import argparse
from pathlib import Path

import bokehdiff

__all__ = ["add_arguments", "packages", "run"]

EXAMPLES = """examples:
  python -m evaluation speed render --megapixels 1
  python -m evaluation speed classical --radius 4,8,16,32,64
  python -m evaluation speed classical --method layered --method scatter --cat-eye 0.4
  python -m evaluation speed pisa
  python -m evaluation speed pisa --tokens 1024,4096,16384 --backward --out pisa.json
  python -m evaluation speed pisa --grid 48x96 --radius 3.2,8 --backend local --backend reference
  python -m evaluation speed pisa --device cuda --dtype bfloat16 --tokens 4096,65536 --plot a.png
  python -m evaluation speed pipeline --flops --size 1024x1024 --size 1536x1024
  python -m evaluation speed pipeline --device cuda --dtype bfloat16 --size 1024x1024
  python -m evaluation speed pipeline --refocus --shapes tiny --size 512x512
  python -m evaluation speed pipeline --megapixels 1,4,12,24 --model tiny
  python -m evaluation speed flow --variant nano --size 1280x720 --size 1920x1080
  python -m evaluation speed flow --variant small --device cuda --dtype bfloat16 --compile
  python -m evaluation speed flow --linearity --mixer gated_conv --mixer bigdr
  python -m evaluation speed flow --training-step --mixer bigdr --variant small
  python -m evaluation speed flow --stream 300 --model FOLDER
  python -m evaluation speed recurrence --side 32,64,128
  python -m evaluation speed compact --variant tiny --variant glass --mean-opinion-score 6.5
  python -m evaluation speed compact --model FOLDER --onnx compact.onnx --tflite compact.tflite
  python -m evaluation speed compact --linearity
  python -m evaluation speed start --repeats 5
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``speed``, one parser for each subject."""
    parser.epilog = EXAMPLES
    subjects = parser.add_subparsers(dest="subject", required=True, metavar="SUBJECT")
    add_render(subjects)
    add_classical(subjects)
    add_pisa(subjects)
    add_pipeline(subjects)
    add_flow(subjects)
    add_recurrence(subjects)
    add_compact(subjects)
    add_start(subjects)


def packages(arguments: argparse.Namespace) -> list[str]:
    """What has to be installed for the subject that was asked for."""
    if arguments.subject == "pisa":
        return ["matplotlib"] if arguments.plot else []
    if arguments.subject == "pipeline":
        return ["skimage"] if arguments.megapixels else []
    if arguments.subject == "start":
        return ["skimage"]
    if arguments.subject in ("flow", "recurrence", "compact"):
        return []
    return ["scipy.ndimage", "skimage"]


def add_render(subjects: argparse._SubParsersAction) -> None:
    """The arguments of ``speed render``."""
    render = subjects.add_parser(
        "render",
        help="prepare, first render and refocus of a photograph",
        description="Measure seconds and peak memory on scikit-image's motorcycle photograph.",
    )
    render.add_argument("--model", metavar="FOLDER", help="default: the one inside the package")
    render.add_argument("--megapixels", type=float, default=1.0, help="default %(default)s")
    render.add_argument("--repeats", type=int, default=5, help="refocusings, default %(default)s")
    render.add_argument("--threads", type=int, help="CPU threads; default: all cores")
    render.add_argument("--out", metavar="FILE", help="write the figures to this JSON file")
    render.add_argument("--device", default="cpu", help="cpu (default), cuda, mps")


def add_classical(subjects: argparse._SubParsersAction) -> None:
    """The arguments of ``speed classical``."""
    classical = subjects.add_parser(
        "classical",
        help="the classical renderers as the blur grows",
        description="Measure seconds and peak memory of render_bokeh on scikit-image's motorcycle "
        "photograph, for every method and every blur radius.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    classical.add_argument(
        "--method",
        action="append",
        default=[],
        metavar="NAME",
        help="a method of render_bokeh; may be given several times. Default: all.",
    )
    classical.add_argument(
        "--radius",
        default="4,8,16,32,64",
        metavar="R,R",
        help="radius of the largest circle of confusion in pixels, default %(default)s",
    )
    classical.add_argument("--megapixels", type=float, default=1.0, help="default %(default)s")
    classical.add_argument("--repeats", type=int, default=3, help="default %(default)s")
    classical.add_argument("--threads", type=int, default=1, help="CPU threads, default 1")
    classical.add_argument("--blades", type=int, default=0, help="default: a circular opening")
    classical.add_argument("--cat-eye", type=float, default=0.0, help="0 (default) to 1")
    classical.add_argument("--spherical", type=float, default=0.0, help="-1 to 1, default 0")
    classical.add_argument("--device", default="cpu", help="cpu (default), cuda, mps")
    classical.add_argument("--out", metavar="FILE", help="write the figures to this JSON file")


def add_pisa(subjects: argparse._SubParsersAction) -> None:
    """The arguments of ``speed pisa``."""
    pisa = subjects.add_parser(
        "pisa",
        help="one layer of physics-inspired self-attention beside ordinary attention",
        description="Measure time, peak memory and error of one layer of PISA, as ratios to "
        "scaled_dot_product_attention (SDPA).",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    size = pisa.add_mutually_exclusive_group()
    size.add_argument(
        "--tokens", default="4096,16384", metavar="N,N", help="square grids, default %(default)s"
    )
    size.add_argument("--grid", metavar="HxW", help="one grid of H rows and W columns, e.g. 48x96")
    blur = pisa.add_mutually_exclusive_group()
    blur.add_argument(
        "--radius-share",
        default="0.05",
        metavar="R,R",
        help="largest circle-of-confusion radius as a share of the grid's width, default "
        "%(default)s (a diameter of 10 %%)",
    )
    blur.add_argument("--radius", metavar="R,R", help="the same in tokens")
    pisa.add_argument("--heads", type=int, default=10, help="default %(default)s")
    pisa.add_argument("--channels", type=int, default=64, help="per head, default %(default)s")
    pisa.add_argument("--batch", type=int, default=1, help="images, default %(default)s")
    pisa.add_argument(
        "--logit-std",
        type=float,
        default=1.0,
        help="standard deviation of q k^T / sqrt(channels), default %(default)s",
    )
    pisa.add_argument(
        "--dtype",
        default="float32",
        choices=["float32", "float16", "bfloat16"],
        help="of q, k and v, default %(default)s",
    )
    pisa.add_argument(
        "--scene",
        default="slope",
        choices=["slope", "uniform"],
        help="slope (default): a sloping background and five near discs; uniform: the same, with "
        "the largest radius everywhere",
    )
    pisa.add_argument(
        "--supersampling", type=int, default=2, help="rays per pair of tokens, default %(default)s"
    )
    pisa.add_argument(
        "--backend",
        action="append",
        default=[],
        metavar="NAME",
        help="a backend of pisa_attention; may be given several times. Default: all that can run "
        "here but reference, which is dense.",
    )
    pisa.add_argument(
        "--official",
        action="store_true",
        help="also the dense formula, with the rays of all N^2 pairs traced in every call",
    )
    pisa.add_argument("--backward", action="store_true", help="time forward and backward together")
    pisa.add_argument("--repeats", type=int, default=5, help="default %(default)s")
    pisa.add_argument("--threads", type=int, default=1, help="CPU threads, default %(default)s")
    pisa.add_argument(
        "--sdpa-limit",
        type=int,
        metavar="N",
        help="measure SDPA on at most so many tokens and extrapolate beyond; default 16384 on the "
        "CPU, no limit on a GPU",
    )
    pisa.add_argument("--device", default="cpu", help="cpu (default), cuda")
    pisa.add_argument("--out", metavar="FILE", help="write the figures to this JSON file")
    pisa.add_argument("--plot", metavar="FILE", help="draw them to this .png, .pdf or .svg file")


def add_pipeline(subjects: argparse._SubParsersAction) -> None:
    """The arguments of ``speed pipeline``."""
    pipeline = subjects.add_parser(
        "pipeline",
        help="every stage of the diffusion pipeline, at the size of SDXL",
        description="Measure every stage of the pipeline with networks of the shapes of Stable "
        "Diffusion XL and random weights; count their arithmetic; measure what refocusing saves; "
        "or measure what a photograph costs as it gets larger.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    mode = pipeline.add_mutually_exclusive_group()
    mode.add_argument(
        "--flops", action="store_true", help="count arithmetic without computing anything"
    )
    mode.add_argument(
        "--refocus",
        action="store_true",
        help="a first picture beside a refocus, and eight blur strengths at once beside one by one",
    )
    mode.add_argument(
        "--megapixels",
        metavar="M,M",
        help="seconds and peak memory of scikit-image's motorcycle photograph scaled to each of "
        "these sizes, each in a process of its own",
    )
    pipeline.add_argument(
        "--size",
        action="append",
        metavar="WxH",
        help="width and height of the photo in pixels; may be given several times. Default: "
        "1024x1024 and 1536x1024.",
    )
    pipeline.add_argument(
        "--shapes",
        choices=["sdxl", "tiny"],
        help="networks: sdxl (default), or tiny, the same blocks with few channels",
    )
    pipeline.add_argument("--model", metavar="FOLDER", help="with --megapixels; default: tiny, "
                          "the checkpoint inside the package")  # fmt: skip
    pipeline.add_argument(
        "--radius",
        type=float,
        default=32.0,
        metavar="PX",
        help="radius of the largest circle of confusion in pixels, default %(default)g; with "
        "--flops, of every circle",
    )
    pipeline.add_argument(
        "--radius-scales",
        action="store_true",
        help="with --megapixels: --radius is that of the first size, and grows with the sides",
    )
    pipeline.add_argument(
        "--tiling", metavar="TILES", help="with --megapixels: as of bokehdiff render"
    )
    pipeline.add_argument(
        "--compile", action="store_true", help="compile UNet and codec with torch.compile"
    )
    pipeline.add_argument(
        "--dtype",
        choices=["float32", "float16", "bfloat16"],
        help="of weights and activations, default float32",
    )
    pipeline.add_argument("--repeats", type=int, help="rounds that count, default 10")
    pipeline.add_argument("--threads", type=int, default=1, help="CPU threads, default %(default)s")
    pipeline.add_argument("--device", default="cpu", help="cpu (default), cuda")
    pipeline.add_argument("--out", metavar="FILE", help="write the figures to this JSON file")


def add_flow(subjects: argparse._SubParsersAction) -> None:
    """The arguments of ``speed flow``."""
    from evaluation.flow_networks import add_networks

    flow = subjects.add_parser(
        "flow",
        help="films through BokehFlow: frames per second, memory, training",
        description="Measure frames per second and memory of films through BokehFlow; what a photo "
        "of twice the size costs; a step of training; or the memory of a long film.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_networks(flow, ["nano"], ["gated_conv"])
    mode = flow.add_mutually_exclusive_group()
    mode.add_argument(
        "--linearity",
        action="store_true",
        help="time and memory per pixel and arithmetic per token at one size and at twice its "
        "sides",
    )
    mode.add_argument(
        "--training-step",
        action="store_true",
        help="a step of training, and with recurrences beside loops over tokens",
    )
    mode.add_argument(
        "--stream", type=int, metavar="N", help="whether memory grows over a film of N frames"
    )
    flow.add_argument(
        "--size",
        action="append",
        metavar="WxH",
        help="width and height in pixels; may be given several times. Default: 1280x720 and "
        "1920x1080; 256x256 with --linearity and --training-step; 320x180 with --stream",
    )
    flow.add_argument("--batch", type=int, default=4, help="of --training-step, default 4")
    flow.add_argument(
        "--dtype",
        default="float32",
        choices=["float32", "float16", "bfloat16"],
        help="of weights and activations of films, default %(default)s",
    )
    flow.add_argument("--compile", action="store_true", help="films by torch.compile")
    flow.add_argument("--repeats", type=int, default=5, help="that count, default %(default)s")
    flow.add_argument("--threads", type=int, default=1, help="CPU threads, default %(default)s")
    flow.add_argument("--device", default="cpu", help="cpu (default), cuda")
    flow.add_argument("--out", metavar="FILE", help="write the figures to this JSON file")


def add_recurrence(subjects: argparse._SubParsersAction) -> None:
    """The arguments of ``speed recurrence``."""
    recurrence = subjects.add_parser(
        "recurrence",
        help="the gated delta rule in chunks beside loops over tokens",
        description="Measure time, memory and error of the gated delta rule on square grids of "
        "tokens, and of loops over tokens on one of them.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    recurrence.add_argument(
        "--side",
        default="32,64,128",
        metavar="N,N",
        help="of the grids in tokens, default %(default)s",
    )
    recurrence.add_argument(
        "--loop-side",
        type=int,
        default=64,
        metavar="N",
        help="of the grid that the loops run over, default %(default)s",
    )
    recurrence.add_argument(
        "--sequences",
        type=int,
        default=16,
        help="four directions times heads times images, default %(default)s",
    )
    recurrence.add_argument(
        "--channels", type=int, default=24, help="of keys and of values, default %(default)s"
    )
    recurrence.add_argument("--repeats", type=int, default=5, help="default %(default)s")
    recurrence.add_argument("--threads", type=int, default=1, help="CPU threads, default 1")
    recurrence.add_argument("--device", default="cpu", help="cpu (default), cuda")
    recurrence.add_argument("--out", metavar="FILE", help="write the figures to this JSON file")


def add_compact(subjects: argparse._SubParsersAction) -> None:
    """The arguments of ``speed compact``."""
    compact = subjects.add_parser(
        "compact",
        help="LiteBokeh in torch, onnxruntime and LiteRT: milliseconds, memory, score",
        description="Measure milliseconds and memory of a photo through LiteBokeh in torch, and "
        "with files of `bokehdiff export compact` in onnxruntime and LiteRT beside it; or what a "
        "pixel costs in larger photos.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    compact.add_argument(
        "--model", metavar="FOLDER", help="a trained network, or the name of one on the Hub"
    )
    compact.add_argument(
        "--variant",
        action="append",
        metavar="NAME",
        help="random weights: a size of TinyUnet, pico, nano, tiny, wide or large, or glass, the "
        "GlassEncNet; may be given several times. Default: tiny",
    )
    compact.add_argument(
        "--size",
        action="append",
        metavar="WxH",
        help="width and height in pixels; may be given several times. Default: 1536x1024; with "
        "--linearity 384x256, 768x512 and 1536x1024",
    )
    compact.add_argument("--onnx", metavar="FILE", help="of the network, for onnxruntime")
    compact.add_argument("--tflite", metavar="FILE", help="of the network and size, for LiteRT")
    compact.add_argument(
        "--mean-opinion-score",
        type=float,
        metavar="MOS",
        help="what people gave the pictures, for the score of the challenge",
    )
    compact.add_argument(
        "--linearity",
        action="store_true",
        help="time and arithmetic per pixel at several sizes, in torch",
    )
    compact.add_argument("--repeats", type=int, default=5, help="that count, default %(default)s")
    compact.add_argument("--threads", type=int, default=1, help="CPU threads, default %(default)s")
    compact.add_argument("--out", metavar="FILE", help="write the figures to this JSON file")


def add_start(subjects: argparse._SubParsersAction) -> None:
    """The arguments of ``speed start``."""
    start = subjects.add_parser(
        "start",
        help="the import, the command line and the first picture of a fresh process",
        description="Measure seconds and peak memory of fresh processes: import bokehdiff, "
        "bokehdiff --help, and the first picture of scikit-image's motorcycle photograph.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    start.add_argument(
        "--first-picture",
        action="append",
        metavar="NAME",
        help="layered, flow_nano or tiny; may be given several times. Default: all",
    )
    start.add_argument(
        "--megapixels",
        type=float,
        default=0.177,
        help="of the photograph, default %(default)s: 512 px wide",
    )
    start.add_argument("--repeats", type=int, default=5, help="that count, default %(default)s")
    start.add_argument("--threads", type=int, default=1, help="CPU threads, default %(default)s")
    start.add_argument("--out", metavar="FILE", help="write the figures to this JSON file")


def measure_render(arguments: argparse.Namespace) -> None:
    """Times the pipeline on one photograph; prints a sentence and writes the JSON."""
    import torch

    from evaluation import report, speed

    check_megapixels_and_repeats(arguments)
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


def check_megapixels_and_repeats(arguments: argparse.Namespace) -> None:
    """Raises ValueError for numbers out of range."""
    if not 0.01 <= arguments.megapixels <= 100:
        raise ValueError(f"--megapixels must be in [0.01, 100], got {arguments.megapixels:g}.")
    if arguments.repeats < 1:
        raise ValueError(f"--repeats must be at least 1, got {arguments.repeats}.")


def measure_classical(arguments: argparse.Namespace) -> None:
    """Times the classical renderers; prints the table and writes the JSON."""
    import torch

    from bokehdiff.rendering import Aperture
    from evaluation import classical_speed, report
    from evaluation.pisa_speed import numbers

    check_megapixels_and_repeats(arguments)
    radii = numbers(arguments.radius, "--radius")
    if min(radii) <= 0 or radii != sorted(set(radii)):
        raise ValueError(
            f"--radius takes positive numbers, each larger than the one before, got "
            f"{arguments.radius}."
        )
    if arguments.threads < 1:
        raise ValueError(f"--threads must be at least 1, got {arguments.threads}.")
    aperture = Aperture(
        blades=arguments.blades, cat_eye=arguments.cat_eye, spherical=arguments.spherical
    )
    torch.set_num_threads(arguments.threads)
    rows = classical_speed.measure(
        arguments.method or list(classical_speed.METHODS),
        radii, arguments.megapixels, arguments.repeats, aperture, arguments.device,
    )  # fmt: skip

    machine = report.hardware(arguments.device)
    protocol = classical_speed.protocol(rows, arguments.repeats, aperture, arguments.device)
    print(classical_speed.table(rows))
    print()
    print(protocol)
    print(report.hardware_sentence(machine))
    if arguments.out:
        report.write_json(
            arguments.out,
            {
                "benchmark": "speed classical",
                "protocol": protocol,
                "hardware": machine,
                "aperture": aperture.to_dict(),
                "classical": [vars(row) for row in rows],
            },
        )
        print(f"All figures: {arguments.out}")


def measure_pisa(arguments: argparse.Namespace) -> None:
    """Times PISA beside SDPA; prints the table and writes the JSON and the plot."""
    import torch

    from evaluation import pisa_speed, report

    if arguments.plot and Path(arguments.plot).suffix not in pisa_speed.PLOT_SUFFIXES:
        raise ValueError(
            f"--plot writes {', '.join(pisa_speed.PLOT_SUFFIXES)}, got {arguments.plot}."
        )
    cases = pisa_speed.cases(arguments)
    chosen = [
        pisa_speed.choose_backends(case, arguments.backend, arguments.official) for case in cases
    ]
    sdpa_limit = arguments.sdpa_limit or (16384 if arguments.device == "cpu" else None)
    torch.set_num_threads(arguments.threads)
    rows = pisa_speed.measure(cases, [names for names, _ in chosen], arguments.repeats, sdpa_limit)

    machine = {**report.hardware(arguments.device), "dtype": arguments.dtype}
    left_out = {name: reason for _, reasons in chosen for name, reason in reasons.items()}
    protocol = pisa_speed.protocol(cases[0], arguments.repeats, rows)
    print(pisa_speed.table(rows))
    print()
    for name, reason in left_out.items():
        print(f"No row for {name}: {reason}")
    print(protocol)
    print(report.hardware_sentence(machine))
    if arguments.out:
        report.write_json(
            arguments.out,
            {
                "benchmark": "speed pisa",
                "protocol": protocol,
                "hardware": machine,
                "left_out": left_out,
                "pisa": pisa_speed.as_json(rows),
            },
        )
        print(f"All figures: {arguments.out}")
    if arguments.plot:
        pisa_speed.plot(rows, arguments.plot, in_tokens=bool(arguments.radius))
        print(f"Plot: {arguments.plot}")


def measure_pipeline(arguments: argparse.Namespace) -> None:
    """Measures the pipeline in one of four ways; prints the table and writes the JSON."""
    from evaluation import pipeline_report, report

    measured = pipeline_report.measure(arguments)
    machine = {**report.hardware(arguments.device), "dtype": measured.dtype}
    print(measured.table)
    print()
    for name, reason in measured.left_out.items():
        print(f"No row for {name}: {reason}")
    print(measured.protocol)
    print(report.hardware_sentence(machine))
    print(arguments.command_line)
    if arguments.out:
        report.write_json(
            arguments.out,
            {
                "benchmark": f"speed pipeline, {measured.mode}",
                "command": arguments.command_line,
                "protocol": measured.protocol,
                "hardware": machine,
                "left_out": measured.left_out,
                "pipeline": measured.rows,
            },
        )
        print(f"All figures: {arguments.out}")


def measure_flow(arguments: argparse.Namespace) -> None:
    """Measures BokehFlow in one of four ways; prints the table and writes the JSON."""
    from evaluation import flow_speed

    flow_speed.run(arguments)


def measure_recurrence(arguments: argparse.Namespace) -> None:
    """Times the gated delta rule; prints the table and writes the JSON."""
    import torch

    from evaluation import recurrence_speed, report
    from evaluation.pisa_speed import numbers

    sides = [int(side) for side in numbers(arguments.side, "--side")]
    if min(sides) < 1:
        raise ValueError(f"--side takes whole numbers of at least 1, got {arguments.side}.")
    for name in ("loop_side", "sequences", "channels", "repeats", "threads"):
        if getattr(arguments, name) < 1:
            raise ValueError(
                f"--{name.replace('_', '-')} must be at least 1, got {getattr(arguments, name)}."
            )
    torch.set_num_threads(arguments.threads)
    shape = arguments.sequences, arguments.channels
    rows = recurrence_speed.measure(
        sides, arguments.loop_side, arguments.repeats, *shape, arguments.device
    )
    machine = report.hardware(arguments.device)
    protocol = recurrence_speed.protocol(*shape, arguments.repeats, arguments.device)
    print(recurrence_speed.table(rows))
    print()
    print(protocol)
    print(report.hardware_sentence(machine))
    if arguments.out:
        report.write_json(
            arguments.out,
            {
                "benchmark": "speed recurrence",
                "protocol": protocol,
                "command": arguments.command_line,
                "hardware": machine,
                "recurrence": [vars(row) for row in rows],
            },
        )
        print(f"All figures: {arguments.out}")


def measure_compact(arguments: argparse.Namespace) -> None:
    """Times LiteBokeh in all its runtimes; prints the table and writes the JSON."""
    from evaluation import compact_speed

    compact_speed.run(arguments)


def measure_start(arguments: argparse.Namespace) -> None:
    """Times fresh processes; prints the tables and writes the JSON."""
    from evaluation import start_speed

    start_speed.run(arguments)


def run(arguments: argparse.Namespace) -> int:
    """Times what was asked for; returns 0. ValueError for mistakes."""
    subjects = {
        "render": measure_render,
        "classical": measure_classical,
        "pisa": measure_pisa,
        "pipeline": measure_pipeline,
        "flow": measure_flow,
        "recurrence": measure_recurrence,
        "compact": measure_compact,
        "start": measure_start,
    }
    subjects[arguments.subject](arguments)
    return 0
