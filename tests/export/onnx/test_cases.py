import json

import torch
from safetensors import safe_open
from torch import nn
from transformers import BertConfig, BertModel

from skink.export.onnx.cases import make_cases, save_cases
from skink.export.onnx.export import _canonical
from skink.graph.capture import capture
from skink.graph.state import derive_step
from tests.export.onnx.exported import program
from tests.models import build, tiny


def _cases(family):
    return make_cases(program(family), derive_step(program(family)), torch.float32)


def test_expected_logits_are_the_models_own():
    for case in _cases("gemma2")[0]:
        with torch.no_grad():
            wanted = tiny("gemma2")(**case.inputs, use_cache=False).logits
        torch.testing.assert_close(case.outputs["logits"][case.real], wanted[case.real], rtol=1e-5, atol=1e-5)


def test_greedy_tokens_follow_padded_prompts():
    case = _cases("llama")[0][0]
    assert case.greedy_from == 12
    assert case.chunks == (12, *[1] * 32)
    assert (~case.real).sum(1).tolist() == [0, 4, 7]
    best = case.outputs["logits"].argmax(-1)
    assert torch.equal(best[:, 11:-1], case.inputs["input_ids"][:, 12:])


def test_chunks_cover_the_sequence():
    for case in _cases("mistral")[0]:
        assert sum(case.chunks) == case.inputs["input_ids"].shape[1]
        assert len(set(case.chunks)) > 1


def test_a_window_too_long_to_cross_is_noted():
    wide = _canonical(build("mistral", sliding_window=2000, max_position_embeddings=8000))
    cases, notes = make_cases(wide, derive_step(wide), torch.float32)
    assert len(cases) == 2
    assert notes == ["the check did not reach past the window of 2000 tokens."]


def test_sequences_fit_a_short_table_of_positions():
    short = _canonical(build("gpt2", n_positions=32))
    cases, _ = make_cases(short, derive_step(short), torch.float32)
    assert all(case.inputs["input_ids"].shape[1] <= 32 for case in cases)
    assert cases[0].greedy_from is not None
    assert cases[0].greedy_from < cases[0].inputs["input_ids"].shape[1]


def test_other_modules_get_random_inputs():
    captured = capture(nn.Linear(4, 3), (torch.zeros(2, 4),))
    (case,), notes = make_cases(captured, captured, torch.float32)
    assert list(case.inputs) == ["input"]
    assert case.outputs["output_0"].shape == (3, 3)
    assert case.greedy_from is None
    assert notes == []


def test_cases_on_disk_hold_everything(tmp_path):
    cases, _ = _cases("llama")
    save_cases(cases, tmp_path / "cases")
    with safe_open(str(tmp_path / "cases"), framework="pt") as file:
        described = json.loads(file.metadata()["cases"])
        assert [entry["name"] for entry in described] == [case.name for case in cases]
        for index, case in enumerate(cases):
            assert torch.equal(file.get_tensor(f"{index}.output.logits"), case.outputs["logits"])
            assert torch.equal(file.get_tensor(f"{index}.real"), case.real)


def test_an_encoder_is_tried_on_a_padded_batch_of_different_tokens():
    sizes = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    program = _canonical(BertModel(BertConfig(**sizes, num_hidden_layers=1)).eval())
    (case,), notes = make_cases(program, program, torch.float32)
    assert notes == []
    assert case.real.tolist() == [[True] * 7, [True] * 4 + [False] * 3, [True] + [False] * 6]
    assert torch.equal(case.inputs["attention_mask"].bool(), case.real)
    assert len(case.inputs["input_ids"].unique()) > 5
    assert case.inputs["token_type_ids"].unique().tolist() == [0, 1]
    assert list(case.outputs) == ["last_hidden_state", "pooler_output"]
