import dataclasses

import pytest
import torch
from torch import nn

from skink.errors import OptionError
from skink.graph import objective as subject
from skink.graph.calibration import token_batches
from skink.graph.capture import capture
from skink.graph.objective import LogLikelihood, Probes, objective_of
from tests.graph.programs import canonical
from tests.models import VOCABULARY


def token_windows(count=3, length=9):
    return torch.randint(0, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(5))


def made(windows, *, padding=None, batch=None, labels="sampled", samples=1, seed=0):
    program = canonical("llama")
    batches = token_batches(program, windows, batch=batch, padding=padding)
    return objective_of(program, batches, labels=labels, samples=samples, seed=seed)


def logits_of(windows, seed=0):
    return 2 * torch.randn(*windows.shape, VOCABULARY, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("chunk", [2**24, 4 * VOCABULARY])
def test_the_text_itself(chunk, monkeypatch):
    monkeypatch.setattr(subject, "_CHUNK", chunk)
    windows = token_windows()
    logits = logits_of(windows).requires_grad_()
    with torch.enable_grad():
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten(), reduction="sum")
        (expected,) = torch.autograd.grad(loss, logits)
    objective = made(windows, labels="text", samples=3)
    found = objective.gradient(objective.nodes[0], logits.detach(), 0, 0)
    assert objective.draws == 1
    torch.testing.assert_close(found, expected)
    assert not found[:, -1].any()


def test_the_text_beside_padding():
    windows, padding = token_windows(2, 6), torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    objective = made(windows, padding=padding, labels="text")
    found = objective.gradient(objective.nodes[0], logits_of(windows), 0, 0)
    # A token has a label where it and the next are text.
    assert found.any(-1).long().tolist() == [[0, 0, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_sampled_labels_follow_the_softmax(dtype):
    windows = torch.zeros(4000, 2, dtype=torch.int64)
    row = torch.tensor([0.0, 1.0, 2.0, -1.0, -torch.inf])
    logits = row.to(dtype).expand(4000, 2, 5)
    objective = made(windows, batch=4000)
    found = objective.gradient(objective.nodes[0], logits, 0, 0)
    assert found.dtype == dtype
    share = row.softmax(-1)
    drawn = (found.float() - share).round().neg()
    assert torch.equal(drawn.sum(-1), torch.ones(4000, 2))
    # Within four standard deviations.
    assert ((drawn.mean((0, 1)) - share).abs() <= 4 * (share * (1 - share) / 8000).sqrt()).all()
    # Tokens are drawn for one by one.
    both = (drawn[:, 0].argmax(-1) == drawn[:, 1].argmax(-1)).float().mean()
    assert float(both) == pytest.approx(float(share.square().sum()), abs=0.04)


def test_draws_do_not_depend_on_batches_but_on_seed_draw_and_window():
    windows = token_windows(5)
    logits = logits_of(windows[:1]).expand(5, -1, -1)
    whole = made(windows, batch=5, samples=2, seed=4)
    parts = made(windows, batch=2, samples=2, seed=4)
    (node,) = whole.nodes
    for draw in range(2):
        one = whole.gradient(node, logits, 0, draw)
        split = [parts.gradient(node, part, index, draw) for index, part in enumerate(logits.split(2))]
        assert torch.equal(one, torch.cat(split))
        assert len({one[window].numpy().tobytes() for window in range(5)}) == 5
    assert not torch.equal(whole.gradient(node, logits, 0, 0), whole.gradient(node, logits, 0, 1))
    other = made(windows, batch=5, seed=5)
    assert not torch.equal(whole.gradient(node, logits, 0, 0), other.gradient(node, logits, 0, 0))


def test_padding_has_no_label():
    windows, padding = token_windows(2, 6), torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    objective = made(windows, padding=padding)
    found = objective.gradient(objective.nodes[0], logits_of(windows), 0, 0)
    assert torch.equal(found.any(-1).long(), padding)


class TwoOutputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x):
        y = self.layer(x)
        return y, y * 100.0


def test_probes_have_the_size_that_makes_errors_relative():
    program = capture(TwoOutputs(), (torch.randn(4, 6),))
    x = torch.randn(3000, 6)
    objective = objective_of(program, token_batches(program, x, batch=2000), labels="sampled", samples=1, seed=0)
    assert isinstance(objective, Probes)
    assert objective.observes
    for node, factor in zip(objective.nodes, (1.0, 100.0), strict=True):
        for index, part in enumerate(x.split(2000)):
            objective.observe(node, factor * part[:, :4], index)
        found = torch.cat(
            [objective.gradient(node, factor * part[:, :4], index, 0) for index, part in enumerate(x.split(2000))]
        )
        expected = 2 * 3000 / float((factor * x[:, :4]).double().square().sum())
        assert float(found.square().mean()) == pytest.approx(expected, rel=0.06)
        assert abs(float(found.mean())) < 0.05 * expected**0.5
    first, second = (objective.gradient(node, x[:2000, :4], 0, 0).flatten() for node in objective.nodes)
    assert abs(float(torch.corrcoef(torch.stack((first, second)))[0, 1])) < 0.05


def test_logits_make_a_loss():
    objective = made(token_windows())
    assert isinstance(objective, LogLikelihood)
    assert not objective.observes


def test_text_needs_logits_of_tokens():
    program = capture(nn.Linear(6, 6), (torch.randn(4, 6),))
    batches = token_batches(program, torch.randn(4, 6))
    with pytest.raises(OptionError, match="needs a model with logits") as caught:
        objective_of(program, batches, labels="text", samples=1, seed=0)
    assert caught.value.code == "OPTION-002"
    named = dataclasses.replace(program, outputs=("logits",))
    with pytest.raises(OptionError, match="needs a decoder"):
        objective_of(named, batches, labels="text", samples=1, seed=0)
