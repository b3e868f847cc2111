"""The runs of the failures benchmark do what they say, others' figures are as defined, and its page counts right."""

import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import attrs
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.failures import analysis, kinds, limits, methods, others, page, runs, score
from benchmarks.failures.runs import HEALTHY, Record
from benchmarks.failures.score import Scored
from benchmarks.failures.training import Setting, Training
from benchmarks.pages import Table
from mixture_torch import read_log, read_run
from mixture_torch.losses import NTXentLoss
from tests.report.logs import healthy, lose, write

SETTING = Setting("SimCLR", "mlp", "digits")
GONE = "one class gone"
FLICKER = np.resize([1.0, -1, 1, -1, 0], 200)  # 5 rows have mean 0, and no two in succession are on the same side
pytestmark = pytest.mark.filterwarnings("ignore:An input array is constant")  # a figure that is so in all runs


@pytest.fixture
def run(tmp_path: Path) -> Training:
    return Training(SETTING, 0, tmp_path / "run")


def drawn(run: Training, steps: int) -> Counter[int]:
    """How often each class is drawn."""
    return Counter(int(label) for _ in range(steps) for label in run.data.labels[run.draw()])


def test_forked_run_goes_on_as_the_run_itself(run: Training, tmp_path: Path) -> None:
    run.run(12)
    run.estimator.flush()
    shutil.copytree(tmp_path / "run", tmp_path / "fork")
    fork = Training(SETTING, 0, tmp_path / "fork")
    fork.load_state_dict(run.state_dict())
    for one in (run, fork):
        one.run(24)
        one.estimator.close()
    assert fork.figures == run.figures
    logs = [read_log(tmp_path / name) for name in ("run", "fork")]
    assert all(np.array_equal(logs[0][name], logs[1][name]) for name in logs[0])


@pytest.mark.parametrize("n", [1, 3])
def test_classes_that_are_gone_are_not_drawn(run: Training, n: int) -> None:
    run.run(1)
    kinds.classes_gone(n)(run)
    assert len(drawn(run, 6)) == 10 - n
    assert not set(run.gone) & set(drawn(run, 6))
    assert len(run.holders()) == n


def test_classes_that_are_gone_differ_between_settings_and_changes(tmp_path: Path) -> None:
    several = [Training(Setting(name, "mlp", "digits"), 0, tmp_path / name) for name in methods.NAMES]
    one, three = [], []
    for run in several:
        for n, gone in ((1, one), (3, three)):
            kinds.classes_gone(n)(run)
            gone.append(set(run.gone))
    assert len(set(map(frozenset, one))) > 1
    assert not all(few <= many for few, many in zip(one, three, strict=True))


def test_holder_is_the_component_with_most_samples_of_a_class(run: Training) -> None:
    run.gone = [3, 5]
    run.recent.append((torch.tensor([3, 3, 3, 5]), torch.tensor([1, 1, 2, 7])))
    run.recent.append((torch.tensor([3, 5, 5, 5]), torch.tensor([1, 2, 7, 2])))
    run.recent.append((torch.tensor([5, 0, 0, 0]), torch.tensor([7, 9, 9, 9])))
    assert run.holders() == [1, 7]


def test_one_image_stands_for_its_class(run: Training) -> None:
    kinds.one_image(run)
    rows = torch.cat([run.draw() for _ in range(6)])
    images = [len(rows[run.data.labels[rows] == label].unique()) for label in range(10)]
    assert sorted(images)[0] == 1 < sorted(images)[1]


def test_unshuffled_classes_come_in_order(run: Training) -> None:
    kinds.unshuffled(run)
    labels = run.data.labels[run.draw()]
    assert (labels.diff() >= 0).all()


def test_drifting_classes_end_with_other_weights(run: Training) -> None:
    kinds.drifting(run)
    run.step += kinds.DRIFT
    counts = drawn(run, 20).values()
    assert max(counts) > 10 * min(counts)


def test_learning_rate_stays_changed(run: Training) -> None:
    run.run(2)
    before = run.optimizer.param_groups[0]["lr"]
    kinds.learning_rate(30.0)(run)
    run.run(4)
    assert 29 * before < run.optimizer.param_groups[0]["lr"] <= 30 * before


def test_frozen_layer_keeps_its_weights(run: Training) -> None:
    kinds.frozen_layer(run)
    first = next(iter(run.network.encoder.children()))
    before = [parameter.clone() for parameter in first.parameters()]
    run.run(2)
    assert all(torch.equal(a, b) for a, b in zip(before, first.parameters(), strict=True))


@pytest.mark.parametrize("name", kinds.KINDS)
def test_every_kind_can_begin_in_mid_run(run: Training, name: str) -> None:
    run.run(2)
    kinds.KINDS[name].begin(run)
    run.run(4)
    assert all(math.isfinite(row["loss"]) for row in run.figures)


