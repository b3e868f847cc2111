"""Every run folder gives a picture that can be read."""

import functools
import itertools
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from mixture_torch import MixtureStats, plot
from mixture_torch.report.run import read_run

GONE = 60  # the step at which a group of rows disappears
ALL_NAN = range(20)


def train(
    folder: Path, *, K: int = 3, D: int = 6, steps: int = 20, nan: range | None = None, gone: int = 10**9
) -> Path:
    chance = torch.Generator().manual_seed(0)
    groups = 4 * torch.randn(max(K, 2), D, generator=chance)
    with (
        pytest.warns() if nan else matplotlib.rc_context(),
        MixtureStats(K=K, enabled=True, log_dir=folder, ema_decay=0.9, on_alarm=lambda alarm: None) as estimator,
    ):
        for step in range(steps):
            chosen = torch.randint(int(step >= gone), len(groups), (200,), generator=chance)
            x = groups[chosen] + torch.randn(200, D, generator=chance)
            estimator.update(x * (float("nan") if nan and step in nan else 1.0))
            estimator.log_step(step=step, epoch=step // 10)
            if step % 10 == 9:
                estimator.flush()
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    made = {
        "K = 1": train(root / "one", K=1),
        "K = 64": train(root / "many", K=64, D=16),
        "D = 1": train(root / "line", D=1),
        "one row": train(root / "short", steps=1),
        "rows without embeddings": train(root / "some", steps=60, nan=range(20, 40)),
        "no embeddings": train(root / "none", nan=ALL_NAN),
        "class gone": train(root / ("long $name_" + 8 * "with words "), steps=100, gone=GONE),
        "only mixture.csv": root / "bare",
        "no row": root / "empty",
    }
    for name, source in (("bare", (root / "many" / "mixture.csv").read_bytes()), ("empty", b"")):
        (root / name).mkdir()
        (root / name / "mixture.csv").write_bytes(source)
    return made


Draw = Callable[..., tuple[Figure, list[tuple[Text, np.ndarray]]]]
ALONE = ("K = 1", "K = 64", "one row", "no embeddings", "class gone", "only mixture.csv", "no row")
SEVERAL = ("D = 1", "rows without embeddings", "class gone", "only mixture.csv", "no row")


def texts(figure: Figure) -> Iterator[tuple[Text, np.ndarray]]:
    """Yields each text that is drawn, and its left, lower, right and upper end in pixels."""
    FigureCanvasAgg(figure).draw()
    inside = figure.bbox
    beyond = {text for axes in figure.axes for text in _not_drawn(axes)}
    for text in figure.findobj(Text):
        box = text.get_window_extent()
        if text.get_visible() and text.get_text().strip() and box.width and text not in beyond:
            yield text, np.array([box.x0, box.y0, inside.width - box.x1, inside.height - box.y1])


def _not_drawn(axes: Axes) -> Iterator[Text]:
    """Yields the labels of ticks that matplotlib keeps but does not draw."""
    for axis in (axes.xaxis, axes.yaxis):
        low, high = sorted(axis.get_view_interval())
        for tick in axis.get_major_ticks():
            if not (axes.axison and low <= tick.get_loc() <= high):
                yield tick.label1


@pytest.fixture(scope="module")
def draw(folders: dict[str, Path]) -> Draw:
    """Draws each figure once."""

    @functools.cache
    def drawn(*names: str) -> tuple[Figure, list[tuple[Text, np.ndarray]]]:
        figure = plot(*(folders[name] for name in names))
        return figure, list(texts(figure))

    return drawn


@pytest.mark.parametrize("names", [*((name,) for name in ALONE), SEVERAL])
def test_texts_are_whole_apart_and_large_enough(draw: Draw, names: tuple[str, ...]) -> None:
    figure, found = draw(*names)
    assert min(text.get_fontsize() for text, _ in found) >= 8
    width, height = figure.bbox.width, figure.bbox.height
    assert round(width) == 1280
    cut = [text.get_text() for text, room in found if room.min() < -1]
    assert cut == []
    boxes = [(text.get_text(), room[0], room[1], width - room[2], height - room[3]) for text, room in found]
    over = [
        (a[0], b[0])
        for a, b in itertools.combinations(boxes, 2)
        if min(a[3], b[3]) - max(a[1], b[1]) > 2 and min(a[4], b[4]) - max(a[2], b[2]) > 4
    ]
    assert over == []


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (("only mixture.csv",), "There is no mixture_extra.csv with rows."),
        (("only mixture.csv",), "There is no snapshot yet."),
        (("only mixture.csv",), "no total"),
        (("K = 1",), "All figures are 0 or unknown."),
        (("no embeddings",), "All figures are 0 or unknown."),
        (SEVERAL, "no total of bare, empty"),
    ],
)
def test_figure_says_what_is_missing(draw: Draw, names: tuple[str, ...], sentence: str) -> None:
    assert sentence in " ".join(text.get_text().replace("\n", " ") for text, _ in draw(*names)[1])


