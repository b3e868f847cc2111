"""What the harnesses share: what is in a run folder, and what should be in it."""

import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixture_torch import MixtureStats, read_extra, read_log, read_scores, read_snapshots
from mixture_torch.files.extra import extra_header
from mixture_torch.files.log import HEADER, read_lines
from mixture_torch.files.recorder import Recorder, Row
from mixture_torch.files.scores import read_entries
from mixture_torch.files.shards import ScoreEntry, load_entry
from mixture_torch.files.snapshots import Snapshot, load_snapshot

Place = tuple[int, int]  # (epoch, step)
Item = tuple[Place, bytes]  # a row or an entry: where in the run it belongs, and all that is in it


class Record(NamedTuple):
    """A logged step."""

    row: Item
    entry: Item
    extra: Item | None  # its row in `mixture_extra.csv`, if it has one
    snapshot: Item | None  # that is written right after it

    @property
    def place(self) -> Place:
        """Where in the run it belongs."""
        return self.row[0]


class Step(NamedTuple):
    """A step that is logged."""

    record: Record
    resumed: bool = False  # the first after `load_state_dict`
    aside: bool = False  # the first with existing="aside"

    @property
    def cut(self) -> Place | None:
        """Where what it supersedes begins."""
        return (-1, -1) if self.aside else self.record.place if self.resumed else None


class Contents(NamedTuple):
    """What is in a run folder, or should be."""

    rows: list[Item]
    entries: list[Item]
    extra: list[Item]
    snapshots: list[Item]
    rows_aside: list[Item]  # superseded, in the order of the files' numbers
    entries_aside: list[Item]
    extra_aside: list[Item]
    snapshots_aside: list[Item]


KINDS = Contents._fields[:4]  # of which there are main files and files that were set aside
EMPTY = Contents([], [], [], [], [], [], [], [])


class FullRecorder(Recorder):
    """Adds to most rows one of `mixture_extra.csv`, and to some a snapshot."""

    def write(self, row: Row) -> None:
        """Writes a row and what is added to it."""
        row.extra = extra_of(row.step, row.K, row.trace_B)
        super().write(row)
        if (snapshot := snapshot_of(row.step, row.epoch, row.trace_B)) is not None:
            self.write_snapshot(snapshot)


def extra_of(step: int, K: int, value: float) -> tuple[float, ...] | None:
    """What is added to the row of a step: nothing to every fifth."""
    return None if step % 5 == 4 else (step, 0, 1, *([value / 3] * 5), *([value / 7] * K), *([step] * K), *([0.5] * K))


def snapshot_of(step: int, epoch: int, value: float) -> Snapshot | None:
    """The snapshot at a step, at every fourth."""
    return None if step % 4 else {"step": step, "epoch": epoch, "pi": torch.full((3,), value), "trace_B": value}


def recorded(stats: Mapping[str, Tensor], *, step: int, epoch: int) -> Record:
    """Returns what `log_step` should make of statistics."""
    figures = [float(value) for value in (stats["pi"].min(), stats["pi"].max(), stats["trace_B"], stats["opnorm_B"])]
    K, snapshot = len(stats["pi"]), snapshot_of(step, epoch, figures[2])
    others = extra_of(step, K, figures[2])
    return Record(
        _line(step, epoch, K, *figures),
        _item(step, epoch, stats["R"]),
        None if others is None else _line(step, epoch, *others),
        None if snapshot is None else _frozen(snapshot),
    )


def sample(value: int, *, step: int, epoch: int) -> tuple[dict[str, Tensor], Record]:
    """Returns statistics that hold a number, of as many rows as it says, and what is to be found of them."""
    generator = torch.Generator().manual_seed(value)
    R = torch.rand(1 + value % 5, 3, generator=generator)
    number = torch.tensor(float(value))
    stats = {"pi": torch.tensor([0.25, 0.25, 0.5]), "trace_B": number, "opnorm_B": number / 3, "R": R}
    return stats, recorded(stats, step=step, epoch=epoch)


def writer(folder: Path, scores_mode: str, **options: Any) -> MixtureStats:
    """An estimator of three components that stores responsibilities, and the snapshots of `FullRecorder`."""
    stores = {"log_dir": folder, "store_scores": True, "scores_mode": scores_mode, "snapshot_every": 2**40}
    estimator = MixtureStats(**{"K": 3, "enabled": True, **stores, **options})
    estimator._journal._recorder.__class__ = FullRecorder
    return estimator


