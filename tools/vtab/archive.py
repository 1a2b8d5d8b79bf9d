"""Getting VTAB-1K into its folder: download of the archive in common use, and unpacking of that or of per-task zips.

Safe to interrupt; rerun to continue: the download resumes, a task folder appears under its name only when
complete, and of a task that is there already only what is missing or differs is taken from the archive.
"""

from __future__ import annotations

import shutil
import stat
import sys
import zipfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO
from urllib.parse import urlparse

from huggingface_hub import get_hf_file_metadata, hf_hub_url, utils
from huggingface_hub.file_download import http_get

from eva_lightning.errors import InputError, MissingInputError, UnreachableError
from eva_lightning.files import check_writable, file_digest, format_bytes, free_bytes
from eva_lightning.names import check_path, shown
from eva_lightning.reading import reading
from eva_lightning.threads import ordered_map
from eva_lightning.vision.backbone.hub import endpoint, require_hub
from eva_lightning.vision.data.tasks import SPLITS, TASKS

REPOSITORY = "XiN0919/VTAB-1k"
ARCHIVE_NAME = "vtab-1k.zip"
ARCHIVE_BYTES = 4_700_000_000

_DOWNLOADS = ".download"
_ROOM_TO_LEAVE = 256 * 2**20
_SPLIT_FILES = tuple(f"{split}.txt" for split in SPLITS)
#: What zips of images use; the others' parsers take as much memory as a hostile file asks for.
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_ENCRYPTED = 0x1
_BLOCK = 1 << 20
_AGAIN = "download it again"
#: Bytes of the largest file that is unpacked: an image or a list of images.
_MOST_BYTES = 256 * 2**20
#: Bytes that the name of a file being written has more: ``.NAME.part``.
_PART_ROOM = 6
_JUNK = ("__MACOSX", ".DS_Store", "Thumbs.db", "desktop.ini", "Icon\r")


@dataclass(frozen=True)
class Member:
    """A file of a task in an archive: where it is, and its path relative to the task folder."""

    archive: Path
    info: zipfile.ZipInfo
    path: PurePosixPath


def find_archives(given: Iterable[str | Path]) -> list[Path]:
    """The zip files that `given` names: zips, or folders of zips.

    Raises:
        MissingInputError: No such file or folder, or a folder without zips.
        InputError: The folder is VTAB-1K itself, already unpacked.
    """
    archives: list[Path] = []
    for name in given:
        path = Path(name).expanduser()
        if path.is_file():
            archives.append(path)
            continue
        if not path.is_dir():
            raise MissingInputError(
                f"archive {path} does not exist: pass {ARCHIVE_NAME}, zips of tasks, or their folder"
            )
        inside = sorted(file for file in path.iterdir() if file.suffix.lower() == ".zip" and file.is_file())
        if not inside:
            unpacked = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and entry.name in TASKS)
            if unpacked:
                raise InputError(
                    f"{path} is no archive but an unpacked folder (it holds {', '.join(unpacked[:3])}"
                    f"{', …' if len(unpacked) > 3 else ''}): pass it as --root to have it checked"
                )
            raise MissingInputError(f"folder {path} holds no zip file: pass {ARCHIVE_NAME} or zips of tasks")
        archives += inside
    return archives


def find_members(archives: Iterable[Path]) -> dict[str, list[Member]]:
    """Task name -> its files in `archives`. Other files are passed over, as is what macOS adds.

    A task's files lie under a folder with its name, at any depth, or in a zip with its name.

    Raises:
        InputError: A file is no whole zip, or names a path outside its folder.
    """
    found: dict[str, dict[PurePosixPath, Member]] = {}
    for archive in archives:
        with reading(archive, _AGAIN, "zip file"), zipfile.ZipFile(archive) as opened:
            infos = [info for info in opened.infolist() if not info.is_dir()]
        paths = [(info, path) for info in infos if (path := _inside(archive, info)) is not None]
        for task, info, path in _by_task(archive, paths):
            found.setdefault(task, {}).setdefault(path, Member(archive, info, path))
    for task, members in found.items():
        folders = {parent for path in members for parent in path.parents}
        for path in folders.intersection(members):
            raise InputError(f"{members[path].archive} holds {shown(f'{task}/{path}')} as a file and as a folder")
    return {task: list(members.values()) for task, members in found.items()}


