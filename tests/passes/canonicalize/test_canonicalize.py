"""The canonical form: its numbers, and that it is reached in one pass."""

import collections

import pytest
import torch

from skink.graph.passes import Context
from skink.graph.pipeline import Pipeline
from skink.graph.program import Stage
from skink.graph.rewriter import Rewriter
from skink.passes.canonicalize import Canonicalize
from tests.programs import batch, canonical, captured, distance, eager_logits


def test_numbers_stay_and_idioms_are_raised(family: str) -> None:
    program, inputs = canonical(family), batch(3, 11, padding=4)
    assert program.stage is Stage.CANONICAL
    assert distance(program(*inputs)[0], eager_logits(family, inputs), inputs.attention_mask) < 1e-5
    found = collections.Counter(str(node.target) for node in program.graph.nodes)
    norms = {"gpt2": 0, "opt": 0, "gpt_neox": 0, "qwen3": 9, "gemma2": 9, "olmo2": 9}.get(family, 5)
    assert found["skink.rms_norm.default"] == norms
    assert found["skink.rotary.default"] == (0 if family in ("gpt2", "opt") else 4)
    assert found["skink.attention.default"] == 2
    leftovers = ("alias", "contiguous", "clone", "detach", "view", "dropout", "expand", "rsqrt", "addmm")
    assert not [name for name in found if name.split(".")[1:2] and name.split(".")[1] in leftovers]


def test_a_second_time_changes_nothing(family: str) -> None:
    program = canonical(family)
    text, edits = str(program), len(program.edits)
    result = Pipeline((Canonicalize(),)).run(program, verify=1)
    assert result.passes[0].result.edits == 0
    assert len(program.edits) == edits
    assert str(program) == text


def test_it_casts_the_same_whatever_dtype_the_weights_have() -> None:
    program = canonical("gemma2")
    inputs = batch(2, 7, padding=2)
    wide = program(*inputs)[0]
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        for name in dict(program.weights()):
            if name not in program.buffers:
                program.set_weight(name, canonical("gemma2").weight(name).to(dtype))
        found = program(*inputs)[0]
        allowed = 1e-4 if dtype is torch.float64 else 0.05
        assert found.dtype is dtype
        assert distance(found.float(), wide, inputs.attention_mask) < allowed * float(wide.abs().max())


def test_the_log_names_rules_and_modules() -> None:
    program = captured("llama")
    Canonicalize().run(program, Rewriter(program, "canonicalize"), Context())
    counts = collections.Counter(edit.rule for edit in program.edits)
    assert counts["raise-rms-norm"] == counts["raise-rms-norm-plain"] == 5
    assert counts["raise-rotary"] == 4
    edit = next(edit for edit in program.edits if edit.rule == "raise-rms-norm")
    assert edit.qualified_name == "model.layers.0.input_layernorm"
    assert [edit.index for edit in program.edits] == list(range(len(program.edits)))


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.8, 0.99])
def test_every_edit_stands_alone(family: str, share: float) -> None:
    """Stopped anywhere, the program runs and computes what it computed."""
    program, inputs = captured(family).clone(), batch(2, 9, padding=3)
    limit = int(share * len(canonical(family).edits))
    rewriter = Rewriter(program, "canonicalize", limit=limit)
    Canonicalize().run(program, rewriter, Context())
    rewriter.finish()
    assert len(program.edits) == limit
    assert [edit.rule for edit in program.edits] == [edit.rule for edit in canonical(family).edits[:limit]]
    assert distance(program(*inputs)[0], eager_logits(family, inputs), inputs.attention_mask) < 1e-5
