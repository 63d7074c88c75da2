"""What each family of operators does to the token axis of its arguments.

A rule gets a call and says on which axis of the result the tokens lie, or raises `MixingError` with the reason: then
token t of the result may depend on other tokens than t. A rule may rely on `Call.check`, which holds every answer
against the result's shape.
"""

from collections.abc import Callable, Mapping

import torch

from skink.graph.mixing_call import COUNTED, PAIRS, Call, MixingError, Value
from skink.graph.token_axis import TokenAxis, axis_in_shape, depends_on, reshaped, size_of

Answer = TokenAxis | None | list[TokenAxis | None]
Rule = Callable[[Call], Answer]


def pointwise(call: Call) -> Answer:
    """Arguments broadcast against each other, aligned at their last axis."""
    found = {(v.axis.index - v.tensor.dim(), *v.axis.layout) for v in call.values if v.axis is not None}
    if len(found) > 1:
        raise MixingError(PAIRS)
    return next((TokenAxis(call.rank + back, outer, inner) for back, outer, inner in found), None)


def like_first(call: Call) -> Answer:
    """The result is the first argument's in another form, or constants in its shape; others give a dtype only."""
    return call.values[0].axis


def along(call: Call) -> Answer:
    """Works along some axes of its argument, and keeps them, shortens them or takes them away."""
    if "other" in call.arguments:
        return pointwise(call)  # the lesser of two tensors
    value, axis = call.first()
    rank = value.tensor.dim()
    dims = call.dims(rank)
    if axis.index in dims:
        raise MixingError(f"it works along axis {axis.index} of its argument, which holds the tokens.")
    gone = sum(dim < axis.index for dim in dims)
    return [axis.at(axis.index - (gone if result.dim() < rank else 0)) for result in call.results]


def overwrite(call: Call) -> Answer:
    """`slice_scatter` and `select_scatter`: part of one tensor becomes another, along another axis than the tokens'."""
    dim = call.arguments["dim"] % call.rank
    axes = set()
    for value in call.values:
        if value.axis is not None:
            lost = value.tensor.dim() < call.rank and value.axis.index >= dim
            axes.add(value.axis.at(value.axis.index + lost))
    if len(axes) != 1:
        raise MixingError(PAIRS if axes else COUNTED)
    (axis,) = axes
    if axis.index == dim:
        raise MixingError("it puts tokens in the place of others.")
    return axis


def slicing(call: Call) -> Answer:
    """`slice` and `narrow`: along another axis, or all of the tokens."""
    value, axis = call.first()
    dim = call.arguments["dim"] % value.tensor.dim()
    if dim != axis.index:
        if any(depends_on(entry, call.tokens) for entry in call.arguments.values()):
            raise MixingError(COUNTED)
        return axis
    if call.arguments.get("step", 1) != 1 or size_of(call.results[0].shape[dim]) != size_of(value.tensor.shape[dim]):
        raise MixingError("it takes some of the tokens and leaves others.")
    return axis


def view(call: Call) -> Answer:
    """`reshape` and its like."""
    value = call.values[0]  # view_as names a second one for its shape
    if value.axis is None or "dtype" in call.arguments:
        raise MixingError("it takes elements apart.")
    axis = reshaped(value.axis, value.tensor.shape, call.results[0].shape, call.tokens)
    if axis is None:
        raise MixingError("it takes tokens apart, or puts them on one axis with others in an order of its own.")
    return axis


def permute(call: Call) -> Answer:
    """`permute`, `transpose` and `t`."""
    value, axis = call.first()
    order = list(range(value.tensor.dim()))
    if "dims" in call.arguments:
        order = [dim % len(order) for dim in call.arguments["dims"]]
    elif len(order) > 1:
        one, other = (call.arguments.get(key, default) % len(order) for key, default in (("dim0", 0), ("dim1", 1)))
        order[one], order[other] = order[other], order[one]
    return axis.at(order.index(axis.index))


def expand(call: Call) -> Answer:
    """`expand` repeats what is the same for every token once for each, and leaves tokens where they are."""
    value = call.values[0]
    if value.axis is None:
        return axis_in_shape(call.results[0].shape, call.tokens)
    return value.axis.at(value.axis.index + call.rank - value.tensor.dim())


