"""Steps as CUDA graphs: one launch instead of about twenty, whose launches take longer than their work."""

from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from mixture_core import MixtureConfig, MixtureState, Moments
from mixture_core.absorb_cpu import Workspace
from mixture_core.step import advance
from mixture_torch.update.arrivals import Report
from mixture_torch.update.checkpoint import LowerState
from mixture_torch.update.figures import numbers_of
from mixture_torch.update.precision import full_float32
from mixture_torch.update.stats import Source

MOST = 16  # graphs at a time: two for each size of batch
Replayed: TypeAlias = tuple[LowerState, Source, Report]  # the outcome of a step


class _Results:
    """The results of one replay. They stay in the graph's memory until one is read or `Memory` is about to reuse it."""

    def __init__(self, memory: Tensor, covariance: Tensor, *, N: int) -> None:
        self._memory = memory  # float32: the number of ignored rows as the halves of an int64, weight, mean, R
        self._covariance, self._N = covariance, N  # the covariance is copied elsewhere

    def __getitem__(self, name: str) -> Tensor:
        """Returns a result; all but the covariance are copied from the graph's memory at the first call for one."""
        return self._covariance if name == "covariance" else self._copied[name]

    @cached_property
    def _copied(self) -> dict[str, Tensor]:
        N, (K, D, _) = self._N, self._covariance.shape
        with full_float32(self._memory):
            count, weight, mean, R = self._memory.clone().split_with_sizes([2, K, K * D, N * K])
        n_ignored = count.view(torch.int64)[0]
        R = R.view(N, K)
        return {"weight": weight, "mean": mean.view(K, D), "R": R, "n_ignored": n_ignored, "counts": R.sum(dim=0)}


class _Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    x: Tensor  # (N, D) to copy the embeddings to
    labels: Tensor | None  # (N,) to copy the labels to
    state: LowerState  # after the step, in memory that the graph writes to
    results: Tensor  # as in _Results
    numbers: Tensor  # on the host, as in `numbers_of`
    arrived: torch.cuda.Event  # for the numbers


class Graphs:
    """Captures one graph for each size of batch and each of the two memories of covariances, and replays it."""

    def __init__(self, config: MixtureConfig, *, extra: bool, say: Callable[[str], None]) -> None:
        self._config, self._extra, self._say = config, extra, say
        self._graphs: dict[tuple[int, int, int], _Graph] = {}
        self._memories: dict[int, LowerState] = {}  # by address of the covariance
        self._inputs: dict[int, tuple[Tensor, Tensor | None]] = {}  # by size of batch: embeddings and labels
        self._pool: Any = None  # memory that all graphs share, since one runs at a time
        self._warm: set[int] = set()  # sizes of batch that have run without a graph, which compiled the kernels
        self._failed = False

    def step(self, state: LowerState, x: Tensor, labels: Tensor | None, work: Workspace) -> Replayed | None:
        """Returns the outcome of `advance` by a graph; None if this batch size must first run without a graph."""
        N = len(x)
        if N not in self._warm or N == 0 or self._failed or x.device.index != torch.cuda.current_device():
            self._warm.add(N)
            return None
        if self._key(state, N, work) not in self._graphs:
            try:
                self._capture(state, x, labels, work)
            except RuntimeError as error:
                self._failed = True
                self._say(f"`compile` has no effect: the step could not be captured ({error}).")
                return None
        return self.replay(state, x, labels, work)

    def take(self, embeddings: Any) -> bool:
        """Returns whether embeddings can be copied into a graph as they are."""
        if type(embeddings) not in (Tensor, torch.nn.Parameter) or embeddings.ndim != 2:
            return False
        known, _ = self._inputs.get(embeddings.shape[0], (None, None))
        return (
            known is not None
            and embeddings.is_floating_point()
            and embeddings.shape == known.shape
            and embeddings.device == known.device
            and known.device.index == torch.cuda.current_device()  # whose stream replays
            and not torch.is_inference_mode_enabled()  # tensors made in inference mode cannot be used outside it
        )

    def replay(self, state: LowerState, x: Tensor, labels: Tensor | None, work: Workspace) -> Replayed | None:
        """Returns the outcome of `advance` for embeddings of any floating type; None if no graph has been captured."""
        N = x.shape[0]
        graph = self._graphs.get(self._key(state, N, work))
        if graph is None:
            return None
        before = self._memories[state.moments.covariance.data_ptr()]
        if state is not before:
            _copy(state, before)
        graph.x.copy_(x.detach())
        if labels is not None and graph.labels is not None:
            graph.labels.copy_(labels)
        graph.graph.replay()
        graph.arrived.record(torch.cuda.current_stream(x.device))
        results = _Results(graph.results, graph.state.moments.covariance, N=N)
        return graph.state, results, Report(graph.numbers, K=self._config.K, D=x.shape[1], arrived=graph.arrived)

    @staticmethod
    def _key(state: LowerState, N: int, work: Workspace) -> tuple[int, int, int]:
        return N, state.moments.covariance.data_ptr(), work.covariance.data_ptr()

    def _memory(self, covariance: Tensor) -> LowerState:
        """The state in fixed memory that a covariance belongs to."""
        address = covariance.data_ptr()
        if address not in self._memories:
            K, D, _ = covariance.shape
            moments = Moments(weight=covariance.new_empty(K), mean=covariance.new_empty(K, D), covariance=covariance)
            self._memories[address] = LowerState(MixtureState(config=self._config, moments=moments))
        return self._memories[address]

    def _capture(self, state: LowerState, x: Tensor, labels: Tensor | None, work: Workspace) -> None:
        if len(self._graphs) >= MOST:
            self._graphs, self._inputs, self._memories = {}, {}, {}
        before, after = self._memory(state.moments.covariance), self._memory(work.covariance)
        N, key, graph = len(x), self._key(state, len(x), work), torch.cuda.CUDAGraph()
        if N not in self._inputs:
            self._inputs[N] = (torch.empty_like(x), None if labels is None else torch.empty_like(labels))
        x, labels = self._inputs[N]
        n_numbers = 10 + 3 * self._config.K if self._extra else 7
        numbers = torch.empty(n_numbers, dtype=torch.float32, device="cpu", pin_memory=True)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        # thread_local: other threads, such as those that pin memory for data loaders, go on meanwhile
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            new, stats = advance(before, x, labels, work=work)
            m = new.moments
            _copy(new, after)
            numbers.copy_(numbers_of(stats, extra=self._extra), non_blocking=True)
            count = stats.n_ignored[None].view(torch.float32)
            results = torch.cat([count, m.weight, m.mean.flatten(), stats.R.flatten()])
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch has not annotated it
        self._graphs[key] = _Graph(graph, x, labels, after, results, numbers, arrived)


def _copy(source: MixtureState, target: MixtureState) -> None:
    """Writes all of a state but its covariance to the memory of another."""
    target.moments.weight.copy_(source.moments.weight)
    target.moments.mean.copy_(source.moments.mean)
    target.residual.copy_(source.residual)
