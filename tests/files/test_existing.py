"""What becomes of the rows that a folder has already: `existing`, and a K that changes."""

from pathlib import Path

import pytest
import torch

from mixture_torch import MixtureStats, read_extra, read_log, read_scores, read_snapshots
from tests.files.recording import HEADER, Writer, broken, line, places, said
from tests.wrapper.samples import contents, estimator, log_steps

MODES = ["append", "per_step"]


def cell(folder: Path, steps: int = 3, **options: object) -> tuple[MixtureStats, list[str]]:
    """What a notebook cell does, each time that it is run."""
    with said() as messages:
        wrapper = estimator(log_dir=folder, store_scores=True, **options)
        log_steps(wrapper, steps)
        wrapper.flush()
    return wrapper, messages


@pytest.mark.parametrize("scores_mode", MODES)
def test_aside_moves_all_files_of_the_earlier_run(tmp_path: Path, scores_mode: str) -> None:
    cell(tmp_path, 5, scores_mode=scores_mode)[0].close()
    before = contents(tmp_path)
    second, messages = cell(tmp_path, existing="aside", scores_mode=scores_mode)
    second.close()
    scores = f"mixture_scores.superseded-1{'.pt' if scores_mode == 'append' else ''}"
    assert messages == [
        f"`{tmp_path}` is begun anew: 5 earlier rows and 5 entries of responsibilities were moved to "
        f"`mixture.superseded-1.csv` and `mixture_extra.superseded-1.csv` and `{scores}` and "
        "`mixture_snapshots.superseded-1` and `mixture_last.superseded-1.pt`."
    ]
    after = contents(tmp_path)
    moved = {name: data for name, data in after.items() if "superseded-1" in name}
    assert {name.replace(".superseded-1", ""): data for name, data in moved.items()} == before
    assert read_log(tmp_path)["step"].tolist() == read_extra(tmp_path)["step"].tolist() == [0, 1, 2]
    assert [entry["step"] for entry in read_scores(tmp_path)] == [0, 1, 2]
    assert [entry["step"] for entry in read_snapshots(tmp_path)] == [2]
    assert torch.load(tmp_path / "mixture_last.pt")["n_steps"] == 3


def test_aside_works_for_another_K_and_each_time(tmp_path: Path) -> None:
    for number, K in enumerate((3, 4, 3)):
        wrapper, messages = cell(tmp_path, existing="aside", K=K)
        wrapper.close()
        assert len(messages) == (number > 0)
    assert {path.name for path in tmp_path.glob("mixture.*csv")} == {
        "mixture.csv", "mixture.superseded-1.csv", "mixture.superseded-2.csv"
    }  # fmt: skip
    assert read_log(tmp_path / "mixture.superseded-2.csv")["K"].tolist() == [4, 4, 4]
    assert read_extra(tmp_path / "mixture_extra.superseded-2.csv")["n"].shape == (3, 4)


def test_aside_is_done_once_and_not_in_an_empty_folder(tmp_path: Path) -> None:
    wrapper, messages = cell(tmp_path, existing="aside")
    wrapper.close()
    log_steps(wrapper, epoch=1)
    wrapper.close()
    assert messages == []
    assert len(read_log(tmp_path)["step"]) == 6
    assert not list(tmp_path.glob("*superseded*"))


@pytest.mark.parametrize("existing", ["aside", "refuse"])
def test_existing_means_nothing_after_a_checkpoint(tmp_path: Path, existing: str) -> None:
    first, _ = cell(tmp_path)
    first.close()
    second = estimator(log_dir=tmp_path, existing=existing)
    second.load_state_dict(first.state_dict())
    second.update(torch.randn(20, 4))
    second.log_step(step=3, epoch=0)
    assert read_log(tmp_path)["step"].tolist() == [0, 1, 2, 3]


def test_aside_leaves_the_rows_of_an_estimator_that_is_writing(tmp_path: Path) -> None:
    with said() as messages:
        (one := Writer(tmp_path)).log(0)
        (other := Writer(tmp_path, existing="aside")).log(1)
        one.log(2)
    assert messages == [f"`{tmp_path}` is open in this process already; both estimators write to it."]
    assert places(tmp_path) == [(0, 0), (0, 1), (0, 2)]
    other.close()
    one.close()


def test_aside_spares_rows_that_come_before_its_own_first_one(tmp_path: Path) -> None:
    (old := Writer(tmp_path)).log(0, value=1.0)
    old.close()
    with said():
        (one := Writer(tmp_path, existing="aside")).open()  # its row is still on a GPU
        (other := Writer(tmp_path)).log(0)
        one.log(1)
    assert (tmp_path / "mixture.csv").read_bytes() == HEADER + line(0) + line(1)
    assert (tmp_path / "mixture.superseded-1.csv").read_bytes() == HEADER + line(0, 1.0)
    other.close()


