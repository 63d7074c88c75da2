"""Where tokens lie in a shape, and where a reshape takes them."""

from hypothesis import given
from hypothesis import strategies as st
from sympy import Integer, Symbol

from skink.graph.token_axis import TokenAxis, axis_in_shape, fits, quotient, reshaped
from tests.graph.symbols import symbolic

B, T, ONE = Symbol("B"), Symbol("T"), Integer(1)


def test_quotients_are_whole_or_none() -> None:
    assert quotient(64 * B * T, 16 * T) == 4 * B
    assert quotient(T, T) == 1
    assert quotient(T, Integer(2)) is None
    assert quotient(B, T) is None
    assert quotient(T + 1, T) is None


def test_flattening_and_back() -> None:
    plain = TokenAxis(1)
    sizes = symbolic("B", "T")
    b, t = sizes["B"], sizes["T"]
    tokens = t.node.expr
    flat = reshaped(plain, [b, t, 64], [b * t, 64], tokens)
    assert flat == TokenAxis(0, b.node.expr, ONE)
    assert reshaped(flat, [b * t, 64], [b, t, 8, 8], tokens) == TokenAxis(1)
    rows = reshaped(TokenAxis(1), [b, t, 2, 64], [b * t * 2, 64], tokens)
    assert rows == TokenAxis(0, b.node.expr, Integer(2))
    assert reshaped(rows, [b * t * 2, 64], [b * t, 128], tokens) == flat
    assert reshaped(plain, [b, t, 64], [b, t * 64], tokens) == TokenAxis(1, ONE, Integer(64))
    assert reshaped(plain, [b, t, 64], [b, 64, t], tokens) is None
    assert reshaped(plain, [b, t, 64], [t, b, 64], tokens) is None
    assert reshaped(TokenAxis(0), [t, b], [b, t], tokens) is None


@given(st.lists(st.sampled_from([1, 2, 3, "B", "T"]), min_size=1, max_size=4), st.data())
def test_a_reshape_keeps_every_token_at_its_place(dims: list[int | str], data: st.DataObject) -> None:
    """By counting: the token that the axis names at each element is the same before and after."""
    if dims.count("T") != 1:
        dims = [*(dim for dim in dims if dim != "T"), "T"]
    symbols, numbers = symbolic("B", "T"), {"B": 3, "T": 5}
    # Neighbours that are merged, and the order of the rest as it was.
    cuts = sorted(data.draw(st.sets(st.integers(1, max(len(dims) - 1, 1)))))
    groups = [dims[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(dims)], strict=True) if begin < end]
    before = [symbols.get(dim, dim) if isinstance(dim, str) else dim for dim in dims]
    after, sizes = [], []
    for group in groups:
        size, number = 1, 1
        for dim in group:
            size, number = size * symbols.get(dim, dim), number * numbers.get(dim, dim)  # type: ignore[call-overload, arg-type]
        after.append(size)
        sizes.append(number)
    tokens = symbols["T"].node.expr
    axis = reshaped(TokenAxis(dims.index("T")), before, after, tokens)
    assert axis is not None
    assert fits(axis, after, tokens)
    shape = [numbers.get(dim, dim) for dim in dims]  # type: ignore[call-overload]
    inner = int(axis.inner.subs({symbols["B"].node.expr: 3, tokens: 5}))
    for element in range(_count(shape)):
        token = element // _count(shape[dims.index("T") + 1 :]) % 5
        assert element // _count(sizes[axis.index + 1 :]) % sizes[axis.index] // inner % 5 == token
    assert reshaped(axis, after, before, tokens) == TokenAxis(dims.index("T"))


def _count(shape: list[int]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result


def test_the_axis_of_tokens_in_a_shape() -> None:
    sizes = symbolic("B", "T")
    b, t = sizes["B"], sizes["T"]
    tokens = t.node.expr
    assert axis_in_shape([b, t, 4], tokens) == TokenAxis(1)
    assert axis_in_shape([b * t, 4], tokens) == TokenAxis(0, b.node.expr)
    assert axis_in_shape([b, 4], tokens) is None
    assert axis_in_shape([t, t], tokens) is None
    assert axis_in_shape([t + 1], tokens) is None
    assert axis_in_shape([t * t], tokens) is None
    assert not fits(TokenAxis(0), [t, t], tokens)
    assert not fits(None, [b, t], tokens)
    assert fits(None, [b, 3], tokens)
    assert not fits(TokenAxis(2), [b, t], tokens)
