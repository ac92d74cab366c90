"""Every command of the README and the documentation is one that the programs understand."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import re
import runpy
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from bokehdiff.cli import app
from tests.docs.pages import PAGES, REPOSITORY, Command, commands
from tests.docs.stand_ins import PLACES, make_models, write_files

pytest.importorskip("yaml", reason="needs pip install 'bokehdiff[train]'")

PROGRAMS_OF_OTHERS = ("cd", "git", "hf", "pip", "tensorboard")

TAKES_THE_FLAGS_OF = {"training.speed": "training.finetune"}
"""Modules that hand on what they do not know to another one."""

NOT_RUN = {
    "export ": "a network is exported in a quarter of a minute, which has tests of its own",
    "bokehdiff app": "serves until it is stopped, and has tests of its own",
    "--from-bokeh --K": "the stack is painted by FLUX.1-Kontext in bfloat16",
    "lamps.exr": "needs OpenImageIO, and has tests of its own",
}
"""Words of commands of ``bokehdiff`` that are parsed and not run, and why."""


# --- Whether a command is understood --------------------------------------------------------------


def check(words: tuple[str, ...], in_text: bool = False) -> None:
    """Raises SystemExit, ValueError or a usage error for a command that nobody understands."""
    program, *rest = (word for word in words if word != "...")
    # In a sentence, files and places are left out: `bokehdiff render --metric`.
    whole = "..." not in words and not in_text
    if program == "python" and rest[0] == "-m":
        check_module(rest[1], rest[2:], "..." not in words)
    elif program == "python":
        check_help(str(REPOSITORY / rest[0]), rest[1:], runpy.run_path)
    elif Path(program).name == "bokehdiff":  # that of any environment
        check_verb(rest, whole or "-o" in rest)
    elif program == "accelerate":
        check_launch(rest, whole)
    elif program == "make":
        targets = re.findall(r"^([a-z]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
        for word in rest:
            if "=" not in word and word not in targets:
                raise ValueError(f"make has no target {word}; it has {targets}")
    elif program not in PROGRAMS_OF_OTHERS:
        raise ValueError(f"{program} is no program that this test knows")


def check_verb(words: list[str], whole: bool) -> None:
    command: Any = typer.main.get_command(app)
    name = "bokehdiff"
    while words and hasattr(command, "commands"):
        if words[0] in ("--help", "--version"):
            return
        name = words.pop(0)
        if name not in command.commands:
            raise ValueError(f"bokehdiff has no verb {name}; it has {list(command.commands)}")
        command = command.commands[name]
    if whole and not hasattr(command, "commands"):
        command.make_context(name, words)
        return
    known = {option for parameter in command.params for option in parameter.opts}
    check_options(f"bokehdiff {name}", words, known | {"--help"})


def check_module(module: str, words: list[str], whole: bool) -> None:
    if module == "pytest":
        return
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"there is no module {module}")
    if module == "evaluation" and whole and words[1:]:
        from evaluation.__main__ import parser

        parser(words[0]).parse_args(words)
        return
    check_help(module, words, runpy.run_module)


def check_launch(words: list[str], whole: bool) -> None:
    from accelerate.commands.launch import launch_command_parser

    if words[0] != "launch":
        raise ValueError(f"accelerate {words[0]} is no command that this test knows")
    parser = launch_command_parser()
    if not whole and not any(word.endswith(".py") for word in words):
        check_options("accelerate launch", words[1:], set(parser._option_string_actions))
        return
    launched = parser.parse_args(words[1:])
    script, flags = launched.training_script, launched.training_script_args
    for file in (launched.config_file, None if launched.module else script):
        if file and not (REPOSITORY / file).is_file():
            raise ValueError(f"there is no file {file}")
    if launched.module:
        check_module(script, flags, True)
    else:
        importlib.import_module(script.removesuffix(".py").replace("/", ".")).parse_args(flags)


def check_help(program: str, words: list[str], run: Callable[..., Any]) -> None:
    """That a program's ``--help`` knows the options and takes what comes before it."""
    shown = help_of(program, words, run)
    if program in TAKES_THE_FLAGS_OF:
        shown += help_of(TAKES_THE_FLAGS_OF[program], [], run)
    check_options(program, words, set(re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", shown)))


def check_options(program: str, words: list[str], known: set[str]) -> None:
    for word in words:
        if word.startswith("-") and not re.fullmatch(r"-[\d.]+", word):
            if word.partition("=")[0] not in known:
                raise ValueError(f"{program} has no option {word}; it has {sorted(known)}")


def help_of(program: str, words: list[str], run: Callable[..., Any]) -> str:
    shown, mistakes, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = [program, *words, "--help"]
    try:
        with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(mistakes):
            run(program, run_name="__main__")
    except SystemExit as ended:
        if ended.code not in (0, None):
            raise ValueError(f"{program} {shlex.join(words)}: {mistakes.getvalue()}") from ended
    finally:
        sys.argv = before
    return shown.getvalue()


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("page", PAGES)
def test_commands_of_a_page_are_understood(page: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(REPOSITORY)
    wrong = []
    for command in commands(page):
        try:
            with contextlib.redirect_stderr(io.StringIO()) as said:
                check(command.words, command.in_text)
        except (Exception, SystemExit) as error:
            reason = str(error) if isinstance(error, Exception) else said.getvalue()[-300:]
            wrong.append(f"{command}\n    {type(error).__name__}: {reason}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "command",
    [
        "bokehdiff rendre photo.jpg",
        "bokehdiff render photo.jpg --no-such-option -o out.png",
        "bokehdiff render photo.jpg --K much -o out.png",
        "bokehdiff render",
        "python -m data_synthesis procedural --cuont 3",
        "python -m data_synthesis procedural --count many",
        "python -m evaluation raytraced DATA --no-such-option 1",
        "python -m no_such_module",
        "python examples/demo.py --no-such-option",
        "accelerate launch training/finetune.py --no_such_setting 1",
        "accelerate launch training/finetune.py --config no_such_file.yaml",
        "accelerate launch training/no_such_script.py",
        "make no_such_target",
        "wget https://example.org",
    ],
)
def test_a_command_nobody_understands_is_found(command: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises((Exception, SystemExit)), contextlib.redirect_stderr(io.StringIO()):
        check(tuple(shlex.split(command)))


def test_a_mistake_in_a_sentence_is_found():
    check(("bokehdiff", "render", "--metric"), in_text=True)
    with pytest.raises(ValueError, match="has no option --metrik"):
        check(("bokehdiff", "render", "--metrik"), in_text=True)


# --- Whether it works -----------------------------------------------------------------------------


def commands_to_run(page: str) -> list[Command]:
    return [
        command
        for command in commands(page)
        if command.words[0] == "bokehdiff"
        and not command.in_text
        and not any(words in " ".join(command.words) for words in NOT_RUN)
    ]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", [page for page in PAGES if commands_to_run(page)])
def test_commands_of_a_page_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_files(tmp_path)
    make_models("\n".join(map(str, commands_to_run(page))), tmp_path)
    monkeypatch.chdir(tmp_path)
    for command in commands_to_run(page):
        words = [PLACES.get(word, word) for word in command.words[1:]]
        words = [name for word in words for name in (sorted(_matching(word)) or [word])]
        if "-o" in words:  # commands of a page write to the same file
            words.append("--force")
        if words[0] == "focus-pull":  # of an option that is given twice the last counts
            words += ["--seconds", "0.2"]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, f"{command}\n{result.output}"


def _matching(word: str) -> list[str]:
    return [str(path) for path in Path().glob(word)] if "*" in word else []
