"""The result of a run on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import httpx, validate_repo_id

NOT_UPLOADED = [
    *("checkpoint-*", "replaced-checkpoint-*", "unfinished-*"),
    *("logs/*", "wandb/*"),
]
"""What a run leaves in its folder for itself: checkpoints, unfinished files, the trackers' logs."""


def create_hub_repository(
    repo_id: str | None, output_dir: Path, token: str | None, private: bool
) -> str:
    """Make sure that the result can be uploaded, and return the repository's full name.

    A repository that exists is taken as it is. To be called before the training, so that missing
    rights do not show after it.

    Args:
        repo_id: ``"owner/name"``, or ``"name"`` in the account of the token; None takes the name of
            the output folder.
        output_dir: folder of the run; it need not exist.
        token: access token; None takes the one of ``HF_TOKEN`` or ``hf auth login``.
        private: make a new repository private. Otherwise it is what its owner's new ones are.

    Raises:
        ValueError: there is no token or it may not write there, the name is none, or the Hub cannot
            be reached; the message says what to do.
    """
    name = output_dir.resolve().name if repo_id is None else repo_id
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(
            f"{name!r} cannot be the name of a repository on the Hub. Set --hub_model_id to "
            "OWNER/NAME, of letters, digits, '-', '_' and '.'."
        ) from error
    if token is None and get_token() is None:
        raise ValueError(
            "Uploading needs an access token of the Hugging Face Hub. Run `hf auth login`, set "
            "HF_TOKEN, or pass --hub_token."
        )
    api = HfApi(token=token)
    try:
        full_name = api.create_repo(name, private=private or None, exist_ok=True).repo_id
        # A public repository of somebody else exists too.
        api.auth_check(full_name, write=True)
    except (HfHubHTTPError, httpx.HTTPError, OfflineModeIsEnabled) as error:
        raise ValueError(
            f"The result could not be uploaded to {name!r}, so there is no use in starting: "
            f"{_what_to_do(error)} Or leave out --push_to_hub."
        ) from error
    return full_name


def upload_result(repo_id: str, output_dir: Path, token: str | None, step: int) -> str:
    """Upload the folder of a run, without what `NOT_UPLOADED` names; return the address.

    Args:
        repo_id: what `create_hub_repository` returned.
        output_dir: folder of the run.
        token: as of `create_hub_repository`.
        step: optimiser steps done, for the commit message.

    Raises:
        RuntimeError: the upload failed; the message says what to do. The folder is as it was.
    """
    try:
        HfApi(token=token).upload_folder(
            repo_id=repo_id,
            folder_path=output_dir,
            commit_message=f"Result of training after {step} steps",
            ignore_patterns=list(NOT_UPLOADED),
        )
    # The client raises ValueError for a model card that the Hub does not take.
    except (HfHubHTTPError, httpx.HTTPError, OfflineModeIsEnabled, ValueError) as error:
        without = " ".join(f"--exclude '{pattern}'" for pattern in NOT_UPLOADED)
        raise RuntimeError(
            f"The result is in {output_dir}, but was not uploaded: {_what_to_do(error)} Then run "
            f"`hf upload {repo_id} {output_dir} {without}`."
        ) from error
    return f"{HfApi().endpoint}/{repo_id}"


def _what_to_do(error: Exception) -> str:
    """One sentence on what went wrong, one on what helps."""
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE keeps the Hub out of reach. Unset it."
    if not isinstance(error, HfHubHTTPError):
        if isinstance(error, httpx.HTTPError):
            return f"the Hub cannot be reached ({error}). Look after the connection."
        return f"{' '.join(str(error).split())}"
    status = error.response.status_code
    if status == 401:
        return (
            "the Hub does not take the access token (401). Run `hf auth login`, or set --hub_token."
        )
    if status in (403, 404):
        return (
            f"the access token may not write there ({status}). Use one that may (`hf auth login`, "
            "--hub_token), or another repository (--hub_model_id OWNER/NAME)."
        )
    return f"the Hub answers {status} ({error.server_message or 'without a reason'}). Try again."
