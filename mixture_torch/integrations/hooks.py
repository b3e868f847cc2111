"""`watch` feeds an estimator the output of a layer, at each forward pass in training mode."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NoReturn, TypeAlias

import torch
from torch import Tensor, nn

from mixture_core.config import as_integer
from mixture_torch.context import register, update_compiled
from mixture_torch.estimator import MixtureStats
from mixture_torch.files.recorder import warn_caller
from mixture_torch.update.ranks import is_out_of_memory, text_of

Output: TypeAlias = int | str | Callable[[Any], Tensor] | None
Reduce: TypeAlias = Literal["mean", "first", "each"]


def watch(
    module: nn.Module,
    estimator: MixtureStats,
    *,
    output: Output = None,
    reduce: Reduce = "mean",
    views: int = 1,
    forwards: int = 1,
) -> "LayerHook":
    """Updates an estimator at each forward pass of a layer in training mode; returns the hook.

    The output is only read, so training is the same to the bit. Passes in evaluation mode, and those that activation
    checkpointing repeats, are ignored. You still call `log_step`. Copies of the layer are not watched.

    A batch that cannot be used counts as one without rows. The first one is warned about, and training goes on.

    Args:
        module: The layer; it must itself be in training mode.
        estimator: One for each layer, each with its own `log_dir`.
        output: Where the embeddings are, if the layer does not return one tensor: an index, a key, the name of an
            attribute, or a function of what it returns.
        reduce: How tokens (N, T, D) and maps (N, D, H, W) become rows: the `mean` over tokens or positions, only the
            `first` one, or one row for `each`. Rows (N, D) stay as they are.
        views: 2 if rows n and n + N/2 of a batch are two views of one sample.
        forwards: Number of forward passes that make up a batch: 2 if each view has its own. If a pass may fail and
            training goes on, call the hook's `begin` at each step, which drops the other one.

    Raises:
        TypeError: An argument has the wrong type. In a forward pass, with `strict`: the embeddings are not a tensor.
        ValueError: An argument is out of range. In a forward pass, with `strict`: the embeddings have a wrong shape.

    Example:
        >>> import torch
        >>> from mixture_torch import MixtureStats
        >>> from mixture_torch.integrations import watch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
        >>> estimator = MixtureStats(K=2, enabled=True)
        >>> hook = watch(model[1], estimator, views=2, forwards=2)
        >>> _ = model(torch.randn(32, 8)), model(torch.randn(32, 8))
        >>> hook.remove()
        >>> estimator.stats.R.shape
        torch.Size([64, 2])
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"`module` must be a layer of a model, got {module!r}.")
    if not isinstance(estimator, MixtureStats):
        raise TypeError(f"`estimator` must be a MixtureStats, got {estimator!r}.")
    if estimator.config.uses_labels:
        raise ValueError("`estimator` needs labels, which a hook does not have; call `update` in the loop instead.")
    hook = LayerHook(estimator, output=output, reduce=reduce, views=views, forwards=forwards)
    if estimator.enabled:
        hook._handle = module.register_forward_hook(hook)
    else:
        estimator.update(torch.empty(0, 1))  # warns if `enabled` was left out
    return hook


