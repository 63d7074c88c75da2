import json

import pytest
import torch

from skink.errors import ExportError, ModelError, OptionError
from skink.evaluation import measure_generation
from skink.export.onnx import OrtRunner
from tests.export.onnx.exported import exported
from tests.models import FAMILIES, VOCABULARY, tiny


@pytest.fixture(scope="module")
def runner():
    return OrtRunner(exported("mistral").folder, threads=1)


def _prompts(rows=3, length=9):
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    ids[0, :4] = 0
    return ids, mask


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_transformers_own(family):
    ids, mask = _prompts()
    expected = tiny(family).generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False)
    found = OrtRunner(exported(family).folder, threads=1).generate(ids, mask, max_new_tokens=20)
    assert found.dtype == torch.int64
    assert torch.equal(found, expected)


def test_any_chunking_gives_the_same_logits(runner):
    ids, mask = _prompts(length=17)
    whole, _ = runner.forward(ids, None, mask)
    pieces, state = [], None
    for chunk, chunk_mask in zip(ids.split([3, 1, 7, 1, 5], dim=1), mask.split([3, 1, 7, 1, 5], dim=1)):
        logits, state = runner.forward(chunk, state, chunk_mask)
        pieces.append(logits)
    real = mask.bool()
    torch.testing.assert_close(torch.cat(pieces, 1)[real], whole[real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [1, 3, 50])
def test_logits_of_the_last_tokens_only(runner, count):
    ids, mask = _prompts()
    every, _ = runner.forward(ids, None, mask)
    last, _ = runner.forward(ids, None, mask, logits_to_keep=count)
    assert last.shape == (3, min(count, 9), VOCABULARY)
    torch.testing.assert_close(last, every[:, -count:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [0, 1, 4, 50])
def test_prompts_are_read_in_chunks(chunk):
    ids, mask = _prompts(length=17)
    whole = OrtRunner(exported("mistral").folder, threads=1)
    chunked = OrtRunner(exported("mistral").folder, threads=1, chunk=chunk)
    torch.testing.assert_close(
        chunked.prefill(ids, mask)[0], whole.forward(ids, None, mask)[0][:, -1:], rtol=1e-5, atol=1e-5
    )
    wanted = whole.generate(ids, mask, max_new_tokens=6, eos=())
    assert torch.equal(chunked.generate(ids, mask, max_new_tokens=6, eos=()), wanted)


def test_a_prompt_has_tokens(runner):
    with pytest.raises(OptionError) as caught:
        runner.generate(torch.zeros(2, 0, dtype=torch.int64))
    assert caught.value.code == "OPTION-002"


def test_a_state_may_be_used_twice(runner):
    ids, mask = _prompts()
    _, state = runner.forward(ids, None, mask)
    first, _ = runner.step(ids[:, :1], state)
    runner.step(ids[:, 1:2], state)
    again, _ = runner.step(ids[:, :1], state)
    assert torch.equal(first, again)


def test_the_state_of_a_window_stays_small(runner):
    ids, _ = _prompts(length=17)
    _, state = runner.forward(ids)
    assert {tuple(tensor.shape()) for tensor in state.tensors} == {(3, 2, 4, 16)}


def test_rows_end_at_eos_and_are_filled(runner):
    ids, mask = _prompts()
    free = runner.generate(ids, mask, max_new_tokens=6, eos=())
    assert free.shape == (3, 15)
    stop = int(free[1, 11])
    ended = runner.generate(ids, mask, max_new_tokens=6, eos=stop, pad=96)
    for row in range(3):
        new = free[row, 9:].tolist()
        end = new.index(stop) + 1 if stop in new else len(new)
        wanted = (new[:end] + [96] * 6)[: ended.shape[1] - 9]
        assert ended[row, 9:].tolist() == wanted
    assert runner.generate(ids[1:2], max_new_tokens=6, eos=[stop]).shape[1] <= 12


def test_eos_comes_from_the_generation_config(tmp_path):
    source = exported("mistral").folder
    for path in source.iterdir():
        (tmp_path / path.name).symlink_to(path)
    ids, _ = _prompts()
    stop = int(OrtRunner(source).generate(ids[1:2], max_new_tokens=3, eos=())[0, 11])
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [stop]}))
    assert OrtRunner(tmp_path).generate(ids[1:2], max_new_tokens=30).shape[1] == 12


def test_every_step_is_streamed(runner):
    ids, mask = _prompts()
    steps = []
    result = runner.generate(ids, mask, max_new_tokens=5, eos=(), on_token=lambda token: steps.append(token.clone()))
    assert torch.equal(torch.stack(steps, 1), result[:, 9:])


def test_sampling(runner):
    ids, mask = _prompts()

    def draw(**options):
        return runner.generate(ids, mask, max_new_tokens=8, eos=(), do_sample=True, **options)

    greedy = runner.generate(ids, mask, max_new_tokens=8, eos=())
    assert torch.equal(draw(seed=3), draw(seed=3))
    assert not torch.equal(draw(seed=3), draw(seed=4))
    assert not torch.equal(draw(seed=3), greedy)
    assert torch.equal(draw(seed=3, top_k=1), greedy)
    assert torch.equal(draw(seed=3, top_p=1e-6), greedy)
    assert torch.equal(draw(seed=3, temperature=1e-4), greedy)


def test_sampling_keeps_to_the_likeliest(runner):
    ids, _ = _prompts(rows=1)
    likeliest = set(runner.forward(ids)[0][0, -1].topk(3).indices.tolist())
    drawn = {
        int(runner.generate(ids, max_new_tokens=1, eos=(), do_sample=True, temperature=50.0, top_k=3, seed=seed)[0, -1])
        for seed in range(40)
    }
    assert drawn == likeliest


@pytest.mark.parametrize(
    "options", [{"max_new_tokens": 0}, {"temperature": 0.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}]
)
def test_options_out_of_range(runner, options):
    with pytest.raises(OptionError) as caught:
        runner.generate(_prompts()[0], do_sample=True, **options)
    assert caught.value.code == "OPTION-002"
    assert next(iter(options)) in caught.value.what


def test_a_mask_must_cover_the_tokens(runner):
    ids, mask = _prompts()
    with pytest.raises(OptionError) as caught:
        runner.forward(ids, None, mask[:, 1:])
    assert caught.value.code == "OPTION-002"


def test_it_is_measured_like_any_target(runner):
    measured = measure_generation({"ort": runner}, batch=2, prompt=5, new_tokens=3, rounds=1)
    assert runner.vocabulary == VOCABULARY
    assert measured["ort"].decode.median > 0


def test_folders_that_hold_no_decoder(tmp_path):
    with pytest.raises(ModelError) as caught:
        OrtRunner(tmp_path)
    assert caught.value.code == "MODEL-001"
    (tmp_path / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(ExportError) as broken:
        OrtRunner(tmp_path)
    assert broken.value.code == "EXPORT-003"
