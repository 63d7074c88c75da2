# ruff: noqa: E501 -- lines of the text are as long as they are
"""The canonical form as text: what people and passes see. `python -m tests.passes.canonicalize.test_golden_text` prints
it anew.
"""

import torch
from torch import Tensor, nn

from tests.programs import canonical, canonicalized


class Block(nn.Module):
    """A hand-written block: norm, rotary attention, residual."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(8))
        self.qkv = nn.Linear(8, 24, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        h = self.scale * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))
        q, k, v = (part.view(*part.shape[:2], 2, 4).transpose(1, 2) for part in self.qkv(h).chunk(3, -1))
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        q = q * cos + torch.cat((-q[..., 2:], q[..., :2]), -1) * sin
        k = k * cos + torch.cat((-k[..., 2:], k[..., :2]), -1) * sin
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + out.transpose(1, 2).contiguous().view(x.shape)


class Plain(nn.Module):
    """Attention, norm, rotary and mask as a textbook has them, on [B, T, H, D]."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))
        self.w = nn.Parameter(torch.randn(24, 8))
        self.sinks = nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attention_mask: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        h = centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-5) * self.scale + self.shift
        q, k, v = (part.view(*part.shape[:2], 2, 4) for part in (h @ self.w.T).split(8, -1))
        cos, sin = cos[:, :, None], sin[:, :, None]
        q, k = (part * cos + torch.stack((-part[..., 1::2], part[..., ::2]), -1).flatten(-2) * sin for part in (q, k))
        scores = q.permute(0, 2, 1, 3) @ k.permute(0, 2, 3, 1) / 2.0
        position = torch.arange(x.shape[1])
        slopes = torch.tensor([0.5, 0.25])[:, None, None]
        scores = scores + slopes * (position[None] - position[:, None])
        seen = (position[None] <= position[:, None]) & attention_mask.bool()[:, None, None]
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
        sinks = self.sinks.view(1, 2, 1, 1).expand(x.shape[0], -1, x.shape[1], -1)
        weights = torch.cat((scores, sinks), -1).softmax(-1, dtype=torch.float32)[..., :-1]
        return (weights @ v.transpose(1, 2)).transpose(1, 2).flatten(2)


def of_plain() -> str:
    tables = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    return str(canonicalized(Plain(), torch.randn(2, 3, 8), *tables, torch.ones(2, 3, dtype=torch.int64))[0])


def of_block() -> str:
    return str(canonicalized(Block(), torch.randn(2, 3, 8), torch.randn(2, 3, 4), torch.randn(2, 3, 4))[0])


def of_layer(family: str, name: str) -> str:
    """The lines of the text from the first that reads a weight of layer 0 to the last."""
    lines = str(canonical(family)).splitlines()
    reads = [index for index, line in enumerate(lines) if f"@{name}.0." in line]
    # The residual after the last linear layer belongs to it.
    return "\n".join(line.strip() for line in lines[reads[0] : reads[-1] + 2])