def constant(call: Call) -> Answer:
    """A tensor of one number."""
    return axis_in_shape(call.results[0].shape, call.tokens)


def counting(call: Call) -> Answer:
    """`arange` and its like."""
    raise MixingError(COUNTED)


def join(call: Call) -> Answer:
    """`cat` and `stack`, along another axis."""
    dim = call.arguments["dim"] % call.rank
    axes = {value.axis for value in call.values if value.axis is not None}
    if call.name == "cat" and any(axis.index == dim for axis in axes):
        raise MixingError("it puts tokens behind others.")
    if len(axes) != 1:
        raise MixingError(PAIRS if axes else COUNTED)
    (axis,) = axes
    return axis.at(axis.index + 1) if call.name == "stack" and dim <= axis.index else axis


def repeat(call: Call) -> Answer:
    """`repeat`, of the whole along each axis: what is the same for every token may be repeated once for each."""
    value, times = call.values[0], call.arguments["repeats"]
    new = len(times) - value.tensor.dim()
    if value.axis is not None:
        axis = value.axis
        outer = axis.outer * size_of(times[axis.index + new])
        return TokenAxis(axis.index + new, outer, axis.inner)
    made = axis_in_shape(call.results[0].shape, call.tokens)
    if made is None or size_of(times[made.index]) != call.tokens:
        raise MixingError(COUNTED)
    return TokenAxis(made.index, inner=made.outer)


def repeat_each(call: Call) -> Answer:
    """`repeat_interleave` by one number."""
    value, axis = call.first()
    dim, repeats = call.arguments.get("dim"), call.arguments.get("repeats")
    if dim is None or isinstance(repeats, Value):
        raise MixingError("how often each token is repeated is not known.")
    if dim % value.tensor.dim() != axis.index:
        return axis
    return TokenAxis(axis.index, axis.outer, axis.inner * size_of(repeats))


def pad(call: Call) -> Answer:
    """`constant_pad_nd`, whose numbers of elements come in pairs from the last axis on."""
    value, axis = call.first()
    start = 2 * (value.tensor.dim() - 1 - axis.index)
    if any(size_of(amount) != 0 for amount in call.arguments["pad"][start : start + 2]):
        raise MixingError("it puts something before or after the tokens.")
    return axis


def normalization(call: Call) -> Answer:
    """`layer_norm` and its like, over the last axes."""
    value, axis = call.first()
    if axis.index >= value.tensor.dim() - len(call.arguments["normalized_shape"]):
        raise MixingError("it normalises over the tokens.")
    return axis


def contraction(call: Call) -> Answer:
    """Products of matrices, as an Einstein sum: a token axis must stay, and may meet no other one."""
    *labels, result = _LABELS[call.name](*(value.tensor.dim() for value in call.values))
    found = {
        (names[value.axis.index], *value.axis.layout)
        for value, names in zip(call.values, labels, strict=True)
        if value.axis is not None
    }
    if not found:
        raise MixingError(COUNTED)
    if len(found) > 1:
        raise MixingError(PAIRS)
    ((label, outer, inner),) = found
    if label not in result:
        raise MixingError("it sums over the tokens.")
    return TokenAxis(result.index(label), outer, inner)


def _matmul(one: int, other: int) -> list[str]:
    batch = "abcdefgh"[: max(one, other, 2) - 2]
    left = "k" if one == 1 else batch[len(batch) - one + 2 :] + "mk"
    right = "k" if other == 1 else batch[len(batch) - other + 2 :] + "kn"
    return [left, right, batch + "m" * (one > 1) + "n" * (other > 1)]


def _linear(data: int, weight: int, bias: int | None = None) -> list[str]:
    batch = "abcdefgh"[: data - 1]
    return [batch + "k", "nk"[2 - weight :], *(["n"] if bias else []), batch + ("n" if weight == 2 else "")]


_LABELS: Mapping[str, Callable[..., list[str]]] = {
    "matmul": _matmul,
    "mm": _matmul,
    "mv": _matmul,
    "dot": _matmul,
    "bmm": lambda one, other: ["bmk", "bkn", "bmn"],
    "linear": _linear,
    "addmm": lambda bias, one, other: ["mn"[2 - bias :], "mk", "kn", "mn"],
    "baddbmm": lambda bias, one, other: ["bmn"[3 - bias :], "bmk", "bkn", "bmn"],
}


