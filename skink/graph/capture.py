"""Capture of a model as a `Program`, through `torch.export`.

The model is never touched: what is exported is a copy whose weights are fake tensors (shapes without values), so that
capture needs no memory for weights, cannot change them, and works for weights on the meta device. The graph is then
tied back to the model's own tensors by qualified name.
"""

import copy
import inspect
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from functools import partial
from io import StringIO
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from skink.errors import CaptureError
from skink.graph.lift import lift
from skink.graph.program import Input, Program
from skink.graph.propagate import prime_sizes, propagate
from skink.graph.provenance import source_line

Dims = Mapping[str, Mapping[int, str]]


@dataclass(frozen=True)
class Subject:
    """What is exported.

    Args:
        module: its forward takes the inputs in order.
        inputs: names, dtypes and dims.
        prefix: what its weights' names begin with because of wrapping, to be taken off again.
        model: the caller's own module, whose tensors the graph will hold.
        cast: the dtype that trained weights have while exporting. Where it is not the model's own, every cast to it in
            the graph is read as "cast to whatever the weights are", so that the program runs in any dtype.
        outputs: names of what forward returns, in order; none for `output_0` and so on.
        positional: forward takes any number of inputs, without names.
    """

    module: nn.Module
    inputs: tuple[Input, ...]
    prefix: str
    model: nn.Module
    cast: torch.dtype | None = None
    outputs: tuple[str, ...] = ()
    positional: bool = False


def capture(
    model: nn.Module | ExportedProgram,
    example_inputs: Sequence[Tensor] | Mapping[str, Tensor] | None = None,
    *,
    dims: Dims | None = None,
    strict: bool = False,
) -> Program:
    """A model as a program, at stage `captured`.

    Args:
        model: a Hugging Face decoder or encoder (then nothing else is needed: inputs are those of `input_ids`,
            `attention_mask`, and a decoder's `position_ids` or an encoder's `token_type_ids` that it takes, all
            int64[B, T]; the outputs are `logits`, `start_logits` and `end_logits` of a question-answering head, or
            of a model without a head `last_hidden_state` and the `pooler_output` that it has), or any module whose
            forward takes tensors, a `fx.GraphModule` among them, or an `ExportedProgram` (then no example inputs are
            needed; for a graph from dynamo see `program_from_dynamo`).
        example_inputs: for other modules, tensors of the shapes and dtypes that forward takes; values are not used.
        dims: for other modules, names of symbolic dims by input and axis, as `{"x": {0: "B", 1: "T"}}`. Dims of one
            name have one size. Without it axis 0 of every input is `B`, and axis 1 is `T` where there are further axes
            or the input is of integers.
        strict: read the model's Python by dynamo rather than run it: slower, and some models need the one or the other.

    Raises:
        CaptureError: CAPTURE-001 inputs share memory, -002 export failed (with the source line), -003 unknown mask,
            -004 no decoder or encoder of text, -005 example inputs that do not fit, -006 random numbers are drawn.
    """
    from skink.graph.frontends import Replay, program_from_exported

    run = partial(_capture, strict=strict)
    check_dims(dims)
    if not isinstance(model, nn.Module | ExportedProgram):
        raise CaptureError(
            "CAPTURE-004",
            f"a model of the type {type(model).__name__} is no module.",
            fix="give a torch.nn.Module; put a function into the forward of one.",
        )
    if isinstance(model, ExportedProgram):
        return program_from_exported(model, dims=dims)
    if example_inputs is None:
        from skink.graph.huggingface import capture_huggingface

        return capture_huggingface(model, run)
    subject = _module_subject(model, example_inputs, dims)
    if isinstance(model, fx.GraphModule):
        subject = replace(subject, module=Replay(model), prefix="graph_module.", positional=True)
    return run(subject)


