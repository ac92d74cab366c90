"""Uploading a result, over HTTP, to a stand-in for the Hub."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hub_server import HubServer, Repository
from tests.training.runs import REPOSITORY

CARD = b"---\nlicense: apache-2.0\nbase_model: somebody/base\n---\n\n# A model\n"
RESULT = {
    "README.md": CARD,
    "training_config.yaml": b"seed: 0\n",
    "log.jsonl": b'{"step": 0}\n',
    "validation/step-000000.png": b"\x89PNG\r\n",
    "unet/config.json": b"{}",
    "unet/diffusion_pytorch_model.safetensors": random.Random(0).randbytes(200_000),
    "vae_encoder.safetensors": random.Random(1).randbytes(1000),
    "empty.txt": b"",
}
LEFTOVERS = [
    "checkpoint-2/unet/diffusion_pytorch_model.safetensors",
    "checkpoint-2/trainer_state/optimizer.bin",
    "replaced-checkpoint-2/trainer_state/optimizer.bin",
    "unfinished-checkpoint-4/unet/config.json",
    "unfinished-log.jsonl",
    "logs/events.out.tfevents.1.host",
    "logs/images/1.png",
    "wandb/run-1/run.wandb",
]

CALLS = """
import json, sys
from pathlib import Path
from training.publishing import create_hub_repository, upload_result

functions = {"create": create_hub_repository, "upload": upload_result}
for name, arguments in json.loads(sys.argv[1]):
    try:
        outcome = functions[name](**{**arguments, "output_dir": Path(arguments["output_dir"])})
    except (ValueError, RuntimeError) as error:
        outcome = f"{type(error).__name__}: {error}"
    print("outcome:", json.dumps(outcome))
