"""What an estimator leaves in its run folder, on which rank, and whoever else flushes it."""

import gc
import linecache
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from mixture_torch import MixtureStats, read_log, read_scores
from mixture_torch.files.recorder import Recorder, Row
from mixture_torch.journal import Logged
from mixture_torch.update.arrivals import Arrivals, Report
from mixture_torch.update.figures import numbers_of
from tests.files.recording import HEADER, said
from tests.tolerances import FLOAT32
from tests.wrapper.samples import contents, estimator, log_steps, mixture

SCORES: list[dict[str, Any]] = [{}, {"store_scores": True}, {"store_scores": True, "scores_mode": "per_step"}]
scores = pytest.mark.parametrize("options", SCORES, ids=str)


@scores
def test_files_are_the_statistics_of_every_step(tmp_path: Path, options: dict[str, Any]) -> None:
    with estimator(log_dir=tmp_path / "new" / "run", **options) as wrapper:
        found = log_steps(wrapper, epoch=4)
        assert read_log(tmp_path / "new" / "run")["step"].tolist() == [0, 1, 2]  # before it is closed
    rows = (tmp_path / "new" / "run" / "mixture.csv").read_bytes()
    figures = [[s["pi"].min(), s["pi"].max(), s["trace_B"], s["opnorm_B"]] for s in found]
    texts = [",".join([f"{n},4,3", *(f"{float(x):.9g}" for x in row)]) + "\n" for n, row in enumerate(figures)]
    assert rows == HEADER + "".join(texts).encode()
    names = {"mixture.csv", "mixture_extra.csv", "mixture_last.pt"}
    if options:
        names |= {"mixture_scores.pt"} if len(options) == 1 else {f"mixture_scores/step_00000{n}.pt" for n in range(3)}
        stored = [
            (e["step"], e["epoch"], e["responsibilities"].tolist()) for e in read_scores(tmp_path / "new" / "run")
        ]
        assert stored == [(step, 4, stats["R"].tolist()) for step, stats in enumerate(found)]
    assert set(contents(tmp_path / "new" / "run")) == names


def test_row_is_of_the_stats_that_are_given(tmp_path: Path) -> None:
    with estimator(log_dir=tmp_path) as wrapper:
        first = wrapper.update(mixture()[0])
        wrapper.update(mixture(seed=1)[0] * 3)
        wrapper.log_step(step=0, epoch=0, stats=first)
        wrapper.log_step(step=1, epoch=0, stats=dict(first))
        wrapper.log_step(step=torch.tensor(2), epoch=torch.ones(()).long().numpy()[()])  # type: ignore[arg-type]
    trace_B = [float(first["trace_B"])] * 2 + [float(wrapper.stats["trace_B"])]
    assert read_log(tmp_path)["trace_B"].tolist() == pytest.approx(trace_B, rel=1e-8)
    assert read_log(tmp_path)["epoch"].tolist() == [0, 0, 1]


def test_stats_need_pi_and_B_alone_unless_scores_are_stored(tmp_path: Path) -> None:
    with estimator(log_dir=tmp_path) as wrapper:
        stats = wrapper.update(mixture()[0])
        wrapper.log_step(step=0, epoch=0)
        wrapper.log_step(step=1, epoch=0, stats={"pi": stats["pi"], "B": stats["B"]})
        with pytest.raises(ValueError, match="a mapping without B"):
            wrapper.log_step(step=2, epoch=0, stats={"pi": stats["pi"]})
    log = read_log(tmp_path)
    for name in HEADER.decode().strip().split(",")[2:]:
        assert log[name][1] == pytest.approx(log[name][0], rel=FLOAT32)
    with (
        estimator(log_dir=tmp_path / "scores", store_scores=True) as wrapper,
        pytest.raises(ValueError, match="without R"),
    ):
        wrapper.log_step(step=0, epoch=0, stats={"pi": stats["pi"], "B": stats["B"]})
    assert not (tmp_path / "scores").exists()


@pytest.mark.parametrize("R", [torch.ones(2, 3, 4), torch.ones(3), torch.eye(3).to_sparse(), [[1.0]]], ids=str)
def test_responsibilities_that_are_no_matrix_are_refused_at_once(R: Any, tmp_path: Path) -> None:
    wrapper = estimator(log_dir=tmp_path / "run", store_scores=True)
    stats = {**wrapper.update(mixture()[0]), "R": R}
    with pytest.raises(ValueError, match=r"^`stats` must hold R as a dense tensor \(N, K\), got "):
        wrapper.log_step(step=0, epoch=0, stats=stats)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [("pi", [0.5, 0.5]), ("pi", torch.ones(0)), ("pi", torch.tensor(1.0)), ("B", torch.ones(3, 4)), ("trace_B", 1.0)],
    ids=str,
)
def test_stats_of_a_wrong_shape_are_refused_in_one_line(key: str, value: Any, tmp_path: Path) -> None:
    with estimator(log_dir=tmp_path / "run") as wrapper:
        stats = {"pi": torch.ones(2) / 2, "B": torch.eye(4), key: value}
        with pytest.raises(ValueError, match=f"^`stats` must hold {key} as a dense tensor .*, got .*\\.$"):
            wrapper.log_step(step=0, epoch=0, stats=stats)


