"""Whether the Hugging Face hub answers. Its client, asked first, retries for minutes where there is no network."""

from __future__ import annotations

import os
import threading
import urllib.error
import urllib.request

from eva_lightning.errors import UnreachableError

_WAIT_SECONDS = 5.0
_GRACE_SECONDS = 0.5


def endpoint() -> str:
    """Address of the hub: ``HF_ENDPOINT`` or the public one, without a slash at its end."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def require_hub(path: str, missing: str, remedy: str) -> None:
    """Ask the hub for one small file, for at most a few seconds.

    Args:
        path: The file, such as ``timm/vit/resolve/main/config.json``. It need not exist: any answer will do.
        missing: What the hub is needed for, as the beginning of the error: ``"the weights of X are not here"``.
        remedy: What to do without the hub, as the end of the error.

    Raises:
        UnreachableError: No answer, or only server errors; one sentence of `missing`, the reason and `remedy`.
    """
    reason = silence(path)
    if reason is not None:
        raise UnreachableError(f"{missing} and the Hugging Face hub does not answer ({reason}): {remedy}")


def silence(path: str, seconds: float = _WAIT_SECONDS) -> object:
    """Why the hub does not answer within `seconds` when asked for the file `path`, or None where it does."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return "HF_HUB_OFFLINE is set"
    found: list[object] = []
    # on a thread, because the time limit of a connection does not count the search for the server's address
    asking = threading.Thread(target=lambda: found.append(_ask(path, seconds)), daemon=True)
    asking.start()
    asking.join(seconds + _GRACE_SECONDS)
    return found[0] if found else f"no answer within {seconds:g} s"


def _ask(path: str, seconds: float) -> object:
    try:
        request = urllib.request.Request(f"{endpoint()}/{path}", method="HEAD")
        with urllib.request.urlopen(request, timeout=seconds):
            return None
    except urllib.error.HTTPError as error:
        # the client explains other statuses better
        return None if error.code < 500 else f"HTTP status {error.code}"
    except (OSError, ValueError) as error:
        return getattr(error, "reason", error)
