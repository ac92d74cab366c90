"""The measurement of training runs at the size of SDXL, rehearsed with fewer channels."""

from __future__ import annotations

import json

import pytest
import torch

from training import speed


@pytest.mark.slow
def test_a_rehearsal_on_a_processor(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--batch_size", "1", "--mixed_precision", "no", "--gradient_checkpointing"]
    speed.main(["--size", "64", "--steps", "1", "--channel_share", "0.1", *flags])
    measured = json.loads(capsys.readouterr().out)
    assert measured["crop"] == 64 and measured["batch_size"] == 1
    assert measured["mixed_precision"] == "no" and measured["gradient_checkpointing"] == "True"
    assert measured["seconds_per_step"] > 0 and measured["peak_gigabytes"] > 0.1
    # Nobody should take a rehearsal for the time that the real run needs.
    assert not [name for name in measured if name.startswith("hours")]


def test_the_networks_have_the_size_of_sdxl() -> None:
    with torch.device("meta"):
        pipe = speed.random_pipeline()
    # Published: 2.567 billion parameters in the UNet, 83.65 million in the VAE.
    assert sum(value.numel() for value in pipe.unet.parameters()) == 2_567_463_684
    assert sum(value.numel() for value in pipe.vae.parameters()) == 83_653_863


def test_settings_that_do_not_fit_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        speed.main(["--size", "64", "--batch_size", "0"])
    assert "batch_size must be at least 1" in capsys.readouterr().err
