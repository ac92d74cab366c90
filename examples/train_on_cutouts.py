"""Train the model inside the package further, on scenes made of your own cut-outs.

    python examples/train_on_cutouts.py
    python examples/train_on_cutouts.py --cutouts cutouts --photos photos --max_train_steps 2000

Cut-outs are pictures with transparency, photos are all in focus; without them, some are made from
nothing. All settings of training/finetune.py may be added.
"""

import argparse
import sys
import time
from pathlib import Path

import bokehdiff


def main() -> None:
    more = "All settings of training/finetune.py may be added, for instance --max_train_steps 2000."
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog=more, allow_abbrev=False
    )
    parser.add_argument("--cutouts", type=Path, help="folder of RGBA pictures")
    parser.add_argument("--photos", type=Path, help="folder of backgrounds")
    out = Path("outputs/train_on_cutouts")
    help_of_out = "folder; a second run in it wants --resume latest or --overwrite_output_dir"
    parser.add_argument("--out", type=Path, default=out, help=help_of_out)
    asked, settings = parser.parse_known_args()
    started = time.perf_counter()

    from data_synthesis.cutouts import procedural_cutout
    from data_synthesis.layer_scenes import LayerScenes
    from training import finetune

    cutouts = asked.cutouts
    if cutouts is None:
        cutouts = asked.out / "cutouts"
        cutouts.mkdir(parents=True, exist_ok=True)
        for number in range(8):
            if not (cutouts / f"{number}.png").exists():
                procedural_cutout(number, side=192).save(cutouts / f"{number}.png")
    photos = "null" if asked.photos is None else f"'{asked.photos}'"
    run = f"""
        --pretrained {bokehdiff.TINY} --trained_parts correction --no-pisa_hardness_by_step
        --data_kind layers --data_size 96 --data_crop_size 64 --batch_size 2
        --max_train_steps 20 --warmup_steps 5 --learning_rate 1e-4 --log_steps 5
        --validation_scenes 0 --report_to none
    """.split()
    run += ["--data_options", f"{{foregrounds: '{cutouts}', backgrounds: {photos}}}"]
    finetune.main(finetune.parse_args([*run, "--output_dir", str(asked.out / "model"), *settings]))

    # A scene that it has not seen, beside the truth.
    scene = LayerScenes(seed=1000, size=192, foregrounds=cutouts, backgrounds=asked.photos)[0]
    pipe = bokehdiff.BokehDiffPipeline.from_pretrained(asked.out / "model")
    seen = [scene[name][None] for name in ("image", "disparity", "df", "K")]
    blurred = pipe(*seen, output_type="pt").images
    for name, picture in (("image", seen[0]), ("blurred", blurred), ("truth", scene["target"])):
        bokehdiff.write_image(asked.out / f"{name}.png", picture, overwrite=True)
    took = f"{time.perf_counter() - started:.0f} s"
    print(f"The model, and a scene that it has not seen: {asked.out.resolve()} ({took})")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as mistake:
        sys.exit(f"train_on_cutouts.py: {mistake}")