def _inside(archive: Path, info: zipfile.ZipInfo) -> PurePosixPath | None:
    """The path of a member, or None for junk and links."""
    # zips of Windows have the other separator
    name = info.filename.replace("\\", "/")
    parts = name.split("/")
    if any(part in _JUNK or part.startswith("._") for part in parts) or stat.S_ISLNK(info.external_attr >> 16):
        return None
    if info.compress_type not in _COMPRESSIONS or info.flag_bits & _ENCRYPTED:
        raise InputError(
            f"{archive} holds {shown(info.filename)} encrypted or packed in an unusual way: pack it as a usual zip"
        )
    if info.file_size > _MOST_BYTES:
        raise InputError(
            f"{archive} holds {shown(info.filename)} of {format_bytes(info.file_size)}, no image is so large"
        )
    return check_path(f"nothing was unpacked from {archive}: a path in it", name, room=_PART_ROOM)


def _by_task(
    archive: Path, paths: Sequence[tuple[zipfile.ZipInfo, PurePosixPath]]
) -> Iterable[tuple[str, zipfile.ZipInfo, PurePosixPath]]:
    inside_task_folder = False
    for info, path in paths:
        task = next((part for part in path.parts[:-1] if part in TASKS), None)
        if task is not None:
            inside_task_folder = True
            yield task, info, PurePosixPath(*path.parts[path.parts.index(task) + 1 :])
    if inside_task_folder or archive.stem not in TASKS:
        return
    # a zip of one task's content, perhaps under a folder of another name: the split files show where it starts
    starts = [path.parent for _, path in paths if path.name in _SPLIT_FILES]
    start = min(starts, key=lambda folder: len(folder.parts), default=PurePosixPath())
    for info, path in paths:
        if path.is_relative_to(start):
            yield archive.stem, info, path.relative_to(start)


def unpack(
    members: Mapping[str, Sequence[Member]],
    root: str | Path,
    *,
    replace: Mapping[str, Collection[str]] | None = None,
    workers: int = 1,
    advance: Callable[[str, int, int], None] | None = None,
) -> dict[str, int]:
    """Write the files of each task in `members` to ``root/<task>``.

    A file that is there with the archive's size is kept, and so is a split file of any size, for people edit them.

    Args:
        members: Task name -> files, as :func:`find_members` gives them.
        root: Folder for the task folders, created if needed.
        replace: Task name -> paths that are written even so, because they are damaged.
        workers: Threads.
        advance: Called with a task, the bytes of it written so far and their total.

    Returns:
        Task name -> number of files written.

    Raises:
        InputError: Too little room, or the archive is damaged.
        OSError: Writing failed; the same call continues.
    """
    folder = Path(root)
    folder.mkdir(parents=True, exist_ok=True)
    todo = {task: _to_write(folder, task, files, (replace or {}).get(task, ())) for task, files in members.items()}
    needed = sum(member.info.file_size for _, files in todo.values() for member in files)
    require_room(folder, needed, "unpacking")
    for task, (target, files) in todo.items():
        _unpack_task(target, task, files, workers, advance)
        if target != folder / task:
            target.replace(folder / task)
    return {task: len(files) for task, (_, files) in todo.items()}


def require_room(folder: Path, needed: int, what: str) -> None:
    """Make sure that the disk of `folder` has `needed` bytes and a reserve free.

    Raises:
        InputError: It has less.
    """
    check_writable(folder)
    free = free_bytes(folder)
    if needed and free < needed + _ROOM_TO_LEAVE:
        raise InputError(
            f"{what} needs {format_bytes(needed)} and {folder} has {format_bytes(free)} free: make room, or choose a "
            "root on another disk"
        )


def _to_write(root: Path, task: str, members: Sequence[Member], replace: Collection[str]) -> tuple[Path, list[Member]]:
    """Where a task's files go, and which of them have to be written."""
    target = root / task
    if not target.is_dir():
        target = root / f".{task}.part"
    return target, [member for member in members if not _is_there(target, member, replace)]


def _is_there(target: Path, member: Member, replace: Collection[str]) -> bool:
    if str(member.path) in replace:
        return False
    try:
        size = (target / member.path).stat().st_size
    except OSError:
        return False
    return size == member.info.file_size or str(member.path) in _SPLIT_FILES


def _unpack_task(
    target: Path, task: str, members: Sequence[Member], workers: int, advance: Callable[[str, int, int], None] | None
) -> None:
    target.mkdir(exist_ok=True)
    for parent in {member.path.parent for member in members}:
        (target / parent).mkdir(parents=True, exist_ok=True)
    opened = {archive: zipfile.ZipFile(archive) for archive in {member.archive for member in members}}
    try:
        total = sum(member.info.file_size for member in members)
        written = 0
        for size in ordered_map(lambda member: _write(target, member, opened[member.archive]), members, workers):
            written += size
            if advance is not None:
                advance(task, written, total)
    finally:
        for archive in opened.values():
            archive.close()


