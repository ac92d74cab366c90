"""Settings of a training run: flags of the command line over values of a YAML file.

Every setting is one flag, spelled with underscores or with dashes. The YAML file names settings as
the flags do, and may group them: the section ``data: {crop_size: 128}`` sets ``--data_crop_size``.
A flag on the command line wins over the file.
"""

from __future__ import annotations

import argparse
import difflib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Schedule:
    """A number that depends on the optimiser step: linear between points, constant outside them.

    Attributes:
        points: (step, value) in the order of the steps; at least one.
    """

    points: tuple[tuple[int, float], ...]

    def at(self, step: int) -> float:
        """The value in optimiser step `step`, counted from 0."""
        steps = [point[0] for point in self.points]
        after = next((index for index, other in enumerate(steps) if other > step), len(steps))
        if after == 0 or after == len(steps):
            return self.points[min(after, len(steps) - 1)][1]
        (start, low), (end, high) = self.points[after - 1], self.points[after]
        return low + (high - low) * (step - start) / (end - start)

    @property
    def is_zero(self) -> bool:
        """Whether it is zero in every step."""
        return all(value == 0 for _, value in self.points)

    def plain(self) -> float | dict[int, float]:
        """What `schedule` reads back: the number, or a mapping from steps to values."""
        return self.points[0][1] if len(self.points) == 1 else dict(self.points)

    def __str__(self) -> str:
        if len(self.points) == 1:
            return f"{self.points[0][1]:g}"
        if len(self.points) == 2 and self.points[1][0] == self.points[0][0] + 1:
            (last, before), (_, after) = self.points
            return f"{before:g} to step {last}, then {after:g}"
        return ", ".join(f"{value:g} at step {step}" for step, value in self.points)


def schedule(text: str) -> Schedule:
    """Argparse type of a number over the steps: ``'0.5'``, or ``'{0: 0, 1000: 0.5}'``.

    The mapping goes from optimiser steps to values; see `Schedule`.
    """
    value = yaml.safe_load(text)
    points = value if isinstance(value, dict) else {0: value}
    wanted = "expected a number of at least 0, or a mapping from steps to such numbers"
    try:
        pairs = tuple(sorted((int(step), float(number)) for step, number in points.items()))
    except (TypeError, ValueError):
        raise argparse.ArgumentTypeError(f"{wanted}, got {text!r}") from None
    if not pairs or any(
        step < 0 or step != given or not 0 <= number < math.inf
        for (step, number), given in zip(pairs, sorted(points), strict=True)
    ):
        raise argparse.ArgumentTypeError(f"{wanted}, got {text!r}")
    return Schedule(pairs)


def setting_adder(group: argparse._ActionsContainer) -> Callable[..., None]:
    """Return ``add(name, *other_names, **arguments)``, which adds a setting to `group`.

    Names are given with underscores and are flags with dashes too.
    """

    def add(*names: str, **arguments: Any) -> None:
        flags = [flag for name in names for flag in (name, name.replace("_", "-"))]
        group.add_argument(*dict.fromkeys(f"--{flag}" for flag in flags), **arguments)

    return add


def check_at_least(args: argparse.Namespace, least: dict[str, float]) -> None:
    """Raise ValueError unless each setting named is None, or finite and at least its bound."""
    for name, lowest in least.items():
        value = getattr(args, name)
        if value is not None and not lowest <= value < math.inf:
            raise ValueError(f"The setting {name} must be at least {lowest}, got {value}.")


def plain_settings(args: argparse.Namespace, *left_out: str) -> dict[str, Any]:
    """Return the settings as values that YAML holds, without those `left_out`."""
    return {
        name: value.plain() if isinstance(value, Schedule) else value
        for name, value in vars(args).items()
        if name not in left_out
    }


