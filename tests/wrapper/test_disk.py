"""Files that grow, files that appear whole, and whose folder it is, whatever the disk says."""

import errno
import os
import shutil
from pathlib import Path

import pytest
from mixture_torch.disk import FolderLock, GrowingFile, Whole, move, write_atomically

from tests.wrapper.conftest import Disk
from tests.wrapper.recording import broken, process, said
from tests.wrapper.samples import contents


def growing(path: Path, *, piece: int = 4, header: bytes = b"HEAD") -> GrowingFile:
    """A file of pieces of one size, as its header is."""

    def whole() -> Whole:
        size = path.stat().st_size
        return Whole(size - size % piece, torn=size % piece)

    return GrowingFile(path, whole=whole, header=header)


def test_growing_file_makes_nothing_before_the_first_piece(tmp_path: Path) -> None:
    file = growing(tmp_path / "folder" / "file")
    file.sync()
    file.close()
    assert not (tmp_path / "folder").exists()


def test_growing_file_has_each_piece_when_append_returns(tmp_path: Path) -> None:
    file = growing(tmp_path / "folder" / "file")
    file.append(b"1111")
    assert contents(tmp_path) == {"folder/file": b"HEAD1111"}
    file.close()


def test_growing_file_goes_on_in_a_file_of_ours(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"HEAD1111")
    file = growing(tmp_path / "file")
    file.append(b"2222")
    file.close()
    assert contents(tmp_path) == {"file": b"HEAD11112222"}


def test_growing_file_replaces_a_tail_by_the_next_piece(tmp_path: Path) -> None:
    file = growing(tmp_path / "file")
    file.append(b"1111")
    file.finish([b"the", b" end"])
    assert contents(tmp_path) == {"file": b"HEAD1111the end"}
    file.append(b"2222")
    file.close()
    assert contents(tmp_path) == {"file": b"HEAD11112222"}


def test_growing_file_replaces_a_tail_by_a_shorter_one(tmp_path: Path) -> None:
    file = growing(tmp_path / "file")
    file.finish([b"the end"])
    file.finish([b"end"])
    file.close()
    assert contents(tmp_path) == {"file": b"HEADend"}


def test_growing_file_knows_its_pieces_from_its_tail(tmp_path: Path) -> None:
    file = growing(tmp_path / "file")
    file.append(b"1111")
    assert (file.end, file.has_tail) == (8, False)
    file.finish([b"the end"])
    assert (file.end, file.has_tail) == (8, True)
    file.close()


def test_growing_file_cut_keeps_the_first_pieces(tmp_path: Path) -> None:
    file = growing(tmp_path / "file")
    for piece in (b"1111", b"2222", b"3333"):
        file.append(piece)
    file.finish([b"the end"])
    file.cut(8)
    assert contents(tmp_path) == {"file": b"HEAD1111"}
    file.append(b"4444")
    file.close()
    assert contents(tmp_path) == {"file": b"HEAD11114444"}


def test_growing_file_drops_what_a_crash_tore_with_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"HEAD1111222")
    file = growing(tmp_path / "file")
    with pytest.warns(UserWarning, match="ended in 3 bytes of an unfinished write"):
        file.append(b"3333")
    file.close()
    assert contents(tmp_path) == {"file": b"HEAD11113333"}


@pytest.mark.filterwarnings("ignore")  # what is said is the next test's
@pytest.mark.parametrize("change", ["delete", "move", "replace", "truncate", "lengthen"])
def test_growing_file_looks_again_where_somebody_changed_it(tmp_path: Path, change: str) -> None:
    path = tmp_path / "file"
    file = growing(path)
    file.append(b"1111")
    file.append(b"2222")
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
    file.append(b"4444")
    file.close()
    assert path.read_bytes() == before + b"4444"


@pytest.mark.parametrize("change", ["delete", "move"])
def test_growing_file_that_vanishes_is_missed_once(tmp_path: Path, change: str) -> None:
    said: list[str] = []
    file = GrowingFile(tmp_path / "file", whole=lambda: Whole(4, 0), say=said.append)
    file.append(b"1111")
    if change == "move":
        (tmp_path / "file").rename(tmp_path / "moved")
    else:
        (tmp_path / "file").unlink()
    file.append(b"2222")
    file.append(b"3333")
    file.close()
    assert said == [f"`{tmp_path / 'file'}` was moved or deleted; a new one is begun."]