BLOCK = """\
program canonical(%x: f32[B,T,8], %cos: f32[B,T,4], %sin: f32[B,T,4])
  %sym_size_int : size B = aten.sym_size.int(%x, 0)  # canonicalize
  %sym_size_int_4 : size T = aten.sym_size.int(%x, 1)
  %rms_norm_default_1 : f32[B,T,8] = skink.rms_norm(%x, @scale, 1e-05, 0.0)  # raise-rms-norm
  %linear : f32[B,T,24] = aten.linear(%rms_norm_default_1, @qkv.weight)
  %chunk : (f32[B,T,8], f32[B,T,8], f32[B,T,8]) = aten.chunk(%linear, 3, -1)
  %getitem : f32[B,T,8] = operator.getitem(%chunk, 0)
  %getitem_1 : f32[B,T,8] = operator.getitem(%chunk, 1)
  %getitem_2 : f32[B,T,8] = operator.getitem(%chunk, 2)
  %view : f32[B,T,2,4] = aten.reshape(%getitem, [%sym_size_int, %sym_size_int_4, 2, 4])
  %transpose : f32[B,2,T,4] = aten.transpose.int(%view, 1, 2)
  %view_1 : f32[B,T,2,4] = aten.reshape(%getitem_1, [%sym_size_int, %sym_size_int_4, 2, 4])
  %transpose_1 : f32[B,2,T,4] = aten.transpose.int(%view_1, 1, 2)
  %view_2 : f32[B,T,2,4] = aten.reshape(%getitem_2, [%sym_size_int, %sym_size_int_4, 2, 4])
  %transpose_2 : f32[B,2,T,4] = aten.transpose.int(%view_2, 1, 2)
  %rotary_default : f32[B,2,T,4] = skink.rotary(%transpose, %cos, %sin)  # raise-rotary
  %rotary_default_1 : f32[B,2,T,4] = skink.rotary(%transpose_1, %cos, %sin)  # raise-rotary
  %attention_default : f32[B,2,T,4] = skink.attention(%rotary_default, %rotary_default_1, %transpose_2, causal=True, scale=0.5)  # raise-attention
  %transpose_3 : f32[B,T,2,4] = aten.transpose.int(%attention_default, 1, 2)
  %view_3 : f32[B,T,8] = aten.reshape(%transpose_3, [%sym_size_int, %sym_size_int_4, 8])
  %add_3 : f32[B,T,8] = aten.add.Tensor(%x, %view_3)
  return output_0=%add_3"""

PLAIN = """\
program canonical(%x: f32[B,T,8], %cos: f32[B,T,4], %sin: f32[B,T,4], %attention_mask: i64[B,T])
  %sym_size_int : size B = aten.sym_size.int(%x, 0)  # canonicalize
  %sym_size_int_13 : size T = aten.sym_size.int(%x, 1)
  %layer_norm_default_1 : f32[B,T,8] = aten.layer_norm(%x, [8], @scale, @shift, 1e-05)  # raise-layer-norm
  %linear_default : f32[B,T,24] = aten.linear(%layer_norm_default_1, @w)  # raise-linear-product
  %split : (f32[B,T,8], f32[B,T,8], f32[B,T,8]) = aten.split.Tensor(%linear_default, 8, -1)
  %getitem : f32[B,T,8] = operator.getitem(%split, 0)
  %getitem_1 : f32[B,T,8] = operator.getitem(%split, 1)
  %getitem_2 : f32[B,T,8] = operator.getitem(%split, 2)
  %view : f32[B,T,2,4] = aten.reshape(%getitem, [%sym_size_int, %sym_size_int_13, 2, 4])
  %view_1 : f32[B,T,2,4] = aten.reshape(%getitem_1, [%sym_size_int, %sym_size_int_13, 2, 4])
  %view_2 : f32[B,T,2,4] = aten.reshape(%getitem_2, [%sym_size_int, %sym_size_int_13, 2, 4])
  %transpose_int : f32[B,2,T,4] = aten.transpose.int(%view, 1, 2)  # canonicalize
  %rotary_default : f32[B,2,T,4] = skink.rotary(%transpose_int, %cos, %sin, True)  # raise-rotary
  %transpose_int_2 : f32[B,2,T,4] = aten.transpose.int(%view_1, 1, 2)  # canonicalize
  %rotary_default_1 : f32[B,2,T,4] = skink.rotary(%transpose_int_2, %cos, %sin, True)  # raise-rotary
  %transpose : f32[B,2,T,4] = aten.transpose.int(%view_2, 1, 2)
  %to_dtype : bool[B,T] = aten.to.dtype(%attention_mask, bool)  # canonicalize
  %attention_default : f32[B,2,T,4] = skink.attention(%rotary_default, %rotary_default_1, %transpose, %to_dtype, causal=True, scale=0.5, sinks=@sinks, alibi=@alibi_slopes)  # raise-attention
  %transpose_1 : f32[B,T,2,4] = aten.transpose.int(%attention_default, 1, 2)
  %_unsafe_view : f32[B,T,8] = aten.reshape(%transpose_1, [%sym_size_int, %sym_size_int_13, 8])
  return output_0=%_unsafe_view"""