"""


def outcomes(
    environment: dict[str, str], *calls: tuple[str, dict[str, Any]], without: tuple[str, ...] = ()
) -> list[str]:
    """What calls of the two functions return or raise in a process with this environment."""
    process = subprocess.run(
        [sys.executable, "-c", CALLS, json.dumps(calls)],
        cwd=REPOSITORY,
        env={
            **{name: value for name, value in os.environ.items() if name not in without},
            "PYTHONPATH": str(REPOSITORY),
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    lines = [line for line in process.stdout.splitlines() if line.startswith("outcome: ")]
    return [json.loads(line.removeprefix("outcome: ")) for line in lines]


def create(output_dir: Path, **arguments: Any) -> tuple[str, dict[str, Any]]:
    defaults = {"repo_id": None, "token": None, "private": False}
    return "create", {"output_dir": str(output_dir), **defaults, **arguments}


def upload(output_dir: Path, repo_id: str, **arguments: Any) -> tuple[str, dict[str, Any]]:
    defaults = {"repo_id": repo_id, "token": None, "step": 3000}
    return "upload", {"output_dir": str(output_dir), **defaults, **arguments}


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def output_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "soft-lens"
    for name, content in {**RESULT, **dict.fromkeys(LEFTOVERS, b"not for others")}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_the_result_arrives_whole_and_alone(hub: HubServer, output_dir: Path) -> None:
    name, address = outcomes(
        hub.environment(), create(output_dir), upload(output_dir, "photographer/soft-lens")
    )
    assert name == "photographer/soft-lens"
    assert address == f"{hub.endpoint}/photographer/soft-lens"
    repository = hub.repositories[name]
    assert repository.files == RESULT
    assert repository.commit_messages == ["Result of training after 3000 steps"]
    assert repository.private is None  # as the owner's repositories are
    assert {authorization for *_, authorization in hub.requests} == {f"Bearer {hub.token}"}


def test_an_upload_again_adds_to_the_same_repository(hub: HubServer, output_dir: Path) -> None:
    name = "photographer/mine"
    hub.repositories[name] = Repository(files={"README.md": b"old", "other.txt": b"kept"})
    calls = (
        create(output_dir, repo_id=name, private=True),
        create(output_dir, repo_id="mine"),
        upload(output_dir, name),
    )
    assert outcomes(hub.environment(), *calls)[:2] == [name, name]
    assert hub.repositories[name].files == {**RESULT, "other.txt": b"kept"}
    assert hub.repositories[name].private is None


def test_private_repositories_and_tokens_that_are_passed(hub: HubServer, tmp_path: Path) -> None:
    # The folder does not exist yet when a run starts.
    calls = (
        create(tmp_path / "portraits", private=True, token=hub.token),
        create(tmp_path / "portraits", repo_id="photographer/wide-open", token=hub.token),
    )
    environment = {**hub.environment(), "HF_TOKEN": "hf_of_somebody_else"}
    assert outcomes(environment, *calls) == ["photographer/portraits", "photographer/wide-open"]
    assert hub.repositories["photographer/portraits"].private is True
    assert hub.repositories["photographer/wide-open"].private is None
    assert {authorization for *_, authorization in hub.requests} == {f"Bearer {hub.token}"}


def test_what_the_hub_refuses_is_said_before_training(hub: HubServer, tmp_path: Path) -> None:
    hub.repositories["somebody/public"] = Repository()
    unknown, elsewhere, not_ours, unnamable, folder = outcomes(
        hub.environment(),
        create(tmp_path, repo_id="mine", token="hf_unknown"),
        create(tmp_path, repo_id="somebody/new"),
        create(tmp_path, repo_id="somebody/public"),
        create(tmp_path, repo_id="no/such/name"),
        create(tmp_path / "two words"),
    )
    assert unknown.startswith("ValueError: ") and "does not take the access token (401)" in unknown
    assert "`hf auth login`" in unknown and "--hub_token" in unknown
    for refusal, name in ((elsewhere, "somebody/new"), (not_ours, "somebody/public")):
        assert refusal.startswith("ValueError: ") and repr(name) in refusal
        assert "may not write there (403)" in refusal and "--hub_model_id OWNER/NAME" in refusal
    assert "'no/such/name' cannot be the name" in unnamable and "--hub_model_id" in unnamable
    assert "'two words' cannot be the name" in folder
    assert set(hub.repositories) == {"somebody/public"}


def test_a_failed_upload_says_where_the_result_is(hub: HubServer, output_dir: Path) -> None:
    hub.refused_commits = 403
    hub.repositories["photographer/mine"] = Repository()
    before = {path: path.read_bytes() for path in output_dir.rglob("*") if path.is_file()}
    (refusal,) = outcomes(hub.environment(), upload(output_dir, "photographer/mine"))
    assert refusal.startswith(f"RuntimeError: The result is in {output_dir}, but was not uploaded")
    assert "may not write there (403)" in refusal
    assert f"`hf upload photographer/mine {output_dir} --exclude 'checkpoint-*'" in refusal
    assert not hub.repositories["photographer/mine"].files
    assert {path: path.read_bytes() for path in output_dir.rglob("*") if path.is_file()} == before


def test_a_card_that_the_hub_does_not_take(hub: HubServer, output_dir: Path) -> None:
    hub.repositories["photographer/mine"] = Repository()
    (output_dir / "README.md").write_text("---\nbase_model: /a/folder\n---\n")
    (refusal,) = outcomes(hub.environment(), upload(output_dir, "photographer/mine"))
    assert refusal.startswith("RuntimeError: ") and '"base_model" with value "/a/folder"' in refusal
    assert not hub.repositories["photographer/mine"].files


def test_without_a_token(hub: HubServer, tmp_path: Path) -> None:
    environment = {name: value for name, value in hub.environment().items() if name != "HF_TOKEN"}
    environment["HF_HOME"] = str(tmp_path)
    tokens = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH")
    (refusal,) = outcomes(environment, create(tmp_path), without=tokens)
    assert refusal.startswith("ValueError: Uploading needs an access token")
    assert "`hf auth login`" in refusal and "--hub_token" in refusal
    assert not hub.requests


def test_without_a_hub(output_dir: Path) -> None:
    with HubServer() as server:
        environment = server.environment()
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        environment["HF_ENDPOINT"] = f"http://127.0.0.1:{taken.getsockname()[1]}"
        (unreachable,) = outcomes(environment, create(output_dir))
    assert unreachable.startswith("ValueError: ") and "cannot be reached" in unreachable
    created, uploaded = outcomes(
        {**environment, "HF_HUB_OFFLINE": "1"}, create(output_dir), upload(output_dir, "a/b")
    )
    assert created.startswith("ValueError: ") and "HF_HUB_OFFLINE" in created
    assert uploaded.startswith("RuntimeError: ") and "HF_HUB_OFFLINE" in uploaded