def test_growing_file_stays_open_where_files_have_no_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "samestat", lambda *_: False)
    file = growing(tmp_path / "file")
    file.append(b"1111")
    monkeypatch.delattr(os, "open")
    file.append(b"2222")
    file.close()
    assert contents(tmp_path) == {"file": b"HEAD11112222"}


def test_growing_file_leaves_one_that_is_not_ours(tmp_path: Path) -> None:
    def refuse() -> Whole:
        raise ValueError("not ours")

    (tmp_path / "file").write_bytes(b"foreign")
    with pytest.raises(ValueError, match="not ours"):
        GrowingFile(tmp_path / "file", whole=refuse).append(b"1111")
    assert contents(tmp_path) == {"file": b"foreign"}


def test_growing_file_takes_a_piece_whole_or_not_at_all(tmp_path: Path, disk_with_room_for: Disk) -> None:
    file = growing(tmp_path / "file")
    file.append(b"1111")
    with disk_with_room_for(10), pytest.raises(OSError, match="too large"):
        file.append(b"2222")
    assert contents(tmp_path) == {"file": b"HEAD1111"}
    file.append(b"3333")
    file.close()
    assert contents(tmp_path) == {"file": b"HEAD11113333"}


def test_growing_file_tail_that_does_not_fit_leaves_the_pieces(tmp_path: Path, disk_with_room_for: Disk) -> None:
    file = growing(tmp_path / "file")
    file.append(b"1111")
    with disk_with_room_for(12), pytest.raises(OSError, match="too large"):
        file.finish([b"the", b" end"])
    assert contents(tmp_path) == {"file": b"HEAD1111"}
    file.finish([b"the end"])
    file.close()
    assert contents(tmp_path) == {"file": b"HEAD1111the end"}


@pytest.mark.parametrize("is_written", [False, True])
def test_growing_file_undoes_a_piece_that_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_written: bool
) -> None:
    write = os.write

    def interrupt(fd: int, data: bytes) -> int:
        if is_written:
            write(fd, data)
        raise KeyboardInterrupt

    file = growing(tmp_path / "file")
    file.append(b"1111")
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", interrupt)
        with pytest.raises(KeyboardInterrupt):
            file.append(b"2222")
    file.append(b"3333")
    file.close()
    assert contents(tmp_path) == {"file": b"HEAD11113333"}


@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace"])
def test_write_atomically_leaves_the_old_content_where_it_fails(tmp_path: Path, call: str) -> None:
    write_atomically(tmp_path / "file", b"old")
    with broken(call), pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "file", b"new", durable=True)
    assert contents(tmp_path) == {"file": b"old"}


def test_write_atomically_takes_pieces(tmp_path: Path) -> None:
    write_atomically(tmp_path / "file", (piece for piece in (b"one ", memoryview(b"and "), b"two")))
    assert contents(tmp_path) == {"file": b"one and two"}


def test_write_atomically_keeps_a_link_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "file").symlink_to(tmp_path / "real" / "file")
    for data in (b"old", b"new"):
        write_atomically(tmp_path / "file", data)
    assert (tmp_path / "file").is_symlink()
    assert contents(tmp_path / "real") == {"file": b"new"}


def test_write_atomically_takes_no_name_that_a_user_would(tmp_path: Path) -> None:
    (tmp_path / "file.tmp").write_bytes(b"mine")
    write_atomically(tmp_path / "file", b"new")
    assert contents(tmp_path) == {"file": b"new", "file.tmp": b"mine"}


def test_move_to_another_file_system_copies(tmp_path: Path) -> None:
    def replace(source: Path, target: Path) -> None:
        if Path(source).parent != Path(target).parent:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        original(source, target)

    original = os.replace
    (tmp_path / "one").write_text("one")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", replace)
        move([tmp_path / "one"], tmp_path / "folder")
    assert contents(tmp_path) == {"folder/one": b"one"}


def test_move_keeps_names_and_contents(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("one", "two")]
    for path in paths:
        path.write_text(path.name)
    move(paths, tmp_path / "new" / "folder")
    assert contents(tmp_path) == {"new/folder/one": b"one", "new/folder/two": b"two"}


