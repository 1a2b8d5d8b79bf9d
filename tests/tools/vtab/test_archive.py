from __future__ import annotations

import hashlib
import http.server
import io
import shutil
import stat
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from eva_lightning.errors import InputError
from tests.eva_lightning.vision.fakes import make_task
from tools.vtab import archive
from tools.vtab.archive import download, downloaded, find_archives, find_members, remove_download, unpack


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def zip_folder(folder: Path, file: Path, prefix: str = "") -> Path:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as opened:
        for name, content in files_below(folder).items():
            opened.writestr(prefix + name, content)
    return file


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two tasks in miniature."""
    make_task(tmp_path / "data", "kitti")
    make_task(tmp_path / "data", "dmlab", classes=6)
    return tmp_path / "data"


@pytest.mark.parametrize("prefix", ["", "vtab-1k/", "some/where/vtab-1k/", "./"])
def test_unpacks_tasks_wherever_they_lie(tmp_path: Path, data: Path, prefix: str) -> None:
    members = find_members([zip_folder(data, tmp_path / "vtab-1k.zip", prefix)])
    assert set(members) == {"kitti", "dmlab"}
    assert unpack(members, tmp_path / "root") == {"kitti": 40, "dmlab": 40}
    assert files_below(tmp_path / "root") == files_below(data)


def test_only_the_tasks_asked_for(tmp_path: Path, data: Path) -> None:
    members = find_members([zip_folder(data, tmp_path / "vtab-1k.zip")])
    unpack({"kitti": members["kitti"]}, tmp_path / "root")
    assert [path.name for path in (tmp_path / "root").iterdir()] == ["kitti"]


@pytest.mark.parametrize("prefix", ["", "kitti/", "KITTI-vtab/"])
def test_zip_of_one_task(tmp_path: Path, data: Path, prefix: str) -> None:
    members = find_members([zip_folder(data / "kitti", tmp_path / "kitti.zip", prefix)])
    assert set(members) == {"kitti"}
    unpack(members, tmp_path / "root", workers=3)
    assert files_below(tmp_path / "root" / "kitti") == files_below(data / "kitti")


def test_junk_and_links_are_passed_over(tmp_path: Path, data: Path) -> None:
    file = zip_folder(data, tmp_path / "vtab-1k.zip")
    link = zipfile.ZipInfo("kitti/link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(file, "a") as opened:
        opened.writestr("__MACOSX/kitti/._test.txt", "junk")
        opened.writestr("kitti/.DS_Store", "junk")
        opened.writestr("kitti/images/._test_000.jpg", "junk")
        opened.writestr("README.md", "about")
        opened.writestr(link, "/etc/passwd")
        opened.mkdir("kitti/empty") if hasattr(opened, "mkdir") else None
    unpack(find_members([file]), tmp_path / "root")
    assert files_below(tmp_path / "root") == files_below(data)


@pytest.mark.parametrize(
    "name", ["../evil", "kitti/../../evil", "/kitti/evil", "kitti\\..\\..\\evil", "C:\\kitti\\evil"]
)
def test_path_outside_is_refused_and_nothing_written(tmp_path: Path, data: Path, name: str) -> None:
    file = zip_folder(data, tmp_path / "vtab-1k.zip")
    with zipfile.ZipFile(file, "a") as opened:
        opened.writestr(name, "evil")
    with pytest.raises(
        ValueError,
        match=r"nothing was unpacked from .*vtab-1k\.zip: a path in it must be a relative path .*evil'",
    ):
        find_members([file])
    assert not (tmp_path / "root").exists()


def test_what_is_there_is_kept_and_what_differs_replaced(tmp_path: Path, data: Path) -> None:
    members = find_members([zip_folder(data, tmp_path / "vtab-1k.zip")])
    unpack(members, tmp_path / "root")
    assert unpack(members, tmp_path / "root") == {"kitti": 0, "dmlab": 0}
    folder = tmp_path / "root" / "kitti"
    (folder / "images/test_000.jpg").unlink()
    (folder / "images/test_001.jpg").write_bytes(b"short")
    (folder / "test.txt").write_text("mine\n")
    (folder / "notes.md").write_text("mine\n")
    same_size = folder / "images/test_002.jpg"
    same_size.write_bytes(b"x" * same_size.stat().st_size)
    assert unpack(members, tmp_path / "root", replace={"kitti": ["images/test_002.jpg"]})["kitti"] == 3
    assert (folder / "test.txt").read_text() == (folder / "notes.md").read_text() == "mine\n"
    assert unpack(members, tmp_path / "root", replace={"kitti": ["test.txt"]})["kitti"] == 1
    (folder / "notes.md").unlink()
    assert files_below(tmp_path / "root") == files_below(data)


def test_killed_half_way_nothing_counts_as_complete_and_the_rest_follows(tmp_path: Path, data: Path) -> None:
    members = find_members([zip_folder(data, tmp_path / "vtab-1k.zip")])

    def stop(task: str, done: int, total: int) -> None:
        if task == "dmlab" and done > total // 2:
            raise KeyboardInterrupt

    order = {task: members[task] for task in ("kitti", "dmlab")}
    with pytest.raises(KeyboardInterrupt):
        unpack(order, tmp_path / "root", advance=stop)
    assert {path.name for path in (tmp_path / "root").iterdir()} == {"kitti", ".dmlab.part"}
    written = unpack(order, tmp_path / "root")
    assert written["kitti"] == 0
    assert 0 < written["dmlab"] < 40
    assert files_below(tmp_path / "root") == files_below(data)


@pytest.mark.parametrize("workers", [1, 3])
def test_damaged_archive_is_named_and_no_wrong_file_remains(tmp_path: Path, data: Path, workers: int) -> None:
    file = tmp_path / "vtab-1k.zip"
    with zipfile.ZipFile(file, "w") as opened:  # stored: a changed byte is found by its checksum alone
        for name, content in files_below(data).items():
            opened.writestr(name, content)
    content = bytearray(file.read_bytes())
    image = (data / "kitti/images/val200_003.jpg").read_bytes()
    content[content.index(image) + len(image) // 2] ^= 255
    file.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"vtab-1k\.zip at kitti/images/val200_003\.jpg is damaged \(.*\): download it"
    ):
        unpack(find_members([file]), tmp_path / "root", workers=workers)
    assert not (tmp_path / "root" / "kitti").exists()
    assert not list((tmp_path / "root" / ".kitti.part").rglob("*val200_003*"))


def test_half_an_archive_and_no_archive(tmp_path: Path, data: Path) -> None:
    file = zip_folder(data, tmp_path / "vtab-1k.zip")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"zip file .*vtab-1k\.zip is damaged .*: download it again"):
        find_members([file])
    file.write_text("<html>404</html>")
    with pytest.raises(ValueError, match=r"zip file .*vtab-1k\.zip is damaged"):
        find_members([file])


def test_archives_are_files_lists_and_folders(tmp_path: Path, data: Path) -> None:
    zips = tmp_path / "zips"
    zips.mkdir()
    names = [zip_folder(data / task, zips / f"{task}.zip") for task in ("dmlab", "kitti")]
    assert find_archives(names[:1]) == names[:1]
    assert find_archives(names) == names
    assert find_archives([zips]) == names
    assert set(find_members(find_archives([zips]))) == {"kitti", "dmlab"}
    with pytest.raises(FileNotFoundError, match=r"archive .*none\.zip does not exist: pass vtab-1k\.zip"):
        find_archives([tmp_path / "none.zip"])
    with pytest.raises(
        ValueError, match=r"data is no archive but an unpacked folder \(it holds dmlab, kitti\): pass it as"
    ):
        find_archives([data])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no zip file"):
        find_archives([tmp_path / "empty"])


def test_too_little_room_is_said_before_anything_is_written(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 10, 10))  # type: ignore[attr-defined]
    members = find_members([zip_folder(data, tmp_path / "vtab-1k.zip")])
    with pytest.raises(ValueError, match=r"unpacking needs .* KiB and .*root has 10 B free: make room"):
        unpack(members, tmp_path / "root")
    assert list((tmp_path / "root").iterdir()) == []


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hugging Face hub as the download of one file needs, breaking off once when asked to."""

    content = b""
    served = b""
    break_after: int | None = None
    ranges: ClassVar[list[str | None]] = []

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        if not self.path.startswith("/datasets/XiN0919/VTAB-1k/resolve/main/"):
            self.send_error(404)
            return
        wanted = self.headers.get("Range")
        if body:
            type(self).ranges.append(wanted)
        start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted and body else 0
        data = self.served[start:]
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{hashlib.sha256(self.content).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Accept-Ranges", "bytes")
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(self.content) - 1}/{len(self.content)}")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body and self.break_after is not None:
            self.wfile.write(data[: max(0, self.break_after - start)])
            self.close_connection = True
        elif body:
            self.wfile.write(data)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, data: Path) -> Iterator[type[Hub]]:
    """A hub on this machine that holds the archive of `data`."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as opened:
        for name, content in files_below(data).items():
            opened.writestr(f"vtab-1k/{name}", content)
    Hub.content = Hub.served = stream.getvalue()
    Hub.break_after, Hub.ranges = None, []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield Hub
    server.shutdown()
    server.server_close()
    thread.join()


def test_download_unpacks_to_the_data(tmp_path: Path, data: Path, hub: type[Hub]) -> None:
    root = tmp_path / "root"
    file = download(root, "nothing is here", progress=False)
    assert file.read_bytes() == hub.content
    assert downloaded(root) == file
    assert download(root, "nothing is here", progress=False) == file
    assert len(hub.ranges) == 1
    unpack(find_members([file]), root)
    remove_download(root)
    assert files_below(root) == files_below(data)


def test_broken_download_goes_on_where_it_stopped(
    tmp_path: Path, hub: type[Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the client's own attempts
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    root = tmp_path / "root"
    hub.break_after = 5000
    with pytest.raises(
        ConnectionError, match=r"download of vtab-1k\.zip .* broke off .*: the same command continues it"
    ):
        download(root, "nothing is here", progress=False)
    assert downloaded(root) is None
    got = sum(part.stat().st_size for part in root.rglob("*.incomplete"))
    assert got == 5000
    hub.break_after, hub.ranges = None, []
    assert download(root, "nothing is here", progress=False).read_bytes() == hub.content
    assert hub.ranges == [f"bytes={got}-"]


def test_what_arrives_is_compared_with_the_hubs_digest(tmp_path: Path, hub: type[Hub]) -> None:
    hub.served = hub.content[:-1] + b"x"
    with pytest.raises(ConnectionError, match=r"broke off \(the file that arrived is not the hub's\)"):
        download(tmp_path / "root", "nothing is here", progress=False)
    assert downloaded(tmp_path / "root") is None
    hub.served = hub.content
    assert download(tmp_path / "root", "nothing is here", progress=False).read_bytes() == hub.content


def test_file_that_the_hub_does_not_have(tmp_path: Path, hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "REPOSITORY", "somebody/else")
    with pytest.raises(
        ConnectionError, match=r"broke off \(.*\): the same command continues it, or download vtab-1k\.zip"
    ):
        download(tmp_path / "root", "nothing is here", progress=False)


def test_no_room_for_the_download(tmp_path: Path, hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 10, 5_000_000_000))  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"downloading and unpacking VTAB-1K needs 8\.8 GiB and .* has 4\.7 GiB free"):
        download(tmp_path / "root", "nothing is here", progress=False)
    assert hub.ranges == []


@pytest.mark.parametrize(
    ("compression", "names", "message"),
    [
        (zipfile.ZIP_LZMA, ("kitti/a.jpg",), "packed in an unusual way"),
        (zipfile.ZIP_BZIP2, ("kitti/a.jpg",), "packed in an unusual way"),
        (zipfile.ZIP_STORED, ("kitti/a", "kitti/a/b.jpg"), "holds 'kitti/a' as a file and as a folder"),
    ],
)
def test_unusual_archives_are_refused(tmp_path: Path, compression: int, names: tuple[str, ...], message: str) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", compression) as opened:
        for name in names:
            opened.writestr(name, b"x")
    with pytest.raises(InputError, match=message):
        find_members([tmp_path / "a.zip"])


def test_a_file_of_gigabytes_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("kitti/a.jpg", bytes(2**20))
    content = (tmp_path / "a.zip").read_bytes()
    # as hostile archives do: the sizes that the list of contents gives are not the true ones
    (tmp_path / "a.zip").write_bytes(content.replace((2**20).to_bytes(4, "little"), (2**31).to_bytes(4, "little")))
    with pytest.raises(InputError, match=r"of 2\.0 GiB, no image is so large"):
        find_members([tmp_path / "a.zip"])
