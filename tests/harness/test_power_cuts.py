"""A power cut at any call that changes the disk loses no row that had been flushed."""

import os
import stat
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.harness.disks import FOR_GOOD, Died, Disk, Instant, dies
from tests.harness.folders import KINDS, found, loaded
from tests.harness.runs import SCENARIOS, Operation, Run, at_every_instant

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="asks /proc for the name of an open file"),
]

GO_ON: list[Operation] = [(2, 20), (2, 21), "flush", (2, 22), "close"]
scenarios = pytest.mark.parametrize("scenario", SCENARIOS)


class Cache(Disk):
    """A disk behind a cache, of which a power cut leaves as little as file systems with a journal allow.

    A file that is synced is there, with its name; another name, or none, is there when its folder is synced.
    """

    def __init__(self, at: Instant) -> None:
        super().__init__(at, dies, lasts=FOR_GOOD)
        self._data: dict[int, bytes] = {}  # of each file, by inode, as last synced
        self._names: dict[Path, bytes] = {}  # that are on the disk

    def done(self, name: str, result: Any, arguments: tuple[Any, ...]) -> None:
        """Keeps account of what is on the disk."""
        if name == "open" and arguments[1] & os.O_CREAT and not os.fstat(result).st_size:
            self._data.pop(os.fstat(result).st_ino, None)  # a number that an earlier file had
        if name == "fsync":
            path, status = Path(os.readlink(f"/proc/self/fd/{arguments[0]}")), os.fstat(arguments[0])
            if stat.S_ISDIR(status.st_mode):
                self._names = {name: data for name, data in self._names.items() if name.parent != path}
                self._names |= {file: self._data.get(file.stat().st_ino, b"") for file in path.glob("*.*")}
            else:
                self._names[path] = self._data[status.st_ino] = path.read_bytes()

    def leaves(self, folder: Path) -> list[dict[str, bytes]]:
        """Returns what may be found: nothing but what was synced; or all names and sizes, but of no other data."""
        now = {}
        for file in filter(Path.is_file, folder.glob("*.*")):
            size, data = file.stat().st_size, self._data.get(file.stat().st_ino, b"")
            now[file.name] = data[:size].ljust(size, b"\0")
        return [{name.name: data for name, data in self._names.items() if not name.is_dir()}, now]


def cut(folder: Path, scenario: str, scores_mode: str, instant: Instant) -> None:
    """Cuts the power at an instant, and goes on."""
    run, disk = Run(folder / "run", scores_mode), Cache(instant)
    with disk.under(), pytest.raises(Died):
        run.does(SCENARIOS[scenario])
    flushed, logged = run.holds(run.logged[: run.flushed]), run.holds()
    for files in disk.leaves(run.folder):
        with tempfile.TemporaryDirectory(dir=folder) as place:
            left = Path(place)
            for name, data in files.items():
                (left / name).write_bytes(data)
            now = found(left)
            last = run.logging.record if run.logging else [None] * len(KINDS)
            for kind, record in list(zip(KINDS, last, strict=True))[:3]:  # no promise is made of snapshots
                there, was, may_be = (
                    Counter(getattr(of, kind) + getattr(of, f"{kind}_aside")) for of in (now, flushed, logged)
                )
                assert was <= there
                assert set(there) <= {*may_be, record}
            after = Run(left, scores_mode, now)
            with Disk().under():
                after.does(GO_ON)
            assert found(left) == after.holds()
            assert loaded(left, scores_mode) == after.holds().entries
    with Disk().under():
        run.does(["close"])


@scenarios
def test_power_cut_at_some_calls_loses_no_flushed_row(tmp_path: Path, scenario: str) -> None:
    assert at_every_instant(cut, tmp_path, scenario, "append", step=31)


@pytest.mark.slow
def test_power_may_be_cut_at_any_call_and_no_flushed_row_is_lost(tmp_path: Path) -> None:
    count = sum(at_every_instant(cut, tmp_path / scenario, scenario, "append") for scenario in SCENARIOS)
    print(f"\n{count} power cuts survived in two ways each, flushed rows lost: 0")