LLAMA = """\
%rms_norm_default_1 : f32[B,T,64] = skink.rms_norm(%embedding, @model.layers.0.input_layernorm.weight, 1e-06, 0.0)  # raise-rms-norm
%linear : f32[B,T,64] = aten.linear(%rms_norm_default_1, @model.layers.0.self_attn.q_proj.weight)
%view : f32[B,T,4,16] = aten.reshape(%linear, [%sym_size_int, %sym_size_int_9, -1, 16])
%transpose : f32[B,4,T,16] = aten.transpose.int(%view, 1, 2)
%linear_1 : f32[B,T,32] = aten.linear(%rms_norm_default_1, @model.layers.0.self_attn.k_proj.weight)
%view_1 : f32[B,T,2,16] = aten.reshape(%linear_1, [%sym_size_int, %sym_size_int_9, -1, 16])
%transpose_1 : f32[B,2,T,16] = aten.transpose.int(%view_1, 1, 2)
%linear_2 : f32[B,T,32] = aten.linear(%rms_norm_default_1, @model.layers.0.self_attn.v_proj.weight)
%view_2 : f32[B,T,2,16] = aten.reshape(%linear_2, [%sym_size_int, %sym_size_int_9, -1, 16])
%transpose_2 : f32[B,2,T,16] = aten.transpose.int(%view_2, 1, 2)
%rotary_default : f32[B,4,T,16] = skink.rotary(%transpose, %cos, %sin)  # raise-rotary
%rotary_default_1 : f32[B,2,T,16] = skink.rotary(%transpose_1, %cos, %sin)  # raise-rotary
%attention : f32[B,4,T,16] = skink.attention(%rotary_default, %rotary_default_1, %transpose_2, %to, scale=0.25)
%transpose_3 : f32[B,T,4,16] = aten.transpose.int(%attention, 1, 2)
%reshape : f32[B,T,64] = aten.reshape(%transpose_3, [%sym_size_int, %sym_size_int_9, -1])
%linear_3 : f32[B,T,64] = aten.linear(%reshape, @model.layers.0.self_attn.o_proj.weight)
%add_3 : f32[B,T,64] = aten.add.Tensor(%embedding, %linear_3)
%rms_norm_default_3 : f32[B,T,64] = skink.rms_norm(%add_3, @model.layers.0.post_attention_layernorm.weight, 1e-06, 0.0)  # raise-rms-norm
%linear_4 : f32[B,T,128] = aten.linear(%rms_norm_default_3, @model.layers.0.mlp.gate_proj.weight)
%silu : f32[B,T,128] = aten.silu(%linear_4)
%linear_5 : f32[B,T,128] = aten.linear(%rms_norm_default_3, @model.layers.0.mlp.up_proj.weight)
%mul_17 : f32[B,T,128] = aten.mul.Tensor(%silu, %linear_5)
%linear_6 : f32[B,T,64] = aten.linear(%mul_17, @model.layers.0.mlp.down_proj.weight)
%add_5 : f32[B,T,64] = aten.add.Tensor(%add_3, %linear_6)"""

