import itertools
import math

import pytest
import torch

from skink.budget import pricing
from skink.errors import BudgetError
from skink.passes.decompose.factorize.factorize import Factorization, uniform_rank
from skink.passes.decompose.low_rank.candidates import Candidate, Stack
from skink.passes.decompose.low_rank.ranks import Group, Ranking, best_ranks, uniform_ranks
from skink.passes.decompose.selection import LinearLayer


def layer(name, out, width):
    return LinearLayer(name, (name,), (out, width), (None,), ())


def ranking(keep, *, pivoted=False, multiple_of=1, floor=0.0, fixed=0.0):
    return Ranking(pricing("params", None), pivoted, multiple_of, floor, keep, fixed)


def candidate(stack, height=1.0, decay=1.0):
    """A candidate whose losses fall as a power of the rank."""
    losses = height * (torch.arange(min(stack.shape) + 1).double() + 1).pow(-decay)
    losses[-1] = 0.0
    empty = torch.empty(0)
    return Candidate(stack, Factorization(empty, empty, empty, losses, losses), losses=losses)


def cost(pairs, *, pivoted=False):
    total = 0
    for entry, rank in pairs:
        out, width = entry.stack.shape
        total += out * width if rank == 0 else rank * (out + width - (rank if pivoted else 0))
    return total


def loss(pairs):
    return sum(float(entry.losses[rank]) if rank else 0.0 for entry, rank in pairs)


STACKS = [Stack((layer(name, *shape),)) for name, shape in (("a", (12, 8)), ("b", (8, 8)), ("c", (20, 6)))]


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.8, 0.95])
def test_uniform_ranks_are_the_published_ones_where_all_can_be_factored(keep):
    stacks = [Stack((layer("a", 64, 48),)), Stack((layer("b", 48, 128),))]
    found = uniform_ranks(stacks, ranking(keep))
    assert found == {stack: uniform_rank(keep, *stack.shape) for stack in stacks}


def test_uniform_ranks_make_up_for_what_stays_dense():
    stacks = [Stack((layer("a", 64, 64),)), Stack((layer("thin", 64, 1),))]
    found = uniform_ranks(stacks, ranking(0.5))
    assert found[stacks[1]] == 0
    assert found[stacks[0]] * 128 + 64 <= 0.5 * (4096 + 64) < (found[stacks[0]] + 1) * 128 + 64
    assert found == uniform_ranks(stacks[:1], ranking(0.5, fixed=64.0)) | {stacks[1]: 0}


class Flat:
    """As measured times may be: factors are quicker than the matrix at any rank, and none quicker than another."""

    def linear(self, out, in_, *, uses=1):
        return 1.0

    def low_rank_curve(self, out, in_, ranks, **form):
        return torch.full((len(ranks),), 0.5, dtype=torch.float64)


@pytest.mark.parametrize("pivoted", [False, True])
def test_no_rank_is_above_the_largest_that_is_of_use_whatever_it_costs(pivoted):
    rule = Ranking(Flat(), pivoted, 1, 0.0, 0.8)
    for stack, rank in uniform_ranks(STACKS, rule).items():
        assert rank == rule.most(stack)
    assert rule.curve(Stack((layer("row", 1, 8),)))[1].tolist() == [0]


def test_uniform_ranks_at_all_of_the_price_and_at_too_little():
    assert set(uniform_ranks(STACKS, ranking(1.0)).values()) == {0}
    with pytest.raises(BudgetError) as caught:
        uniform_ranks(STACKS, ranking(0.05))
    assert caught.value.code == "BUDGET-001"


@pytest.mark.parametrize("pivoted", [False, True])
@pytest.mark.parametrize("keep", [0.4, 0.6, 0.8])
def test_the_best_ranks_of_all_there_are(keep, pivoted):
    made = [candidate(stack, height, decay) for stack, height, decay in zip(STACKS, (3.0, 1.0, 0.3), (1.0, 0.5, 2.0))]
    rule = ranking(keep, pivoted=pivoted)
    room = keep * sum(out * width for out, width in (stack.shape for stack in STACKS))
    choices = []
    for entry in made:
        offered = rule.curve(entry.stack, entry.losses)[1].tolist()
        choices.append([(entry, rank) for rank in offered])
    best = min(loss(pairs) for pairs in itertools.product(*choices) if cost(pairs, pivoted=pivoted) <= room)
    found = best_ranks([Group((entry,)) for entry in made], rule)
    assert cost(found, pivoted=pivoted) <= room
    # Within one step of one weight of the best (docs of skink.budget).
    assert loss(found) <= best * 1.1 + 1e-12


def test_layers_go_together_where_that_is_better():
    first, second = Stack((layer("a", 12, 8),)), Stack((layer("b", 12, 8),))
    both = Stack(first.layers + second.layers)
    single = candidate(first), candidate(second)
    good, bad = candidate(both, height=0.5), candidate(both, height=50.0)
    ((chosen, rank),) = best_ranks([Group(single, good)], ranking(0.5))
    assert (chosen, rank > 0) == (good, True)
    assert rank * (24 + 8) <= 0.5 * 24 * 8 < (rank + 1) * (24 + 8)
    apart = best_ranks([Group(single, bad)], ranking(0.5))
    assert [entry for entry, _ in apart] == list(single)
    assert apart == best_ranks([Group(single)], ranking(0.5))
    # What two do side by side is what two groups of one would do.
    assert cost(apart) <= 0.5 * 2 * 12 * 8


def test_a_group_has_every_useful_choice_of_its_layers():
    wide = [Stack((layer(name, *shape),)) for name, shape in (("a", (96, 64)), ("b", (64, 64)), ("c", (160, 48)))]
    single = candidate(wide[0], 3.0), candidate(wide[1], 1.0, 0.5), candidate(wide[2], 0.3, 2.0)
    for keep in (0.4, 0.6, 0.8):
        together = best_ranks([Group(single)], ranking(keep))
        apart = best_ranks([Group((entry,)) for entry in single], ranking(keep))
        assert loss(together) == pytest.approx(loss(apart), rel=0.1)


def test_no_rank_is_below_the_floor():
    made = [candidate(stack, height) for stack, height in zip(STACKS, (100.0, 1e-9, 1e-9), strict=True)]
    groups = [Group((entry,)) for entry in made]
    free = dict((entry.stack, rank) for entry, rank in best_ranks(groups, ranking(0.5)))
    held = dict((entry.stack, rank) for entry, rank in best_ranks(groups, ranking(0.5, floor=0.9)))
    assert min(free.values()) < math.ceil(0.45 * 3)
    for stack, rank in held.items():
        assert rank == 0 or rank >= math.ceil(0.9 * 0.5 * uniform_rank(1.0, *stack.shape))


def test_ranks_are_multiples():
    stack = Stack((layer("a", 96, 64),))
    ((_, rank),) = best_ranks([Group((candidate(stack),))], ranking(0.7, multiple_of=4))
    assert rank % 4 == 0
    assert uniform_ranks([stack], ranking(0.7, multiple_of=5))[stack] == 25


@pytest.mark.parametrize(
    ("shape", "multiple"),
    [((256, 256), 1), ((768, 768), 8), ((4096, 4096), 64), ((4096, 11008), 64), ((28672, 8192), 64)],
)
def test_automatic_multiples(shape, multiple):
    rule = ranking(0.8, multiple_of=0)
    stack = Stack((layer("a", *shape),))
    assert rule.multiple(stack) == multiple
    # Rounding costs a small part of what there is to share.
    assert multiple <= uniform_rank(1.0, *shape) / 16
