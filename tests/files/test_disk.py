"""Files that grow and files that are replaced, whatever the disk says."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mixture_torch.files.disk import GrowingFile, move, write_atomically
from tests.files.recording import broken
from tests.wrapper.samples import contents


class Pieces(GrowingFile):
    """A file of pieces of four bytes, which is how long its header is."""

    def __init__(self, path: Path, say: Callable[[str], None] = print) -> None:
        super().__init__(path, header=b"HEAD", say=say)

    def write(self, piece: bytes, *, is_tail: bool = False) -> None:
        self.open()
        self.put(piece, is_tail=is_tail)

    def look(self) -> int:
        if not self.path.exists():
            return 0
        if not self.path.read_bytes().startswith(b"HEAD"[: self.path.stat().st_size]):
            raise ValueError("not ours")
        return self.path.stat().st_size // 4 * 4


def test_growing_file_overwrites_a_tail_by_what_comes_next(tmp_path: Path) -> None:
    file = Pieces(tmp_path / "file")
    file.write(b"1111")
    file.write(b"the end", is_tail=True)
    assert (contents(tmp_path), file.end) == ({"file": b"HEAD1111the end"}, 8)
    file.write(b"end", is_tail=True)
    assert contents(tmp_path) == {"file": b"HEAD1111end"}
    file.write(b"2222")
    file.cut(8)
    assert contents(tmp_path) == {"file": b"HEAD1111"}
    file.close()


@pytest.mark.parametrize("change", ["delete", "move", "replace", "truncate", "lengthen"])
def test_growing_file_looks_again_if_somebody_changed_it(tmp_path: Path, change: str) -> None:
    said: list[str] = []
    path = tmp_path / "file"
    file = Pieces(path, said.append)
    file.write(b"1111")
    file.write(b"2222")
    if change == "delete":
        path.unlink()
    elif change == "move":
        path.rename(tmp_path / "moved")
    elif change == "replace":
        os.link(path, tmp_path / "backup")
        write_atomically(path, b"HEADaaaabbbb")
    else:
        path.write_bytes(b"HEAD" if change == "truncate" else b"HEAD111122223333")
    before = path.read_bytes() if path.exists() else b"HEAD"
    file.write(b"4444")
    file.write(b"5555")
    file.close()
    assert path.read_bytes() == before + b"44445555"
    vanished = change in ("delete", "move")
    assert said == [f"`{path}` was moved or deleted; a new one is begun."] * vanished


def test_growing_file_leaves_one_that_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"foreign")
    with pytest.raises(ValueError, match="not ours"):
        Pieces(tmp_path / "file").write(b"1111")
    assert contents(tmp_path) == {"file": b"foreign"}


@pytest.mark.parametrize("durable", [False, True])
def test_write_atomically_replaces_the_content(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "folder" / "file"
    write_atomically(path, b"old", durable=durable)
    write_atomically(path, (piece for piece in (b"one ", memoryview(b"and "), b"two")), durable=durable)
    assert contents(tmp_path) == {"folder/file": b"one and two"}
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace"])
def test_write_atomically_leaves_the_old_content_if_it_fails(tmp_path: Path, call: str) -> None:
    write_atomically(tmp_path / "file", b"old")
    with broken(call), pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "file", b"new", durable=True)
    assert contents(tmp_path) == {"file": b"old"}


def test_write_atomically_keeps_a_link_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "file").symlink_to(tmp_path / "real" / "file")
    for data in (b"old", b"new"):
        write_atomically(tmp_path / "file", data)
    assert (tmp_path / "file").is_symlink()
    assert contents(tmp_path / "real") == {"file": b"new"}


@pytest.mark.parametrize("plant", ["link", "pipe", "left by a killed process"])
def test_write_atomically_neither_follows_nor_opens_what_has_the_temporary_name(tmp_path: Path, plant: str) -> None:
    (tmp_path / "victim").write_bytes(b"mine")
    temporary = tmp_path / ".file.mixture_torch.tmp"
    if plant == "link":
        temporary.symlink_to(tmp_path / "victim")
    elif plant == "pipe":
        os.mkfifo(temporary)
    else:
        temporary.write_bytes(b"a longer content than the new one")
    write_atomically(tmp_path / "file", b"new")
    assert contents(tmp_path) == {"file": b"new", "victim": b"mine"}


def test_move_to_another_file_system_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def replace(source: Path, target: Path) -> None:
        if Path(source).parent != Path(target).parent:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        original(source, target)

    original = os.replace
    (tmp_path / "one").write_text("one")
    monkeypatch.setattr(os, "replace", replace)
    move([tmp_path / "one"], tmp_path / "folder")
    assert contents(tmp_path) == {"folder/one": b"one"}