@pytest.mark.parametrize("B", [torch.eye(4).half(), torch.eye(4, dtype=torch.int64), torch.eye(4) * torch.nan], ids=str)
def test_stats_of_any_numbers_are_logged(B: torch.Tensor, tmp_path: Path) -> None:
    with estimator(log_dir=tmp_path) as wrapper:
        wrapper.log_step(step=0, epoch=0, stats={"pi": torch.ones(2) / 2, "B": B})
    assert read_log(tmp_path)["trace_B"][0] == pytest.approx(float(B.float().trace()), nan_ok=True)


@pytest.mark.parametrize("stats", [None, {}])
def test_log_step_without_an_update_warns_once(tmp_path: Path, stats: Any) -> None:
    wrapper = estimator(log_dir=tmp_path / "run")
    with pytest.warns(UserWarning, match="`log_step` has nothing to log because there was no `update`") as caught:
        wrapper.log_step(step=0, epoch=0, stats=stats)
    assert caught[0].filename == __file__
    with said() as messages:
        wrapper.log_step(step=1, epoch=0, stats=stats)
    assert messages == []
    assert not (tmp_path / "run").exists()
    log_steps(wrapper)
    wrapper.close()
    assert read_log(tmp_path / "run")["step"].tolist() == [0, 1, 2]


def test_empty_log_dir_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^`log_dir` is empty; use `\.` for the working directory"):
        estimator(log_dir="")


def test_folder_is_that_of_the_time_of_making(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    wrapper = estimator(log_dir="run", store_scores=True)
    nothing = estimator()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    log_steps(nothing)
    wrapper.update(mixture()[0])
    wrapper.flush()
    assert contents(tmp_path) == {}
    log_steps(wrapper)
    wrapper.close()
    assert set(contents(tmp_path)) == {
        f"run/{name}" for name in ("mixture.csv", "mixture_extra.csv", "mixture_last.pt", "mixture_scores.pt")
    }


@pytest.mark.parametrize("finish", ["flush", "close", "collect"])
def test_other_ranks_write_nothing_and_leave_the_files_of_the_main_rank(tmp_path: Path, finish: str) -> None:
    main = estimator(log_dir=tmp_path, store_scores=True, is_main=True)
    other = estimator(log_dir=tmp_path, store_scores=True, is_main=False)
    log_steps(main)
    before = contents(tmp_path)
    log_steps(other)
    if finish == "collect":
        del other
        gc.collect()
    else:
        getattr(other, finish)()
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("rank", "is_main", "writes"),
    [("0", None, True), ("1", None, False), ("", None, True), (None, None, True), ("1", True, True)],
)
def test_main_rank_is_that_of_the_environment_at_the_first_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: str | None, is_main: bool | None, writes: bool
) -> None:
    with estimator(log_dir=tmp_path / "run", is_main=is_main) as wrapper:
        monkeypatch.delenv("RANK", raising=False) if rank is None else monkeypatch.setenv("RANK", rank)
        log_steps(wrapper)
    assert (tmp_path / "run").exists() is writes


# Whoever else flushes: a signal handler, a second thread


def trained(
    wrapper: MixtureStats, steps: int, between: Callable[[], None] = lambda: None, epoch: int = 0
) -> list[float]:
    """Trains, and returns what should be in the log."""
    expected = []
    for step in range(steps):
        stats = wrapper.update(mixture(seed=step)[0])
        between()
        wrapper.log_step(step=step, epoch=epoch)
        expected.append(float(stats["trace_B"]))
    return expected


def assert_each_is_there_once(folder: Path, expected: list[float], options: dict[str, Any]) -> None:
    log = read_log(folder)
    assert log["step"].tolist() == list(range(len(expected)))
    assert log["trace_B"].tolist() == pytest.approx(expected, rel=1e-8)
    if options:
        assert [entry["step"] for entry in read_scores(folder)] == list(range(len(expected)))


