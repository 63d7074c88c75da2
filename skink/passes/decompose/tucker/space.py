"""A design space over a model's weights: which blocks, which tensors in them (Moar et al. 2024, arXiv 2405.06626)."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from glob import escape

from skink.errors import OptionError
from skink.graph.program import Program
from skink.passes.decompose.selection import Choice, LinearLayer, choose_layers, linear_layers
from skink.passes.decompose.tucker.convolution import Convolution


@dataclass(frozen=True)
class Space:
    """What is named by blocks, tensors and patterns, all of which must fit; where one is empty, everything fits it.

    Args:
        layers: numbers of blocks; see `block_of`.
        tensors: names below a block, whole or their last part.
        targets: shell-style patterns on qualified names.
        ignore: patterns of what to leave alone.
    """

    layers: tuple[int, ...]
    tensors: tuple[str, ...]
    targets: tuple[str, ...]
    ignore: tuple[str, ...]

    @property
    def is_whole(self) -> bool:
        """Whether nothing is named, so that everything fits."""
        return not (self.layers or self.tensors or self.targets)

    def fits(self, name: str) -> bool:
        """Whether a layer of this name is meant."""
        block, below = block_of(name)
        return (
            (not self.layers or block in self.layers)
            and (not self.tensors or below in self.tensors or below.rpartition(".")[2] in self.tensors)
            and (not self.targets or any(fnmatchcase(name, pattern) for pattern in self.targets))
        )

    def reason_to_leave(self, name: str) -> str | None:
        """Why a layer of this name is not wanted, if it is not."""
        if not self.fits(name):
            return "not among the targets"
        return "ignored, as asked" if any(fnmatchcase(name, pattern) for pattern in self.ignore) else None

    def choose(self, program: Program, pass_name: str, kernels: Sequence[Convolution] = ()) -> tuple[Choice, list[str]]:
        """The linear layers that are meant, and notes on what fits no layer and none of `kernels`.

        Raises:
            GraphError: GRAPH-002 where a chosen weight is on the meta device.
            OptionError: OPTION-002 where something is named and none of both is left.
        """
        layers = linear_layers(program)
        names = [*(name for layer in layers for name in layer.names), *(kernel.name for kernel in kernels)]
        if not self.is_whole and not any(self.fits(name) for name in names):
            raise OptionError(
                "OPTION-002",
                f"{pass_name}: layers={list(self.layers)}, tensors={list(self.tensors)} and "
                f"targets={list(self.targets)} leave none of {len(names)} layers.",
                why=f"layers are {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}.",
                fix="count blocks from 0, and name tensors as they are called below a block, as q_proj.",
            )
        fitting = tuple(escape(layer.name) for layer in layers if any(self.fits(name) for name in layer.names))
        if fitting or self.is_whole:
            choice, _ = choose_layers(program, pass_name, () if self.is_whole else fitting, self._ignored(layers))
        else:
            choice = Choice(layers)
            for layer in choice:
                choice.leave(layer, "not among the targets")
        return choice, self._notes(names)

    def _ignored(self, layers: Sequence[LinearLayer]) -> tuple[str, ...]:
        return tuple(pattern for pattern in self.ignore if any(layer.matches((pattern,)) for layer in layers))

    def _notes(self, names: Sequence[str]) -> list[str]:
        """Notes on names and patterns that fit nothing."""
        blocks = {block_of(name)[0] for name in names}
        below = {part for name in names for part in (block_of(name)[1], name.rpartition(".")[2])}
        return [
            *(f"there is no block {block}." for block in self.layers if block not in blocks),
            *(f"no block has a tensor {tensor!r}." for tensor in self.tensors if tensor not in below),
            *(
                f"no layer is named like {pattern!r}."
                for pattern in (*self.targets, *self.ignore)
                if not any(fnmatchcase(name, pattern) for name in names)
            ),
        ]


def block_of(name: str) -> tuple[int | None, str]:
    """The number of the block that a layer lies in, and its name below it: (3, `self_attn.q_proj`).

    A block's number is the first part of a qualified name that is one; (None, name) where there is none.
    """
    parts = name.split(".")
    for place, part in enumerate(parts):
        if part.isdecimal():
            return int(part), ".".join(parts[place + 1 :])
    return None, name
