"""Moves wasted components to where they are needed, from the moments alone."""

import math

import torch
from torch import Tensor
from torch.utils._pytree import tree_map  # torch has no public pytree module

from mixture_core.absorb_cpu import complete_
from mixture_core.inputs import is_plain
from mixture_core.moments import Moments, merge_exactly, safe_divide, two_sum
from mixture_core.step import MixtureState

DEAD = 0.01  # share of the weight, times K, below which a component is dead
MARGIN = 2.0  # a split must gain more than this many times what the merger costs
MOVES = 4  # most moves at one time; K / 8 if that is more
ITERATIONS = 3  # of the power method
HALF = 2 / math.pi  # square of the mean of a standard normal's positive half


def relocate(state: MixtureState) -> tuple[MixtureState, Tensor]:
    """Returns the state with wasted components moved to where the mixture fits worst, and how many moved, () int64.

    Splitting component k by a hyperplane through its mean, with the normal v, gives two halves of a Gaussian:

        weight w_k / 2,  mean mu_k +- s,  covariance Sigma_k - s s^T,  s = sqrt(2 / pi) Sigma_k v / sqrt(v^T Sigma_k v)

    and lowers the inertia by w_k |s|^2. If samples are few per dimension, s is corrected for the noise in v^T Sigma_k
    v. Merging component j with its neighbor i raises the inertia by w_i w_j / (w_i + w_j) |mu_i - mu_j|^2. If the
    largest gain is more than twice the least cost, j is merged into i and takes one half of k, which is split across
    its principal axis. A component with less than 0.01 / K of the weight is dead: moving it costs nothing, and its
    weight is dropped. Up to max(4, K / 8) components move at one time, dead ones first. Apart from dropped weight, the
    mean and the covariance of all components together do not change.

    Call it between steps, once every `config.window` of them: a moved component needs that long to gather weight.
    Nothing moves if `relocate` is false, outside `mode: ema`, or with labels.

    Args:
        state: From `init` or `step`.

    Example:
        >>> import torch, mixture_core
        >>> moments = mixture_core.Moments(  # two components for the cluster at 0, one for those at 6 and 12
        ...     weight=torch.tensor([50.0, 50.0, 200.0]),
        ...     mean=torch.tensor([[0.0], [0.1], [9.0]]),
        ...     covariance=torch.tensor([[[1.0]], [[1.0]], [[10.0]]]),
        ... )
        >>> state = mixture_core.MixtureState(config=mixture_core.MixtureConfig(K=3), moments=moments)
        >>> state, n_relocated = mixture_core.relocate(state)
        >>> int(n_relocated), [round(float(mean), 1) for mean in state.moments.mean]
        (1, [6.5, 0.1, 11.5])

    Split and merge of clusters: Ueda, Nakano, Ghahramani and Hinton, "SMEM algorithm for mixture models" (2000),
    section 3. Moments of a half: Johnson, Kotz and Balakrishnan, "Continuous univariate distributions" (1994), 13.10.1.
    """
    return move(state)


