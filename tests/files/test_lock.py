"""One process at a time has a run folder."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from mixture_torch.files.lock import FolderLock
from tests.files.recording import process


def holder(folder: Path) -> str:
    return (folder / "mixture.lock").read_text()


def test_lock_has_one_holder(tmp_path: Path) -> None:
    one, other = FolderLock(tmp_path), FolderLock(tmp_path)
    one.acquire()
    for _ in range(2):  # the first attempt leaves the holder's name
        with pytest.raises(ValueError, match=rf"^`log_dir` is in use: process {os.getpid()} on .* writes to `.*`; end"):
            other.acquire()
    one.release()
    other.acquire()
    other.release()


@pytest.mark.parametrize("left", [b"", b"proc", bytes(20), b"process 1 on a host with a long name"])
def test_lock_of_a_killed_process_is_taken_over(tmp_path: Path, left: bytes) -> None:
    (tmp_path / "mixture.lock").write_bytes(left)
    lock = FolderLock(tmp_path)
    lock.acquire()
    assert holder(tmp_path).startswith(f"process {os.getpid()} on ")
    lock.release()


@pytest.mark.parametrize("change", ["deleted", "moved"])
def test_lock_is_taken_anew_if_the_folder_was_moved_or_deleted(tmp_path: Path, change: str) -> None:
    lock, other = FolderLock(tmp_path / "run"), FolderLock(tmp_path / "run")
    lock.acquire()
    shutil.rmtree(tmp_path / "run") if change == "deleted" else (tmp_path / "run").rename(tmp_path / "moved")
    lock.acquire()
    with pytest.raises(ValueError, match="is in use"):
        other.acquire()
    lock.release()


def test_lock_leaves_a_file_that_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "mixture.lock").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"lock` is not the lock of a run folder; move the file away"):
        FolderLock(tmp_path).acquire()
    assert holder(tmp_path) == "mine"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
def test_lock_does_not_wait_for_a_pipe_or_follow_a_link(tmp_path: Path) -> None:
    lock, path, victim = FolderLock(tmp_path), tmp_path / "mixture.lock", tmp_path / "empty"
    os.mkfifo(path)
    with pytest.raises(ValueError, match="is not the lock of a run folder"):
        lock.acquire()
    path.unlink()
    victim.touch()
    path.symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"):
        lock.acquire()
    assert victim.read_bytes() == b""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_lock_is_no_childs(tmp_path: Path) -> None:
    # The child outlives its parent and must not lock out the next process.
    script = """
one = Writer(Path(sys.argv[1]))
one.log(0)
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
def test_lock_does_without_on_a_file_system_that_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", fail)
    lock = FolderLock(tmp_path)
    lock.acquire()
    assert holder(tmp_path)
    lock.release()
