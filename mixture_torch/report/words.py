"""The words of verdicts: what happened, the figures that show it, and what to check."""

from collections.abc import Mapping
from typing import Literal, NamedTuple, TypeAlias

import attrs
import numpy as np

from mixture_core.alarms import SHAPELESS, Alarm
from mixture_torch.report.events import Event, listed, named
from mixture_torch.report.run import Run

Level: TypeAlias = Literal["wrong", "changed", "fine", "unknown"]
MOVED = 0.25  # of the batch
EMBEDDINGS = "The embeddings changed abruptly: check the learning rate, the loss and the inputs from this step on."
NAMES = {"trace_T": "total variance", "share_B": "share of the variance between components"}


@attrs.frozen(kw_only=True)
class Verdict:
    """One thing to know about a run.

    Attributes:
        level: `wrong`, `changed`, `fine` or `unknown`.
        kind: The kind of its alarm, `group gone`, `abrupt change`, `no rows`, or the level if there is no alarm.
        component: The component it is about; None if it is about several, or about all embeddings.
        components: All components it is about.
        since: The step at which it began; None if it is about the whole run.
        title: What happened, in one sentence.
        text: The figures that show it, and what to check.
        figures: These figures by name.
    """

    level: Level
    kind: str
    component: int | None = None
    components: tuple[int, ...] = ()
    since: int | None = None
    title: str
    text: str
    figures: Mapping[str, float] = attrs.field(factory=dict)


class Words(NamedTuple):
    """The title of a level while it lasts, its title once it has passed, and what to check."""

    lasts: str
    passed: str
    look: str


LEVELS = {
    "collapse": Words(
        "The embeddings have collapsed: since step {since}, all samples have had nearly the same embedding",
        "From step {since} to step {end}, all samples had nearly the same embedding",
        "Does the loss keep different samples apart (negatives, a variance term)? Is the learning rate too high?",
    ),
    "dimensional collapse": Words(
        "The embeddings have used only a few directions since step {since} (dimensional collapse)",
        "The embeddings used only a few directions from step {since} to step {end} (dimensional collapse)",
        "Check the temperature, the learning rate and the weight decay. More negatives, or a loss that decorrelates "
        "the dimensions, spread the embeddings.",
    ),
    "no structure": Words(
        "The embeddings have had no clusters since step {since}",
        "The embeddings had no clusters from step {since} to step {end}",
        "The model may have found a shortcut that ignores the content of the samples. Check whether the augmentations "
        "are missing or too weak, and whether both views share a mark.",
    ),
    "point component": Words(
        "{who} {has} held nearly identical embeddings since step {since}",
        "{who} held nearly identical embeddings from step {since} to step {end}",
        "Check its samples for copies, constant or broken inputs, and outliers.",
    ),
    "dead component": Words(
        "{who} {has} had hardly any samples since step {since}",
        "{who} had hardly any samples from step {since} to step {end}",
        "K may be larger than the number of groups. With `relocate`, such components move elsewhere.",
    ),
}


def of_level(run: Run, alarms: list[Alarm], end: int | None) -> Verdict:
    """Returns the verdict on levels of one kind that began together; `end` is None while one of them lasts."""
    assert run.extra is not None
    alarm, words = alarms[0], LEVELS[alarms[0].kind]
    components = tuple(sorted({one.component for one in alarms if one.component is not None}))
    has = "has" if len(components) == 1 else "have"
    who = named(components) if components else ""
    title = (words.lasts if end is None else words.passed).format(who=who, has=has, since=alarm.since, end=end)
    last = int(run.extra["step"][-1])
    state = f"It lasts to the end of the log, step {last}." if end is None else "It has passed."
    figures = dict(alarm.figures) if len(alarms) == 1 else _extreme(alarms)
    return Verdict(
        level="wrong" if end is None else "changed",
        kind=alarm.kind,
        component=components[0] if len(components) == 1 else None,
        components=components,
        since=alarm.since,
        title=title,
        text=f"{_figures_of(run, alarm.kind, figures)} {state} {words.look}",
        figures=figures,
    )


def _figures_of(run: Run, kind: str, f: Mapping[str, float]) -> str:
    if kind == "collapse":
        return f"The total variance is {_last(run, 'trace_T'):.3g}; its largest was {_largest(run):.3g}."
    if kind == "dimensional collapse":
        used, along_one = _last(run, "participation_ratio"), 100 * f["opnorm_B / trace_B"]
        along = f"{along_one:.0f} % of the variance between components lies along a single direction."
        return f"They use {used:.1f} of {run.D} directions, and {along}"
    if kind == "no structure":
        used = 100 * f["participation_ratio / D"]
        excess = f"The excess over a Gaussian is {f['excess']:.3f}, which is below {SHAPELESS}"
        return f"{excess}, and the embeddings use {used:.0f} % of their dimensions."
    if kind == "point component":
        return f"Its variance is {f['rel']:.2g} of the total; the median over components is {f['median']:.2g}."
    return f"Its weight was {f['pi']:.2g}; equal weights would be {1 / run.log['K'][-1]:.2g}."


