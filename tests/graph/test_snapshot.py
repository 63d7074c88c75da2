"""Snapshots: a program as it was, whatever happens to it afterwards."""

import torch

from skink.graph.pipeline import Pipeline
from skink.graph.program import Stage
from skink.graph.snapshot import Snapshot
from skink.passes.canonicalize import Canonicalize
from tests.programs import batch, captured

TENSORS = tuple(batch(2, 5))


def test_a_snapshot_stays_as_the_program_was() -> None:
    program = captured("llama")
    text, results = str(program), program(*TENSORS)
    snapshot = Snapshot(program)
    Pipeline((Canonicalize(),)).run(program, verify=0)
    program.set_weight("lm_head.weight", torch.zeros_like(program.weight("lm_head.weight")))
    was = snapshot.program()
    assert (was.stage, was.edits, str(was)) == (Stage.CAPTURED, [], text)
    assert torch.equal(was(*TENSORS)[0], results[0])
    assert snapshot.edits == ()


def test_each_program_from_a_snapshot_is_its_own() -> None:
    snapshot = Snapshot(captured("llama"))
    one = snapshot.program()
    text = str(one)
    Pipeline((Canonicalize(),)).run(one, verify=0)
    assert str(snapshot.program()) == text


def test_weights_are_shared() -> None:
    program = captured("llama")
    snapshot = Snapshot(program)
    assert all(tensor is program.weight(name) for name, tensor in snapshot.weights.items())
    assert list(snapshot.weights) == [name for name, _ in program.weights()]
    was = snapshot.program()
    assert all(tensor.data_ptr() == program.weight(name).data_ptr() for name, tensor in was.weights())
    assert was.buffers == program.buffers
