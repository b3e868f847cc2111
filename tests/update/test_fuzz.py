"""Whatever hypothesis comes up with: right numbers, or the documented error and the state unchanged."""

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import mixture_core
from mixture_core import MixtureConfig, MixtureState
from mixture_core.inputs import usable_rows
from mixture_core.testing import oracle_batch_moments, oracle_derived
from mixture_torch import MixtureStats
from tests.wrapper.samples import assert_close, oracle, unchanged, update_quietly

NAN, INF = float("nan"), float("inf")


class Batch(NamedTuple):
    """A batch, and what is wrong with it."""

    embeddings: Any
    labels: Any
    error: type[Exception] | None


@st.composite
def drawn_batches(draw: st.DrawFn, *, K: int, D: int, labelled: bool) -> Batch:
    N, generator = draw(st.integers(0, 14)), torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(N, D, generator=generator) * draw(st.sampled_from((1.0, 1.0, 3.0)))
    dtype = draw(
        st.sampled_from((torch.float32, torch.float32, torch.float64, torch.half, torch.bfloat16, torch.int16))
    )
    x = x.to(dtype)
    for n in draw(st.lists(st.integers(0, N - 1))) if N and dtype.is_floating_point else []:
        x[n, draw(st.integers(0, D - 1))] = draw(st.sampled_from((NAN, INF, -INF)))
    labels = torch.randint(-1, K, (N,), generator=generator)
    fault = draw(st.sampled_from((None,) * 6 + ("width", "vector", "complex", "missing", "float", "short", "range")))
    error: type[Exception] | None = None
    if fault in ("width", "vector", "complex"):
        x = {"width": torch.zeros(N, D + 1), "vector": torch.zeros(N), "complex": torch.zeros(N, D) * 1j}[fault]
        error = TypeError if fault == "complex" else ValueError
    elif fault is not None and labelled:
        wrong = {"missing": None, "float": labels.float(), "short": torch.zeros(N + 1, dtype=torch.int64)}
        labels = wrong.get(fault, torch.cat([labels, torch.tensor([K])]))
        x = torch.cat([x, x.new_zeros(1, D)]) if fault == "range" else x
        error = TypeError if fault == "float" else ValueError
    layout = draw(st.sampled_from(("plain", "column-major", "strided", "NumPy", "backwards", "graph")))
    return Batch(lay_out(x, layout), labels, error)


def lay_out(x: Tensor, layout: str) -> Any:
    if layout == "column-major":
        return x.mT.contiguous().mT if x.ndim == 2 else x
    if layout == "strided":
        return x.repeat_interleave(2, dim=0)[::2]
    if layout == "graph":
        return x.clone().requires_grad_() if x.is_floating_point() else x
    if layout in ("NumPy", "backwards") and x.dtype != torch.bfloat16:
        return x.numpy() if layout == "NumPy" else x.flip(0).numpy()[::-1]
    return x


class Reference:
    """The wrapper once more: the core's assignments, and sums over all rows so far in float64."""

    def __init__(self, config: MixtureConfig) -> None:
        self.config = config
        self.state: MixtureState | None = None
        self.rows: list[Tensor] = []  # usable ones that came before the start
        self.started = config.uses_labels
        self.history: list[tuple[Tensor, Tensor]] = []

    def update(self, embeddings: Any, labels: Any) -> tuple[dict[str, Tensor], Tensor]:
        x = torch.tensor(np.array(embeddings)) if isinstance(embeddings, np.ndarray) else embeddings.detach()
        x = x.float()
        good = x[usable_rows(x)]
        starts_anew = not self.started and (len(good) > 0 or self.state is None)
        if starts_anew or self.state is None:
            self.rows.append(good)
            generator = torch.Generator().manual_seed(0)
            self.state = mixture_core.init(self.config, torch.cat(self.rows), generator=generator)
            self.history = []
            self.started = self.started or len(torch.cat(self.rows)) >= 4 * self.config.K
        self.state, stats = mixture_core.step(self.state, x, labels)
        if stats.R.any():
            self.history = [*(self.history if self.config.mode == "ema" else []), (x, stats.R)]
        if not self.history:
            return oracle_derived(oracle_batch_moments(x, stats.R)), stats.R
        return oracle([(x, R) for x, R in self.history], decay=self.config.ema_decay), stats.R


@given(data=st.data())
def test_update_is_right_or_refuses_whatever_comes(data: st.DataObject) -> None:
    K, D = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    options = {
        "K": K,
        "assigner": data.draw(st.sampled_from(("kmeans_online", "label_supervised"))),
        "mode": data.draw(st.sampled_from(("ema", "per_batch", "label_supervised"))),
        "relocate": False,
    }
    wrapper, reference = MixtureStats(**options, enabled=True), Reference(MixtureConfig(**options))
    update_quietly(wrapper, torch.zeros(0, D), torch.zeros(0, dtype=torch.int64))  # says what D is
    reference.update(torch.zeros(0, D), torch.zeros(0, dtype=torch.int64))
    for _ in range(data.draw(st.integers(1, 4))):
        batch = data.draw(drawn_batches(K=K, D=D, labelled=reference.config.uses_labels))
        if batch.error is not None:
            with unchanged(wrapper), pytest.raises(batch.error, match=r"^`(embeddings|labels)` must "):
                wrapper.update(batch.embeddings, batch.labels)
            continue
        stats = update_quietly(wrapper, batch.embeddings, batch.labels)
        expected, R = reference.update(batch.embeddings, batch.labels)
        assert torch.equal(stats["R"], R)
        assert int(stats["n_ignored"]) == int((R.sum(dim=1) == 0).sum())
        seen = expected["pi"] > 0
        assert_close(stats, {key: expected[key] for key in ("pi", "B", "trace_B", "opnorm_B")}, unit=1.0)
        for key in ("mu", "Sigma"):
            assert_close({key: stats[key][seen]}, {key: expected[key][seen]}, unit=1.0)