def test_lock_is_there_until_it_is_released(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path / "run")
    lock.acquire()
    assert os.listdir(tmp_path / "run") == ["mixture.lock"]
    lock.release()
    assert os.listdir(tmp_path / "run") == []


def test_lock_is_one_holders_alone(tmp_path: Path) -> None:
    one, other = FolderLock(tmp_path), FolderLock(tmp_path)
    one.acquire()
    with pytest.raises(
        ValueError, match=rf"^`log_dir` must be .*, which process {os.getpid()} on .* has open; end that"
    ):
        other.acquire()
    one.release()
    other.acquire()
    other.release()


def test_lock_taken_twice_is_taken_once(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    lock.acquire()
    lock.acquire()
    lock.release()
    assert not lock.is_held


def test_lock_left_by_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / "mixture.lock").write_text("process 1 on a host that is long gone, whatever its name may be")
    lock = FolderLock(tmp_path)
    lock.acquire()
    assert (tmp_path / "mixture.lock").read_text().startswith(f"process {os.getpid()} on ")
    lock.release()


def test_lock_is_taken_anew_where_the_folder_was_deleted(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path / "run")
    lock.acquire()
    shutil.rmtree(tmp_path / "run")
    lock.acquire()
    assert os.listdir(tmp_path / "run") == ["mixture.lock"]
    lock.release()


def test_lock_is_taken_anew_where_the_folder_was_moved(tmp_path: Path) -> None:
    lock, other = FolderLock(tmp_path / "run"), FolderLock(tmp_path / "run")
    lock.acquire()
    (tmp_path / "run").rename(tmp_path / "moved")
    lock.acquire()
    with pytest.raises(ValueError, match="has open; end that"):
        other.acquire()
    lock.release()


@pytest.mark.parametrize("left", [b"", b"proc", bytes(20)], ids=["empty", "torn", "zeros"])
def test_lock_left_by_a_power_cut_is_taken_over(tmp_path: Path, left: bytes) -> None:
    (tmp_path / "mixture.lock").write_bytes(left)
    lock = FolderLock(tmp_path)
    lock.acquire()
    assert (tmp_path / "mixture.lock").read_text().startswith(f"process {os.getpid()} on ")
    lock.release()


def test_lock_leaves_a_file_that_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "mixture.lock").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"lock` must be the lock of a run folder, got something else; move the file"):
        FolderLock(tmp_path).acquire()
    assert contents(tmp_path) == {"mixture.lock": b"mine"}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
def test_lock_leaves_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "mixture.lock")
    with pytest.raises(ValueError, match="must be the lock of a run folder"):
        FolderLock(tmp_path).acquire()


def test_lock_of_a_folder_that_another_took_over_is_left_to_it(tmp_path: Path) -> None:
    lock, other = FolderLock(tmp_path / "run"), FolderLock(tmp_path / "run")
    lock.acquire()
    shutil.rmtree(tmp_path / "run")
    other.acquire()
    lock.release()
    assert os.listdir(tmp_path / "run") == ["mixture.lock"]
    other.release()


def test_lock_is_no_childs(tmp_path: Path) -> None:
    # The child outlives its parent and must not lock out who comes next.
    script = """
from mixture_torch.disk import FolderLock
lock = FolderLock(Path(sys.argv[1]))
lock.acquire()
if os.fork() == 0:
    sys.stdin.read()  # until the test is done
    os._exit(0)
print("held", flush=True)
os._exit(0)
"""
    with process(script, tmp_path) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "held\n"
        parent.wait(60)
        lock = FolderLock(tmp_path)
        lock.acquire()
        lock.release()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_lock_does_without_where_the_file_system_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    fcntl = pytest.importorskip("fcntl")

    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", fail)
    lock = FolderLock(tmp_path)
    with said() as messages:
        lock.acquire()
        lock.release()
    assert messages == []
    assert os.listdir(tmp_path) == []


def test_lock_is_taken_where_files_have_no_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "samestat", lambda *_: False)
    lock = FolderLock(tmp_path)
    lock.acquire()
    assert lock.is_held
    lock.release()