def _module_subject(
    model: nn.Module, example_inputs: Sequence[Tensor] | Mapping[str, Tensor], dims: Dims | None
) -> Subject:
    parameters = [
        parameter.name
        for parameter in inspect.signature(model.forward).parameters.values()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    if isinstance(example_inputs, Mapping):
        examples = dict(example_inputs)
    elif not isinstance(example_inputs, Sequence):
        raise CaptureError(
            "CAPTURE-005",
            f"example_inputs is a {type(example_inputs).__name__}, not a sequence or a mapping of tensors.",
            fix="write (x,) for one tensor x.",
        )
    else:
        if len(example_inputs) > len(parameters):
            raise CaptureError(
                "CAPTURE-005",
                f"{len(example_inputs)} example inputs for a forward of {len(parameters)} arguments.",
                where=f"{type(model).__name__}.forward({', '.join(parameters)})",
                fix="give one tensor for each argument.",
            )
        examples = dict(zip(parameters, example_inputs, strict=False))
    for name, example in examples.items():
        if not isinstance(example, Tensor):
            raise CaptureError(
                "CAPTURE-005",
                f"example input {name!r} is a {type(example).__name__}, not a tensor.",
                fix="wrap the model in a module whose forward takes tensors only.",
            )
    _refuse_shared_memory(examples)
    named = dims if dims is not None else {name: _default_dims(example) for name, example in examples.items()}
    unknown = [name for name in named if name not in examples]
    if unknown:
        raise CaptureError(
            "CAPTURE-005",
            f"dims are named for {', '.join(unknown)}, which is no input.",
            fix=f"inputs are {', '.join(examples)}.",
        )
    inputs = tuple(
        Input(name, example.dtype, _input_dims(name, example, named.get(name, {})))
        for name, example in examples.items()
    )
    _check_sizes(inputs, examples)
    return Subject(module=model, inputs=inputs, prefix="", model=model)


def check_dims(dims: Any) -> None:
    """Refuse what does not name dims by input and axis.

    Raises:
        CaptureError: CAPTURE-005.
    """
    fix = 'write dims={"x": {0: "B", 1: "T"}}: names by input and axis.'
    if dims is None:
        return
    if not isinstance(dims, Mapping):
        raise CaptureError("CAPTURE-005", f"dims is a {type(dims).__name__}, not a mapping of inputs.", fix=fix)
    for name, named in dims.items():
        if not isinstance(name, str):
            raise CaptureError("CAPTURE-005", f"dims has {name!r} where the name of an input belongs.", fix=fix)
        if not isinstance(named, Mapping):
            raise CaptureError("CAPTURE-005", f"dims of {name!r} are {named!r}, not names by axis.", fix=fix)
        for axis, dim in named.items():
            if not isinstance(axis, int) or isinstance(axis, bool):
                raise CaptureError("CAPTURE-005", f"{axis!r}, in dims of {name!r}, is no axis.", fix=fix)
            if not isinstance(dim, str):
                raise CaptureError(
                    "CAPTURE-005", f"{dim!r}, for axis {axis} of {name!r}, cannot name a dim: it is no text.", fix=fix
                )


def _default_dims(example: Tensor) -> dict[int, str]:
    if example.dim() == 0:
        return {}
    sequence = example.dim() > 2 or (example.dim() == 2 and not example.is_floating_point())
    return {0: "B", 1: "T"} if sequence else {0: "B"}


def _input_dims(name: str, example: Tensor, named: Mapping[int, str]) -> tuple[int | str, ...]:
    """The example's dims, with names in place of the sizes of those that are named."""
    dims: list[int | str] = list(example.shape)
    for axis, dim in named.items():
        if not -len(dims) <= axis < len(dims):
            raise CaptureError(
                "CAPTURE-005",
                f"a dim is named for axis {axis} of {name!r}, which has {len(dims)} axes.",
                fix=f"axes are 0 to {len(dims) - 1}.",
            )
        if not dim.isidentifier():
            raise CaptureError(
                "CAPTURE-005", f"{dim!r}, for axis {axis} of {name!r}, cannot name a dim.", fix="write one word."
            )
        dims[axis] = dim
    return tuple(dims)


def _check_sizes(inputs: Sequence[Input], examples: Mapping[str, Tensor]) -> None:
    first: dict[str, tuple[str, int]] = {}
    for entry in inputs:
        for dim, size in zip(entry.dims, examples[entry.name].shape, strict=True):
            if isinstance(dim, str) and first.setdefault(dim, (entry.name, size))[1] != size:
                name, other = first[dim]
                raise CaptureError(
                    "CAPTURE-005",
                    f"dim {dim} has size {other} in {name!r} and {size} in {entry.name!r}; dims of one name are equal.",
                    fix="give them two names, or one size, by dims=.",
                )


def _refuse_shared_memory(examples: Mapping[str, Tensor]) -> None:
    # torch.export merges inputs that are one tensor: sdpa(x, x, x) would become a graph of one input, without a word.
    owners: dict[int, str] = {}
    for name, example in examples.items():
        if example.is_meta or example.numel() == 0:
            continue
        address = example.untyped_storage().data_ptr()
        if address in owners:
            raise CaptureError(
                "CAPTURE-001",
                f"example inputs {owners[address]!r} and {name!r} share memory, and would be captured as one input.",
                fix=f"pass {name}.clone().",
            )
        owners[address] = name


def fake_copy(model: nn.Module, mode: FakeTensorMode, dtype: torch.dtype | None) -> nn.Module:
    """A copy of `model` on fake tensors; floating parameters become `dtype` where one is given."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        wanted = dtype if dtype is not None and parameter.is_floating_point() else parameter.dtype
        with mode:
            fake = torch.empty(parameter.shape, dtype=wanted, device="cpu")
        memo[id(parameter)] = nn.Parameter(fake, requires_grad=False)
    for buffer in model.buffers():
        with mode:
            memo[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")
    return copy.deepcopy(model, memo).eval()


def _capture(subject: Subject, *, strict: bool = False, longest: Mapping[str, int] | None = None) -> Program:
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    # A size of one would be taken for a constant, so every one is larger.
    sizes = prime_sizes((dim for entry in subject.inputs for dim in entry.dims), first=3, apart=4)
    limits = dict.fromkeys(sizes, 2**31 - 1) | dict(longest or {})
    dims = {name: torch.export.Dim(name, min=1, max=limit) for name, limit in limits.items()}
    with mode:
        examples = [
            torch.zeros([sizes[dim] if isinstance(dim, str) else dim for dim in entry.dims], dtype=entry.dtype)
            for entry in subject.inputs
        ]
    shapes = {
        entry.name: {axis: dims[dim] for axis, dim in enumerate(entry.dims) if isinstance(dim, str)} or None
        for entry in subject.inputs
    }
    try:
        with torch.no_grad(), warnings.catch_warnings(), _quiet():
            # torch 2.13 copies its own deprecated objects.
            warnings.filterwarnings("ignore", category=FutureWarning, module="copyreg")
            # Recurrent layers keep their weights in a list too.
            warnings.filterwarnings("ignore", r"The tensor attributes? .*_flat_weights", category=UserWarning)
            exported = torch.export.export(
                fake_copy(subject.module, mode, subject.cast),
                args=tuple(examples) if subject.positional else (),
                kwargs={} if subject.positional else dict(zip(shapes, examples, strict=True)),
                dynamic_shapes={"inputs": tuple(shapes.values())} if subject.positional else shapes,
                strict=strict,
                prefer_deferred_runtime_asserts_over_guards=True,
            )
            exported = without_writes(exported)
        program = lift(exported, subject)
        if longest:
            program.origin["longest"] = dict(longest)
        propagate(program)
    except CaptureError:
        raise
    except Exception as error:
        found = _longest(error)
        if found and longest is None:
            return _capture(subject, strict=strict, longest=found)
        raise _explain(error, subject) from error
    return program


@contextmanager
def _quiet() -> Iterator[None]:
    """On failure torch.export prints and logs the graph so far, which says less than the error does."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stderr(StringIO()):
            yield
    finally:
        logging.disable(before)


def _longest(error: Exception) -> dict[str, int]:
    """The largest sizes that a model has tables for (masks, positions), where they are all that export asks for."""
    _, _, fixes = str(error).partition("Suggested fixes:\n")
    lines = [line.strip() for line in fixes.partition("\n\n")[0].splitlines() if line.strip()]
    found = [re.fullmatch(r"(\w+) = Dim\('\w+', max=(\d+)\)", line) for line in lines]
    return {match[1]: int(match[2]) for match in found if match} if all(found) else {}


def without_writes(exported: ExportedProgram) -> ExportedProgram:
    """The same with functional operators in place of those that write to their arguments."""
    targets = (node.target for node in exported.graph.nodes)
    if not any(isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable for target in targets):
        return exported
    with warnings.catch_warnings():
        # torch 2.13 copies its own deprecated objects.
        warnings.filterwarnings("ignore", category=FutureWarning, module="copyreg")
        # An empty table: nothing is decomposed, and in-place ops become functional ones.
        functional: ExportedProgram = exported.run_decompositions({})
    return functional


def _explain(error: Exception, subject: Subject) -> CaptureError:
    message = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    fixed = isinstance(error, torch._dynamo.exc.UserError) and (
        "Constraints violated" in str(error) or "Specializations unexpectedly required" in str(error)
    )
    # The second is how torch says that a symbolic size met a constant.
    if fixed or re.search(r"\d+ not in VR\[", message):
        reasons = [line.strip() for line in str(error).splitlines() if line.startswith("  - ")]
        return CaptureError(
            "CAPTURE-005",
            "a dim that was named symbolic has only one size in this model, or dims that must agree have two names.",
            where=source_line(error),
            why="\n".join(reasons) or message,
            fix="leave that dim out of dims=, or give both dims one name.",
        )
    name = type(error).__name__
    if "DataDependent" in name or "data-dependent" in str(error).lower():
        fix = "the line decides by a tensor's values (if, .item(), .tolist()): write it with torch.where or a mask."
    elif isinstance(error, TypeError | AttributeError):
        fix = "check that forward runs on the inputs given; wrap the model if it needs other arguments."
    else:
        fix = "run the model in eager on the same inputs first; if it runs there, rewrite the line that is named."
    return CaptureError(
        "CAPTURE-002",
        f"torch.export could not capture {type(subject.model).__name__}: {name}.",
        where=source_line(error),
        why=message,
        fix=fix,
    )
