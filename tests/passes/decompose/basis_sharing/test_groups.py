import pytest
import torch

from skink.budget.target import CountPricing
from skink.passes.decompose.basis_sharing.basis_sharing import SHARED
from skink.passes.decompose.basis_sharing.groups import Plan, Prices, private_curve, shared_curve, sharing_groups
from skink.passes.decompose.selection import LinearLayer

PRICING = CountPricing()


def layer(name, shape=(8, 8)):
    return LinearLayer(weight=f"{name}.weight", names=(name,), shape=shape, readers=(None,), others=())


def names(groups):
    return [tuple(entry.name for entry in group) for group in groups]


def series(count, tensor="q_proj", stack="layers"):
    return [layer(f"{stack}.{index}.{tensor}") for index in range(count)]


@pytest.mark.parametrize(
    ("count", "size", "expected"),
    [(4, 2, [2, 2]), (5, 2, [2, 2, 1]), (5, 3, [3, 2]), (3, 1, [1, 1, 1]), (2, 8, [2]), (1, 2, [1])],
)
def test_groups_begin_at_the_first_layer_and_the_rest_is_smaller(count, size, expected):
    groups = sharing_groups(series(count), ("*q_proj",), size)
    assert [len(group) for group in groups] == expected
    assert [entry for group in groups for entry in group] == series(count)


def test_blocks_of_a_model_that_is_nothing_else():
    layers = [layer("0.q_proj"), layer("1.q_proj")]
    assert names(sharing_groups(layers, ("q_proj",), 2)) == [("0.q_proj", "1.q_proj")]


def test_what_does_not_share_is_single():
    layers = [*series(2), *series(2, "o_proj"), layer("head")]
    groups = sharing_groups(layers, ("*q_proj",), 2)
    assert names(groups) == [("layers.0.q_proj", "layers.1.q_proj"), *(((entry.name),) for entry in layers[2:])]


def test_other_shapes_and_other_stacks_do_not_mix():
    odd = layer("layers.2.q_proj", (4, 8))
    layers = [*series(2), odd, layer("layers.3.q_proj"), *series(2, stack="decoder.layers")]
    assert names(sharing_groups(layers, ("*",), 2)) == [
        ("layers.0.q_proj", "layers.1.q_proj"),
        ("layers.2.q_proj",),
        ("layers.3.q_proj",),
        ("decoder.layers.0.q_proj", "decoder.layers.1.q_proj"),
    ]


@pytest.mark.parametrize(
    ("below", "shares"),
    [
        ("self_attn.q_proj", True),
        ("mlp.up_proj", True),
        ("attn.c_attn", True),
        ("attention.self.query", True),
        ("intermediate.dense", True),
        ("self_attn.o_proj", False),
        ("mlp.down_proj", False),
        ("attn.c_proj", False),
        ("attention.output.dense", False),
    ],
)
def test_what_shares_by_default(below, shares):
    groups = sharing_groups([layer(f"model.layers.{index}.{below}") for index in range(2)], SHARED, 2)
    assert len(groups) == (1 if shares else 2)


def test_a_basis_counts_once_in_size_and_for_each_layer_in_work():
    group = tuple(series(2, "x"))
    losses = torch.linspace(1, 0, 9, dtype=torch.float64)
    size, ranks = shared_curve(group, losses, PRICING, per_use=False)
    assert size.costs.tolist() == [rank * (8 + 16) for rank in ranks]
    assert ranks == (1, 2, 3, 4, 5)
    work, ranks = shared_curve(group, losses, PRICING, per_use=True)
    assert work.costs.tolist() == [2 * rank * 16 for rank in ranks]
    assert ranks == (1, 2, 3)
    assert shared_curve(group, losses, PRICING, per_use=False, multiple=4)[1] == (4,)
    assert shared_curve(group, losses, PRICING, per_use=False, multiple=8) is None
    assert shared_curve(group, losses, PRICING, per_use=False, multiple=20) is None


def prices(shared_losses, private_losses):
    group = tuple(series(2, "x"))
    return Prices(
        group,
        shared_curve(group, torch.tensor(shared_losses, dtype=torch.float64), PRICING, per_use=False),
        tuple(private_curve(entry, torch.tensor(private_losses, dtype=torch.float64), PRICING) for entry in group),
    )


def test_one_curve_holds_both_ways():
    falling = [8.0, 7, 6, 5, 4, 3, 2, 1, 0]
    curve, plans = prices([2 * entry for entry in falling], falling).together()
    found = {
        plan: (loss, cost) for plan, loss, cost in zip(plans, curve.losses.tolist(), curve.costs.tolist(), strict=True)
    }
    assert found[Plan(shared=3)] == (10.0, 72.0)
    assert found[Plan(ranks=(1, 1))] == (14.0, 32.0)
    assert found[Plan(ranks=(0, 0))] == (0.0, 128.0)
    assert set(found) >= {Plan(shared=rank) for rank in range(1, 6)}
