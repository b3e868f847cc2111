"""`plot`, `report` and `watch`: what they write and print, and errors in one line."""

import sys
from pathlib import Path

import pytest

from mixture_torch.__main__ import main
from tests.app.common import demo
from tests.report.logs import healthy, lose, write


@pytest.fixture
def runs(tmp_path: Path) -> tuple[str, str]:
    broken = healthy()
    lose(broken, 2, slice(120, None))
    return str(write(tmp_path / "good", healthy())), str(write(tmp_path / "bad", broken))


def test_report_prints_the_verdicts_and_its_path(runs: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", *runs]) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line for line in out if line.startswith(("good", "bad", "fine:", "wrong:"))] == [
        "good",
        "fine: Nothing is wrong",
        "bad",
        "wrong: A group of samples has gone: component 2 lost most of its samples at step",
    ]
    page = Path(out[-1].removeprefix("Report: "))
    assert page == Path(runs[0], "report.html")
    assert page.read_text().startswith("<!")


def test_plot_writes_a_picture(runs: tuple[str, str], tmp_path: Path) -> None:
    assert main(["plot", *runs, "--out", str(tmp_path / "new" / "runs.png")]) == 0
    assert (tmp_path / "new" / "runs.png").read_bytes().startswith(b"\x89PNG")


def test_watch_prints_once_without_a_terminal(runs: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", runs[1]]) == 0
    assert "wrong: A group of samples has gone" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["report", "nowhere"], "There is no `nowhere`"),
        (["watch", "nowhere"], "There is no `nowhere`"),
        (["watch", "no\x1b[2J"], "There is no `no?[2J`"),
        (["plot", "nowhere", "--out", "x.png"], "There is no `nowhere`"),
        (["plot", "good", "--out", "mixture.csv"], "`--out` must end in .png"),
        (["report", "good", "--out", "mixture.csv"], "`--out` must end in .html"),
        (["report", "good", "--out", "good/mixture.csv/x.html"], "File exists"),
        (["plot", "good"], "Missing option"),
        (["report"], "Missing argument"),
        (["report", "good/mixture.csv"], "`good/mixture.csv` is a file; name the run folder."),
        (["report", "foreign"], "begins with `\\x1b[2J,loss`"),
    ],
)
def test_errors_are_one_line(
    words: list[str], said: str, runs: object, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("foreign").mkdir()
    Path("foreign/mixture.csv").write_text("\x1b[2J,loss\n")
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


@pytest.mark.parametrize(("command", "package"), [("plot", "matplotlib"), ("report", "plotly"), ("report", "jinja2")])
def test_missing_extra_is_one_line(
    command: str, package: str, runs: tuple[str, str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for name in list(sys.modules):
        if name.partition(".")[0] == package or name.startswith("mixture_torch.report"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    out = tmp_path / {"plot": "runs.png", "report": "page.html"}[command]
    assert main([command, runs[0], "--out", str(out)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f'pip install "mixture-diagnostics[{command}]"' in line


def test_runs_are_shown_without_what_the_demo_needs(runs: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name.startswith(("sklearn", "mixture_torch.app")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert [main(words) for words in (["watch", runs[0]], ["report", runs[0]], ["demo", "--help"])] == [0, 0, 0]


def test_demo_ends_with_the_path_of_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo("--out", str(tmp_path / "run")) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"Report: {tmp_path / 'run' / 'report.html'}"
    assert Path(last.removeprefix("Report: ")).exists()


def test_demo_without_the_extra_of_the_report_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    for name in list(sys.modules):
        if name.startswith(("plotly.", "mixture_torch.report.page", "mixture_torch.report.content")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("mixture_torch.report.page", raising=False)
    assert demo("--out", str(tmp_path / "run")) == 0
    assert 'pip install "mixture-diagnostics[report]"' in capsys.readouterr().out.splitlines()[-1]