def embedding(call: Call) -> Answer:
    """Rows of a table, by tokens."""
    value = call.only()
    if value is call.values[0]:
        raise MixingError("its table is made of tokens.")
    return value.axis


def index(call: Call) -> Answer:
    """`x[index, ...]`: tokens of the index pick from what is the same for all, or lie on an axis not indexed."""
    source: Value = call.arguments["self"]
    indices: list[Value | None] = call.arguments["indices"]
    places = [place for place, entry in enumerate(indices) if entry is not None]
    entries = [entry for entry in indices if entry is not None]
    rank = max(entry.tensor.dim() for entry in entries)
    if any(entry.tensor.dtype in (torch.bool, torch.uint8) for entry in entries):
        raise MixingError("it picks by a mask, so that what it gives depends on values.")
    together = places == list(range(places[0], places[-1] + 1))
    begin = places[0] if together else 0
    if source.axis is None:
        found = {(entry.axis.index - entry.tensor.dim(), *entry.axis.layout) for entry in entries if entry.axis}
        if len(found) != 1:
            raise MixingError(PAIRS if found else COUNTED)
        ((back, outer, inner),) = found
        return TokenAxis(begin + rank + back, outer, inner)
    if source.axis.index in places or any(entry.axis is not None for entry in entries):
        raise MixingError("it picks tokens by their positions.")
    before = sum(place < source.axis.index for place in places)
    return source.axis.at(source.axis.index - before + (rank if begin <= source.axis.index else 0))


def pick(call: Call) -> Answer:
    """`gather`, `scatter` and `index_select`: tokens stay where they are, or pick from what is the same for all."""
    values = call.values
    dim = call.arguments["dim"] % max(values[0].tensor.dim(), 1)
    source, picker = values[0].axis, values[1].axis
    if source is None:
        if call.name == "index_select" and picker is not None:
            return picker.at(dim)
        if call.name == "gather" and picker is not None and picker.index == dim:
            return picker
        raise MixingError("it picks by position.")
    if call.name == "index_select":
        stays = picker is None
    else:
        stays = picker == source and all(entry.axis == source or entry.tensor.dim() == 0 for entry in values[2:])
    if source.index == dim or not stays:
        raise MixingError("it picks tokens by their positions.")
    return source


def _table(*entries: tuple[Rule, str]) -> dict[str, Rule]:
    return {name: rule for rule, names in entries for name in names.split()}


# By the operator's name without its overload. Those that PyTorch itself calls pointwise need no entry.
RULES: Mapping[str, Rule] = _table(
    (pointwise, "fill where floor_divide isclose bitwise_left_shift bitwise_right_shift copy polar complex"),
    (like_first, "to type_as _to_copy contiguous clone alias detach lift_fresh_copy dropout"),
    (like_first, "zeros_like ones_like full_like view_as_real view_as_complex"),
    (overwrite, "slice_scatter select_scatter"),
    (along, "softmax _softmax log_softmax _log_softmax _safe_softmax cumsum cumprod cummax cummin logcumsumexp"),
    (along, "sort argsort topk kthvalue median mode sum nansum mean amax amin max min aminmax prod any all"),
    (along, "argmax argmin var std var_mean std_mean norm linalg_vector_norm logsumexp count_nonzero"),
    (along, "flip roll glu diff"),
    (along, "split split_with_sizes chunk tensor_split unbind select"),
    (slicing, "slice narrow"),
    (view, "view _unsafe_view reshape flatten unflatten squeeze unsqueeze view_as reshape_as"),
    (permute, "permute transpose t"),
    (expand, "expand expand_as broadcast_to"),
    (constant, "zeros ones full new_zeros new_ones new_full"),
    (counting, "arange linspace eye"),
    (join, "cat stack"),
    (repeat, "repeat"),
    (repeat_each, "repeat_interleave"),
    (pad, "constant_pad_nd"),
    (normalization, "layer_norm native_layer_norm rms_norm _fused_rms_norm"),
    (contraction, " ".join(_LABELS)),
    (embedding, "embedding"),
    (index, "index"),
    (pick, "gather scatter scatter_add index_select"),
)

# Arguments that say how large a result is: the number of tokens may stand here.
SHAPES = frozenset({"size", "sizes", "shape", "output_size"})