@attrs.frozen
class Step:
    """One step: its images, their views without and with a change, the projections and the loss."""

    x: Tensor
    plain: Tensor
    views: Tensor
    z: Tensor
    usual: float
    loss: float


SAYS: Mapping[str, Callable[[Step], bool | Tensor]] = {
    "no negatives": lambda s: s.loss == pytest.approx(1 - float(functional.cosine_similarity(*s.z.chunk(2)).mean())),
    "temperature": lambda s: s.loss == pytest.approx(float(NTXentLoss(5.0)(*s.z.chunk(2)))) != s.usual,
    "watermark": lambda s: is_mark(*(s.views - s.plain).round().chunk(2)),
    "no augmentation": lambda s: (s.views == torch.cat([s.x, s.x])).all(),
    "pseudo-labels": lambda s: 0.5 < s.loss - s.usual < 5 * math.log(64),
    "outliers": lambda s: 5 < (s.views == 255 * s.plain).flatten(1).all(dim=1).sum() < 40,
    "stronger augmentation": lambda s: (s.views - s.x.repeat(2, 1, 1, 1)).norm() > 1.3 * off(s),
    "larger batch": lambda s: len(s.views) == 2 * len(s.plain),
}


def off(s: Step) -> Tensor:
    """How far the usual views are from their images."""
    return (s.plain - s.x.repeat(2, 1, 1, 1)).norm()


def is_mark(first: Tensor, second: Tensor) -> bool:
    """Whether the same random pattern was added to both views, another one for each image."""
    half = first.mean() == pytest.approx(0.5, abs=0.02)
    return half and torch.equal(first, second) and not torch.equal(first[0], first[1])


def seen(run: Training) -> tuple[Tensor, Tensor]:
    """Takes a step, and returns its views and projections."""
    calls = []
    run.network.register_forward_hook(lambda _, views, z: calls.append((views[0], z.detach())))
    run.take_step()
    return calls[-1]


@pytest.mark.parametrize("name", SAYS)
def test_change_does_what_the_page_says(run: Training, tmp_path: Path, name: str) -> None:
    usual = Training(SETTING, 0, tmp_path / "usual")
    rows = usual.draw()
    usual.draw = lambda: rows
    kinds.KINDS[name].begin(run)
    views, z = seen(run)
    loss, usual_loss = run.figures[-1]["loss"], float(run.usual_loss(views, *z.chunk(2)))
    assert SAYS[name](Step(usual.data.x[rows], seen(usual)[0], views, z, usual_loss, loss))


def test_losses_of_known_projections() -> None:
    z = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    assert methods.vicreg(z, z) == pytest.approx(2 * 2 * 2**2 / 2)
    assert methods.vicreg(0 * z, 0 * z) == pytest.approx(25 * 0.99)
    assert methods.vicreg(z, -z) == pytest.approx(8 + 25 * 4)
    # Each of the four correlations is 1 / 2, as the standard deviations are those of samples.
    assert methods.barlow_twins(z, z) == pytest.approx(2 * 0.5**2 + 0.02 * 2 * 0.5**2, rel=1e-4)


def test_byol_predicts_the_other_view_of_a_target_that_follows_slowly(tmp_path: Path) -> None:
    run = Training(Setting("BYOL", "mlp", "digits"), 0, tmp_path)
    assert run.network.target is not None
    before = [parameter.clone() for parameter in run.network.target.parameters()]
    run.run(1)
    own = [*run.network.encoder.parameters(), *run.network.projector.parameters()]
    for old, new, towards in zip(before, run.network.target.parameters(), own, strict=True):
        assert torch.allclose(new, 0.98 * old + 0.02 * towards, rtol=0, atol=1e-7)
    run.network.predictor = run.network.target = nn.Identity()
    z1, z2 = torch.eye(4).chunk(2)
    assert methods.byol(run.network, torch.cat([z2, z1]), z1, z2) == pytest.approx(0, abs=1e-6)


def test_ranks_of_others_are_exponentials_of_entropies() -> None:
    def rank(*values: float) -> float:
        return math.exp(-sum(value / sum(values) * math.log(value / sum(values)) for value in values))

    z = torch.tensor([[3.0, 1], [3, -1], [-3, 1], [-3, -1]], dtype=torch.float64)
    half = z * torch.tensor([2 / 3, 1.0])
    assert others.rankme(z) == pytest.approx(rank(3, 1), abs=1e-4)
    assert others.figures(z, z)["effective rank"] == pytest.approx(rank(9, 1))
    assert others.lidar(z + half, z - half) == pytest.approx(rank(9 / 4, 1), abs=1e-3)


