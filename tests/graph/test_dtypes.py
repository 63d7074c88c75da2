"""A program in another dtype: weights, buffers, casts, and what is shared."""

import torch

from skink.graph.capture import capture
from skink.graph.dtypes import with_dtype
from skink.graph.propagate import shape_context
from tests.modules import One, parameter
from tests.programs import batch, canonical


def test_trained_weights_change_and_buffers_stay() -> None:
    program = canonical("llama")
    half = program.with_dtype(torch.bfloat16)
    dtypes = {name: tensor.dtype for name, tensor in half.weights()}
    assert dtypes["model.norm.weight"] is torch.bfloat16
    assert dtypes["model.rotary_emb.inv_freq"] is torch.float32
    assert half.dtype is torch.bfloat16
    assert program.dtype is torch.float32
    assert half(*batch(2, 5))[0].dtype is torch.bfloat16
    assert "bf16" in str(half)
    assert "bf16" not in str(program)


def test_shapes_alone_have_no_values() -> None:
    program = canonical("llama")
    empty = program.with_dtype(torch.bfloat16, shapes_only=True)
    assert all(tensor.is_meta for _, tensor in empty.weights())
    assert [name for name, _ in empty.weights()] == [name for name, _ in program.weights()]
    assert (empty.buffers, empty.aliases, empty.stage) == (program.buffers, program.aliases, program.stage)
    assert not program.is_meta


def test_what_fits_already_is_shared() -> None:
    program = canonical("llama")
    context = shape_context(program)
    same = program.with_dtype(torch.float32)
    assert all(tensor.data_ptr() == program.weight(name).data_ptr() for name, tensor in same.weights())
    assert shape_context(same) is context
    assert str(same) == str(program)
    assert shape_context(program.with_dtype(torch.float16)) is not context


def test_a_dtype_may_be_kept_out_everywhere() -> None:
    def body(self, x: torch.Tensor) -> torch.Tensor:
        return (x.to(torch.float64) * self.wide).sum(1, dtype=torch.float64).to(x.dtype) * self.scale

    module = One(body, wide=torch.randn(3, dtype=torch.float64), scale=parameter(1, dtype=torch.float64))
    program = capture(module, (torch.randn(2, 3, dtype=torch.float64),))
    plain = with_dtype(program, torch.float32, without={torch.float64}, device="cpu")
    assert "f64" not in str(plain)
    assert [entry.dtype for entry in plain.inputs] == [torch.float32]
    x = torch.randn(4, 3)
    torch.testing.assert_close(plain(x)[0], program(x.double())[0].float())
    assert "f64" in str(program)