def found(folder: Path) -> Contents:
    """Returns what fresh readers find in a run folder, and fails where one of them speaks of damage."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "An unfinished write of ")  # which is no damage
        logs, others, lists, shots = (
            sorted(folder.glob(f"{name}.superseded-*"), key=_number)
            for name in ("mixture", "mixture_extra", "mixture_scores", "mixture_snapshots")
        )
        return Contents(
            _rows(folder / "mixture.csv") if (folder / "mixture.csv").exists() else [],
            _items(read_scores(folder)) if _has_scores(folder) else [],
            _rows(folder / "mixture_extra.csv") if (folder / "mixture_extra.csv").exists() else [],
            list(map(_frozen, read_snapshots(folder))) if any((folder / "mixture_snapshots").glob("step_*.pt")) else [],
            [row for path in logs if path.suffix != ".tmp" for row in _rows(path)],
            [item for path in lists if path.suffix != ".tmp" for item in _set_aside(path)],
            [row for path in others if path.suffix != ".tmp" for row in _rows(path)],
            sorted(_frozen(load_snapshot(shot)) for path in shots for shot in path.glob("*.pt")),
        )


def loaded(folder: Path, scores_mode: str) -> list[Item]:
    """Returns the entries that plain `torch.load` finds."""
    if scores_mode == "append":
        return _items(torch.load(folder / "mixture_scores.pt"))
    return _items([torch.load(path) for path in sorted((folder / "mixture_scores").glob("*.pt"))])


def logged(before: Contents, step: Step, *, scores_mode: str) -> Contents:
    """Returns what should be in a folder after one more step.

    Args:
        before: What was in it.
        step: The step.
        scores_mode: How responsibilities are stored; one file a step replaces that of the same step.
    """
    record, cut = step.record, step.cut
    now = {name: list(items) for name, items in before._asdict().items()}
    for kind, new in zip(KINDS, record, strict=True):
        if cut is not None:
            now[f"{kind}_aside"] += [item for item in now[kind] if item[0] >= cut]
            now[kind] = [item for item in now[kind] if item[0] < cut]
        is_file = kind == "snapshots" or (kind == "entries" and scores_mode == "per_step")
        if is_file and new is not None:
            now[kind] = [item for item in now[kind] if item[0][1] != record.place[1]]
        now[kind] += [] if new is None else [new]
    if scores_mode == "per_step":
        now["entries"].sort(key=_step)
    now["snapshots"].sort()
    now["snapshots_aside"].sort()
    return Contents(**now)


def assert_nothing_lost(folder: Path, before: Contents, step: Step | None, *, scores_mode: str) -> Contents:
    """Checks and returns what is in a folder whose process died while it logged a step.

    What was there before is there, in the main files or, where the step went on from a checkpoint, set aside. The step
    itself is there wholly or not at all. Nothing else is there, and nothing twice but, in the middle of being set
    aside, in both places.

    Args:
        folder: The run folder.
        before: What was in it before the step.
        step: The step; None where the process was not logging.
        scores_mode: How responsibilities are stored.
    """
    now = found(folder)
    if step is None:
        assert now == before
        return now
    after = logged(before, step, scores_mode=scores_mode)
    if before.rows != after.rows == now.rows:  # the log comes last
        assert (now.entries, now.extra) == (after.entries, after.extra)
    if step.cut is None:
        for kind, items in now._asdict().items():
            assert items in (getattr(before, kind), getattr(after, kind)), kind
        return now
    for kind in KINDS:
        main, was, new = (getattr(contents, kind) for contents in (now, before, after))
        aside, was_aside = (getattr(contents, f"{kind}_aside") for contents in (now, before))
        assert Counter(was) + Counter(was_aside) <= Counter(main) + Counter(aside), "lost"
        assert Counter(aside) <= Counter(was_aside) + Counter(was), "set aside what was not there"
        stays = [item for item in was if item[0] < step.cut]
        is_going = main == [item for item in was if item in main] and set(stays) <= set(main)
        assert main == new or is_going, "not as it was"
    return now


def _rows(path: Path) -> list[Item]:
    is_log = path.name.startswith("mixture.")
    lines = read_lines(path, HEADER if is_log else extra_header(3)).rows
    places = [(int(epoch), int(step)) for step, epoch, _ in (line.split(b",", 2) for line in lines)]
    if "superseded" not in path.name:
        log = (read_log if is_log else read_extra)(path.parent)
        assert places == list(zip(log["epoch"].tolist(), log["step"].tolist(), strict=True))
    return list(zip(places, lines, strict=True))


def _set_aside(path: Path) -> list[Item]:
    return _items(
        [load_entry(shard) for shard in sorted(path.glob("*.pt"))]
        if path.is_dir()
        else list(read_entries(path, warnings.warn))
    )


def _line(step: int, epoch: int, *others: float) -> Item:
    texts = [str(number) if isinstance(number, int) else f"{number:.9g}" for number in (step, epoch, *others)]
    return (epoch, step), ",".join(texts).encode() + b"\n"


def _frozen(entry: Snapshot) -> Item:
    return (entry["epoch"], entry["step"]), repr({**entry, "pi": entry["pi"].tolist()}).encode()


def _items(entries: list[ScoreEntry]) -> list[Item]:
    return [_item(**entry) for entry in entries]


def _item(step: int, epoch: int, responsibilities: Tensor) -> Item:
    return (epoch, step), str(tuple(responsibilities.shape)).encode() + responsibilities.numpy().tobytes()


def _has_scores(folder: Path) -> bool:
    return (folder / "mixture_scores.pt").exists() or any((folder / "mixture_scores").glob("step_*.pt"))


def _number(path: Path) -> int:
    return int(path.name.split("-")[1].split(".")[0])


def _step(item: Item) -> int:
    return item[0][1]
