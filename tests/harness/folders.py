"""What the harnesses share: what is in a run folder, and what should be in it."""

import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixture_torch import MixtureStats, read_log, read_scores
from mixture_torch.files.log import HEADER, read_lines
from mixture_torch.files.scores import read_entries
from mixture_torch.files.shards import ScoreEntry, load_entry

Place = tuple[int, int]  # (epoch, step)
Item = tuple[Place, bytes]  # a row or an entry: where in the run it belongs, and all that is in it


class Record(NamedTuple):
    """A logged step."""

    row: Item
    entry: Item

    @property
    def place(self) -> Place:
        """Where in the run it belongs."""
        return self.row[0]


class Step(NamedTuple):
    """A step that is logged."""

    record: Record
    resumed: bool = False  # the first after `load_state_dict`


class Contents(NamedTuple):
    """What is in a run folder, or should be."""

    rows: list[Item]
    entries: list[Item]
    rows_aside: list[Item]  # superseded, in the order of the files' numbers
    entries_aside: list[Item]


EMPTY = Contents([], [], [], [])


def recorded(stats: Mapping[str, Tensor], *, step: int, epoch: int) -> Record:
    """Returns what `log_step` should make of statistics."""
    figures = [float(value) for value in (stats["pi"].min(), stats["pi"].max(), stats["trace_B"], stats["opnorm_B"])]
    line = ",".join([str(step), str(epoch), str(len(stats["pi"])), *(f"{value:.9g}" for value in figures)])
    return Record(((epoch, step), line.encode() + b"\n"), _item(step, epoch, stats["R"]))


def sample(value: int, *, step: int, epoch: int) -> tuple[dict[str, Tensor], Record]:
    """Returns statistics that hold a number, of as many rows as it says, and what is to be found of them."""
    generator = torch.Generator().manual_seed(value)
    R = torch.rand(1 + value % 5, 3, generator=generator)
    number = torch.tensor(float(value))
    stats = {"pi": torch.tensor([0.25, 0.25, 0.5]), "trace_B": number, "opnorm_B": number / 3, "R": R}
    return stats, recorded(stats, step=step, epoch=epoch)


def writer(folder: Path, scores_mode: str, **options: Any) -> MixtureStats:
    """An estimator of three components that stores responsibilities in a folder."""
    return MixtureStats(
        **{"K": 3, "enabled": True, "log_dir": folder, "store_scores": True, "scores_mode": scores_mode, **options}
    )


def found(folder: Path) -> Contents:
    """Returns what fresh readers find in a run folder, and fails where one of them speaks of damage."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "An unfinished write of ")  # which is no damage
        logs = sorted(folder.glob("mixture.superseded-*.csv"), key=_number)
        lists = sorted(folder.glob("mixture_scores.superseded-*"), key=_number)
        return Contents(
            _rows(folder / "mixture.csv") if (folder / "mixture.csv").exists() else [],
            _items(read_scores(folder)) if _has_scores(folder) else [],
            [row for path in logs for row in _rows(path)],
            [item for path in lists if path.suffix != ".tmp" for item in _set_aside(path)],
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
    record, resumed = step
    rows, entries, rows_aside, entries_aside = (list(items) for items in before)
    if resumed:
        rows_aside += [row for row in rows if row[0] >= record.place]
        entries_aside += [entry for entry in entries if entry[0] >= record.place]
        rows = [row for row in rows if row[0] < record.place]
        entries = [entry for entry in entries if entry[0] < record.place]
    if scores_mode == "per_step":
        entries = sorted([entry for entry in entries if entry[0][1] != record.place[1]] + [record.entry], key=_step)
    else:
        entries.append(record.entry)
    return Contents([*rows, record.row], entries, rows_aside, entries_aside)


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
    if not step.resumed:
        assert now.rows in (before.rows, after.rows)
        assert now.entries in (before.entries, after.entries)
        assert (now.rows_aside, now.entries_aside) == (before.rows_aside, before.entries_aside)
        return now
    for main, aside, was, was_aside, new in (
        (now.rows, now.rows_aside, before.rows, before.rows_aside, after.rows),
        (now.entries, now.entries_aside, before.entries, before.entries_aside, after.entries),
    ):
        assert Counter(was) + Counter(was_aside) <= Counter(main) + Counter(aside), "lost"
        assert Counter(aside) <= Counter(was_aside) + Counter(was), "set aside what was not there"
        stays = [item for item in was if item[0] < step.record.place]
        is_going = main == [item for item in was if item in main] and set(stays) <= set(main)
        assert main == new or is_going, "not as it was"
    return now


def _rows(path: Path) -> list[Item]:
    lines = read_lines(path, HEADER).rows
    places = [(int(epoch), int(step)) for step, epoch, _ in (line.split(b",", 2) for line in lines)]
    if path.name == "mixture.csv":
        log = read_log(path.parent)
        assert places == list(zip(log["epoch"].tolist(), log["step"].tolist(), strict=True))
    return list(zip(places, lines, strict=True))


def _set_aside(path: Path) -> list[Item]:
    return _items(
        [load_entry(shard) for shard in sorted(path.glob("*.pt"))]
        if path.is_dir()
        else list(read_entries(path, warnings.warn))
    )


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
