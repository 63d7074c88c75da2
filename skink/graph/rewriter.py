"""`Rewriter`: the only way to edit a program.

It gives new nodes their shapes, carries over where they came from, names the rule that made them, and keeps the log
and the count of edits.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, fx

from skink.errors import VerifyError
from skink.graph.program import Edit, Program
from skink.graph.propagate import infer, shape_context

# What a new node inherits from the node that it stands for.
_PROVENANCE = ("module", "source")


class Rewriter:
    """Edits one program on behalf of one pass."""

    def __init__(self, program: Program, pass_name: str) -> None:
        self.program = program
        self.pass_name = pass_name
        self.count = 0
        self._anchor: fx.Node | None = None

    @contextmanager
    def before(self, node: fx.Node) -> Iterator[None]:
        """New nodes go before `node`, and inherit where it came from."""
        outer, self._anchor = self._anchor, node
        try:
            with self.program.graph.inserting_before(node):
                yield
        finally:
            self._anchor = outer

    def call(self, target: Any, *args: Any, rule: str = "", **kwargs: Any) -> fx.Node:
        """A new call with its shape inferred."""
        node = self.program.graph.call_function(target, args, kwargs)
        node.meta = self._inherited()
        node.meta["rule"] = rule or self.pass_name
        node.meta["val"] = infer(shape_context(self.program), target, args, kwargs)
        return node

    def weight(self, name: str, tensor: Tensor | None = None, *, buffer: bool = False) -> fx.Node:
        """A node that reads a weight; with `tensor`, the weight is added to the program first."""
        if tensor is not None:
            self.program.set_weight(name, tensor, buffer=buffer)
        node = self.program.graph.get_attr(name)
        node.meta = {"val": shape_context(self.program).fake_weight(self.program.weight(name))}
        return node

    def replace(self, old: fx.Node, new: fx.Node, *, rule: str, detail: str = "") -> None:
        """Let `new` stand for `old` everywhere, and count that as one edit. Dead nodes go at the end of the pass."""
        # What `new` itself is made of stays: it may wrap `old`.
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        self.record(old, rule=rule, detail=detail)

    def record(self, node: fx.Node, *, rule: str, detail: str = "") -> None:
        """Log one edit at `node`."""
        self.count += 1
        self.program.edits.append(
            Edit(
                index=len(self.program.edits),
                pass_name=self.pass_name,
                rule=rule,
                node=node.name,
                qualified_name=node.meta.get("module", ""),
                detail=detail,
            )
        )

    def finish(self) -> None:
        """Remove what nothing uses any more, and recompile.

        Raises:
            VerifyError: VERIFY-001 where the graph is not well formed.
        """
        graph = self.program.graph
        check_well_formed(self.program, pass_name=self.pass_name)
        graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
        self.program.drop_unused_weights()
        self.program.graph_module.recompile()

    def _inherited(self) -> dict[str, Any]:
        if self._anchor is None:
            return {}
        return {key: self._anchor.meta[key] for key in _PROVENANCE if key in self._anchor.meta}


def check_well_formed(program: Program, *, pass_name: str) -> None:
    """Raise VERIFY-001 unless every node comes after what it uses, and every weight that is read exists."""
    try:
        program.graph.lint()
    except RuntimeError as error:
        raise broken(pass_name, "the graph is not well formed.", str(error)) from error


def broken(pass_name: str, what: str, why: str = "", node: fx.Node | None = None) -> VerifyError:
    """VERIFY-001 against a pass."""
    return VerifyError(
        "VERIFY-001",
        f"after pass {pass_name}: {what}",
        where=describe(node) if node is not None else "",
        why=why,
        fix="this is a defect of the pass: report it, with SKINK_DUMP set to a folder and what it then holds.",
    )


def describe(node: fx.Node) -> str:
    """Where a node is, for messages: `%linear_3, model.layers.0.mlp.up_proj (modeling_llama.py:41)`."""
    parts = [f"%{node.name}"]
    if node.meta.get("module"):
        parts.append(str(node.meta["module"]))
    source = f" ({node.meta['source']})" if node.meta.get("source") else ""
    made = f", made by {node.meta['rule']}" if node.meta.get("rule") else ""
    return ", ".join(parts) + source + made