def test_aside_waits_for_a_disk_that_fails(tmp_path: Path) -> None:
    (old := Writer(tmp_path)).log(0, value=1.0)
    old.close()
    one = Writer(tmp_path, existing="aside")
    with said(), broken("replace"):
        one.log(0)
    assert (tmp_path / "mixture.csv").read_bytes() == HEADER + line(0, 1.0)
    with said():
        one.log(1)
    assert (tmp_path / "mixture.csv").read_bytes() == HEADER + line(0) + line(1)
    assert (tmp_path / "mixture.superseded-1.csv").read_bytes() == HEADER + line(0, 1.0)


def test_aside_takes_rows_and_state_that_still_wait_for_the_disk(tmp_path: Path) -> None:
    with said():
        (old := Writer(tmp_path)).log(0, value=1.0)
        with broken("write"):
            old.log(1, value=1.0)
            old.close(last={"n_steps": 2})
        (one := Writer(tmp_path, existing="aside")).log(0)
    assert (tmp_path / "mixture.superseded-1.csv").read_bytes() == HEADER + line(0, 1.0) + line(1, 1.0)
    assert (tmp_path / "mixture.csv").read_bytes() == HEADER + line(0)
    assert torch.load(tmp_path / "mixture_last.superseded-1.pt") == {"n_steps": 2}
    one.close()


def test_refuse_raises_one_line_each_time_and_changes_nothing(tmp_path: Path) -> None:
    cell(tmp_path)[0].close()
    (tmp_path / "mixture_scores.pt").write_bytes((tmp_path / "mixture_scores.pt").read_bytes()[:-9])  # torn
    before = contents(tmp_path)
    second = estimator(log_dir=tmp_path, existing="refuse", store_scores=True)
    second.update(torch.randn(20, 4))
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"^`{tmp_path}` already has 3 rows, and `existing` is `refuse`; .*\.$"):
            second.log_step(step=0, epoch=0)
    second.close()
    assert contents(tmp_path) == before


def test_refuse_takes_a_folder_without_rows(tmp_path: Path) -> None:
    (tmp_path / "mixture.csv").write_bytes(HEADER)
    wrapper, messages = cell(tmp_path, existing="refuse")
    wrapper.close()
    log_steps(wrapper, epoch=1)  # the rows are its own
    assert messages == []
    assert len(read_log(tmp_path)["step"]) == 6


def test_other_K_in_one_log_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "mixture.csv").write_bytes(HEADER + line(0).replace(b",3,", b",8,"))
    with said() as messages:
        (one := Writer(tmp_path)).log(1, 2)
        one.close()
    assert messages == [
        f"`{tmp_path / 'mixture.csv'}` changes from K=8 to K=3 at step 1 of epoch 0; use another `log_dir`."
    ]


@pytest.mark.parametrize("scores_mode", MODES)
def test_readers_take_the_file_or_folder_itself(tmp_path: Path, scores_mode: str) -> None:
    for _ in range(2):
        cell(tmp_path, existing="aside", scores_mode=scores_mode)[0].close()
    for aside in ("", ".superseded-1"):
        assert read_log(str(tmp_path / f"mixture{aside}.csv"))["step"].tolist() == [0, 1, 2]
        assert read_extra(tmp_path / f"mixture_extra{aside}.csv")["step"].tolist() == [0, 1, 2]
        scores = tmp_path / f"mixture_scores{aside}{'.pt' if scores_mode == 'append' else ''}"
        assert [entry["step"] for entry in read_scores(str(scores))] == [0, 1, 2]
        assert [entry["step"] for entry in read_snapshots(str(tmp_path / f"mixture_snapshots{aside}"))] == [2]


@pytest.mark.parametrize("read", [read_log, read_extra, read_scores, read_snapshots])
def test_readers_say_what_is_no_folder(tmp_path: Path, read: object) -> None:
    assert callable(read)
    with pytest.raises(FileNotFoundError, match=rf"^There is no `{tmp_path / 'x'}`\.$"):
        read(tmp_path / "x")


@pytest.mark.parametrize("read", [read_log, read_extra])
def test_readers_say_what_is_no_run(tmp_path: Path, read: object) -> None:
    assert callable(read)
    with pytest.raises(FileNotFoundError, match=rf"^`{tmp_path}` has no `mixture(_extra)?.csv`; was "):
        read(tmp_path)
    (tmp_path / "loss.csv").write_text("step,loss\n0,1\n")
    with pytest.raises(ValueError, match=r"loss.csv` begins with `step,loss` instead of"):
        read(tmp_path / "loss.csv")
