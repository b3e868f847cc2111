"""The result of a run: how the mixture of the embeddings divides the digits, as a record and as a table."""

import attrs
import torch
from rich.console import Group, RenderableType
from rich.table import Table
from torch import Tensor

from mixture_core import Moments


@attrs.frozen(kw_only=True)
class ComponentReport:
    """One component, and the samples assigned to it."""

    pi: float  # mixing weight
    trace_Sigma: float
    n_samples: int
    label: int | None  # most frequent among its samples; None without samples
    purity: float  # share of that label; nan without samples


@attrs.frozen(kw_only=True)
class Report:
    """A mixture, and the labels of the samples assigned to its components."""

    components: tuple[ComponentReport, ...]
    mean_purity: float  # over the components that have samples
    mutual_information: float  # of components and labels, normalised: 0 if unrelated, 1 if the same partition
    between_share: float  # trace_B / (sum_k pi_k tr Sigma_k + trace_B)
    participation_ratio: float  # directions in use


def summarise(moments: Moments, R: Tensor, labels: Tensor) -> Report:
    """Returns how a mixture divides labelled samples.

    Args:
        moments: The mixture.
        R: (N, K) responsibilities; each sample is assigned to its largest.
        labels: (N,) integers, at least 0, the true classes.
    """
    from sklearn.metrics import normalized_mutual_info_score  # here, as only the demo needs it

    assigned = R.argmax(dim=1)
    counts = torch.zeros(R.shape[1], int(labels.max()) + 1, dtype=torch.int64, device=R.device)
    counts.index_put_((assigned, labels), torch.ones_like(labels), accumulate=True)
    pi, trace_B = moments.pi, moments.trace_B
    traces = moments.Sigma.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    within = (pi * traces).sum()
    components = tuple(map(_component, pi.tolist(), traces.tolist(), counts.tolist()))
    purities = [component.purity for component in components if component.n_samples]
    return Report(
        components=components,
        mean_purity=sum(purities) / len(purities),
        mutual_information=float(normalized_mutual_info_score(labels.cpu(), assigned.cpu())),
        between_share=float(trace_B / (within + trace_B)),
        participation_ratio=float(moments.participation_ratio),
    )


def _component(pi: float, trace_Sigma: float, counts: list[int]) -> ComponentReport:
    n_samples, most = sum(counts), max(counts)
    return ComponentReport(
        pi=pi,
        trace_Sigma=trace_Sigma,
        n_samples=n_samples,
        label=counts.index(most) if n_samples else None,
        purity=most / n_samples if n_samples else float("nan"),
    )


def render(report: Report) -> RenderableType:
    """Returns the report for `rich.print`: a table of the components, and a table of overall figures."""
    return Group(_table_of_components(report), _table_of_figures(report))


def _table_of_components(report: Report) -> Table:
    table = Table(title="Components of the embeddings")
    for name in ("k", "pi", "tr Sigma", "images", "digit", "purity"):
        table.add_column(name, justify="right")
    for k, component in enumerate(report.components):
        table.add_row(
            str(k),
            f"{component.pi:.3f}",
            f"{component.trace_Sigma:.3f}",
            str(component.n_samples),
            "-" if component.label is None else str(component.label),
            "-" if component.label is None else f"{component.purity:.2f}",
        )
    return table


def _table_of_figures(report: Report) -> Table:
    table = Table(show_header=False, box=None)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("mean purity", f"{report.mean_purity:.3f}")
    table.add_row("normalized mutual information with the digits", f"{report.mutual_information:.3f}")
    table.add_row("trace_B over total variance", f"{report.between_share:.3f}")
    table.add_row("participation ratio", f"{report.participation_ratio:.2f}")
    return table
