"""The view in the terminal: each width, no spike lost, waiting, torn folders, Ctrl-C."""

import io
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from mixture_torch import read_run
from mixture_torch.report import terminal
from tests.report.logs import healthy, lose, write


def shown(folder: Path, width: int, *, encoding: str = "utf-8") -> str:
    file = io.TextIOWrapper(io.BytesIO(), encoding)
    Console(file=file, width=width).print(terminal.of_run(read_run(folder)))
    file.seek(0)
    return file.read()


@pytest.mark.parametrize("width", [40, 80, 200])
def test_lines_fit_and_end_with_numbers(tmp_path: Path, width: int) -> None:
    text = shown(write(tmp_path, healthy()), width)
    assert max(map(len, text.splitlines())) <= width
    (line,) = (line for line in text.splitlines() if line.startswith("participation_ratio"))
    now = read_run(tmp_path).log | (read_run(tmp_path).extra or {})
    assert f"{now['participation_ratio'][-1]:.4g}" in line


def test_terminal_without_unicode_has_plain_lines(tmp_path: Path) -> None:
    assert shown(write(tmp_path, healthy()), 80, encoding="ascii").isascii()


def test_spike_is_seen_in_a_line_of_any_length() -> None:
    values = np.ones(100_000)
    values[77_777] = 9.0
    assert terminal.levels(values, 10) == [0, 0, 0, 0, 0, 0, 0, 7, 0, 0]
    assert terminal.levels(np.array([np.nan, 1.0]), 5) == [None, 3]
    assert terminal.levels(np.array([0.0, 1e308]), 5) == [0, 7]


def test_watch_prints_once_if_nobody_watches(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=False)
    terminal.watch(write(tmp_path, healthy()), console=console)
    assert "fine: Nothing is wrong" in console.file.getvalue()  # type: ignore[attr-defined]


def test_watch_waits_redraws_and_survives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sleep between two looks does something to the folder; the last one is Ctrl-C."""
    folder, columns = tmp_path / "run", healthy()
    lose(columns, 2, slice(120, None))

    def interrupt() -> None:
        raise KeyboardInterrupt

    acts = iter(
        [
            lambda: write(folder, {name: column[:60] for name, column in columns.items()}),
            lambda: write(folder, columns),
            lambda: (folder / "mixture.csv").write_bytes(b"foreign\n1\n"),
            lambda: folder.rename(tmp_path / "elsewhere"),
            interrupt,
        ]
    )
    monkeypatch.setattr(time, "sleep", lambda _: next(acts)())
    console = Console(file=io.StringIO(), force_terminal=True, width=300, height=40)
    terminal.watch(folder, console=console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    places = [text.index(word) for word in ("Waiting for the first row", "fine", "A group of samples", "begins with")]
    assert places == sorted(places)
    assert text.rindex("Waiting for the first row") > places[-1]
