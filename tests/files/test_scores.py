"""`mixture_scores.pt`: a list to torch, a sound zip, and readable whatever is in it or is missing."""

import os
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mixture_torch import read_scores
from mixture_torch.files.scores import ScoresFile
from mixture_torch.files.scores_format import HEADER, INDEX, archive, pack, scan, tail
from tests.files.recording import said
from tests.wrapper.samples import contents

START = len(HEADER)
RECORD = 256  # bytes of a record of one number
ENTRIES: Any = [
    {"step": step, "epoch": epoch, "responsibilities": R}
    for step, epoch, R in [
        (7, 1, torch.full((3, 2), torch.nan)),
        (2**63 - 1, 2**63 - 2, torch.rand(5, 3)),
        (7, 1, torch.zeros(0, 8)),  # the same step again, and a batch without rows
        (8, 1, torch.zeros(4, 0)),
        (9, 1, torch.rand(100, 8)),
    ]
]
WAYS: list[dict[str, bool]] = [{}, {"weights_only": False}, {"mmap": True}, {"mmap": True, "weights_only": False}]
ways = pytest.mark.parametrize("way", WAYS, ids=str)


class Scores(ScoresFile):
    """Opens itself."""

    def append_entry(self, step: int, epoch: int, R: Tensor) -> None:
        self.open()
        super().append_entry(step, epoch, R)


def opened(folder: Path) -> ScoresFile:
    return Scores(folder / "mixture_scores.pt", say=warnings.warn)


def write(folder: Path, *steps: int) -> None:
    """Appends an entry of one number for each step, and completes the file."""
    file = opened(folder)
    file.open()
    for step in steps:
        file.append_entry(step, 0, torch.zeros(1, 1))
    file.flush()
    file.close()


def leave(folder: Path, *steps: int, flushed: bool = False) -> Path:
    """Leaves the file of a process that was killed after these steps."""
    with tempfile.TemporaryDirectory() as alive:
        write(Path(alive), *steps)
        folder.mkdir(parents=True, exist_ok=True)
        data = (Path(alive) / "mixture_scores.pt").read_bytes()
    path = folder / "mixture_scores.pt"
    path.write_bytes(data if flushed else data[: START + RECORD * len(steps)])
    return path


def steps(folder: Path) -> list[int]:
    return [entry["step"] for entry in read_scores(folder)]


def listed(folder: Path) -> list[int]:
    return [entry["step"] for entry in torch.load(folder / "mixture_scores.pt")]


def plain(entries: Any) -> list[tuple[int, int, torch.Size, bytes]]:
    return [
        (e["step"], e["epoch"], e["responsibilities"].shape, e["responsibilities"].numpy().tobytes()) for e in entries
    ]


# What torch and zip say


@ways
def test_file_loads_as_the_list(tmp_path: Path, way: dict[str, bool]) -> None:
    def kind(tensor: Tensor) -> tuple[object, ...]:
        return tensor.shape, tensor.stride(), tensor.dtype, tensor.requires_grad, tensor.untyped_storage().nbytes()

    (tmp_path / "mixture_scores.pt").write_bytes(b"".join(archive(ENTRIES)))
    found = torch.load(tmp_path / "mixture_scores.pt", **way)
    assert [list(entry) for entry in found] == [["step", "epoch", "responsibilities"]] * len(ENTRIES)
    assert plain(found) == plain(ENTRIES) == plain(read_scores(tmp_path))
    tensors = [entry["responsibilities"] for entry in found]
    assert [kind(tensor) for tensor in tensors] == [kind(torch.zeros(tensor.shape)) for tensor in tensors]
    assert {tensor.data_ptr() % 64 for tensor in tensors if way.get("mmap")} <= {0}
    (tmp_path / "mixture_scores.pt").write_bytes(b"".join(archive([])))
    assert torch.load(tmp_path / "mixture_scores.pt", **way) == read_scores(tmp_path) == []


def test_file_is_a_sound_zip_of_tensors_that_share_nothing(tmp_path: Path) -> None:
    path = tmp_path / "mixture_scores.pt"
    path.write_bytes(b"".join(archive(ENTRIES[:1] * 2)))
    with zipfile.ZipFile(path) as zipped:
        assert zipped.testzip() is None
        assert len(set(zipped.namelist())) == 5
    first, second = torch.load(path)
    first["responsibilities"].zero_()
    assert second["responsibilities"].isnan().all()