def test_component_that_changed_is_marked_and_coloured(folders: dict[str, Path]) -> None:
    run = read_run(folders["class gone"])
    (lost, *_) = (alarm.component for alarm in run.alarms if alarm.kind == "composition" and alarm.since == GONE)
    figure = plot(run, panels=("weights", "batch"))
    weights, batch = figure.axes
    marks = {line.get_label(): line.get_xdata() for line in weights.lines}
    assert GONE in marks["alarm: composition"]
    assert str(lost) in [line.get_label() for line in batch.lines]


def test_figure_of_a_million_rows_takes_seconds_and_keeps_a_spike(folders: dict[str, Path]) -> None:
    run = read_run(folders["K = 1"])
    rows, S = np.arange(1_000_000) % 20, 1_000_000
    log = {name: column[rows] for name, column in run.log.items()} | {"step": np.arange(S)}
    extra = {name: column[rows] for name, column in run.extra.items()} | {"step": np.arange(S)}
    log["trace_B"] = np.where(np.arange(S) == 123_456, 1e3, 1.0)
    run = attrs.evolve(run, log=log, extra=extra)
    begin = time.perf_counter()
    figure = plot(run)
    FigureCanvasAgg(figure).draw()
    assert time.perf_counter() - begin < 10
    assert max(np.nanmax(line.get_ydata(), initial=0.0) for line in figure.axes[0].lines) == 1e3


def test_panels_of_several_runs_begin_a_row(folders: dict[str, Path]) -> None:
    figure = plot(folders["K = 1"], folders["D = 1"], panels=("share", "weights", "batch"))
    places = [(axes.get_subplotspec().rowspan.start, axes.get_subplotspec().colspan.start) for axes in figure.axes]
    assert places == [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1)]


def test_plot_leaves_the_settings_of_other_figures(folders: dict[str, Path]) -> None:
    with matplotlib.rc_context({"font.size": 30.0, "axes.grid": False}):
        before = dict(matplotlib.rcParams)
        figure = plot(folders["D = 1"], panels=("variance",))
        assert dict(matplotlib.rcParams) == before
        assert max(text.get_fontsize() for text, _ in texts(figure)) < 12


def test_plot_needs_no_display_and_import_no_matplotlib(folders: dict[str, Path]) -> None:
    code = (
        "import sys, mixture_torch; assert not {'matplotlib', 'mixture_torch.report'} & set(sys.modules);"
        f"mixture_torch.plot({str(folders['D = 1'])!r}, panels=['share']);"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_missing_matplotlib_is_named_in_one_line(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'^`plot` needs matplotlib: pip install "mixture-diagnostics\[plot\]"\.$'):
        plot(folders["D = 1"])


def test_wrong_arguments_are_named(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="at least one run"):
        plot()
    with pytest.raises(ValueError, match=r"variance, .* got 'loss'"):
        plot(folders["D = 1"], panels=("loss",))
