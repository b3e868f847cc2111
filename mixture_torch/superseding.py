"""What a resumed run records again: earlier records of the same steps are set aside, never deleted."""

from collections.abc import Callable
from itertools import count
from pathlib import Path

from mixture_torch.readers import SUPERSEDED_LIST, SUPERSEDED_LOG, SUPERSEDED_SHARDS
from mixture_torch.scores import AppendScores, PerStepScores
from mixture_torch.writers import CsvWriter


class Superseding:
    """Moves what was recorded at or behind a position to files with a number of their own.

    Broken off anywhere, it leaves every record in its old place, its new one or both, and goes on when run again.
    """

    def __init__(self) -> None:
        self._number = 0  # none yet
        self._entries = 0  # moved so far

    def run(
        self,
        log_dir: Path,
        position: tuple[int, int],
        *,
        log: CsvWriter,
        append: AppendScores,
        say: Callable[[str], None],
    ) -> None:
        """Does it.

        Args:
            log_dir: The run folder.
            position: (epoch, step) of the first record that is recorded anew.
            log: Writer of the rows.
            append: Writer of the scores that are in one file.
            say: Is told what was moved where; nothing where there was nothing to move.

        Raises:
            ValueError: The log is not ours.
            OSError: Something could not be moved.
        """
        self._number = self._number or next(n for n in count(1) if not _files(log_dir, n))
        steps = log.steps_from(position)
        self._entries += PerStepScores(log_dir).supersede(position, self._number, steps=steps)
        try:
            self._entries += append.supersede(position, self._number)
        except ValueError as error:  # not ours, and no reason to end a training run
            say(f"{error} It was left as it is.")
        rows = log.supersede(position, self._number)  # last, as it tells which entries to look into
        if rows or self._entries:
            say(
                f"`{log_dir}` goes on from step {position[1]} of epoch {position[0]}: {rows} rows and {self._entries} "
                "entries of responsibilities from there on were moved to "
                f"{' and '.join(_files(log_dir, self._number))}."
            )


def _files(log_dir: Path, number: int) -> list[str]:
    names = [form.format(number) for form in (SUPERSEDED_LOG, SUPERSEDED_LIST, SUPERSEDED_SHARDS)]
    return [f"`{name}`" for name in names if (log_dir / name).exists()]