def _write(target: Path, member: Member, opened: zipfile.ZipFile) -> int:
    file = target / member.path
    # not files.replacing, which waits for the disk: here 200,000 times
    temporary = file.with_name(f".{file.name}.part")
    try:
        with temporary.open("wb") as destination, _unpacking(member, opened) as source:
            for block in iter(lambda: _block(member, source), b""):  # ends with a comparison of CRC-32
                destination.write(block)
    except InputError:
        temporary.unlink(missing_ok=True)
        raise
    temporary.replace(file)
    return member.info.file_size


def _unpacking(member: Member, opened: zipfile.ZipFile) -> IO[bytes]:
    with reading(f"{member.archive} at {member.info.filename}", _AGAIN):
        return opened.open(member.info)


def _block(member: Member, source: IO[bytes]) -> bytes:
    with reading(f"{member.archive} at {member.info.filename}", _AGAIN):
        return source.read(_BLOCK)


def downloaded(root: str | Path) -> Path | None:
    """The archive that an earlier :func:`download` has left complete under `root`, or None."""
    file = Path(root) / _DOWNLOADS / ARCHIVE_NAME
    return file if file.is_file() else None


def download(root: str | Path, missing: str, progress: bool = True) -> Path:
    """Get the archive from the Hugging Face hub, continuing an earlier download that broke off.

    Args:
        root: The archive goes to a hidden folder in it.
        missing: What it is needed for, as the beginning of the error where the hub does not answer.
        progress: Show the hub client's progress bar.

    Returns:
        The complete archive.

    Raises:
        UnreachableError: The hub does not answer, or not with this file.
        InputError: Too little room for the archive and its content.
    """
    file = downloaded(root)
    if file is not None:
        return file
    remedy = f"download {ARCHIVE_NAME} (data set {REPOSITORY}) where there is a network, and pass it as --archive FILE"
    require_hub(f"datasets/{REPOSITORY}/resolve/main/README.md", missing, remedy)
    folder = Path(root) / _DOWNLOADS
    folder.mkdir(parents=True, exist_ok=True)
    partial = sum(part.stat().st_size for part in folder.glob("*.incomplete"))
    require_room(folder, 2 * ARCHIVE_BYTES - partial, "downloading and unpacking VTAB-1K")
    hidden = utils.are_progress_bars_disabled()  # type: ignore[attr-defined]
    if not (progress and sys.stderr.isatty()):
        utils.disable_progress_bars()  # type: ignore[attr-defined]
    try:
        return _fetch(folder)
    except Exception as error:
        # the client reports the network by errors of its own, of its HTTP library and of Python; those with a number
        # are the disk's
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UnreachableError(
            f"the download of {ARCHIVE_NAME} from {endpoint()} broke off ({reason}): the same command continues it, "
            f"or {remedy}"
        ) from None
    finally:
        if not hidden:
            utils.enable_progress_bars()  # type: ignore[attr-defined]


def _fetch(folder: Path) -> Path:
    """Download by parts of the hub's client, as its ``hf_hub_download`` restarts after every interruption."""
    url = hf_hub_url(REPOSITORY, ARCHIVE_NAME, repo_type="dataset", endpoint=endpoint())
    found = get_hf_file_metadata(url)
    # bytes of another version of the file are another file
    tag = "".join(character for character in found.etag or "" if character.isalnum())
    partial = folder / f"{ARCHIVE_NAME}.{tag[:64]}.incomplete"
    headers = dict(utils.build_hf_headers())  # type: ignore[attr-defined]
    if urlparse(found.location).netloc != urlparse(url).netloc:
        headers.pop("authorization", None)
    with partial.open("ab") as stream:
        http_get(
            found.location,
            stream,
            resume_size=stream.tell(),
            headers=headers,
            expected_size=found.size,
            displayed_filename=ARCHIVE_NAME,
        )
    if len(tag) == 64 and file_digest(partial) != tag:
        partial.unlink()
        raise UnreachableError("the file that arrived is not the hub's")
    return partial.replace(folder / ARCHIVE_NAME)


def remove_download(root: str | Path) -> None:
    """Delete what :func:`download` has left under `root`."""
    shutil.rmtree(Path(root) / _DOWNLOADS, ignore_errors=True)
