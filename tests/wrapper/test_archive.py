"""That the scores file is what torch and zip say it is, and that all of it can be told from its records."""

import os
import pickletools
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mixture_torch.archive import HEADER, MARKER, Entry, archive, parse, record, tail
from mixture_torch.scan import Scan
from mixture_torch.scores import AppendScores
from torch import Tensor

Items = list[tuple[int, int, np.ndarray[Any, np.dtype[np.float32]]]]

ENTRIES: Items = [
    (7, 1, np.full((3, 2), np.nan, np.float32)),
    (2**63 - 1, 2**63 - 2, np.random.default_rng(0).random((5, 3), np.float32)),
    (7, 1, np.zeros((0, 8), np.float32)),  # the same step again, and a batch of nobody
    (8, 1, np.zeros((4, 0), np.float32)),
    (9, 1, np.random.default_rng(1).random((100, 8), np.float32)),
]
WAYS: list[dict[str, bool]] = [
    {},
    {"weights_only": True},
    {"weights_only": False},
    {"mmap": True},
    {"mmap": True, "weights_only": False},
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """An archive of ENTRIES."""
    path = tmp_path / "mixture_scores.pt"
    path.write_bytes(b"".join(archive(ENTRIES)))
    return path


def scanned(path: Path) -> list[Entry]:
    return [entry for entry, _ in Scan(path)]


# What torch and zip say


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_archive_loads_as_the_list(path: Path, way: dict[str, bool]) -> None:
    found = torch.load(path, **way)
    assert [list(entry) for entry in found] == [["step", "epoch", "responsibilities"]] * len(ENTRIES)
    assert [(entry["step"], entry["epoch"]) for entry in found] == [entry[:2] for entry in ENTRIES]
    assert [entry["responsibilities"].numpy().tobytes() for entry in found] == [R.tobytes() for _, _, R in ENTRIES]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_archive_loads_tensors_as_torch_makes_them(path: Path, way: dict[str, bool]) -> None:
    def kind(tensor: Tensor) -> tuple[object, ...]:
        return tensor.shape, tensor.stride(), tensor.dtype, tensor.requires_grad, tensor.untyped_storage().nbytes()

    found = [kind(entry["responsibilities"]) for entry in torch.load(path, **way)]
    assert found == [kind(torch.zeros(R.shape)) for _, _, R in ENTRIES]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_archive_of_nothing_loads_as_an_empty_list(tmp_path: Path, way: dict[str, bool]) -> None:
    (tmp_path / "empty.pt").write_bytes(b"".join(archive([])))
    assert torch.load(tmp_path / "empty.pt", **way) == []


def test_archive_loads_tensors_that_share_nothing(tmp_path: Path) -> None:
    (tmp_path / "same.pt").write_bytes(b"".join(archive(ENTRIES[:1] * 2)))
    first, second = torch.load(tmp_path / "same.pt")
    first["responsibilities"].zero_()
    assert second["responsibilities"].isnan().all()


def test_archive_is_a_sound_zip(path: Path) -> None:
    with zipfile.ZipFile(path) as zipped:
        assert zipped.testzip() is None
        names = zipped.namelist()
        assert (names[:2], names[-1]) == (
            ["mixture_scores/version", "mixture_scores/byteorder"],
            "mixture_scores/data.pkl",
        )
        assert len(set(names)) == len(ENTRIES) + 3


def test_archive_data_are_aligned(path: Path) -> None:
    assert [entry["responsibilities"].data_ptr() % 64 for entry in torch.load(path, mmap=True)] == [0] * len(ENTRIES)
    assert {entry.offset % 64 for entry in scanned(path)} == {0}


def test_archive_pickle_is_sound(path: Path) -> None:
    with zipfile.ZipFile(path) as zipped:
        opcodes = list(pickletools.genops(zipped.read("mixture_scores/data.pkl")))
    assert opcodes[-1][0].name == "STOP"
    assert sum(opcode.name == "GLOBAL" for opcode, _, _ in opcodes) == 3  # the entries share them


@pytest.mark.parametrize("way", [{"mmap": True}, {}], ids=str)
def test_archive_goes_on_beyond_4_gib(tmp_path: Path, way: dict[str, bool]) -> None:
    near, far = record(len(HEADER), 0, 0, ENTRIES[1][2]), record(5 * 2**30, 1, 0, ENTRIES[4][2])
    with open(tmp_path / "long.pt", "wb") as file:  # on most file systems the hole takes no room
        file.write(HEADER + near[1])
        file.seek(far[0].offset)
        file.write(far[1] + b"".join(tail(near[0].packed + far[0].packed, far[0].end)))
    found = torch.load(tmp_path / "long.pt", **way)
    assert found[1]["responsibilities"].numpy().tobytes() == ENTRIES[4][2].tobytes()
    with zipfile.ZipFile(tmp_path / "long.pt") as zipped:
        assert zipped.testzip() is None
        assert zipped.infolist()[3].header_offset == 5 * 2**30


def test_archive_tail_of_many_entries_comes_in_small_pieces() -> None:
    index = b"".join(Entry(512 + 256 * n, 0, n, 1, 1, 0).packed for n in range(20_000))
    assert max(map(len, tail(index, 512 + 256 * 20_000))) < 2**20


def test_archive_of_many_entries_names_each_of_them(tmp_path: Path) -> None:
    one = np.zeros((1, 1), np.float32)
    (tmp_path / "many.pt").write_bytes(b"".join(archive((step, 0, one + step) for step in range(9000))))
    found = torch.load(tmp_path / "many.pt")
    assert [(entry["step"], entry["responsibilities"].item()) for entry in found] == [(n, n) for n in range(9000)]


# What can be told from the records


def integers(bits: int) -> st.SearchStrategy[int]:
    return st.integers(0, 2**bits - 1)


@given(st.builds(Entry, integers(63), integers(63), integers(63), integers(32), integers(32), integers(32)))
def test_entry_is_told_from_its_header(entry: Entry) -> None:
    assert len(entry.header) == 192
    assert parse(entry.header) == entry


@given(st.integers(0, 191), st.integers(1, 255))
def test_entry_is_not_told_from_a_damaged_header(place: int, damage: int) -> None:
    header = bytearray(Entry(512, 3, 4, 5, 6, 7).header)
    header[place] ^= damage
    assert parse(bytes(header)) is None


def test_scan_finds_all_records(path: Path) -> None:
    assert [(entry.step, entry.epoch, R.tobytes()) for entry, R in Scan(path)] == [
        (step, epoch, R.tobytes()) for step, epoch, R in ENTRIES
    ]


def test_scan_says_where_the_tail_begins(path: Path) -> None:
    scan = Scan(path)
    *_, (last, _) = scan
    assert (scan.size, scan.torn, scan.has_header, scan.is_ours) == (last.end, 0, True, True)
    assert path.read_bytes()[scan.size :].startswith(MARKER)


def test_scan_needs_no_tail(path: Path) -> None:
    entries = scanned(path)
    path.write_bytes(path.read_bytes()[: entries[-1].end])
    assert scanned(path) == entries


def test_scan_goes_on_behind_a_record(path: Path) -> None:
    entries = scanned(path)
    assert [entry for entry, _ in Scan(path, start=entries[1].end)] == entries[2:]


def test_scan_leaves_out_what_is_appended_meanwhile(tmp_path: Path) -> None:
    writer = AppendScores(tmp_path)
    for step in range(3):
        writer.append(step, 0, torch.zeros(1, 1))
    found = []
    for entry, _ in Scan(tmp_path / "mixture_scores.pt"):
        writer.append(9, 0, torch.zeros(1, 1))
        found.append(entry.step)
    writer.close()
    assert found == [0, 1, 2]


@pytest.mark.parametrize("beside", [AppendScores.flush, lambda writer: writer.append(2, 0, torch.zeros(1, 1))])
def test_scan_loses_nothing_beside_a_writer(tmp_path: Path, beside: Callable[[AppendScores], None]) -> None:
    writer = AppendScores(tmp_path)
    for step in range(2):
        writer.append(step, 0, torch.zeros(1, 1))
    writer.flush()
    scan = iter(Scan(tmp_path / "mixture_scores.pt"))
    found = [next(scan)[0].step]
    beside(writer)  # in the second case the tail that was there at the start makes room for a record
    found += [entry.step for entry, _ in scan]
    writer.close()
    assert found[:2] == [0, 1]


def test_scan_takes_a_record_that_is_finished_while_it_looks(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, entries = path.read_bytes(), scanned(path)
    path.write_bytes(whole[: entries[1].offset] + bytes(64) + whole[entries[1].offset + 64 :])
    next_start = Scan.__iter__.__globals__["_next_start"]

    def write_first(*arguments: Any) -> int | None:
        path.write_bytes(whole)
        return next_start(*arguments)  # type: ignore[no-any-return]

    monkeypatch.setattr("mixture_torch.scan._next_start", write_first)
    assert scanned(path) == entries


def test_scan_goes_on_behind_a_tail_that_should_have_gone(path: Path) -> None:
    data, entries = path.read_bytes(), scanned(path)
    place = entries[-1].end + 320
    last, appended = record(place, 10, 1, ENTRIES[0][2])
    path.write_bytes(data[:place] + appended)
    scan = Scan(path)
    assert [entry for entry, _ in scan] == [*entries, last]
    assert scan.damage == [f"`{path}` is damaged: skipped 320 bytes at {entries[-1].end}."]


@pytest.mark.parametrize("front", [b"?" * 64, HEADER + bytes(64)], ids=["without_header", "with_header"])
def test_scan_does_not_believe_a_record_that_says_it_is_elsewhere(path: Path, front: bytes) -> None:
    records = path.read_bytes()[len(HEADER) : scanned(path)[-1].end]
    path.write_bytes(front + records)
    assert scanned(path) == []


def test_writer_keeps_little_in_memory(tmp_path: Path) -> None:
    writer, R = AppendScores(tmp_path), torch.zeros(1, 1)
    writer.append(0, 0, R)
    writer.flush()
    tracemalloc.start()
    for step in range(1, 2001):
        writer.append(step, 0, R)
        if step % 500 == 0:
            writer.flush()
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    writer.close()
    assert grown < 2000 * 60  # an index of 36 bytes an entry, and what it has in reserve


def test_scan_takes_no_tail_that_has_just_gone_for_damage(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = scanned(path)
    next_start = Scan.__iter__.__globals__["_next_start"]

    def cut_first(*arguments: Any) -> int | None:
        os.truncate(path, entries[-1].end)  # as a writer does before the next record
        return next_start(*arguments)  # type: ignore[no-any-return]

    monkeypatch.setattr("mixture_torch.scan._next_start", cut_first)
    path.write_bytes(path.read_bytes()[:-1])  # a flush was in the middle of the tail
    scan = Scan(path)
    assert [entry for entry, _ in scan] == entries
    assert (scan.damage, scan.torn) == ([], 0)
