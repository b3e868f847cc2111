"""Moves what earlier runs recorded to `superseded-N` files."""

from collections.abc import Callable
from itertools import count

from mixture_torch.files.disk import set_aside, superseded
from mixture_torch.files.log import NOWHERE, Position, RowsFile
from mixture_torch.files.scores import ScoresFile
from mixture_torch.files.shards import ShardFolder
from mixture_torch.files.snapshots import LAST_FILE

Parts = tuple[RowsFile, RowsFile, ScoresFile, ShardFolder, ShardFolder]  # log, extra, scores, their shards, snapshots


class Cut:
    """All that was recorded at or after an (epoch, step), which is to be moved; NOWHERE means everything."""

    def __init__(self, position: Position) -> None:
        self._position = position
        self._number = 0  # N; 0 before it is begun
        self._moved = 0  # entries of responsibilities

    def make(self, parts: Parts, say: Callable[[str], None]) -> None:
        """Moves it; may be called again after a fault."""
        log, extra, scores, shards, snapshots = parts
        last, (epoch, step) = log.path.with_name(LAST_FILE), self._position
        paths = [*(part.path for part in parts), last]

        def places(number: int) -> list[str]:
            return [f"`{path.name}`" for each in paths if (path := superseded(each, number)).exists()]

        if extra.path.exists():
            extra.open()  # sets a torn row aside first, under a number of its own
        self._number = number = self._number or next(n for n in count(1) if not places(n))
        steps = log.steps_from(self._position)
        self._moved += shards.supersede(self._position, number, steps=steps)
        snapshots.supersede(self._position, number, steps=steps)
        extra.supersede(self._position, number)
        try:
            self._moved += scores.supersede(self._position, number)
        except ValueError as error:  # a foreign file, which this run may not need
            say(f"{error} It was left as it is.")
        if self._position == NOWHERE and last.exists():
            set_aside(last, superseded(last, number))
        n_rows = log.supersede(self._position, number)  # last: it tells which shards to look at
        if found := " and ".join(places(number)):
            begun = f"is resumed at step {step} of epoch {epoch}: {n_rows} later"
            begun = f"is begun anew: {n_rows} earlier" if self._position == NOWHERE else begun
            what = f"{begun} rows and {self._moved} entries of responsibilities"
            say(f"`{log.path.parent}` {what} were moved to {found}.")
