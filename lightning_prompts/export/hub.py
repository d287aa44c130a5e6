"""Uploading an export to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils._validators import validate_repo_id

from lightning_prompts.errors import UserError


def check_repo(repo: str) -> None:
    """Raise a `UserError` for what no repository is called, before anything is made for it."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"--push {repo!r} is no repository of the hub, name/repo: {error}") from error


def check_token() -> None:
    """Raise a `UserError` without a token, before anything is made for it or the network is asked."""
    if get_token() is None:
        raise UserError("--push needs a token of the hub, and there is none; run `hf auth login`, or set HF_TOKEN")


def push(folder: Path, repo: str, private: bool) -> str:
    """Upload a folder, into a repository that is made if it is not there.

    Args:
        folder: What to upload.
        repo: The repository, ``name/repo``.
        private: Whether a repository that is made is private; if not, the account or organisation has its own default
            (mostly public).

    Returns:
        Where it lies.

    Raises:
        UserError: There is no token, no network, or the hub says no; the folder stays.
    """
    try:
        api = HfApi()
        made = api.create_repo(repo, private=private or None, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Export from lightning-prompts")
    except LocalTokenNotFoundError as error:
        raise UserError(
            f"{folder} is written, but not uploaded: there is no token; run `hf auth login` first"
        ) from error
    except Exception as error:  # its HTTP library changes from version to version, and with it the errors
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{folder} is written, but not uploaded to {repo!r} ({type(error).__name__}: {reason}); "
            "with a network and a "
            "token (`hf auth login`), run the same command again with --overwrite"
        ) from error
    return str(made)
