from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from skink.cli.generate import _Pieces
from tests.cli.conftest import ASSETS, Run


def _expected(folder: Path, prompt: str, tokens: int) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=0)[0]
    length = inputs["input_ids"].shape[1]
    return str(tokenizer.decode(ids, skip_special_tokens=True))[len(tokenizer.decode(ids[:length])) :]


def test_greedy_text_is_that_of_transformers(run: Run, tiny: Path) -> None:
    done = run("generate", tiny, "def main():", "--max-new-tokens", 12, "--json")
    assert done.code == 0, done.stderr
    assert done.json == {
        "model": str(tiny),
        "prompt": "def main():",
        "continuation": _expected(tiny, "def main():", 12),
    }


def test_the_text_is_streamed_after_its_prompt(run: Run, tiny: Path) -> None:
    done = run("generate", tiny, "def main():", "--max-new-tokens", 12)
    assert done.stdout == f"def main():{_expected(tiny, 'def main():', 12)}\n"
    assert done.stderr == ""


def test_an_onnx_folder_writes_what_pytorch_writes(run: Run, compressed: Path) -> None:
    arguments = ("x = [", "--max-new-tokens", 10, "--json")
    in_pytorch, in_onnx = (run("generate", folder, *arguments) for folder in (compressed, compressed / "onnx"))
    assert in_onnx.code == 0, in_onnx.stderr
    assert in_onnx.json["continuation"] == in_pytorch.json["continuation"]
    sampled = [run("generate", compressed / "onnx", *arguments, "--sample", "--seed", n).json for n in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_draws_follow_their_seed(run: Run, tiny: Path) -> None:
    arguments = ("generate", tiny, "def", "--max-new-tokens", 12, "--sample", "--json")
    first, again, other = (run(*arguments, "--seed", seed).json["continuation"] for seed in (1, 1, 2))
    assert first == again != other
    assert run(*arguments, "--top-k", 1).json["continuation"] == _expected(tiny, "def", 12)


@pytest.mark.parametrize(("option", "value"), [("--temperature", "0"), ("--top-p", "1.5")])
def test_a_number_out_of_range_is_refused(run: Run, tiny: Path, option: str, value: str) -> None:
    done = run("generate", tiny, "def", "--sample", option, value, "--json")
    assert done.code == 1
    assert done.json["error"]["code"] == "OPTION-002"


def test_a_model_without_tokenizer_is_refused(run: Run, tiny: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(tiny).save_pretrained(tmp_path / "bare")
    done = run("generate", tmp_path / "bare", "def", "--json")
    assert done.json["error"]["code"] == "MODEL-001"
    assert "no tokenizer" in done.json["error"]["what"]


def test_text_comes_in_whole_characters() -> None:
    tokenizer = AutoTokenizer.from_pretrained(ASSETS)
    text = "a = 'é→漢'\n"
    ids = tokenizer(text)["input_ids"]
    written: list[str] = []
    pieces = _Pieces(tokenizer, written.append)
    pieces.put(torch.tensor([ids[:2]]))
    for token in ids[2:]:
        pieces.put(torch.tensor([token]))
    pieces.end()
    assert "".join(written) == pieces.text == text[len(tokenizer.decode(ids[:2])) :]
    assert not any("\ufffd" in piece for piece in written)
    assert len(written) > 3
