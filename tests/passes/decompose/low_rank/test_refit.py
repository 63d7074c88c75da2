from functools import partial

import pytest
import torch
from torch import nn

from skink.graph.calibration import token_batches
from skink.graph.regions import run_plan
from skink.passes.decompose import LowRank
from skink.passes.decompose.low_rank import refit as module
from skink.passes.decompose.low_rank.refit import Half, fitted, spread_windows
from tests.graph.programs import canonical
from tests.passes.decompose.programs import captured, logits, run, text


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Linear(16, 24), nn.Linear(24, 20), nn.Linear(20, 16)

    def forward(self, x):
        return self.third(torch.relu(self.second(torch.relu(self.first(x)))))


def halves(x, y):
    return [Half(a.T @ b, b.T @ b, len(a)) for a, b in zip(x.tensor_split(2), y.tensor_split(2), strict=True)]


def noisy(tokens, features, noise, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, features, dtype=torch.float64, generator=generator)
    delivered = x + noise * torch.randn(tokens, features, dtype=torch.float64, generator=generator)
    return x, delivered, torch.randn(3, features, dtype=torch.float64, generator=generator)


def test_it_reads_what_is_delivered_as_well_as_it_can():
    x, delivered, down = noisy(400, 8, 0.5)
    best = torch.linalg.lstsq(delivered, x @ down.T).solution.T
    torch.testing.assert_close(fitted(down, *halves(x, delivered)), best, rtol=0.05, atol=0.02)


def test_with_little_text_it_does_not_follow_the_noise():
    few = {noise: noisy(24, 16, noise) for noise in (0.1, 1.0)}
    # Sixteen features told by twelve tokens: a least-squares fit would double the error on other text.
    x, delivered, down = few[0.1]
    found = fitted(down, *halves(x, delivered))
    plain = torch.linalg.lstsq(delivered, x @ down.T).solution.T
    x, delivered, _ = noisy(2000, 16, 0.1, seed=1)

    def error(read):
        return float((delivered @ read.T - x @ down.T).norm())

    assert error(plain) > 1.4 * error(down)
    assert error(down if found is None else found) < 1.02 * error(down)
    # Where half of what is delivered is noise, even so little text says enough to gain.
    x, delivered, down = few[1.0]
    found = fitted(down, *halves(x, delivered))
    x, delivered, _ = noisy(2000, 16, 1.0, seed=1)
    assert error(found) < 0.95 * error(down)


def test_where_nothing_is_lost_or_known_nothing_is_fitted():
    x, _, down = noisy(100, 8, 0.0)
    assert fitted(down, *halves(x, x)) is None
    assert fitted(down, *halves(0 * x, 0 * x)) is None
    assert fitted(down, *halves(x[:1], x[:1] + 1)) is None


def test_windows_are_counted_by_their_tokens():
    windows = torch.zeros(40, 10, dtype=torch.int64)
    assert spread_windows(windows, None, 400).tolist() == list(range(40))
    assert spread_windows(windows, None, 10**6).tolist() == list(range(40))
    assert spread_windows(windows, None, 30).tolist() == [0, 20, 39]
    padding = torch.zeros_like(windows)
    padding[:, :2] = 1
    assert len(spread_windows(windows, padding, 30)) == 15
    assert len(spread_windows(torch.randn(40, 10), None, 10)) == 10
    assert len(spread_windows(torch.randn(40, 5, 10), None, 10)) == 2


@pytest.mark.parametrize("form", ["thin", "pivoted"])
def test_each_layer_is_fitted_after_those_before_it(form):
    module, x = Deep(), torch.randn(2000, 16)
    program = captured(module, 3, 16)
    options = {"keep": 0.6, "form": form, "method": "whitened", "allocation": "uniform"}
    _, once = run(program, LowRank(**options), calibration=x)
    _, refitted = run(program, LowRank(**options, refit=True), calibration=x)
    first = "kept" if form == "pivoted" else "down"
    torch.testing.assert_close(refitted.weight(f"first.{first}.weight"), once.weight(f"first.{first}.weight"))
    changed = {name for name, tensor in refitted.weights() if not torch.allclose(tensor, once.weight(name), atol=1e-5)}
    assert changed == {f"second.{first}.weight", f"third.{first}.weight"}
    distance = [float((entry(x)[0] - program(x)[0]).norm()) for entry in (once, refitted)]
    assert distance[1] < distance[0]


def test_second_layer_against_a_regression_written_here():
    module, x = Deep(), torch.randn(4000, 16)
    program = captured(module, 3, 16)
    options = {"keep": 0.5, "form": "thin", "method": "whitened"}
    _, once = run(program, LowRank(**options), calibration=x)
    _, refitted = run(program, LowRank(**options, refit=True), calibration=x)
    dense = torch.relu(module.first(x)).detach().double()
    up, down = once.weight("first.up.weight"), once.weight("first.down.weight")
    delivered = torch.relu((x @ down.T) @ up.T + once.weight("first.up.bias")).double()
    down = once.weight("second.down.weight").double()
    ridge = 1e-3 * delivered.square().sum(0).mean() * torch.eye(24).double()
    expected = down @ (dense.T @ delivered + ridge) @ torch.linalg.inv(delivered.T @ delivered + ridge)
    assert not torch.allclose(expected, down, rtol=0.01)
    torch.testing.assert_close(refitted.weight("second.down.weight").double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_decoder_comes_nearer_on_the_text_that_it_was_fitted_to(family):
    program, ids = canonical(family), text(64)
    _, once = run(program, LowRank(keep=0.6, refit=False), calibration=ids)
    _, refitted = run(program, LowRank(keep=0.6), calibration=ids)
    exact = logits(program, ids)
    assert float((logits(refitted, ids) - exact).norm()) < 0.97 * float((logits(once, ids) - exact).norm())
    assert dict(refitted.weights()).keys() == dict(once.weights()).keys()


class Parallel(nn.Module):
    """As blocks of Falcon and Cohere: what the first layer read is read again behind the second."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, x):
        first, second, third, beside = self.layers
        x = torch.relu(first(x))
        return third(torch.relu(second(x))) + torch.sigmoid(beside(x))


def test_blocks_side_by_side_are_computed_once(monkeypatch):
    ran = []
    monkeypatch.setattr(
        module, "run_plan", lambda program, plan, *rest: ran.extend(plan) or run_plan(program, plan, *rest)
    )
    options = LowRank(keep=0.5, form="thin", method="whitened", share_inputs=False, refit=True)
    run(captured(Parallel(), 3, 16), options, calibration=torch.randn(200, 16))
    calls = [node for node, _ in ran if node.op == "call_function"]
    assert len(calls) == len(set(calls))


@pytest.mark.parametrize("length", [24, 7])
def test_it_does_not_hang_on_how_windows_fall_into_batches(length, monkeypatch):
    """Few tokens, so that halves of the text judge each other: both must be the same windows whatever the batch."""
    program, ids = canonical("llama"), text(7, length)
    options = LowRank(keep=0.5, method="whitened", allocation="uniform", refit=True)
    found = []
    for batch in (7, 1, 3):
        monkeypatch.setattr(module, "token_batches", partial(token_batches, batch=batch))
        found.append(dict(run(program, options, calibration=ids)[1].weights()))
    for other in found[1:]:
        for name, tensor in found[0].items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-5)
