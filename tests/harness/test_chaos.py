"""Random batches of every kind into random estimators: right numbers, or the documented error and nothing changed."""

import re
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mixture_torch import MixtureStats, read_log, read_scores
from tests.harness.draws import CONTEXTS, Batch, chance, draw_batch, draw_world, pick
from tests.harness.reference import Reference
from tests.wrapper.samples import all_bits, bits

BATCHES = 25  # of one estimator
DOCUMENTED = re.compile(r"`\w+` .*|The state_dict .*")  # and one line
NONE = torch.zeros(0, dtype=torch.int64)


class Life:
    """The life of one estimator.

    Args:
        seed: Of everything in it.
        log_dir: Its folder.
    """

    def __init__(self, seed: int, log_dir: Path) -> None:
        self.seed, self.log_dir, self.rng, self.n = seed, log_dir, np.random.default_rng(seed), 0
        self.world = world = draw_world(self.rng)
        self.wrapper = MixtureStats(**world.options, enabled=True, log_dir=log_dir)
        self.reference = Reference(self.wrapper, unit=max(world.scale, float(world.centers.abs().max())))
        self.saved: list[tuple[dict[str, Any], Reference]] = []
        self.unread: list[tuple[Any, dict[str, Tensor]]] = []  # statistics that are read only later
        self.read: list[tuple[Any, dict[str, Any]]] = []  # and some that were read, with what they said
        self.logged: list[tuple[int, float, Tensor]] = []
        self.figures: Counter[str] = Counter()
        self.worst = 0.0

    def run(self) -> None:
        """Goes from birth to death.

        Raises:
            AssertionError: Anything was not as documented; says how to see it again.
        """
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                self._run()
            said = [str(warning.message) for warning in caught]
            known = [
                re.match(r"\d+ of \d+ rows were ign|K=\d+ is too large|`log_step` has nothing", text) for text in said
            ]
            kinds = [match and match[0].lstrip("0123456789")[:3] for match in known]
            assert None not in kinds, said
            assert len(set(kinds)) == len(kinds), said
        except Exception as error:
            again = f"Life({self.seed}, folder).run() of {__name__}"
            raise AssertionError(f"batch {self.n} of {again}, {self.world.options}: {error!r}") from error

    def _run(self) -> None:
        if self.world.options["dim"] is None:  # a batch without a row says what D is
            nothing = torch.zeros(0, self.world.D)
            self.reference.update(nothing, NONE, self.wrapper.update(nothing, NONE), token=None)
        for self.n in range(BATCHES):
            self.update(draw_batch(self.rng, self.world, uses_labels=self.reference.config.uses_labels))
            self.do_something_else()
        self.compare(len(self.unread))
        assert all(bits(stats) == before for stats, before in self.read), "statistics keep their values"
        self.wrapper.close()
        self.compare_files()

    def refused(self, call: Callable[[], Any]) -> bool:
        """Whether a call raises what it may, as it should: one line that names what is wrong, and nothing changed."""
        before = all_bits(self.wrapper)
        try:
            call()
        except (TypeError, ValueError) as raised:
            error = raised
        else:
            return False
        assert DOCUMENTED.fullmatch(str(error)), f"the error is a documented one, and not {error!r}"
        assert all_bits(self.wrapper) == before, f"nothing changes with {error!r}"
        self.figures["refusals"] += 1
        return True

    def update(self, batch: Batch) -> None:
        """Hands a batch in, and compares."""
        token = pick(self.rng, (None, None, self.reference.token, self.n))
        usable = self.reference.usable(batch.x, batch.y)
        wrong = batch.is_wrong or (self.world.options["strict"] and not bool(usable.all()))
        context = pick(self.rng, CONTEXTS)

        def update() -> None:
            with context():
                self.wrapper.update(batch.embeddings, batch.labels, step=token)

        if wrong:
            assert self.refused(update), "what is wrong is refused"
            return
        update()
        stats = self.wrapper.stats
        self.reference.update(batch.x, batch.y, stats, token=token)
        self.unread.append((stats, self.reference.expected()))
        if chance(self.rng, 0.7):
            self.compare(1)
        self.compare(len(self.unread) - 3)

    def compare(self, count: int) -> None:
        """Compares so many of the statistics that nobody has read yet, the oldest first."""
        for _ in range(count):
            stats, expected = self.unread.pop(0)
            self.worst = max(self.worst, self.reference.compare(stats, expected))
            self.read = [*self.read, (stats, bits(stats))][-4:]

    def do_something_else(self) -> None:
        """Logs, flushes, saves and loads, rightly and wrongly, now and then."""
        if chance(self.rng, 0.5):
            self.log(self.n)
        if chance(self.rng, 0.1):
            step, epoch = pick(self.rng, ((-1, 0), (1.5, 0), ("1", 0), (0, None), (True, 0), (0, 2**63), (0, NONE)))
            assert self.refused(lambda: self.wrapper.log_step(step=step, epoch=epoch)), "such a step is refused"
        if chance(self.rng, 0.05):
            self.wrapper.flush()
        if chance(self.rng, 0.1):
            self.saved.append((self.wrapper.state_dict(), self.reference.kept()))
        if self.saved and chance(self.rng, 0.1):
            state_dict, self.reference = pick(self.rng, self.saved)
            self.reference = self.reference.kept()
            self.wrapper.load_state_dict(state_dict)
            assert bits(self.wrapper.state_dict()) == bits(state_dict), "what is loaded is what was saved"
        if chance(self.rng, 0.1):
            state_dict = self.wrapper.state_dict()
            key = pick(self.rng, list(state_dict))
            worse = pick(self.rng, ({**state_dict, key: None}, {k: v for k, v in state_dict.items() if k != key}, None))
            assert self.refused(lambda: self.wrapper.load_state_dict(worse)), "a damaged state_dict is refused"

    def log(self, step: int) -> None:
        """Logs the last step."""
        if not self.wrapper.stats:
            self.wrapper.log_step(step=step, epoch=0)  # nothing to log
            return
        self.wrapper.log_step(step=step, epoch=0)
        R = torch.cat(self.reference.parts).float()
        self.logged.append((step, float(self.wrapper.stats["trace_B"]) if R.any() else float("nan"), R))

    def compare_files(self) -> None:
        """Checks that the files hold all that was logged."""
        if not self.logged:
            return
        log, (steps, traces, scores) = read_log(self.log_dir), zip(*self.logged, strict=True)
        assert log["step"].tolist() == list(steps)
        np.testing.assert_allclose(log["trace_B"], traces, rtol=1e-8)  # nine digits
        if self.world.options["store_scores"]:
            found = [(entry["step"], entry["responsibilities"]) for entry in read_scores(self.log_dir)]
            assert [step for step, _ in found] == list(steps)
            assert all(torch.equal(R, expected) for (_, R), expected in zip(found, scores, strict=True))


@pytest.mark.parametrize("seed", range(12))
def test_estimator_is_right_or_refuses_through_a_life(seed: int, tmp_path: Path) -> None:
    Life(seed, tmp_path).run()


@pytest.mark.slow
def test_estimator_is_right_or_refuses_through_many_lives(tmp_path: Path) -> None:
    figures: Counter[str] = Counter()
    worst, start = 0.0, time.perf_counter()
    for seed in range(400):
        life = Life(seed, tmp_path / str(seed))
        life.run()
        figures.update(life.figures)
        figures.update(life.reference.followed)
        worst = max(worst, life.worst)
    counts = ", ".join(f"{count} {name}" for name, count in figures.items())
    print(f"\n{400 * BATCHES} batches, {time.perf_counter() - start:.0f} s, off by {worst:.1e} at most: {counts}")
    assert figures["refusals"] > 0