@scores
@pytest.mark.parametrize("method", ["flush", "close", "interrupt"])
def test_signal_handler_at_any_line_of_log_step_loses_and_doubles_nothing(
    tmp_path: Path, options: dict[str, Any], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # no test can tell, and it takes most of the time
    first = SCORES.index(options) + 3 * ["flush", "close", "interrupt"].index(method)
    for line in range(1 + first, 2000, 9):  # each case another one of nine lines
        lines, wrapper = count(1), estimator(log_dir=tmp_path / str(line), **options)
        handled: list[int] = []

        def handler(wrapper: MixtureStats = wrapper) -> None:
            if method == "interrupt":
                raise KeyboardInterrupt
            getattr(wrapper, method)()

        def trace(frame: Any, event: str, _: Any, lines: Any = lines, line: int = line, handled: Any = handled) -> Any:
            path = frame.f_code.co_filename
            if "mixture_torch" not in path or path.endswith("precision.py"):  # whose settings belong to all tests
                return None
            # On these lines a trace could raise outside of the block and leave its lock held. Python lets no signal in.
            is_block = linecache.getline(path, frame.f_lineno).lstrip().startswith(("with ", "try:"))
            if event == "line" and not is_block and not handled and next(lines) == line:
                handled.append(line)
                handler()
            return trace

        expected = trained(wrapper, 2)
        stats = wrapper.update(mixture(seed=9)[0])
        with said() as messages:
            sys.settrace(trace)
            with suppress(KeyboardInterrupt):
                wrapper.log_step(step=2, epoch=0)
            sys.settrace(None)
            assert not Recorder._turn._is_owned()  # type: ignore[attr-defined]  # else the next thread would hang
            wrapper.close()
        assert messages == []
        is_there = method != "interrupt" or not handled or len(read_log(tmp_path / str(line))["step"]) == 3
        expected += [float(stats["trace_B"])] if is_there else []
        assert_each_is_there_once(tmp_path / str(line), expected, options)
        if not handled:
            break
    assert line > 100


@scores
def test_second_thread_may_flush_and_close_at_any_time(tmp_path: Path, options: dict[str, Any]) -> None:
    wrapper, ended, errors = estimator(log_dir=tmp_path, **options), threading.Event(), []

    def work() -> None:
        try:
            while not ended.is_set():
                wrapper.flush()
                wrapper.close()
        except Exception as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    thread = threading.Thread(target=work)
    thread.start()
    with said():
        expected = trained(wrapper, 50)
        ended.set()
        thread.join()
    sys.setswitchinterval(interval)
    wrapper.close()
    assert errors == []
    assert_each_is_there_once(tmp_path, expected, options)


def test_signal_handler_that_flushes_beside_a_second_thread_ends(tmp_path: Path) -> None:
    code = f"""
        import signal, threading, torch
        from mixture_torch import MixtureStats, read_log

        estimator, x, is_busy = MixtureStats(K=2, enabled=True, log_dir={str(tmp_path)!r}), torch.randn(64, 4), []

        def train():
            for step in range(100):
                estimator.update(x)
                estimator.log_step(step=step, epoch=0)

        def handle(*_):
            if not is_busy:
                is_busy.append(True)
                estimator.flush()
                is_busy.clear()

        signal.signal(signal.SIGALRM, handle)
        signal.setitimer(signal.ITIMER_REAL, 0.002, 0.002)
        thread = threading.Thread(target=train)
        thread.start()
        while thread.is_alive():
            estimator.flush()
        signal.setitimer(signal.ITIMER_REAL, 0)
        estimator.close()
        assert read_log({str(tmp_path)!r})["step"].tolist() == list(range(100))
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=60)


# Rows whose figures are on their way from a GPU


class Later:
    """An event that has not come before somebody waits for it."""

    def query(self) -> bool:
        """Not yet."""
        return False

    def synchronize(self) -> None:
        """Now."""


def log_later(logged: Arrivals[Logged], step: int, *, resumes: bool = False) -> None:
    """Logs a step whose figures are its number."""
    number = torch.tensor(float(step))
    stats = {"pi": torch.ones(1), "trace_B": number, "opnorm_B": number}
    report = Report(numbers_of(stats, extra=False), K=1, D=1, arrived=Later())  # type: ignore[arg-type]
    row = cache(lambda: Row(step, 0, 1, *report.figures[:4], None, resumes))
    logged.expect(report, Logged(row, report, resumes))


def test_rows_that_arrive_later_keep_their_order_and_what_they_supersede(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, scores_mode=None, writes=lambda: True, strict=False)
    logged: Arrivals[Logged] = Arrivals(recorder.turn)
    recorder.open()
    write: Callable[[Logged], None] = lambda logged: recorder.write(logged.row())  # noqa: E731
    for step in (5, 6, 2):
        log_later(logged, step, resumes=step == 2)
    with said():
        logged.settle(write, but=1)
        assert read_log(tmp_path)["step"].tolist() == [5, 6]
        logged.settle(write)
        recorder.close()
    assert read_log(tmp_path)["step"].tolist() == [2]
    assert (tmp_path / "mixture.superseded-1.csv").read_bytes().count(b"\n") == 3


def test_row_that_was_interrupted_when_it_arrived_is_written_once(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, scores_mode=None, writes=lambda: True, strict=False)
    logged: Arrivals[Logged] = Arrivals(recorder.turn)
    recorder.open()

    def interrupted(row: Callable[[], Row], *, behind: bool) -> None:
        if behind:
            recorder.write(row.row())
        raise KeyboardInterrupt

    for step, behind in enumerate((False, True)):
        log_later(logged, step)
        with pytest.raises(KeyboardInterrupt):
            logged.settle(partial(interrupted, behind=behind))
        logged.settle(lambda logged: recorder.write(logged.row()))
    recorder.close()
    assert read_log(tmp_path)["step"].tolist() == [0, 1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_collected_estimator_writes_what_is_on_its_way(tmp_path: Path) -> None:
    wrapper = estimator(log_dir=tmp_path)
    log_steps(wrapper, 1)
    log_later(wrapper._journal.rows, 7)
    del wrapper
    gc.collect()
    assert read_log(tmp_path)["step"].tolist() == [0, 7]
