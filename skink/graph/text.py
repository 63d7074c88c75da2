"""The printed form of a program: stable, readable, and what golden tests compare.

    program canonical(%input_ids: i64[B,T], %attention_mask: i64[B,T], %position_ids: i64[B,T])
      %embedding : f32[B,T,64] = aten.embedding(@model.embed_tokens.weight, %input_ids)
      ...
      return logits=%linear_14

`%name` is a node, `@name` a weight. A comment at the end of a line names the rule that made the node.
"""

from typing import Any

import torch
from torch import fx

from skink.graph.operators import SIZE_FUNCTIONS
from skink.graph.program import Program
from skink.graph.propagate import ShapeContext, dim_text

_DTYPES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
}


def print_program(program: Program, *, weights: bool = False) -> str:
    """The program's text; `weights` adds a line for each weight, with shape and dtype."""
    context: ShapeContext | None = program.graph_module.meta.get("shapes")
    body: list[str] = []
    inputs: list[str] = []
    for node in program.graph.nodes:
        if node.op == "placeholder":
            inputs.append(f"%{node.name}: {type_text(node.meta.get('val'), context)}")
        elif node.op == "call_function":
            rule = f"  # {node.meta['rule']}" if "rule" in node.meta else ""
            body.append(f"%{node.name} : {type_text(node.meta.get('val'), context)} = {call_text(node)}{rule}")
        elif node.op == "output":
            names = (*program.outputs, *(entry.output_name for entry in program.state))
            results = node.args[0] if isinstance(node.args[0], tuple | list) else (node.args[0],)
            body.append("return " + ", ".join(f"{n}={_argument(r)}" for n, r in zip(names, results, strict=True)))
    header = f"program {program.stage}({', '.join(inputs)})"
    lines = [header, *("  " + line for line in body)]
    if weights:
        lines += [f"  @{name} : {type_text(tensor, context)}" for name, tensor in program.weights()]
    return "\n".join(lines)


def call_text(node: fx.Node) -> str:
    """`aten.linear(%x, @w)`, the call alone."""
    arguments = [_argument(argument) for argument in node.args]
    arguments += [f"{key}={_argument(value)}" for key, value in node.kwargs.items()]
    return f"{target_name(node.target)}({', '.join(arguments)})"


def target_name(target: Any) -> str:
    """`aten.add.Tensor`, `skink.attention`, `operator.getitem`: the default overload goes unsaid."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removesuffix(".default")
    known = next((name for name, function in SIZE_FUNCTIONS.items() if function is target), None)
    return known or str(getattr(target, "__name__", target))


def type_text(value: Any, context: ShapeContext | None) -> str:
    """`f32[B,T,64]`, a value's dtype and dims."""
    if isinstance(value, torch.Tensor):
        return (
            f"{_DTYPES.get(value.dtype, str(value.dtype))}[{','.join(dim_text(context, size) for size in value.shape)}]"
        )
    if isinstance(value, tuple | list):
        return "(" + ", ".join(type_text(entry, context) for entry in value) + ")"
    if isinstance(value, torch.SymInt | int):
        return f"size {dim_text(context, value)}"
    return "?"


def _argument(argument: Any) -> str:
    if isinstance(argument, fx.Node):
        return f"@{argument.target}" if argument.op == "get_attr" else f"%{argument.name}"
    if isinstance(argument, tuple | list):
        return "[" + ", ".join(_argument(entry) for entry in argument) + "]"
    if isinstance(argument, torch.dtype):
        return _DTYPES.get(argument, str(argument))
    if isinstance(argument, int) and argument == torch.iinfo(torch.int64).max:
        return "end"
    return repr(argument)
