"""Steps as CUDA graphs: one launch in the place of some twenty, which take the host longer than the GPU."""

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixture_core import MixtureConfig, MixtureState, Moments, StepStats
from mixture_core.grouped import Workspace
from mixture_core.step import advance
from mixture_torch.recorder import numbers_of

MOST = 16  # graphs at a time: two for each size of batch


class Step(NamedTuple):
    """What came of a step."""

    state: MixtureState
    stats: StepStats
    numbers: Tensor  # as in `numbers_of`


class _Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    x: Tensor  # (N, D) to copy the embeddings to
    labels: Tensor | None  # (N,) to copy the labels to
    after: Moments  # what it writes to
    results: Tensor  # float32: the counts of ignored and revived as the halves of int64, numbers, weight, mean, R


class Graphs:
    """Captures one graph for each size of batch and each of the two memories of covariances, and replays it.

    Args:
        config: The choices.
    """

    def __init__(self, config: MixtureConfig) -> None:
        self._config = config
        self._graphs: dict[tuple[int, int, int], _Graph] = {}
        self._memories: dict[int, Moments] = {}  # by address of the covariance
        self._inputs: dict[int, tuple[Tensor, Tensor | None]] = {}  # by size of batch: embeddings and labels
        self._pool: Any = None  # of memory, which all graphs share, since one runs at a time
        self._warm: set[int] = set()  # sizes that have run without a graph, which compiles the kernels
        self._failed = False

    def step(self, state: MixtureState, x: Tensor, labels: Tensor | None, work: Workspace) -> Step | None:
        """Returns what `advance` would, from one replay; None where there is nothing to replay yet.

        Args:
            state: From the step before, with its covariance in one of two memories that never change.
            x: (N, D) float32 embeddings on a GPU.
            labels: (N,) int64, where responsibilities come from labels.
            work: The other memory.
        """
        N, covariance = len(x), state.moments.covariance
        if N not in self._warm or N == 0 or self._failed:
            self._warm.add(N)
            return None
        before = self._memory(covariance)
        if state.moments is not before:
            before.weight.copy_(state.moments.weight)
            before.mean.copy_(state.moments.mean)
        key = (N, covariance.data_ptr(), work.covariance.data_ptr())
        if key not in self._graphs:
            try:
                self._capture(key, before, x, labels, work)
            except RuntimeError as error:
                self._failed = True
                warnings.warn(f"`compile` has no effect: the step could not be captured ({error}).", stacklevel=5)
                return None
        graph = self._graphs[key]
        graph.x.copy_(x)
        if labels is not None and graph.labels is not None:
            graph.labels.copy_(labels)
        graph.graph.replay()
        return self._read(graph, N)

    def _memory(self, covariance: Tensor) -> Moments:
        """The moments in fixed memory that a covariance belongs to."""
        address = covariance.data_ptr()
        if address not in self._memories:
            K, D, _ = covariance.shape
            weight, mean = covariance.new_empty(K), covariance.new_empty(K, D)
            self._memories[address] = Moments(weight=weight, mean=mean, covariance=covariance)
        return self._memories[address]

    def _capture(
        self, key: tuple[int, int, int], before: Moments, x: Tensor, labels: Tensor | None, work: Workspace
    ) -> None:
        if len(self._graphs) >= MOST:
            self._graphs, self._inputs = {}, {}
            self._memories = {before.covariance.data_ptr(): before}
        after, graph = self._memory(work.covariance), torch.cuda.CUDAGraph()
        if len(x) not in self._inputs:
            self._inputs[len(x)] = (torch.empty_like(x), None if labels is None else torch.empty_like(labels))
        x, labels = self._inputs[len(x)]
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        # Other threads, such as those that pin memory for data loaders, go on meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            state, stats = advance(MixtureState(config=self._config, moments=before), x, labels, work=work)
            m = state.moments
            after.weight.copy_(m.weight)
            after.mean.copy_(m.mean)
            counts = torch.stack([stats.n_ignored, stats.n_revived]).view(torch.float32)
            results = torch.cat([counts, numbers_of(stats), m.weight, m.mean.flatten(), stats.R.flatten()])
        self._graphs[key] = _Graph(graph, x, labels, after, results)

    def _read(self, graph: _Graph, N: int) -> Step:
        """A copy of the results, which the next replay overwrites."""
        K, D = graph.after.mean.shape
        counts, numbers, weight, mean, R = graph.results.clone().split_with_sizes([4, 5, K, K * D, N * K])
        n_ignored, n_revived = counts.view(torch.int64).unbind()
        moments = Moments(weight=weight, mean=mean.view(K, D), covariance=graph.after.covariance)
        stats = StepStats(moments=moments, R=R.view(N, K), n_ignored=n_ignored, n_revived=n_revived)
        return Step(MixtureState(config=self._config, moments=graph.after), stats, numbers)