def mapping(text: str) -> dict[str, Any]:
    """Argparse type of a setting that is a mapping: YAML or JSON such as ``'{rank: 4}'``."""
    value = yaml.safe_load(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(
            f"expected a mapping such as '{{name: value}}', got {text!r}"
        )
    return value


def names(text: str) -> list[str]:
    """Argparse type of a list of names: ``'to_q,to_k'``, or YAML such as ``'[to_q, to_k]'``."""
    value = yaml.safe_load(text)
    if isinstance(value, str):
        value = [name.strip() for name in value.split(",")]
    if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
        raise argparse.ArgumentTypeError(f"expected names such as 'to_q,to_k', got {text!r}")
    return value


def parse_settings(
    parser: argparse.ArgumentParser, input_args: Sequence[str] | None = None
) -> argparse.Namespace:
    """Return the settings of `parser`, with the values of the ``--config`` file as defaults.

    Raises:
        ValueError: the file cannot be read, names an unknown setting, or holds a value of the wrong
        kind.
    """
    config_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config_parser.add_argument("--config")
    config = config_parser.parse_known_args(input_args)[0].config
    if config is not None:
        parser.set_defaults(**read_settings(Path(config), parser))
    return parser.parse_args(input_args)


def read_settings(path: Path, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Return the settings in the YAML file `path`, checked as `parser` would check flags."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"The settings file {path} cannot be read: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise ValueError(f"The settings file {path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"The settings file {path} must hold `name: value` lines.")
    actions = {
        action.dest: action for action in parser._actions if action.dest not in ("help", "config")
    }
    return {
        name: _converted(actions[name], value, path)
        for name, value in _flattened(content, actions, "", path).items()
    }


def write_settings(path: Path, settings: dict[str, Any]) -> None:
    """Write settings (see `plain_settings`) as YAML that `read_settings` takes back."""
    write_in_one_step(path, yaml.safe_dump(settings, sort_keys=True))


def write_in_one_step(path: Path, text: str) -> None:
    """Write a file that holds either what it held before or all of `text`, even if killed."""
    unfinished = path.with_name(f"unfinished-{path.name}")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def _flattened(
    section: dict[Any, Any], actions: dict[str, argparse.Action], prefix: str, path: Path
) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for key, value in section.items():
        name = f"{prefix}{key}"
        if name in actions:
            found = {name: value}
        elif isinstance(value, dict) and any(action.startswith(f"{name}_") for action in actions):
            found = _flattened(value, actions, f"{name}_", path)
        else:
            close = difflib.get_close_matches(name, actions, n=3)
            hint = (
                f"Did you mean {' or '.join(close)}?"
                if close
                else "See --help for the settings there are."
            )
            raise ValueError(f"The settings file {path} holds an unknown setting {name!r}. {hint}")
        if repeated := found.keys() & settings.keys():
            raise ValueError(f"The settings file {path} sets {repeated.pop()!r} twice.")
        settings.update(found)
    return settings


def _converted(action: argparse.Action, value: Any, path: Path) -> Any:
    """The YAML `value` as the flag `action` would have read it."""
    if value is None:
        return None
    if value is False and action.choices is not None and "no" in action.choices:
        value = "no"  # YAML reads a bare `no` as false
    kind: Any = action.type or str
    wanted = (
        "true or false" if isinstance(action, argparse.BooleanOptionalAction) else kind.__name__
    )
    try:
        if isinstance(action, argparse.BooleanOptionalAction):
            fits = isinstance(value, bool)
        elif kind in (mapping, names, schedule):
            # written back as text, so that files and flags pass the same check
            value, fits = kind(yaml.safe_dump(value, default_flow_style=True)), True
        else:
            fits = isinstance(value, (str, int, float)) and not isinstance(value, bool)
            value = kind(str(value)) if fits else value
    except (ValueError, argparse.ArgumentTypeError):
        fits = False
    if not fits:
        raise ValueError(f"The setting {action.dest!r} in {path} must be {wanted}, got {value!r}.")
    if action.choices is not None and value not in action.choices:
        choices = ", ".join(map(str, action.choices))
        raise ValueError(
            f"The setting {action.dest!r} in {path} must be one of {choices}, got {value!r}."
        )
    return value
