import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skink.graph.windows import Windows
from skink.training.loop.order import Order, text_lengths


@settings(max_examples=40, deadline=None)
@given(windows=st.integers(1, 7), cuts=st.lists(st.integers(0, 30), min_size=1, max_size=5), seed=st.integers(0, 2**32))
def test_pieces_are_the_whole_however_it_is_cut(windows: int, cuts: list[int], seed: int) -> None:
    ends = sorted(cuts)
    pieces = [Order(windows, seed).rows(start, stop) for start, stop in zip([0, *ends], ends, strict=False)]
    assert torch.equal(torch.cat(pieces), Order(windows, seed).rows(0, ends[-1]))


def test_each_round_has_every_window_once_in_an_order_of_its_own() -> None:
    order = Order(9, seed=3)
    first, second = order.rows(0, 9), order.rows(9, 18)
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(9))
    assert not torch.equal(first, second)
    assert not torch.equal(first, Order(9, seed=4).rows(0, 9))


def test_places_for_tokens_of_full_windows() -> None:
    order = Order(5, seed=0)
    assert [order.places_for(tokens, None, 4) for tokens in (1, 4, 5, 20, 21)] == [1, 1, 2, 5, 6]
    assert order.tokens_in(6, None, 4) == 24


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=6), tokens=st.integers(1, 60), seed=st.integers(0, 9))
def test_places_for_tokens_counts_text_only(lengths: list[int], tokens: int, seed: int) -> None:
    order, counts = Order(len(lengths), seed), torch.tensor(lengths)
    places = order.places_for(tokens, counts, 6)
    read = counts[order.rows(0, places)]
    assert order.tokens_in(places, counts, 6) == int(read.sum()) >= tokens
    assert int(read[:-1].sum()) < tokens


def test_lengths_are_those_of_text() -> None:
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    assert text_lengths(Windows(tokens)) is None
    assert text_lengths(Windows(tokens, padding=torch.tensor([[1, 1, 0], [0, 0, 1]]))).tolist() == [2, 1]