def _last(run: Run, name: str) -> float:
    assert run.extra is not None
    known = run.extra[name][np.isfinite(run.extra[name])]
    return float(known[-1]) if len(known) else float("nan")


def _largest(run: Run) -> float:
    assert run.extra is not None
    return float(np.nanmax(run.extra["trace_T"]))


def _extreme(alarms: list[Alarm]) -> dict[str, float]:
    return {name: min(alarm.figures[name] for alarm in alarms) for name in alarms[0].figures}


def of_event(event: Event) -> Verdict:
    """Returns the verdict on a change."""
    lost, crowded, changed = event.lost, event.crowded, event.changed
    level: Level = "wrong"
    components: tuple[int, ...] = ()
    if crowded is not None:
        kind, components = "abrupt change", (crowded,)
        title = f"At step {event.since}, most samples fell into component {crowded}"
        text = [f"{_shares(event, components)}; {_how_many(event)} {EMBEDDINGS}"]
    elif event.is_loss:
        kind, components = "group gone", lost
        whose = ("A group of samples has", "its") if len(lost) == 1 else ("Groups of samples have", "their")
        title = f"{whose[0]} gone: {lower(named(lost))} lost most of {whose[1]} samples at step {event.since}"
        text = _loss(event)
    elif event.moved > MOVED:
        kind, components = "abrupt change", changed
        title = f"At step {event.since}, samples moved to other components"
        text = [f"{100 * event.moved:.0f} % of the batch moved; {_how_many(event)} {EMBEDDINGS}"]
    elif event.scalars:
        level, kind, components = "changed", next(iter(event.scalars)), changed
        before, after, _ = event.scalars[kind]
        title = f"The {NAMES[kind]} {'rose' if after > before else 'fell'} suddenly at step {event.since}"
        text = [f"{named(changed)} changed with it."] if changed else []
    else:
        level, kind, components = "changed", "composition", changed
        have = "has had a different share" if len(changed) == 1 else "have had different shares"
        title = f"{named(changed)} {have} of the batch since step {event.since}"
        text = [f"{_shares(event, changed)}.", _now(event, changed), "Check the data from this step on."]
    figures = _figures(event, components)
    for name, (before, after, now) in event.scalars.items():
        text.append(f"The {NAMES[name]} went from {before:.4g} to {after:.4g}; at the end of the log it is {now:.4g}.")
        figures |= {f"{name} before": before, f"{name} after": after, f"{name} now": now}
    if level == "changed" and event.scalars:
        text.append("Check the learning rate, the loss and the data at that step.")
    return Verdict(
        level=level,
        kind=kind,
        component=components[0] if len(components) == 1 else None,
        components=components,
        since=event.since,
        title=title,
        text=" ".join(text),
        figures=figures,
    )


def _how_many(event: Event) -> str:
    n, K = len(event.changed), len(event.before)
    return f"{n} of {K} components changed."


def _loss(event: Event) -> list[str]:
    lost, others = event.lost, tuple(k for k in event.changed if k not in event.lost)
    text = [
        f"{_shares(event, lost)}, and no other component gained as much, so these samples are missing from the batches."
    ]
    before, after = event.n_rows
    if abs(after / before - 1) > 0.02:
        text.append(f"The batch has {after:.0f} rows instead of {before:.0f}.")
    if others:
        text.append(f"{named(others)} changed with it.")
    return [*text, _now(event, lost), "Check the data: is a class, a source or a file no longer read?"]


def _shares(event: Event, components: tuple[int, ...]) -> str:
    pairs = [f"{event.before[k]:.3f} to {event.after[k]:.3f}" for k in components[:5]]
    whose = "Its share" if len(components) == 1 else "Their shares"
    return f"{whose} of the batch went from {listed(pairs)}"


def _now(event: Event, components: tuple[int, ...]) -> str:
    apart = [k for k in components if abs(event.now[k] - event.before[k]) > 0.5 * abs(event.after[k] - event.before[k])]
    shares = listed(f"{event.now[k]:.3f}" for k in components[:5])
    now = f"it is {shares}" if len(components) == 1 else f"they are {shares}"
    return f"At the end of the log, step {event.last}, {now}{'.' if apart else ' again.'}"


def _figures(event: Event, components: tuple[int, ...]) -> dict[str, float]:
    return {
        f"share of {k} {when}": float(shares[k])
        for k in components[:5]
        for when, shares in (("before", event.before), ("after", event.after), ("now", event.now))
    }


def lower(text: str) -> str:
    return text[:1].lower() + text[1:]
