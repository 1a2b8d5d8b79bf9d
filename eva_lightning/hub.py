"""Uploading an exported adapter, or a merged model, to the Hugging Face hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from eva_lightning.adapters.model_card import CARD, REPOSITORY
from eva_lightning.errors import InputError, MissingInputError, UnreachableError
from eva_lightning.reading import read_text

#: What each kind of folder must hold; nothing else of it is uploaded but the card.
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
_MERGED = ("config.json", "model.safetensors")

#: How packages are called whose exceptions mean that a connection failed: the hub's client has another by its version.
_OF_A_CONNECTION = ("httpx", "httpcore", "requests", "urllib3")


def push_to_hub(
    directory: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    message: str = "Upload by eva_lightning",
) -> str:
    """Upload what :func:`eva_lightning.adapters.save_pretrained` (with ``base_model=``) or
    :func:`eva_lightning.vision.save_timm` wrote.

    ``PeftModel.from_pretrained(base, repo_id)``, or ``timm.create_model("hf-hub:" + repo_id, pretrained=True)`` for a
    merged model, then loads it anywhere. The repository is made if it does not exist; other files in it stay.
    Its name takes the place of ``THIS REPOSITORY`` in the card.

    Args:
        directory: The folder.
        repo_id: ``"owner/name"``.
        private: Of a repository that is made now; None for the account's default.
        token: A token that may write; else the one of ``hf auth login`` or ``HF_TOKEN``.
        message: Of the commit.

    Returns:
        The address of the repository.

    Raises:
        MissingInputError: The folder lacks a file; names it.
        InputError: The name or the token cannot be one, the hub refuses (such as for want of a token), or the metadata
            of an edited card are not as it wants them.
        UnreachableError: The hub does not answer.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    files = _files(Path(directory))
    card = read_text(files[CARD])
    if token is not None and not (token.isascii() and token.isprintable() and " " not in token):
        # the client would show it in an error
        raise InputError(
            "token has characters that no token has, such as a space or the end of a line", setting="token"
        )
    try:
        api = HfApi(token=token)
        repo = api.create_repo(repo_id, private=private, exist_ok=True)
        name = repo.repo_id
        contents: dict[str, Path | bytes] = {**files, CARD: card.replace(REPOSITORY, name).encode()}
        operations = [CommitOperationAdd(path, content) for path, content in contents.items()]
        api.create_commit(name, operations, commit_message=message)
    except HFValidationError as error:
        raise InputError(f"repo_id must be owner/name: {_in_short(error)}", setting="repo_id") from error
    except (HfHubHTTPError, LocalTokenNotFoundError) as error:
        raise InputError(
            f"the Hugging Face hub refuses {repo_id}: {_in_short(error)}; log in with a token that may write (hf auth "
            "login, or token=)"
        ) from error
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{directory} cannot be uploaded to {repo_id}: {reason}") from error
    except Exception as error:
        if not (isinstance(error, ConnectionError) or type(error).__module__.startswith(_OF_A_CONNECTION)):
            raise
        raise UnreachableError(
            f"the Hugging Face hub does not answer ({_in_short(error)}): {directory} stays as it is, upload it later"
        ) from error
    return str(repo)


def _files(folder: Path) -> dict[str, Path]:
    """The files to upload, by their names in the repository."""
    wanted = _ADAPTER if (folder / _ADAPTER[0]).is_file() else _MERGED
    found = {name: folder / name for name in (*wanted, CARD)}
    for name, file in found.items():
        if not file.is_file():
            raise MissingInputError(
                f"{folder} has no {name}: write the folder by save_pretrained(..., base_model=...) or save_timm"
            )
    return found


def _in_short(error: Any) -> str:
    """The first line of an error of the hub's client."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__).rstrip(".")
