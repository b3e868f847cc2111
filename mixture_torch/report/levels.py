"""Verdicts on levels: what lasted for many rows, such as a collapse or a component without samples."""

from typing import Any, NamedTuple

import attrs
import numpy as np

from mixture_core.alarms import SHAPELESS, Alarm
from mixture_torch.report.run import Run
from mixture_torch.report.verdict import Raised, Verdict, components_of, named


class Words(NamedTuple):
    """What happened, the figures that show it when the alarm is raised, and what to check."""

    title: str
    figures: str
    check: str


WORDS = {
    "collapse": Words(
        "Collapse: all samples {have}had nearly the same embedding {when}",
        "the total variance was {trace_T:.3g}; its largest in this run was {largest:.3g}",
        "Does the loss keep different samples apart (negatives, a variance term)? Is the learning rate too high?",
    ),
    "dimensional collapse": Words(
        "Dimensional collapse: the embeddings {have}used only a few directions {when}",
        "they used {directions:.1f} of {D} directions, and {along:.0f} % of the variance between components lay along "
        "a single direction",
        "Check the temperature, the learning rate and the weight decay. More negatives, or a loss that decorrelates "
        "the dimensions, spread the embeddings.",
    ),
    "no structure": Words(
        "The embeddings {have}had no clusters {when}",
        f"the excess over a Gaussian was {{excess:.3f}}, below the limit of {SHAPELESS}, although the embeddings used "
        "{used:.0f} % of their dimensions",
        "The model may have found a shortcut that ignores the content of the samples. Check whether the augmentations "
        "are missing or too weak, and whether both views share a mark.",
    ),
    "dead component": Words(
        "{who} {have}had hardly any samples {when}",
        "the weight of component {k} was {pi:.2g}; equal weights would be {equal:.2g}",
        "K may be larger than the number of groups. With `relocate`, such components move elsewhere.",
    ),
}
EXPLAINS = {"collapse": {*WORDS} - {"collapse"}, "dimensional collapse": {"no structure"}}


@attrs.frozen(kw_only=True, eq=False)
class Level:
    """Alarms on levels of one kind that began together.

    Attributes:
        kind: The kind of these alarms.
        components: The components that they are about.
        row: The row of `mixture_extra.csv` at which the first begins.
        since: The step of this row.
        end: The step at which the last of them ended; None if one of them lasts.
        worst: The alarm with the smallest figure.
    """

    kind: str
    components: tuple[int, ...]
    row: int
    since: int
    end: int | None
    worst: Alarm

    @classmethod
    def of(cls, group: list[Raised]) -> "Level":
        """Returns the level that a group of alarms is about."""
        ends = [one.end for one in group if one.end is not None]
        return cls(
            kind=group[0].alarm.kind,
            components=components_of(group),
            row=group[0].row,
            since=group[0].alarm.since,
            end=max(ends) if len(ends) == len(group) else None,
            worst=min((one.alarm for one in group), key=lambda alarm: next(iter(alarm.figures.values()))),
        )

    def explains(self, other: "Level") -> bool:
        """Returns whether another level needs no verdict, because it began in the course of this worse one."""
        is_meanwhile = self.since <= other.since and (self.end is None or other.since <= self.end)
        return is_meanwhile and other.kind in EXPLAINS.get(self.kind, ())

    def verdict(self, run: Run) -> Verdict:
        """Returns the verdict on this level."""
        assert run.extra is not None
        words, since, end = WORDS[self.kind], self.since, self.end
        figures: dict[str, Any] = {"D": run.D, "k": self.worst.component, "equal": 1 / run.extra["pi"].shape[1]}
        figures |= {"largest": np.nanmax(run.extra["trace_T"]), **self.worst.figures}
        if (used := self.worst.figures.get("participation_ratio / D")) is not None and run.D is not None:
            along = self.worst.figures.get("opnorm_B / trace_B", 0.0)
            figures |= {"used": 100 * used, "directions": used * run.D, "along": 100 * along}
        if end is None:
            have, when = "has " if len(self.components) == 1 else "have ", f"since step {since}"
            state = f"It lasts to the end of the log, step {run.extra['step'][-1]}."
        else:
            have, when, state = "", f"from step {since} to step {end}", "It has passed."
        who = named(self.components) if self.components else ""
        return Verdict(
            level="wrong" if end is None else "changed",
            kind=self.kind,
            components=self.components,
            since=since,
            title=words.title.format(who=who, have=have, when=when),
            text=f"At step {self.worst.step}, {words.figures.format(**figures)}. {state} {words.check}",
        )
