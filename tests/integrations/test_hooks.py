"""`watch`."""

import copy
import io
import re
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mixture_torch import MixtureStats, activate, read_extra
from mixture_torch.integrations import hooks, watch
from tests.files.recording import said
from tests.integrations.exact import OPTIONS, Net, log, plain, trained


def estimator(**options: Any) -> MixtureStats:
    return MixtureStats(**({"K": 2, "enabled": True} | options))


def same_mixture(left: MixtureStats, right: MixtureStats) -> bool:
    return torch.equal(left.stats.mu, right.stats.mu) and torch.equal(left.stats.Sigma, right.stats.Sigma)


def rows(*shape: int) -> Tensor:
    return torch.randn(*(shape or (32, 4)), generator=torch.Generator().manual_seed(len(shape)))


def test_watch_writes_the_log_of_a_plain_loop_and_keeps_the_weights(tmp_path: Path) -> None:
    weights = plain(tmp_path / "plain")
    net = Net()
    with estimator(log_dir=tmp_path / "hook", **OPTIONS) as watching, watch(net.projector, watching):
        for step, epoch, _ in trained(net):
            watching.log_step(step=step, epoch=epoch)
    assert log(tmp_path / "hook") == log(tmp_path / "plain")
    assert torch.equal(net.encoder.weight, weights)


def test_only_training_mode_counts_and_only_until_removed() -> None:
    layer, seen = nn.Identity(), estimator()
    with watch(layer, seen):
        layer.eval()(rows())
        assert not seen.stats
        layer.train()(rows())
        assert seen.stats.R.shape == (32, 2)
    layer(rows()[:8])
    assert seen.stats.R.shape == (32, 2)


@pytest.mark.parametrize(
    ("shape", "reduce", "want"),
    [
        ((32, 5, 4), "mean", lambda x: x.mean(1)),
        ((32, 5, 4), "first", lambda x: x[:, 0]),
        ((32, 5, 4), "each", lambda x: x.reshape(-1, 4)),
        ((32, 4, 3, 2), "mean", lambda x: x.mean((2, 3))),
        ((32, 4, 3, 2), "each", lambda x: x.permute(0, 2, 3, 1).reshape(-1, 4)),
    ],
)
def test_tokens_and_maps_become_rows(shape: tuple[int, ...], reduce: Any, want: Any) -> None:
    layer, seen, plainly, x = nn.Identity(), estimator(), estimator(), rows(*shape)
    watch(layer, seen, reduce=reduce)
    layer(x)
    plainly.update(want(x))
    torch.testing.assert_close(seen.stats.mu, plainly.stats.mu)


@pytest.mark.parametrize(
    ("returned", "output"),
    [
        ((0, rows()), 1),
        ({"z": rows()}, "z"),
        (OrderedDict(z=rows()), "z"),
        (SimpleNamespace(z=rows()), "z"),
        ([rows()], lambda out: out[0]),
    ],
    ids=["tuple", "dict", "mapping", "attribute", "function"],
)
def test_output_selects_the_embeddings(returned: Any, output: Any) -> None:
    layer, seen = nn.Identity(), estimator()
    watch(layer, seen, output=output)
    assert layer(returned) is returned
    assert seen.stats.R.shape == (32, 2)


@pytest.mark.parametrize(
    ("returned", "output", "error"),
    [
        (None, None, r"`output` must select a tensor from what .*, None, got output=None, which selects None\."),
        ((1, 2), 5, r"a value of type tuple with 2 elements, got output=5, which selects None\."),
        ({"z": 1}, "y", r"a value of type dict with the keys \['z'\], got output='y', which selects None\."),
        (
            SimpleNamespace(z=1),
            "z",
            r"a value of type SimpleNamespace, got output='z', which selects a value of type int\.",
        ),
        ({"z": 1}, lambda out: out["y"], r"KeyError: 'y'\."),
        (torch.zeros(3), None, r"must return rows .*, got \(3,\)\."),
    ],
    ids=["none", "tuple", "dict", "attribute", "function", "vector"],
)
def test_output_without_embeddings_is_said_once_and_raises_if_strict(returned: Any, output: Any, error: str) -> None:
    layer = nn.Identity()
    with watch(layer, estimator(), output=output), said() as messages:
        layer(returned), layer(returned)
    (message,) = messages
    assert re.search(f"left out: .*{error} This warning comes once", message)
    with watch(layer, estimator(strict=True), output=output), pytest.raises((TypeError, ValueError), match=error):
        layer(returned)


def test_output_without_embeddings_is_said_by_compiled_code() -> None:
    torch._dynamo.reset()
    layer = nn.Identity()
    run = torch.compile(lambda x: layer(x), backend="eager", fullgraph=True)
    with watch(layer, estimator()), said() as messages:
        run(None)
    (message,) = messages
    assert "None, got output=None, which selects None. This warning comes once." in message


@pytest.mark.parametrize(
    ("parts", "views", "error"),
    [
        ([(32, 4), (32, 6)], 1, r"must have the same width, got \(32, 4\) and \(32, 6\)\."),
        ([(32, 4), (30, 4)], 2, r"must have the same number of rows, got \(32, 4\) and \(30, 4\)\."),
        ([(32, 5), (32, 5)], 1, r"must have shape \(N, 4\), got \(64, 5\)\."),
    ],
    ids=["widths", "views", "another width"],
)
def test_batch_that_cannot_be_used_is_logged_as_one_without_rows(
    parts: Any, views: int, error: str, tmp_path: Path
) -> None:
    layer, seen = nn.Identity(), estimator(log_dir=tmp_path)
    watch(layer, seen, views=views, forwards=2)
    with said() as messages:
        for step, shapes in enumerate([[(32, 4), (32, 4)], parts, parts, [(32, 4), (32, 4)]]):
            for shape in shapes:
                layer(rows(*shape))
            seen.log_step(step=step, epoch=0)
    (message,) = messages
    assert re.search(error, message)
    assert read_extra(tmp_path)["n_rows"].tolist() == [64, 0, 0, 64]


