"""The benchmarks run, and their competitors do the same job."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import bench_training, cases, pages, pictures
from benchmarks.__main__ import main
from benchmarks.bench_growth import slope
from benchmarks.cases import Ours, Size
from benchmarks.competitors import RowFile, ScikitLearn, Textbook
from benchmarks.timing import paired_interval
from mixture_torch import read_log
from tests.tolerances import FLOAT32, relative_error

CPU = torch.device("cpu")
SIZE = Size(N=400, D=16, K=4)


def test_quick_run_prints_and_writes_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--quick", "--device", "cpu", "--out", str(tmp_path), "--themes", "step", "syncs"])
    (page,) = tmp_path.glob("*.md")
    text = page.read_text(encoding="utf-8")
    assert "\n| 256 | 16 | 4 | " in text
    assert "`python -m benchmarks --quick --device cpu --themes step syncs`" in text
    assert f"torch {torch.__version__}" in text
    assert text.split("## ")[1].strip() in capsys.readouterr().out


def test_theme_measured_again_replaces_only_its_section(tmp_path: Path) -> None:
    def save(theme: str, title: str) -> str:
        table = pages.Table(title=title)
        pages.save_theme(tmp_path, CPU, theme, [table], order=["First", "Second"], command="command")
        (page,) = tmp_path.glob("*.md")
        return page.read_text(encoding="utf-8")

    save("Second", "old")
    save("First", "kept")
    text = save("Second", "new")
    assert re.findall(r"^##+ (.*)$", text, re.MULTILINE) == ["First", "kept", "Second", "new"]


def test_figures_lie_beside_the_page(tmp_path: Path) -> None:
    table = pages.Table(title="Curve", figures={"curve": b"png"})
    text = pages.save_theme(tmp_path, CPU, "Growth", [table], order=["Growth"], command="command")
    (picture,) = tmp_path.glob("*.png")
    assert f"![Curve]({picture.name})" in text
    assert picture.read_bytes() == b"png"


def test_pictures_of_the_front_page_are_drawn(tmp_path: Path) -> None:
    pictures.main(["--out", str(tmp_path), "--epochs", "2"])
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert set(sizes) == {"healthy.png", "class-gone.png"}
    assert 10_000 < min(sizes.values()) < max(sizes.values()) < 200_000


def test_paired_interval_of_known_differences() -> None:
    interval = paired_interval([10.0, 20.0, 30.0, 40.0], [11.0, 22.0, 33.0, 46.0])
    assert interval.mean == 3.0
    assert interval.median == 2.5
    # Standard deviation of 1, 2, 3, 6: sqrt(14 / 3).
    half = 1.96 * (14 / 3) ** 0.5 / 2
    assert (interval.low, interval.high) == pytest.approx((3.0 - half, 3.0 + half))


def test_slope_of_a_power_law() -> None:
    assert slope([1, 10, 100], [3.0, 300.0, 30000.0]) == pytest.approx(2)


def test_palindromes_time_every_step_in_either_order() -> None:
    order: list[str] = []
    steps = {name: (lambda name=name: order.append(name)) for name in "AB"}
    seconds = bench_training.in_palindromes(steps, pairs=3, seconds=0, warmups=1)
    assert "".join(order) == "AB" + "ABBAAB"
    assert [len(times) for times in seconds.values()] == [3, 3]


def test_competitors_compute_of_a_first_batch_what_the_estimator_computes(tmp_path: Path) -> None:
    batches, centers = cases.draw(SIZE, device=CPU)
    folders = [tmp_path / name for name in ("ours", "textbook", "scikit-learn")]
    for folder in folders:
        folder.mkdir()
    ours = Ours(SIZE, folders[0])
    with RowFile(folders[1]) as rows, RowFile(folders[2]) as more_rows:
        textbook, scikit_learn = Textbook(centers, rows), ScikitLearn(centers, SIZE.N, more_rows)
        for competitor in (ours, textbook, scikit_learn):
            competitor.step(batches[0])
    ours.estimator.close()
    stats = ours.estimator.stats
    order = torch.cdist(centers, stats["mu"]).argmin(dim=1)  # the estimator finds the components in an order of its own
    for competitor in (textbook, scikit_learn):
        for name in ("pi", "mu", "Sigma"):
            assert relative_error(as_tensor(getattr(competitor, name)), stats[name][order]) < FLOAT32, name
        assert relative_error(as_tensor(competitor.B), stats["B"]) < FLOAT32
    written = [read_log(folder) for folder in folders]
    for name in ("pi_min", "pi_max", "trace_B", "opnorm_B"):
        assert [log[name][0] for log in written] == pytest.approx([written[0][name][0]] * 3, rel=1e-5)


def as_tensor(values: object) -> Tensor:
    return torch.as_tensor(values)
