"""`Rewriter`: the only way to edit a program.

It gives new nodes their shapes, carries over where they came from, names the rule that made them, and keeps the log
and the count of edits.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, fx

from skink.errors import VerifyError
from skink.graph.program import Edit, Program
from skink.graph.propagate import infer, shape_context

# What a new node inherits from the node that it stands for.
_PROVENANCE = ("module", "source")


class Rewriter:
    """Edits one program on behalf of one pass.

    Args:
        program: what is edited.
        pass_name: on whose behalf.
        limit: most edits that the program's log may hold; later ones are refused and leave the graph as it is, which is
            how the first bad one among them is found.
        on_edit: called after each edit, when the graph is whole again.
    """

    def __init__(
        self,
        program: Program,
        pass_name: str,
        *,
        limit: int | None = None,
        on_edit: Callable[[Edit], None] | None = None,
    ) -> None:
        self.program = program
        self.pass_name = pass_name
        self.limit = limit
        self.on_edit = on_edit
        self.count = 0
        self._anchor: fx.Node | None = None
        self._made: list[fx.Node] | None = None

    @property
    def exhausted(self) -> bool:
        """Whether the limit is reached, so that every further edit is refused."""
        return self.limit is not None and len(self.program.edits) >= self.limit

    @contextmanager
    def before(self, node: fx.Node) -> Iterator[None]:
        """New nodes go before `node`, and inherit where it came from."""
        outer, self._anchor = self._anchor, node
        try:
            with self.program.graph.inserting_before(node):
                yield
        finally:
            self._anchor = outer

    @contextmanager
    def watching(self) -> Iterator[list[fx.Node]]:
        """Collects the calls that are made while it is open."""
        outer, self._made = self._made, []
        try:
            yield self._made
        finally:
            self._made = outer

    def call(self, target: Any, *args: Any, rule: str = "", **kwargs: Any) -> fx.Node:
        """A new call with its shape inferred."""
        node = self.program.graph.call_function(target, args, kwargs)
        node.meta = self._inherited()
        node.meta["rule"] = rule or self.pass_name
        node.meta["val"] = infer(shape_context(self.program), target, args, kwargs)
        if self._made is not None:
            self._made.append(node)
        return node

    def weight(self, name: str, tensor: Tensor | None = None, *, buffer: bool = False) -> fx.Node:
        """A node that reads a weight; with `tensor`, the weight is added to the program first."""
        if tensor is not None:
            self.program.set_weight(name, tensor, buffer=buffer)
        node = self.program.graph.get_attr(name)
        node.meta = {"val": shape_context(self.program).fake_weight(self.program.weight(name))}
        return node

    def replace(self, old: fx.Node, new: fx.Node | int, *, rule: str, detail: str = "") -> bool:
        """Let `new`, a node or the number that a size is, stand for `old` everywhere: one edit.

        Dead nodes go at the end of the pass.

        Returns:
            False where the limit refuses the edit.
        """
        return self.replace_all({old: new}, rule=rule, detail=detail)

    def replace_all(self, replacements: Mapping[fx.Node, fx.Node | int], *, rule: str, detail: str = "") -> bool:
        """Let several nodes stand for others, as one edit; else as `replace`."""
        if self.exhausted:
            return False
        made = set(replacements.values())
        for old, new in replacements.items():
            if isinstance(new, fx.Node):
                # What `new` itself is made of stays: it may wrap `old`.
                old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in made)
            else:
                for user in list(old.users):
                    user.replace_input_with(old, new)  # type: ignore[arg-type]
        self.record(next(iter(replacements)), rule=rule, detail=detail)
        return True

    def update(
        self,
        node: fx.Node,
        *,
        rule: str,
        target: Any = None,
        args: tuple[Any, ...] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        detail: str = "",
    ) -> bool:
        """Change a call in its place: one edit. Its shape is inferred anew.

        Returns:
            False where the limit refuses the edit.
        """
        if self.exhausted:
            return False
        node.target = target if target is not None else node.target
        node.args = args if args is not None else node.args
        node.kwargs = dict(kwargs) if kwargs is not None else node.kwargs
        node.meta["val"] = infer(shape_context(self.program), node.target, node.args, node.kwargs)
        self.record(node, rule=rule, detail=detail)
        return True

    def move_before(self, node: fx.Node, other: fx.Node) -> None:
        """Compute `node` before `other`; what it reads must come before both. Nothing changes, so it is no edit."""
        other.prepend(node)

    def record(self, node: fx.Node, *, rule: str, detail: str = "") -> None:
        """Log one edit at `node`."""
        self.count += 1
        edit = Edit(
            index=len(self.program.edits),
            pass_name=self.pass_name,
            rule=rule,
            node=node.name,
            qualified_name=node.meta.get("module", ""),
            detail=detail,
            source=node.meta.get("source", ""),
        )
        self.program.edits.append(edit)
        if self.on_edit is not None:
            self.on_edit(edit)

    def erase_dead(self, node: fx.Node) -> list[fx.Node]:
        """Remove `node` and what it alone used, where nothing uses it any more; returns what went."""
        erased: list[fx.Node] = []
        pending = [node]
        while pending:
            dead = pending.pop()
            if dead.op not in ("call_function", "get_attr") or dead.users or dead._erased:
                continue
            operands = dead.all_input_nodes
            self.program.graph.erase_node(dead)
            erased.append(dead)
            pending.extend(operands)
        return erased

    def finish(self) -> None:
        """Remove what nothing uses any more, and recompile.

        Raises:
            VerifyError: VERIFY-001 where the graph is not well formed.
        """
        check_well_formed(self.program, pass_name=self.pass_name)
        self.sweep()
        self.program.drop_unused_weights()
        self.program.graph_module.recompile()

    def sweep(self) -> None:
        """Remove the nodes that nothing uses any more."""
        graph = self.program.graph
        for node in reversed(graph.nodes):
            if not node.users and node.op not in ("placeholder", "output"):
                graph.erase_node(node)

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