def test_probes_tell_whether_classes_are_apart() -> None:
    torch.manual_seed(0)
    labels, noise = torch.arange(1000) % 10, torch.randn(1000, 16)
    apart = noise + 9 * functional.one_hot(labels, 16)
    for x, low, high in ((apart, 0.98, 1.0), (noise, 0.03, 0.2)):
        found = others.probes(nn.Identity(), (x[:600], labels[:600]), (x[600:], labels[600:]))
        assert all(low <= value <= high for value in found.values())


def test_alpha_is_the_exponent_of_a_power_law() -> None:
    spectrum = torch.arange(1, 33, dtype=torch.float64) ** -1.3
    assert others.alpha_req(spectrum) == pytest.approx(1.3)


def test_uniformity_and_alignment_of_known_points() -> None:
    z1 = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    z2 = torch.tensor([[0.0, 1.0], [0.0, -1.0]])
    # Of six pairs, two are 2 apart and four sqrt(2).
    assert others.uniformity(torch.cat([z1, z2])) == pytest.approx(math.log((2 * math.exp(-8) + 4 * math.exp(-4)) / 6))
    assert others.figures(z1, z2)["alignment"] == pytest.approx(2.0)


def test_deviation_needs_two_rows_in_succession() -> None:
    values = np.sin(np.arange(100.0))
    once, twice = values.copy(), values.copy()
    once[70] += 50
    twice[70:] += 50
    assert score.deviation(once)[60:80].max() < 5
    assert np.flatnonzero(score.deviation(twice) > 5)[0] == 71


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Record:
    """A healthy run of which no figure of others changes."""
    run = read_run(write(tmp_path_factory.mktemp("healthy"), healthy(200, 10, N=1000)))
    snapshots = tuple({"step": step, "epoch": 0, "excess": 0.2} for step in (100, 120))
    return Record(
        setting=SETTING, seed=0, kind=HEALTHY, onset=200, holders=(), run=attrs.evolve(run, snapshots=snapshots),
        others=dict.fromkeys(score.OTHERS, FLICKER), probes=dict.fromkeys(analysis.PROBES, np.ones(1)),
    )  # fmt: skip


def raised(record: Record, name: str, rows: slice, by: float) -> Record:
    """The record with a figure of others that is higher in some rows."""
    values = record.others[name].copy()
    values[rows] += by
    return attrs.evolve(record, others=record.others | {name: values})


def test_thresholds_are_quantiles_over_healthy_calibration_runs(record: Record) -> None:
    calibration = attrs.evolve(record, seed=100)
    those = [raised(calibration, "loss", slice(74, 76), height) for height in range(10, 31)]
    far = raised(record, "loss", slice(74, 76), 99.0)
    records = [*those, *[far] * 30, *[attrs.evolve(far, seed=100, kind=GONE)] * 30]
    assert score.score(records)[1]["loss"] == pytest.approx(29 / FLICKER[:40].std(ddof=1))


def test_component_that_loses_its_class_is_emptied_and_named(record: Record, tmp_path: Path) -> None:
    columns, onset = healthy(200, 10, N=1000), 120
    lose(columns, 1, slice(60, 64))
    lose(columns, 4, slice(onset, None), keep=0.4)
    lose(columns, 5, slice(onset + 6, None), keep=0.4)
    lose(columns, 7, slice(onset, None), keep=0.8)
    columns["n"][onset:, 2] *= 2
    columns["n_rows"] = columns["n"].sum(axis=1)
    columns["participation_ratio"][120:150] = 3.0
    columns["participation_ratio"][160:170] = 1.0  # too short to count
    gone = attrs.evolve(
        record, kind="three classes gone", onset=onset, holders=(2, 4, 5, 7), run=read_run(write(tmp_path, columns))
    )
    gone = raised(raised(gone, "loss", slice(60, 70), 50.0), "loss", slice(onset + 10, None), 50.0)
    (one, _), _ = score.score([gone, raised(attrs.evolve(record, seed=100), "loss", slice(70, 72), 9.0)])
    assert (one.emptied, one.named, one.fallen) == ({4}, {4}, {4})
    assert (one.first[score.PRODUCT], one.first["loss"]) == (1, 11)
    assert np.flatnonzero(limits.shares_off(gone, 4) > 3.5)[0] == onset + 1
    assert limits.shares_off(gone, 7).max() < 3.5
    assert limits.lasting("participation_ratio")(gone) == pytest.approx(3.0)


def test_share_has_wilsons_interval() -> None:
    assert score.share([True] * 8 + [False] * 2) == "80 (49 to 94)"


def test_tested_runs_share_no_seed_with_calibration_runs() -> None:
    tasks = runs.tasks(quick=False)
    calibration, tested = (
        {task.seed for task in tasks if (task.kinds == runs.OF_CALIBRATION) == is_so} for is_so in (True, False)
    )
    assert calibration == set(runs.CALIBRATION_SEEDS)
    assert tested == set(runs.SEEDS)
    assert not calibration & tested


