"""Flags, YAML files, what wins, and what is refused."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from training.settings import (
    mapping,
    names,
    parse_settings,
    plain_settings,
    read_settings,
    schedule,
    setting_adder,
    write_settings,
)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--data_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--kind", choices=("mse", "l1"), default="mse")
    parser.add_argument("--precision", choices=("no", "bf16"), default="bf16")
    parser.add_argument("--fast", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--model_unet", type=mapping)
    parser.add_argument("--targets", type=names, default=["to_q"])
    return parser


def parse(tmp_path: Path, text: str, *flags: str) -> argparse.Namespace:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    return parse_settings(parser(), ["--config", str(path), *flags])


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    args = parse(tmp_path, "steps: 5\nlearning_rate: 2e-4\nfast: true", "--steps", "7")
    assert (args.steps, args.learning_rate, args.fast, args.data_size) == (7, 2e-4, True, 64)
    assert parse(tmp_path, "fast: true", "--no-fast").fast is False


def test_sections_are_prefixes(tmp_path: Path) -> None:
    text = "data: {size: 32}\nmodel:\n  unet: {channels: [4, 8]}\ntargets: [a, b]\nkind: null"
    args = parse(tmp_path, text)
    assert args.data_size == 32
    assert args.model_unet == {"channels": [4, 8]}
    assert args.targets == ["a", "b"]
    assert args.kind is None


def test_a_bare_no_is_a_word_where_it_is_a_choice(tmp_path: Path) -> None:
    assert parse(tmp_path, "precision: no").precision == "no"


def test_mappings_and_names_as_flags() -> None:
    args = parse_settings(parser(), ["--model_unet", "{a: 1}", "--targets", "to_q, to_k"])
    assert args.model_unet == {"a": 1}
    assert args.targets == ["to_q", "to_k"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("step: 5", "unknown setting 'step'. Did you mean steps"),
        ("data: {crop: 5}", "unknown setting 'data_crop'"),
        ("steps: many", "'steps' in .* must be int, got 'many'"),
        ("steps: 2.5", "must be int, got 2.5"),
        ("steps: true", "must be int, got True"),
        ("steps: [1]", r"must be int, got \[1\]"),
        ("fast: 1", "must be true or false, got 1"),
        ("kind: l2", "must be one of mse, l1, got 'l2'"),
        ("model_unet: [1]", "must be mapping"),
        ("targets: {a: 1}", "must be names"),
        ("data_size: 3\ndata: {size: 4}", "sets 'data_size' twice"),
        ("- steps", "must hold `name: value` lines"),
        ("steps: [", "not valid YAML"),
    ],
)
def test_bad_files_are_refused_with_a_hint(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        parse(tmp_path, text)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        parse_settings(parser(), ["--config", str(tmp_path / "none.yaml")])


def test_written_settings_are_read_back(tmp_path: Path) -> None:
    args = parse(tmp_path, "model_unet: {channels: [4, 8]}\ntargets: [a]\nlearning_rate: 1e-5")
    settings = {name: value for name, value in vars(args).items() if name != "config"}
    write_settings(tmp_path / "written.yaml", settings)
    again = parse_settings(parser(), ["--config", str(tmp_path / "written.yaml")])
    assert {**vars(again), "config": None} == {**vars(args), "config": None}


# -- Schedules, and the spelling of flags --------------------------------------------------------


def test_a_schedule_is_linear_between_its_points_and_constant_outside() -> None:
    weight = schedule("{10: 0.0, 20: 1.0, 21: 0.25}")
    values = {0: 0.0, 10: 0.0, 13: 0.3, 20: 1.0, 21: 0.25, 1000: 0.25}
    assert {step: weight.at(step) for step in values} == pytest.approx(values)
    assert schedule("0.5").at(0) == schedule("0.5").at(10**6) == 0.5


def test_a_schedule_is_zero_only_if_it_always_is() -> None:
    assert schedule("0").is_zero and schedule("{0: 0, 5: 0.0}").is_zero
    assert not schedule("{0: 0, 30000: 0.5}").is_zero


@pytest.mark.parametrize("text", ["0.5", "{30000: 0.0, 30001: 0.5}", "{0: 1.0, 5: 2.0, 9: 0.0}"])
def test_schedules_come_back_from_a_file(tmp_path: Path, text: str) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--weight", type=schedule)
    args = parser.parse_args(["--weight", text])
    write_settings(tmp_path / "settings.yaml", plain_settings(args))
    assert read_settings(tmp_path / "settings.yaml", parser)["weight"] == args.weight


def test_schedules_in_words() -> None:
    assert str(schedule("1.0")) == "1"
    assert str(schedule("{30000: 0, 30001: 0.5}")) == "0 to step 30000, then 0.5"
    assert str(schedule("{0: 1, 100: 0.5}")) == "1 at step 0, 0.5 at step 100"


@pytest.mark.parametrize(
    "text", ["-1", "nan", "{a: 1}", "{0.5: 1}", "{-2: 1}", "[1, 2]", "{}", "x"]
)
def test_no_schedule(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="a mapping from steps"):
        schedule(text)


def test_flags_are_spelled_with_underscores_or_dashes() -> None:
    parser = argparse.ArgumentParser()
    add = setting_adder(parser)
    add("resume_from_checkpoint", "resume")
    add("push_to_hub", action=argparse.BooleanOptionalAction, default=False)
    for flag in ("--resume_from_checkpoint", "--resume-from-checkpoint", "--resume"):
        assert parser.parse_args([flag, "latest"]).resume_from_checkpoint == "latest"
    assert parser.parse_args(["--push-to-hub"]).push_to_hub
    assert not parser.parse_args(["--no-push-to-hub"]).push_to_hub
