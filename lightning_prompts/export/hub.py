"""Upload an export to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils._validators import validate_repo_id

from lightning_prompts.errors import UserError


def check_repo(repo: str) -> None:
    """Raise a `UserError` for an invalid name of a repository, before the export starts."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"--push {repo!r} is not a valid repository name (name/repo): {error}") from error


def check_token() -> None:
    """Raise a `UserError` without a token, before the export starts."""
    if get_token() is None:
        raise UserError("--push needs a token of the hub, but none is set; run `hf auth login`, or set HF_TOKEN")


def push(folder: Path, repo: str, private: bool) -> str:
    """Upload a folder to a repository, which is created if necessary.

    Args:
        folder: The folder.
        repo: The repository, ``name/repo``.
        private: Whether a new repository is private; otherwise the setting of the account or organisation decides
            (usually public).

    Returns:
        The URL of the repository.

    Raises:
        UserError: There is no token or no network, or the hub rejects the upload. The folder is kept.
    """
    try:
        api = HfApi()
        made = api.create_repo(repo, private=private or None, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Export from lightning-prompts")
    except LocalTokenNotFoundError as error:
        raise UserError(
            f"{folder} was written, but not uploaded: there is no token; run `hf auth login` first"
        ) from error
    except Exception as error:  # the types of errors depend on the version of the HTTP library
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{folder} was written, but not uploaded to {repo!r} ({type(error).__name__}: {reason}); check the network "
            "and the token (`hf auth login`), and run the command again with --overwrite"
        ) from error
    return str(made)