@pytest.mark.parametrize("way", [{"mmap": True}, {}], ids=str)
def test_file_goes_on_beyond_4_gib(tmp_path: Path, way: dict[str, bool]) -> None:
    near, far = pack(START, 0, 0, torch.rand(5, 3)), pack(5 * 2**30, 1, 0, torch.rand(100, 8))
    with open(tmp_path / "long.pt", "wb") as file:  # on most file systems the hole takes no room
        file.write(HEADER + near[1])
        file.seek(far[0].offset)
        file.write(far[1] + tail(INDEX.pack(*near[0]) + INDEX.pack(*far[0]), far[0].end))
    assert torch.load(tmp_path / "long.pt", **way)[1]["responsibilities"].shape == (100, 8)
    with zipfile.ZipFile(tmp_path / "long.pt") as zipped:
        assert zipped.testzip() is None
        assert zipped.infolist()[3].header_offset == 5 * 2**30


# Appending


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int64])
def test_entries_are_float32_without_gradient_whatever_the_default_device(tmp_path: Path, dtype: torch.dtype) -> None:
    R = torch.full((3, 2), 1.0).to(dtype).requires_grad_(dtype.is_floating_point)
    with torch.device("meta"):
        file = opened(tmp_path)
        file.append_entry(0, 0, R)
        file.flush()
        file.close()
        (entry,) = read_scores(tmp_path)
    stored = entry["responsibilities"]
    assert (stored.dtype, stored.device.type, stored.requires_grad) == (torch.float32, "cpu", False)


@pytest.mark.parametrize("legacy", [False, True])
def test_file_goes_on_behind_a_list_that_torch_saved(tmp_path: Path, legacy: bool) -> None:
    both = torch.arange(12.0).reshape(2, 2, 3)  # of one storage
    saved = [{"step": step, "epoch": 0, "responsibilities": both[step].T.requires_grad_()} for step in range(2)]
    torch.save(saved, tmp_path / "mixture_scores.pt", _use_new_zipfile_serialization=not legacy)
    assert steps(tmp_path) == [0, 1]
    write(tmp_path, 2)
    assert listed(tmp_path) == [0, 1, 2]
    assert torch.load(tmp_path / "mixture_scores.pt")[1]["responsibilities"].tolist() == both[1].T.tolist()
    torch.save([], tmp_path / "mixture_scores.pt")
    assert steps(tmp_path) == []
    write(tmp_path, 3)
    assert listed(tmp_path) == [3]


FOREIGN = {
    "text": b"not a checkpoint",
    "zip": b"PK\3\4" + bytes(range(256)) * 20,
    "other_list": [{"step": 1, "R": torch.ones(2, 2)}],
    "float64": [{"step": 1, "epoch": 0, "responsibilities": torch.ones(2, 2, dtype=torch.float64)}],
    "vector": [{"step": 1, "epoch": 0, "responsibilities": torch.ones(2)}],
    "long_step": [{"step": 2**63, "epoch": 0, "responsibilities": torch.ones(2, 2)}],
    "pipe": None,
}


@pytest.mark.parametrize("value", FOREIGN.values(), ids=FOREIGN)
def test_foreign_file_is_left_alone(tmp_path: Path, value: object) -> None:
    path = tmp_path / "mixture_scores.pt"
    if value is None:
        os.mkfifo(path)
    elif isinstance(value, bytes):
        path.write_bytes(value)
    else:
        torch.save(value, path)
    before = contents(tmp_path)
    for use in (lambda file: write(tmp_path, 0), lambda file: file.supersede((0, 0), 1), lambda _: steps(tmp_path)):
        with pytest.raises(ValueError, match=r"mixture_scores.pt` is not a list of entries .* move the file away"):
            use(opened(tmp_path))
    assert contents(tmp_path) == before


# Damage


