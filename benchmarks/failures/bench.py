"""The theme `failures`: makes the runs, scores them, and writes the page."""

import time
from pathlib import Path

import torch

from benchmarks import pages
from benchmarks.failures import page, runs, score

TITLE = "Which failures are seen, by which figure, and how soon"
SLUG = "failures"
SETTING = (
    "{tested} tested runs of small encoders (D = 32, K = 10, `ema_decay` 0.9), and {calibration} calibration runs "
    "with other seeds. The {healthy} healthy calibration runs set the thresholds of single figures, and some of the "
    "alarms. "
    "A run has 100 to 220 steps; batches have 512 images or 128 sentences, "
    "in two views. Larger models and longer runs may behave differently. All figures are of embeddings of norm 1. See "
    "[the description](../README.md#failures) and [the changes](../failures/kinds.py)."
)
RUNS = Path(__file__).parent / "runs"  # git ignores it


def save(out: Path, folder: Path | None, *, quick: bool, command: str) -> str:
    """Makes the runs that are missing, writes the page and its figures, and returns its text.

    Args:
        out: Folder of the page, which exists.
        folder: Of the runs. If None, beside this file, or with `quick` beside the page.
        quick: Whether to make only a few runs, to see that everything works.
        command: What the page is made with.
    """
    folder = folder or (out / "runs" if quick else RUNS)
    todo, begin = runs.tasks(quick=quick), time.monotonic()
    for line in runs.make(todo, folder):
        print(f"{time.monotonic() - begin:6.0f} s: {line}", flush=True)
    scored, thresholds = score.score(runs.read(todo, folder))
    made = f"Made by `{command}` with {pages.environment(torch.device('cpu'))}."
    n_calibration = sum(one.record.is_calibration for one in scored)
    n_healthy = sum(score.sets_limits(one.record) for one in scored)
    setting = SETTING.format(calibration=n_calibration, tested=len(scored) - n_calibration, healthy=n_healthy)
    tables = page.tables(scored, thresholds)
    text = "\n\n".join([f"# {TITLE}", made, setting, *(table.markdown(SLUG) for table in tables)])
    for table in tables:
        for name, png in table.figures.items():
            (out / f"{SLUG}-{name}.png").write_bytes(png)
    (out / f"{SLUG}.md").write_text(text + "\n", encoding="utf-8")
    return text