GPT2 = """\
%layer_norm : f32[B,T,64] = aten.layer_norm(%add, [64], @transformer.h.0.ln_1.weight, @transformer.h.0.ln_1.bias, 1e-05, False)
%linear_default : f32[B,T,192] = aten.linear(%layer_norm, @transformer.h.0.attn.c_attn.weight, @transformer.h.0.attn.c_attn.bias)  # raise-linear
%split : (f32[B,T,64], f32[B,T,64], f32[B,T,64]) = aten.split.Tensor(%linear_default, 64, 2)
%getitem : f32[B,T,64] = operator.getitem(%split, 0)
%getitem_1 : f32[B,T,64] = operator.getitem(%split, 1)
%getitem_2 : f32[B,T,64] = operator.getitem(%split, 2)
%view_4 : f32[B,T,4,16] = aten.reshape(%getitem_1, [%sym_size_int, %sym_size_int_15, -1, 16])
%transpose : f32[B,4,T,16] = aten.transpose.int(%view_4, 1, 2)
%view_5 : f32[B,T,4,16] = aten.reshape(%getitem_2, [%sym_size_int, %sym_size_int_15, -1, 16])
%transpose_1 : f32[B,4,T,16] = aten.transpose.int(%view_5, 1, 2)
%view_6 : f32[B,T,4,16] = aten.reshape(%getitem, [%sym_size_int, %sym_size_int_15, -1, 16])
%transpose_2 : f32[B,4,T,16] = aten.transpose.int(%view_6, 1, 2)
%attention : f32[B,4,T,16] = skink.attention(%transpose_2, %transpose, %transpose_1, %to_1, scale=0.25)
%transpose_3 : f32[B,T,4,16] = aten.transpose.int(%attention, 1, 2)
%reshape : f32[B,T,64] = aten.reshape(%transpose_3, [%sym_size_int, %sym_size_int_15, -1])
%linear_default_1 : f32[B,T,64] = aten.linear(%reshape, @transformer.h.0.attn.c_proj.weight, @transformer.h.0.attn.c_proj.bias)  # raise-linear
%add_1 : f32[B,T,64] = aten.add.Tensor(%linear_default_1, %add)
%layer_norm_1 : f32[B,T,64] = aten.layer_norm(%add_1, [64], @transformer.h.0.ln_2.weight, @transformer.h.0.ln_2.bias, 1e-05, False)
%linear_default_2 : f32[B,T,256] = aten.linear(%layer_norm_1, @transformer.h.0.mlp.c_fc.weight, @transformer.h.0.mlp.c_fc.bias)  # raise-linear
%mul_6 : f32[B,T,256] = aten.mul.Tensor(%linear_default_2, 0.5)
%pow_1 : f32[B,T,256] = aten.pow.Tensor_Scalar(%linear_default_2, 3.0)
%mul_7 : f32[B,T,256] = aten.mul.Tensor(%pow_1, 0.044715)
%add_2 : f32[B,T,256] = aten.add.Tensor(%linear_default_2, %mul_7)
%mul_8 : f32[B,T,256] = aten.mul.Tensor(%add_2, 0.7978845608028654)
%tanh : f32[B,T,256] = aten.tanh(%mul_8)
%add_3 : f32[B,T,256] = aten.add.Tensor(%tanh, 1.0)
%mul_9 : f32[B,T,256] = aten.mul.Tensor(%mul_6, %add_3)
%linear_default_3 : f32[B,T,64] = aten.linear(%mul_9, @transformer.h.0.mlp.c_proj.weight, @transformer.h.0.mlp.c_proj.bias)  # raise-linear
%add_4 : f32[B,T,64] = aten.add.Tensor(%add_1, %linear_default_3)"""


def test_a_textbook_by_hand() -> None:
    assert of_plain() == PLAIN


def test_a_block_by_hand() -> None:
    assert of_block() == BLOCK


def test_a_layer_of_llama() -> None:
    assert of_layer("llama", "model.layers") == LLAMA


def test_a_layer_of_gpt2() -> None:
    assert of_layer("gpt2", "transformer.h") == GPT2


if __name__ == "__main__":
    print(of_block(), of_plain(), of_layer("llama", "model.layers"), of_layer("gpt2", "transformer.h"), sep="\n\n")  # noqa: T201