@pytest.mark.parametrize("flushed", [False, True])
def test_torn_file_loses_the_torn_record_alone(tmp_path: Path, flushed: bool) -> None:
    path = leave(tmp_path, 0, 1, flushed=flushed)
    data = path.read_bytes()
    ends = [START, START + RECORD, START + 2 * RECORD]
    for size in range(1, len(data), 13):
        whole = [step for step in (0, 1) if ends[step + 1] <= size]
        path.write_bytes(data[:size])
        with said() as messages:
            assert steps(tmp_path) == whole
        assert path.read_bytes() == data[:size]
        is_torn = size < ends[-1] and size not in ends
        assert [message.startswith("An unfinished write of ") for message in messages] == [True] * is_torn
        with said() as messages:
            write(tmp_path, 2)
        assert len(messages) == is_torn
        assert listed(tmp_path) == [*whole, 2]


@pytest.mark.parametrize("flushed", [False, True])
def test_damaged_record_is_skipped_with_a_warning_and_kept_on_disk(tmp_path: Path, flushed: bool) -> None:
    data = leave(tmp_path, 0, 1, 2, flushed=flushed).read_bytes()
    for place in [*range(0, 196, 7), 192, 195]:
        place += START + RECORD
        damaged = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        (tmp_path / "mixture_scores.pt").write_bytes(damaged)
        for use, expected in ((lambda: steps(tmp_path), [0, 2]), (lambda: write(tmp_path, 3), None)):
            with said() as messages:
                assert use() == expected
            assert [message.split("` ")[1] for message in messages] == [
                f"is damaged: skipped 256 bytes at {START + 256}."
            ]
        assert listed(tmp_path) == [0, 2, 3]
        assert (tmp_path / "mixture_scores.pt").read_bytes().startswith(damaged[: START + 3 * RECORD])


@pytest.mark.parametrize("place", [0, 300, START + 3])
def test_damaged_header_is_mended(tmp_path: Path, place: int) -> None:
    path = leave(tmp_path, 0, 1, flushed=True)
    data = path.read_bytes()
    path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    with pytest.warns(UserWarning, match="damaged"):
        write(tmp_path, 2)
    assert listed(tmp_path) == ([0, 1, 2] if place < START else [1, 2])


@pytest.mark.parametrize("beside", ["flush", "append"])
def test_reader_beside_a_writer_finds_all_that_was_there(tmp_path: Path, beside: str) -> None:
    file = opened(tmp_path)
    for step in range(2):
        file.append_entry(step, 0, torch.zeros(1, 1))
    file.flush()
    messages: list[str] = []
    found = []
    for record, _ in scan(tmp_path / "mixture_scores.pt", messages.append):
        found.append(record.step)
        if len(found) < 3:  # the tail that was there at the start makes room for a record
            file.flush() if beside == "flush" else file.append_entry(2, 0, torch.zeros(1, 1))
    file.close()
    assert (found[:2], messages) == ([0, 1], [])


# Superseding

POSITIONS = [(0, 5), (0, 6), (1, 0), (0, 6), (1, 1), (0, 7), (1, 2)]  # (epoch, step), of runs one behind the other


def entries_of(positions: list[tuple[int, int]]) -> Any:
    return [{"step": s, "epoch": e, "responsibilities": torch.full((5, 3), e + s / 8)} for e, s in positions]


@pytest.mark.parametrize("cut", [(0, 0), (0, 6), (1, 2), (2, 0)], ids=str)
def test_supersede_moves_entries_at_or_behind_a_position(tmp_path: Path, cut: tuple[int, int]) -> None:
    moved = [position for position in POSITIONS if position >= cut]
    kept = [position for position in POSITIONS if position < cut]
    path = tmp_path / "mixture_scores.pt"
    path.write_bytes(b"".join(archive(entries_of(POSITIONS))))
    file = opened(tmp_path)
    assert file.supersede(cut, 3) == len(moved)
    assert path.exists() == bool(kept)
    if kept:
        assert path.read_bytes() == b"".join(archive(entries_of(kept)))
    aside = tmp_path / "mixture_scores.superseded-3.pt"
    assert aside.exists() == bool(moved)
    if moved:
        assert aside.read_bytes() == b"".join(archive(entries_of(moved)))
    file.open()
    file.append_entry(9, 9, torch.full((5, 3), 9 + 9 / 8))
    file.flush()
    file.close()
    assert path.read_bytes() == b"".join(archive(entries_of([*kept, (9, 9)])))


def test_read_scores_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has neither `mixture_scores.pt` nor .* was `store_scores` on\?"):
        read_scores(tmp_path)