@pytest.mark.parametrize("shortage", [MemoryError, torch.OutOfMemoryError])
@pytest.mark.parametrize("forwards", [1, 2])
@pytest.mark.parametrize("where", ["_select", "_as_rows", "_joined"])
def test_shortage_of_memory_skips_the_batch(
    where: str, forwards: int, shortage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise shortage("no memory")

    layer, seen, plainly = nn.Identity(), estimator(), estimator()
    watch(layer, seen, forwards=forwards)
    first, *others, short = [rows(forwards, 32, 4) + number for number in range(4)]
    for batch in (first, short, *others):
        *earlier, last = batch
        for part in earlier:
            layer(part)
        if batch is short:
            with monkeypatch.context() as patch, said() as messages:
                patch.setattr(hooks, where, fail)
                layer(last)
            assert messages == ["`update` ran out of memory and skips such batches: no memory"]
        else:
            layer(last)
            plainly.update(batch.flatten(0, 1))
    assert same_mixture(seen, plainly)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float8_e4m3fn, torch.float16])
def test_tokens_of_any_type_have_a_mean(dtype: torch.dtype) -> None:
    layer, seen = nn.Identity(), estimator()
    with watch(layer, seen):
        layer(rows(32, 5, 4).to(dtype))
    assert seen.stats.R.shape == (32, 2)


def test_two_forward_passes_are_two_views_of_one_batch() -> None:
    layer, seen, plainly = nn.Sequential(nn.Identity(), nn.ReLU(inplace=True)), estimator(), estimator()
    hook, x = watch(layer[0], seen, views=2, forwards=2), rows()
    for step in range(3):
        hook.begin(step)
        layer(x.clone())  # a batch that an error cut short
        hook.begin(step)
        layer(x.clone()), layer(x + 0.1)
        plainly.update(torch.cat([x, x + 0.1]), views=2, step=step)
    assert same_mixture(seen, plainly)
    assert seen.stats.scalars()["alignment"] == plainly.stats.scalars()["alignment"]


def test_passes_of_one_step_are_parts_of_it() -> None:
    layer, seen, plainly, x = nn.Identity(), estimator(), estimator(), rows(64, 4)
    watch(layer, seen)
    for step in range(3):
        with activate(seen, step=step):
            layer(x[:32]), layer(x[32:])
        plainly.update(x[:32], step=step), plainly.update(x[32:], step=step)
    assert same_mixture(seen, plainly)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.layer, self.reentrant = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.layer, x * 1.5, use_reentrant=self.reentrant).sum()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_activation_checkpointing_counts_once(reentrant: bool, compiled: bool) -> None:
    model = Checkpointed(reentrant)
    seen = estimator()
    watch(model.layer[0], seen)
    run = torch.compile(model, backend="aot_eager", fullgraph=not reentrant) if compiled else model
    for _ in range(3):
        run(rows().requires_grad_()).backward()
    assert repr(seen).endswith("3 updates)")


def test_compiled_code_feeds_in_one_graph_until_removed() -> None:
    torch._dynamo.reset()
    layer, seen, plainly, x = nn.Linear(4, 4), estimator(), estimator(), rows()
    hook = watch(layer, seen, views=2, forwards=2)
    model = torch.compile(lambda one, two: (layer(one), layer(two)), backend="aot_eager", fullgraph=True)
    plainly.update(torch.cat(model(x, -x)), views=2)
    assert same_mixture(seen, plainly)
    hook.remove()
    model(x, -x)
    assert repr(seen).endswith("1 update)")


def test_copies_of_a_watched_layer_are_not_watched() -> None:
    layer, seen, buffer = nn.Linear(4, 4), estimator(), io.BytesIO()
    watch(layer, seen)
    torch.save(layer, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
        other(rows())
    assert not seen.stats


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
def test_watched_layer_can_be_traced() -> None:
    layer, seen = nn.Linear(4, 4), estimator()
    watch(layer, seen)
    traced = torch.jit.trace(layer, rows())
    assert torch.equal(traced(rows()), layer(rows()))


def test_disabled_estimators_add_no_hook() -> None:
    layer = nn.Identity()
    watch(layer, MixtureStats(K=2, enabled=False))
    with pytest.warns(UserWarning, match="MixtureStats is disabled"):
        watch(layer, MixtureStats(K=2))
    assert not layer._forward_hooks


@pytest.mark.parametrize("options", [{"output": 1.5}, {"reduce": "max"}, {"views": 3}, {"forwards": 0}])
def test_bad_options_are_named(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises((TypeError, ValueError), match=f"`{name}` must be .*, got {options[name]!r}"):
        watch(nn.Identity(), estimator(), **options)


def test_bad_layers_and_estimators_are_named() -> None:
    with pytest.raises(TypeError, match="`module` must be a layer"):
        watch("encoder", estimator())
    with pytest.raises(TypeError, match="`estimator` must be a MixtureStats"):
        watch(nn.Identity(), None)
    with pytest.raises(ValueError, match="needs labels"):
        watch(nn.Identity(), estimator(assigner="label_supervised"))