def move(state: MixtureState, *, lower: bool = False) -> tuple[MixtureState, Tensor]:
    """Does what `relocate` does.

    Args:
        state: From `init` or `step`.
        lower: Whether the covariance is a `Lower`. Its upper triangle may then be written to.
    """
    K, m = state.config.K, state.moments
    n_relocated = m.weight.new_zeros((), dtype=torch.int64)
    if not state.config.relocates or K == 1:
        return state, n_relocated
    plain = is_plain(m.weight, m.mean, m.covariance, state.residual)
    looking, dead = plain and m.weight.device.type == "cpu", m.weight < DEAD / K * m.weight.sum()
    cost, neighbors = _mergers(m)
    variance = m.weight * m.covariance.diagonal(dim1=-2, dim2=-1).sum(dim=1)
    if looking and not float(variance.max()) * HALF > MARGIN * float(torch.where(dead, 0.0, cost).min()):
        return state, n_relocated  # the usual case: the largest eigenvalue is at most the trace

    if lower:
        complete_(m.covariance)
    per_weight = 1 + state.config.ema_decay  # samples: a decayed weight is as exact as so many times as many of them
    k, shift = torch.arange(K, device=m.weight.device), _half_shift(m.covariance, m.weight * per_weight)
    healthy, is_half = variance.sum().isfinite(), torch.zeros_like(dead)
    for n in range(max(MOVES, K // 8)):
        cost = torch.where(is_half, torch.inf, torch.where(dead, 0.0, cost))
        donor = torch.where(dead, m.pi - 1, cost).argmin()[None]
        neighbor, dies = neighbors[donor], dead[donor]
        size = shift.square().sum(dim=1)
        apart = size > (8 * torch.finfo(size.dtype).eps) ** 2 * m.mean.square().sum(dim=1)  # else halves would coincide
        splits = healthy & apart & ~dead & (k != donor) & ((k != neighbor) | dies)
        gain = torch.where(splits, m.weight * size, 0.0)
        target = gain.argmax()[None]
        moves = gain[target] > MARGIN * cost[donor]
        if looking and not moves:
            break
        if plain and n == 0:  # from here on it is written to
            state = tree_map(torch.clone, state)

        union = torch.where(dies, donor, neighbor)
        merged = merge_exactly(_at(state, union), _at(state, donor))
        state = _put(state, union, merged, moves & ~dies, in_place=plain)
        halves = torch.cat([target, donor])
        state = _put(state, halves, _halves(_at(state, target), shift[target]), moves, in_place=plain)
        n_relocated = n_relocated + moves[0]
        dead = dead & ~(moves & (k == donor))
        is_half = is_half | (moves & ((k == donor) | (k == target)))
        m, changed = state.moments, torch.cat([union, halves])
        cost, neighbors = _mergers(m)
        shift = shift.index_put((changed,), _half_shift(m.covariance[changed], m.weight[changed] * per_weight))
    return state, n_relocated


def _mergers(m: Moments) -> tuple[Tensor, Tensor]:
    """The inertia that removing each component adds, (K,), and which one it is cheapest to merge with, (K,)."""
    w, mean = m.weight.detach(), m.mean.detach()
    distance = torch.cdist(mean, mean, compute_mode="donot_use_mm_for_euclid_dist")
    each = distance.square() / (1 / w[:, None] + 1 / w)
    cost, neighbor = torch.where(torch.eye(len(w), dtype=torch.bool, device=w.device), torch.inf, each).min(dim=1)
    return cost, neighbor


def _half_shift(covariance: Tensor, n: Tensor) -> Tensor:
    """The shift of a half's mean from the whole's, (K, D), across the axis that a few power iterations find.

    If n is not far above D, most of the largest variance is noise, and halves placed that far apart would both lose
    their rows. So the variance along the axis is that of the covariance shrunk to a multiple of the identity: Chen,
    Wiesel, Eldar and Hero, "Shrinkage algorithms for MMSE covariance estimation" (2010), equation 23.

    Args:
        covariance: (K, D, D).
        n: (K,) number of samples it was estimated from.
    """
    D = covariance.shape[-1]
    diagonal = covariance.diagonal(dim1=-2, dim2=-1)
    scale = diagonal.mean(dim=1)
    unit = safe_divide(covariance, scale[:, None, None])  # its trace is D: no square below can overflow
    v = unit.gather(1, diagonal.argmax(dim=1)[:, None, None].expand(-1, 1, D))[:, 0]
    for _ in range(ITERATIONS):
        axis, v = v, (unit @ v[:, :, None])[:, :, 0]
    along, length, squares = (axis * v).sum(dim=1), axis.square().sum(dim=1), unit.square().sum(dim=(1, 2))
    noise, signal = (1 - 2 / D) * squares + D**2, (n + 1 - 2 / D) * (squares - D)
    shrinkage = torch.where(signal > noise, safe_divide(noise, signal), 1.0)
    variance = torch.lerp(along, length, shrinkage) * scale
    positive = variance > 0
    root = torch.where(positive, variance, 1.0).sqrt()  # which has a gradient everywhere
    return (math.sqrt(HALF) * torch.where(positive, safe_divide(root, along), 0.0))[:, None] * v


def _halves(whole: tuple[Moments, Tensor], shift: Tensor) -> tuple[Moments, Tensor]:
    """The two halves of one component, as moments of two and their residual."""
    (m, residual), step = whole, torch.cat([shift, -shift])
    mean, left = two_sum(m.mean, residual + step)
    covariance = m.covariance - step[:, :, None] * step[:, None, :]
    return Moments(weight=(m.weight / 2).expand(2), mean=mean, covariance=covariance), left


def _at(state: MixtureState, index: Tensor) -> tuple[Moments, Tensor]:
    found: tuple[Moments, Tensor] = tree_map(lambda tensor: tensor[index], (state.moments, state.residual))
    return found


def _put(
    state: MixtureState, index: Tensor, values: tuple[Moments, Tensor], really: Tensor, *, in_place: bool
) -> MixtureState:
    """The state with these components replaced, if `really`, (1,)."""

    def put(old: Tensor, new: Tensor) -> Tensor:
        value = torch.where(really.view(-1, *[1] * (old.ndim - 1)), new, old[index])
        return old.index_put_((index,), value) if in_place else old.index_put((index,), value)

    moments, residual = tree_map(put, (state.moments, state.residual), values)
    return MixtureState(config=state.config, moments=moments, residual=residual)
