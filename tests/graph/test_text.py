"""The printer: what golden tests compare."""

import json
import subprocess
import sys
from pathlib import Path

import torch

from skink.graph.capture import capture
from skink.graph.rewriter import Rewriter
from skink.graph.serialization import program_to_json
from skink.graph.text import print_program
from skink.passes.lower import lower
from tests.modules import Two, small_program
from tests.programs import canonical

EXPECTED = """\
program captured(%tokens: i64[B,T], %scale: f32[B,T,1])
  %sym_size_int_2 : size B = aten.sym_size.int(%tokens, 0)
  %sym_size_int_3 : size T = aten.sym_size.int(%tokens, 1)
  %embedding : f32[B,T,8] = aten.embedding(@embed.weight, %tokens)
  %mul : f32[B,T,8] = aten.mul.Tensor(%embedding, %scale)
  %chunk : (f32[B,T,4], f32[B,T,4]) = aten.chunk(%mul, 2, -1)
  %getitem : f32[B,T,4] = operator.getitem(%chunk, 0)
  %getitem_1 : f32[B,T,4] = operator.getitem(%chunk, 1)
  %slice_1 : f32[B,T,2] = aten.slice.Tensor(%getitem, 2, 2, end)
  %mul_1 : size B*T = operator.mul(%sym_size_int_2, %sym_size_int_3)
  %reshape : f32[B*T,4] = aten.reshape(%getitem_1, [%mul_1, 4])
  %to : f16[B*T,4] = aten.to.dtype(%reshape, f16)
  return output_0=%slice_1, output_1=%to
  @embed.weight : f32[11,8]"""


def test_golden_text() -> None:
    assert print_program(small_program(), weights=True) == EXPECTED


def test_text_and_file_are_the_same_in_another_process() -> None:
    code = """
import json
from skink.graph.serialization import program_to_json
from skink.graph.serialization import program_to_json
from skink.graph.text import print_program
from tests.modules import small_program
program = small_program()
print(print_program(program, weights=True), json.dumps(program_to_json(program)), sep="\\n")
"""
    folder = Path(__file__).parents[2]
    text = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True).stdout
    assert text == f"{EXPECTED}\n{json.dumps(program_to_json(small_program()))}\n"


def test_rules_are_named_at_the_end_of_a_line() -> None:
    program = capture(Two(lambda self, x, y: x + y), (torch.zeros(2), torch.zeros(2)))
    (node,) = program.graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)
    rewriter = Rewriter(program, "test")
    with rewriter.before(node):
        new = rewriter.call(torch.ops.aten.sub.Tensor, *node.args, rule="add-to-sub")
    rewriter.replace(node, new, rule="add-to-sub")
    rewriter.finish()
    assert str(program).splitlines()[1].strip() == "%sub_tensor : f32[B] = aten.sub.Tensor(%x, %y)  # add-to-sub"


def test_copies_and_lowered_programs_name_their_dims_too() -> None:
    program = canonical("llama")
    assert str(program.clone()) == str(program)
    lowered, _ = lower(program)
    assert "f32[B,T,97]" in str(lowered)
