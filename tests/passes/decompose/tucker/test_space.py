import pytest

from skink.errors import OptionError
from skink.passes.decompose.tucker.space import Space, block_of
from tests.graph.programs import canonical


def space(**options):
    return Space(**({"layers": (), "tensors": (), "targets": (), "ignore": ()} | options))


def chosen(family, **options):
    choice, notes = space(**options).choose(canonical(family), "tucker")
    return [layer.name for layer in choice], notes


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.3.self_attn.q_proj", (3, "self_attn.q_proj")),
        ("transformer.h.11.attn.c_attn", (11, "attn.c_attn")),
        ("encoder.layer.0.attention.output.dense", (0, "attention.output.dense")),
        ("model.layers.2.experts.7.up", (2, "experts.7.up")),
        ("lm_head", (None, "lm_head")),
    ],
)
def test_the_block_of_a_name(name, expected):
    assert block_of(name) == expected


def test_layers_times_tensors():
    names, notes = chosen("llama", layers=(1,), tensors=("q_proj", "mlp.up_proj"))
    assert names == ["model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"]
    assert notes == []


def test_other_names_of_blocks():
    assert chosen("gpt2", layers=(0,))[0] == [
        f"transformer.h.0.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    # One leaf, two tensors: a longer name tells them apart.
    assert len(chosen("gpt2", tensors=("c_proj",))[0]) == 4
    assert chosen("gpt2", tensors=("mlp.c_proj",), layers=(1,))[0] == ["transformer.h.1.mlp.c_proj"]


def test_targets_and_ignore_narrow_it():
    names, notes = chosen("llama", layers=(0, 1), targets=("*.mlp.*",), ignore=("*.1.*", "*.nowhere"))
    assert names == [f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")]
    assert notes == ["no layer is named like '*.nowhere'."]


def test_everything_but_the_head():
    names, _ = chosen("llama")
    assert len(names) == 14
    assert "lm_head" not in names
    assert chosen("llama", tensors=("lm_head",))[0] == ["lm_head"]


def test_what_fits_nothing_is_said():
    _, notes = chosen("llama", layers=(0, 7), tensors=("q_proj", "ffn"))
    assert notes == ["there is no block 7.", "no block has a tensor 'ffn'."]


def test_nothing_left():
    with pytest.raises(OptionError, match="leave none of 15 layers") as caught:
        chosen("llama", layers=(9,))
    assert caught.value.code == "OPTION-002"
    assert "model.layers.0.self_attn.q_proj" in caught.value.why