class LayerHook:
    """The hook that `watch` returns. `remove`, or the end of its `with` block, removes it."""

    def __init__(self, estimator: MixtureStats, *, output: Output, reduce: Reduce, views: int, forwards: int) -> None:
        if not (output is None or isinstance(output, (int, str)) or callable(output)):
            raise TypeError(f"`output` must be an index, a name, a function or None, got {output!r}.")
        if reduce not in ("mean", "first", "each"):
            raise ValueError(f"`reduce` must be `mean`, `first` or `each`, got {reduce!r}.")
        if views not in (1, 2):
            raise ValueError(f"`views` must be 1 or 2, got {views!r}.")
        if not isinstance(as_integer(forwards), int) or forwards < 1:
            raise ValueError(f"`forwards` must be an integer of at least 1, got {forwards!r}.")
        self.estimator = estimator
        self.has_row = False  # whether the estimator was updated since this was last set to false
        self._output, self._reduce, self._views, self._forwards = output, reduce, views, forwards
        self._step: int | str | None = None
        self._parts: list[Tensor | _Unmade] = []  # rows of the passes of an unfinished batch
        self._has_warned = False
        self._handle: torch.utils.hooks.RemovableHandle | None = None
        self._key = register(self)  # by which compiled code finds it

    def begin(self, step: int | str | None) -> None:
        """Begins a batch of a training step; rows of an unfinished batch are dropped.

        Batches of the same step, as in gradient accumulation, are counted as one. Without this call, the step is that
        of the surrounding `activate`; outside of it, each batch is a step.
        """
        self._step, self._parts = step, []

    def remove(self) -> None:
        """Removes the hook; the estimator stays as it is."""
        if self._handle is not None:
            self._handle.remove()
        self._handle, self._parts = None, []

    def __call__(self, module: nn.Module, _: Any, output: Any) -> None:
        """The forward hook."""
        if not module.training or torch._C._get_tracing_state() is not None:  # a trace would record what this does
            return
        found = _made(_select, output, self._output)
        if torch.compiler.is_compiling():  # calls `update` when the code runs; for an error, it takes a text only
            wrong = str(found.error) if isinstance(found, _Unmade) else None
            update_compiled(self._key, torch.zeros(()) if wrong else found, None, wrong, 1)
        else:
            self.update(found)

    def update(
        self, found: "Tensor | _Unmade", labels: None = None, *, step: str | None = None, views: int = 1
    ) -> None:
        """Takes the output of one forward pass, or the text of an error as `step`; updates if the batch is complete."""
        if self._handle is None or torch._C._current_graph_task_id() != -1:  # removed, or repeated in a backward pass
            return
        self._parts.append(_made(self._rows, found if step is None else _Unmade(TypeError(step))))
        if len(self._parts) < self._forwards:
            return
        parts, self._parts = self._parts, []
        rows: Any = _made(_joined, parts, self._views)
        try:
            self.estimator.update(rows, step=self._step, views=self._views)
        except (TypeError, ValueError) as error:
            if self.estimator.config.strict:
                raise
            self._leave_out(error)
        self.has_row = True

    def _rows(self, found: "Tensor | _Unmade") -> Tensor:
        """Returns the rows of one forward pass."""
        if isinstance(found, _Unmade):
            raise found.error
        rows = _as_rows(found.detach(), self._reduce)
        return rows if self._forwards == 1 else rows.clone()  # the layer's output may be overwritten meanwhile

    def _leave_out(self, error: Exception) -> None:
        """Updates with a batch without rows instead of one with an error, so that no row repeats earlier figures."""
        if self.estimator.stats:
            self.estimator.update(self.estimator.stats.mu[:0], step=self._step)
        if not self._has_warned:
            self._has_warned = True
            warn_caller(f"A batch of the watched layer was left out: {text_of(error)} This warning comes once.")

    def __enter__(self) -> "LayerHook":
        """Returns the hook."""
        return self

    def __exit__(self, *_: object) -> None:
        """Removes the hook."""
        self.remove()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and files of the layer hold a hook that does nothing instead."""
        return _no_hook, ()


class _Unmade:
    """Stands for embeddings that could not be made. `update` meets the error where it can tell other ranks of it.

    If the error is a lack of memory, `update` skips the batch.
    """

    def __init__(self, error: Exception) -> None:
        known = isinstance(error, (TypeError, ValueError)) or is_out_of_memory(error)
        self.error = error if known else ValueError(f"{type(error).__name__}: {text_of(error)}.")

    def __array__(self) -> NoReturn:
        """Raises the error instead of returning an array."""
        raise self.error


def _made(make: Callable[..., Tensor], *arguments: Any) -> Tensor | _Unmade:
    try:
        return make(*arguments)
    except Exception as error:  # any: `output` may be the user's function, and nothing may end the forward pass
        return _Unmade(error)


def _no_hook() -> Callable[..., None]:
    return _ignore


def _ignore(module: nn.Module, _: Any, output: Any) -> None:
    """A forward hook that does nothing."""


def _select(output: Any, where: Output) -> Tensor:
    """Returns the tensor in what a layer returned."""
    found = output
    if callable(where):
        found = where(output)
    elif isinstance(where, str):
        found = output.get(where) if isinstance(output, Mapping) else getattr(output, where, None)
    elif where is not None:
        found = output[where] if isinstance(output, (tuple, list)) and -len(output) <= where < len(output) else None
    if not isinstance(found, Tensor):
        kinds = f" with the keys {list(output)}" if isinstance(output, Mapping) else ""
        kinds = f" with {len(output)} elements" if isinstance(output, (tuple, list)) else kinds
        raise TypeError(
            f"`output` must select a tensor from what the layer returned, {_kind(output)}{kinds}, "
            f"got output={where!r}, which selects {_kind(found)}."
        )
    return found


def _kind(value: Any) -> str:
    return "None" if value is None else f"a value of type {type(value).__name__}"


def _as_rows(x: Tensor, reduce: Reduce) -> Tensor:
    """Returns tokens (N, T, D) and maps (N, D, ...) as rows."""
    if x.ndim == 2:
        return x
    if x.ndim < 2:
        raise ValueError(
            f"The layer must return rows (N, D), tokens (N, T, D) or maps (N, D, H, W), got {tuple(x.shape)}."
        )
    tokens = x if x.ndim == 3 else x.flatten(2).transpose(1, 2)  # (N, T, D)
    if reduce == "each":
        return tokens.flatten(0, 1)
    if reduce == "first":
        tokens = tokens[:, :1]
    return tokens.mean(1, dtype=None if x.is_complex() else torch.float32)  # integers and float8 have no mean


def _joined(parts: list[Tensor | _Unmade], views: int) -> Tensor:
    """Returns the rows of all forward passes of a batch."""
    rows = []
    for part in parts:
        if isinstance(part, _Unmade):
            raise part.error
        rows.append(part)
    if len(rows) == 1:
        return rows[0]
    if len({part.shape[1] for part in rows}) > 1:
        raise ValueError(f"All forward passes of a batch must have the same width, got {_shapes(rows)}.")
    half = len(rows) // 2
    if views == 2 and sum(map(len, rows[:half])) != sum(map(len, rows[-half:])):
        raise ValueError(f"Both views of a batch must have the same number of rows, got {_shapes(rows)}.")
    return torch.cat(rows)


def _shapes(rows: list[Tensor]) -> str:
    return " and ".join(str(tuple(part.shape)) for part in rows)
