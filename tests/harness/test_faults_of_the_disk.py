"""A disk that is full, gone or refuses costs no row: training goes on, and all is in the files when it works again."""

import gc
import re
import shutil
import subprocess
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

import pytest

from tests.files.recording import said
from tests.harness.disks import Disk, Instant, refuses
from tests.harness.folders import found, loaded
from tests.harness.runs import SCENARIOS, Operation, Run, at_every_instant, scenarios
from tests.wrapper.samples import contents

resource = pytest.importorskip("resource")

BEFORE: list[Operation] = [(0, step) for step in range(5)]
DURING: list[Operation] = [(1, step) for step in range(5, 60)]  # more than the room left in a page
AFTER: list[Operation] = [(2, 60), "flush"]

Fault = Callable[[Path], AbstractContextManager[None]]
modes = pytest.mark.parametrize("scores_mode", ["append", "per_step"])


@contextmanager
def limit(kind: int, value: int) -> Iterator[None]:
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (value, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


@contextmanager
def no_file_may_grow(folder: Path) -> Iterator[None]:
    scores = folder / "mixture_scores.pt"
    room = scores.stat().st_size if scores.exists() else 0
    with limit(resource.RLIMIT_FSIZE, room + 100):  # so that a part of the next piece is written
        yield


@contextmanager
def no_file_may_be_opened(folder: Path) -> Iterator[None]:
    with limit(resource.RLIMIT_NOFILE, 0):
        yield


@contextmanager
def disk_is_full(folder: Path) -> Iterator[None]:
    filler = folder.parent / "filler"
    with pytest.raises(OSError, match="No space left"):
        filler.write_bytes(bytes(2**20))  # takes what there is, and then raises
    try:
        yield
    finally:
        filler.unlink()


@contextmanager
def disk_is_read_only(folder: Path) -> Iterator[None]:
    subprocess.run(["mount", "-o", "remount,ro", folder.parent], check=True)
    try:
        yield
    finally:
        subprocess.run(["mount", "-o", "remount,rw", folder.parent], check=True)


@contextmanager
def folder_is_elsewhere(folder: Path) -> Iterator[None]:
    folder.rename(folder.parent / "elsewhere")
    folder.write_bytes(b"in the way")
    try:
        yield
    finally:
        folder.unlink()
        (folder.parent / "elsewhere").rename(folder)


# What happens, whether the files have to be closed before for it to be felt, and whether it needs a disk of its own.
FAULTS: dict[str, tuple[Fault, bool, bool]] = {
    "no file may grow": (no_file_may_grow, False, False),
    "no file may be opened": (no_file_may_be_opened, True, False),
    "folder is elsewhere": (folder_is_elsewhere, True, False),
    "disk is full": (disk_is_full, False, True),
    "disk was full from the first row on": (disk_is_full, True, True),
    "disk is read-only": (disk_is_read_only, True, True),
}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 512 KiB; skips where nobody may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "none", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs to mount a small disk, which this user may not")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def undisturbed(folder: Path, operations: list[Operation], scores_mode: str) -> dict[str, bytes]:
    """What is in the folder of a run that nothing happens to."""
    run = Run(folder / "undisturbed", scores_mode)
    run.does([*operations, "close"])
    return contents(folder / "undisturbed")


@modes
@pytest.mark.parametrize("name", FAULTS)
def test_fault_that_passes_costs_no_byte(
    tmp_path: Path, request: pytest.FixtureRequest, name: str, scores_mode: str
) -> None:
    fault, closed, needs_disk = FAULTS[name]
    place = request.getfixturevalue("small_disk") if needs_disk else tmp_path
    run = Run(place / "run", scores_mode)
    run.does([*BEFORE, *(["close"] if closed else [])])
    before = found(place / "run")
    with said() as during, fault(place / "run"):
        run.does(DURING)
    assert [message.split(" could not be written (")[0] for message in during] == [f"`{place / 'run'}`"]
    with said() as after:
        run.does(AFTER)
    assert after == []
    assert before.rows == run.holds().rows[:5]
    assert loaded(place / "run", scores_mode) == run.holds().entries
    run.does(["close"])
    assert contents(place / "run") == undisturbed(tmp_path, [*BEFORE, *DURING, *AFTER], scores_mode)


GROWING = {
    "append": ["mixture.csv", "mixture_extra.csv", "mixture_scores.pt"],
    "per_step": ["mixture.csv", "mixture_extra.csv"],
}


@modes
@pytest.mark.parametrize("in_the_way", [False, True])
def test_folder_that_is_deleted_has_all_later_rows(tmp_path: Path, scores_mode: str, in_the_way: bool) -> None:
    folder = tmp_path / "run"
    run = Run(folder, scores_mode)
    run.does([*BEFORE, "flush"])
    shutil.rmtree(folder)
    if in_the_way:
        folder.write_bytes(b"in the way")
    with said() as during:
        run.does(DURING)
    if in_the_way:
        assert folder.read_bytes() == b"in the way"
        folder.unlink()
    with said() as after:
        run.does([*AFTER, "close"])
    begun_anew = [f"`{folder / name}` was moved or deleted; a new one is begun." for name in GROWING[scores_mode]]
    assert [message for message in [*during, *after] if message not in begun_anew] == during[: int(in_the_way)]
    assert sorted(message for message in [*during, *after] if message in begun_anew) == sorted(begun_anew)
    later = run.holds(run.logged[len(BEFORE) :])
    assert found(folder) == later
    assert loaded(folder, scores_mode) == later.entries


@modes
def test_close_says_how_much_a_disk_does_not_take(small_disk: Path, scores_mode: str) -> None:
    run = Run(small_disk / "run", scores_mode)
    run.does(BEFORE)
    with disk_is_full(small_disk / "run"):
        with said():
            run.does(DURING)
        in_files = found(small_disk / "run")
        rows, entries = (len(run.logged) - len(items) for items in in_files[:2])
        with said() as messages:
            run.does(["close"])
        assert len(messages) == 1
        lacking = rf"{rows} rows and {entries} entries of responsibilities( and \d+ snapshots)? are "
        assert re.search(lacking + "kept in memory", messages[0])
        with said() as messages:
            del run
        assert re.search(lacking + "lost", messages[0])
    assert found(small_disk / "run") == in_files


@modes
@pytest.mark.filterwarnings("ignore")
def test_fault_keeps_nobody_alive(tmp_path: Path, scores_mode: str) -> None:
    run = Run(tmp_path / "run", scores_mode)
    run.does(BEFORE)
    with no_file_may_grow(tmp_path):
        run.does(["close"])
        gone = weakref.ref(run.estimator)
        gc.disable()  # errors keep alive whoever called, in circles too
        del run
        gc.enable()
        assert gone() is None


def refused(
    folder: Path, scenario: str, scores_mode: str, instant: Instant, *, lasts: int, expected: dict[str, bytes]
) -> None:
    """Has a disk refuse for so many calls, and compares what is there in the end."""
    run = Run(folder / "run", scores_mode)
    with Disk(instant, refuses, lasts=lasts).under():
        run.does([operation for operation in SCENARIOS[scenario] if operation != "reopen"])
    with Disk().under():
        run.does(["close"])
    assert contents(folder / "run") == expected


def at_every_call(folder: Path, scenario: str, scores_mode: str, *, lasts: int, step: int = 1) -> int:
    """Has a disk refuse from every instant on, or every so-manieth, and returns at how many."""
    expected = undisturbed(folder, SCENARIOS[scenario], scores_mode)
    happens = partial(refused, lasts=lasts, expected=expected)
    return at_every_instant(happens, folder / "disturbed", scenario, scores_mode, step=step)


@scenarios
@pytest.mark.filterwarnings("ignore")
def test_refusal_of_some_calls_costs_no_byte(tmp_path: Path, scenario: str, scores_mode: str) -> None:
    assert at_every_call(tmp_path, scenario, scores_mode, lasts=1, step=31)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_any_call_may_be_refused_and_no_byte_is_lost(tmp_path: Path) -> None:
    count = 0
    for lasts in (1, 2, 3, 10, 40):
        for scenario in SCENARIOS:
            for scores_mode in ("append", "per_step"):
                folder = tmp_path / str(lasts) / scenario / scores_mode
                folder.mkdir(parents=True)
                count += at_every_call(folder, scenario, scores_mode, lasts=lasts)
    print(f"\n{count} refusals by the disk survived, bytes that differ: 0")