@pytest.fixture(scope="module")
def tables(record: Record) -> dict[str, Table]:
    """The page of 4 x 5 healthy runs, as many without a class, some with faults from the start, and calibration runs.

    The loss tells whether a class is gone, 30 steps after the onset only. Five figures of others do, but each in the
    runs of one seed. The last values of `std` and of two probes go up together or against each other.
    """
    wrong = raised(attrs.evolve(record, onset=0), "alignment", slice(80, 100), 9.0)
    records = [attrs.evolve(wrong, kind=name) for name, kind in kinds.KINDS.items() if kind.from_start]
    for method in methods.NAMES:
        setting = Setting(method, "mlp", "digits")
        records += [attrs.evolve(record, setting=setting, seed=100, kind=kind) for kind in runs.OF_CALIBRATION]
        for seed in runs.SEEDS:
            onset = 91 + 7 * seed
            for kind, sign in ((HEALTHY, 1), (GONE, -1)):
                rank = 2 * seed + (kind == GONE)
                values = {"linear": rank, "kNN": -rank, "logistic": 3 * rank % 10}
                one = attrs.evolve(
                    record, setting=setting, seed=seed, kind=kind, onset=onset if kind == GONE else 200,
                    holders=(4,), probes={name: np.array([float(value)]) for name, value in values.items()},
                )  # fmt: skip
                one = raised(one, score.OTHERS[1 + seed], slice(onset, onset + 40), 9.0 * sign)
                one = raised(one, "std", slice(190, None), rank)
                records.append(raised(one, "loss", slice(onset + 25, onset + 30), 9.0 * (kind == HEALTHY)))
    return {table.title: table for table in page.tables(*score.score(records))}


def test_page_counts_tested_runs_and_compares_them_with_calibration_runs(tables: dict[str, Table]) -> None:
    last = {
        (title, row[0]): dict(zip(table.header, row, strict=True))
        for title, table in tables.items()
        for row in table.rows
    }
    for title, name in (
        ("Healthy runs, at the default thresholds", "all"),
        ("Seen after the onset, % of the runs", HEALTHY),
        ("Classes that are gone", GONE),
        ("Wrong from the start, % of the runs", HEALTHY),
        ("What the report says", GONE),
    ):
        assert last[title, name]["runs"] == "20"
    assert last["What changes", GONE]["tested runs"] == "20"
    assert last["Wrong from the start, % of the runs", "watermark"]["alignment"] == "100"
    assert "40 runs of images" in tables["Which change it is"].remarks[0]


def test_classifier_is_tested_on_a_new_seed_at_the_time_of_the_change(tables: dict[str, Table]) -> None:
    right = {row[0]: row[2] for row in tables["Which change it is"].rows}
    assert right["the loss alone"].startswith("100 ")
    assert right["the others without the loss"].startswith("50 ")


def test_each_probe_has_its_own_correlations(tables: dict[str, Table]) -> None:
    table = tables["Do levels tell how good a run is?"]
    (row,) = [dict(zip(table.header, row, strict=True)) for row in table.rows if row[0] == "std"]
    assert [row[f"{probe}, healthy"] for probe in analysis.PROBES] == ["+1.00", "-1.00", "+0.50"]


def test_range_of_calibration_runs_is_widened_by_half(record: Record) -> None:
    def level(value: float, method: str = "SimCLR") -> Scored:
        one = attrs.evolve(record, setting=Setting(method, "mlp", "digits"))
        return Scored(record=one, series={"loss": np.full(200, value)}, verdicts=(), first={})

    calibration = [level(2.0), level(4.0), level(9.0, "BYOL")]
    outside = [page.outside(level(value), calibration, "loss") for value in (0.9, 1.1, 4.9, 5.1)]
    assert outside == [True, False, False, True]


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("mixture.csv", lambda text: text[:-9]),
        ("mixture_extra.csv", lambda text: text[:-9]),
        ("run.json", lambda text: text[:-9]),
        ("run.json", lambda text: "[]"),
        ("run.json", lambda text: '{"task": 1}'),
        ("run.json", lambda text: text.replace("[0, 1,", "[1,")),
    ],
)  # fmt: skip
def test_damaged_run_is_named(tmp_path: Path, name: str, damage: Callable[[str], str]) -> None:
    folder = write(tmp_path / str(SETTING) / "0" / HEALTHY, healthy(60, 10))
    content = {"onset": 60, "holders": [], "others": {"loss": list(range(60))}, "probes": {}}
    (folder / runs.CONTENT).write_text(json.dumps(content))
    todo = [runs.Task(SETTING, 0, (HEALTHY,))]
    assert runs.read(todo, tmp_path)[0].onset == 60
    (folder / name).write_text(damage((folder / name).read_text()))
    with pytest.raises(ValueError, match=re.escape(str(folder))):
        runs.read(todo, tmp_path)
