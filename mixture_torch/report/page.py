"""The page: one HTML file about one or more runs, which opens without a network."""

import base64
import hashlib
import math
from importlib.resources import files
from typing import Any

from mixture_torch.report.content import BUCKETS, content
from mixture_torch.report.run import Run
from mixture_torch.report.verdicts import Verdict, verdicts

FOLDER = files("mixture_torch.report")
NOTHING = "\u2013"  # where a figure is not known
MOST_VERDICTS = 6  # shown at once


def render(*runs: Run) -> str:
    """Returns an HTML page about these runs: verdicts, series, the plane of B, components and configurations.

    The page cannot use the network. Only its own two scripts can run, which the browser checks by their hashes, so
    text from a run folder is only ever shown.

    Args:
        runs: At least one, from `read_runs`. Their series share axes.

    Raises:
        ImportError: The extra `report` is not installed.
        ValueError: There are no runs.
    """
    if not runs:
        raise ValueError("`render` needs at least one run, got none.")
    try:
        from jinja2 import Environment
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ImportError('`report` needs plotly and jinja2: pip install "mixture-diagnostics[report]"') from error
    found = [verdicts(run) for run in runs]
    data = content(runs, found)
    scripts = [get_plotlyjs().strip(), _asset("page.js")]
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(_asset("page.html"))
    return page.render(
        runs=[_run(*one) for one in zip(runs, found, strict=True)],
        data=data,
        scripts=scripts,
        hashes=[_hash(script) for script in scripts],
        style=_asset("page.css"),
        figure=figure,
        most=MOST_VERDICTS,
        most_points=BUCKETS,
    )


def figure(value: float | None) -> str:
    """Returns a number with three digits, or a dash if it is unknown.

    Example:
        >>> figure(0.123456), figure(1234567), figure(0.0), figure(1.5e-7)
        ('0.123', '1,234,567', '0', '1.5e-07')
    """
    if value is None or not math.isfinite(value):
        return NOTHING
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _run(run: Run, found: tuple[Verdict, ...]) -> dict[str, Any]:
    return {
        "name": run.name,
        "folder": str(run.folder),
        "n_rows": len(run.log["step"]),
        "last": _last(run),
        "verdicts": found,
        "components": _components(run),
        "missing": run.missing,
        "config": run.config,
    }


def _last(run: Run) -> dict[str, str]:
    """The figures of the last step, under the names that the page shows."""
    columns = run.log | (run.extra or {})
    names = ("step", "epoch", "K", "trace_T", "trace_B", "share_B", "participation_ratio")
    last = {name: float(columns[name][-1]) for name in names if name in columns and len(columns[name])}
    last["participation_ratio"] = run.directions
    shown = {name.replace("participation_", "participation "): figure(last.get(name)) for name in names}
    return shown | {"D": figure(run.D), "alarms so far": figure(len(run.alarms))}


def _components(run: Run) -> list[dict[str, Any]]:
    """The rows of the table of components."""
    if run.extra is None:
        return []
    columns = [run.extra[name][-1].tolist() for name in ("pi", "n", "rel")]
    alarms = {alarm.component: f"{alarm.kind}, step {alarm.since:,}" for alarm in run.alarms}
    return [
        {"k": k, "pi": pi, "n": n, "rel": rel, "alarm": alarms.get(k)}
        for k, (pi, n, rel) in enumerate(zip(*columns, strict=True))
    ]


def _asset(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8").strip()


def _hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
