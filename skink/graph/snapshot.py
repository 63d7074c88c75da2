"""`Snapshot`: a program as it was at one moment, cheap enough to be taken at every pass."""

from dataclasses import replace

from torch import fx, nn

from skink.graph.program import Program, store_weight


class Snapshot:
    """A copy of a program's graph, and the tensors that it had then. Nothing writes to tensors, so they are shared."""

    def __init__(self, program: Program) -> None:
        self.weights = dict(program.weights())
        self.edits = tuple(program.edits)
        self._fields = replace(program, edits=list(program.edits), aliases=dict(program.aliases))
        self._meta = dict(program.graph_module.meta)
        values: dict[fx.Node, fx.Node] = {}
        self._graph = fx.Graph()
        output = self._graph.output(self._graph.graph_copy(program.graph, values))
        output.meta = dict(program.graph.output_node().meta)
        for old, new in values.items():
            new.meta = dict(old.meta)

    def program(self) -> Program:
        """The program as it was, to edit at will."""
        root = nn.Module()
        for name, tensor in self.weights.items():
            store_weight(root, name, tensor, buffer=name in self._fields.buffers)
        whole = fx.GraphModule(root, self._graph)
        whole.meta.update(self._meta)
        return replace(self._fields, graph_module=whole).clone()
