"""How large a module is, every tensor counted once however many names it has."""

from collections.abc import Iterator

from torch import Tensor, nn


def parameter_count(module: nn.Module) -> int:
    """Number of values in the module's parameters; tied ones count once."""
    return sum(parameter.numel() for parameter in _distinct(module))


def parameter_bytes(module: nn.Module) -> int:
    """Bytes of the module's parameters in the dtypes they have; tied ones count once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in _distinct(module))


def _distinct(module: nn.Module) -> Iterator[Tensor]:
    """The parameters, without those that look at memory which an earlier one looks at in the same way."""
    seen = set()
    for parameter in module.parameters():
        # Tensors on the meta device have no memory, and `parameters()` gives each of those objects once anyway.
        place = id(parameter) if parameter.is_meta else parameter.data_ptr()
        key = (place, parameter.device, parameter.dtype, parameter.shape, parameter.stride())
        if key not in seen:
            seen.add(key)
            yield parameter
