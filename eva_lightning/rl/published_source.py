"""Where published trajectories come from: a folder on this machine, or a data set of the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from eva_lightning.errors import InputError, MissingInputError, UnreachableError
from eva_lightning.files import digest, file_digest
from eva_lightning.reading import in_short
from eva_lightning.vision.backbone.hub import endpoint, require_hub

#: How a data set of the hub is written where a folder can be too.
HUB = "hub:"
#: The data set of Schmied et al.
PUBLISHED = f"{HUB}ml-jku/meta-world"

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
#: What the client raises where the network fails: OSError, and the base of its transport's errors.
_TRANSPORT: tuple[type[BaseException], ...] = (
    OSError,
    *(kind for kind in HfHubHTTPError.__mro__ if issubclass(kind, Exception) and kind.__name__ == "HTTPError"),
)


class Source(Protocol):
    """A collection of files, by paths with slashes."""

    def names(self) -> list[str]:
        """All files."""

    def get(self, names: Sequence[str]) -> list[Path]:
        """Files on this machine, in the order of `names`."""

    def describe(self, names: Sequence[str]) -> str:
        """What tells the content of these files from any other, for people too."""


class Folder:
    """A folder on this machine.

    Args:
        path: The folder.

    Raises:
        MissingInputError: There is none.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            hint = f" (a data set of the hub is written {HUB}{path})" if _REPOSITORY.fullmatch(str(path)) else ""
            raise MissingInputError(f"there is no folder {path} with published trajectories{hint}")
        self.path = path
        self._names: list[str] | None = None

    def names(self) -> list[str]:
        """All files below the folder."""
        if self._names is None:
            self._names = sorted(file.relative_to(self.path).as_posix() for file in self.path.rglob("*"))
        return self._names

    def get(self, names: Sequence[str]) -> list[Path]:
        """Where they lie."""
        return [self.path / name for name in names]

    def describe(self, names: Sequence[str]) -> str:
        """Their names, sizes and ends."""
        files = self.get(names)
        if len(files) == 1:
            return f"{names[0]} ({file_digest(files[0], span=1 << 20)[:12]})"
        sizes = [[name, file.stat().st_size] for name, file in zip(names, files, strict=True)]
        return f"{Path(names[0]).parent.name}, {len(files)} files ({digest(sizes)[:12]})"


class HubDataset:
    """A data set of the Hugging Face hub, at one commit.

    Files that are whole are kept, whatever ends the program; within a file the client goes on by itself where the
    connection was cut.

    Args:
        repository: Its owner and name.
        revision: Branch, tag or commit; None for the newest.
        downloads: Folder for downloads; None for the client's own cache.

    Raises:
        UnreachableError: The hub does not answer.
        InputError: There is no such data set or revision.
    """

    def __init__(self, repository: str, revision: str | None = None, downloads: Path | None = None) -> None:
        if not _REPOSITORY.fullmatch(repository):
            raise InputError(f"a data set of the hub is written {HUB}OWNER/NAME, got {HUB}{repository}")
        self.repository, self._downloads = repository, downloads
        self._remedy = (
            f"download it where there is a network (hf download {repository} --repo-type dataset --local-dir DIR) and "
            "name that folder with --from"
        )
        require_hub(
            f"datasets/{repository}/resolve/main/README.md", f"the data set {repository} is needed", self._remedy
        )
        try:
            found = HfApi(endpoint=endpoint()).dataset_info(repository, revision=revision)
        except RevisionNotFoundError as error:
            raise InputError(f"the data set {repository} of the hub has no revision {revision}") from error
        except RepositoryNotFoundError as error:
            raise InputError(f"the hub has no data set {repository}, or does not show it without a token") from error
        except _TRANSPORT as error:
            raise UnreachableError(f"the hub does not list {repository} ({in_short(error)}): {self._remedy}") from error
        self.commit = found.sha or revision or "main"
        self._names = sorted(item.rfilename for item in found.siblings or [])

    def names(self) -> list[str]:
        """All files of the commit."""
        return self._names

    def get(self, names: Sequence[str]) -> list[Path]:
        """Download what is not there yet.

        Raises:
            UnreachableError: The hub stops answering; what is there is kept.
        """
        found = []
        for name in names:
            try:
                file = hf_hub_download(
                    self.repository, name, repo_type="dataset", revision=self.commit, cache_dir=self._downloads,
                    endpoint=endpoint(),
                )  # fmt: skip
            except _TRANSPORT as error:
                raise UnreachableError(
                    f"the download of {name} from {self.repository} stopped ({in_short(error)}): whole files are "
                    f"kept, rerun to resume, or {self._remedy}"
                ) from error
            found.append(Path(file))
        return found

    def describe(self, names: Sequence[str]) -> str:
        """The commit."""
        what = names[0] if len(names) == 1 else f"{Path(names[0]).parent.name}, {len(names)} files"
        return f"{self.repository}@{self.commit[:12]} {what}"


def open_source(text: str, revision: str | None = None, downloads: Path | None = None) -> Source:
    """The source that ``--from`` names: ``hub:OWNER/NAME``, or a folder."""
    if text.startswith(HUB):
        return HubDataset(text.removeprefix(HUB), revision, downloads)
    return Folder(Path(text))
