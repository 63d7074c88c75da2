import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from skink.errors import ModelError, OptionError
from skink.evaluation import HuggingFaceTarget, Speed, Spread, measure_generation


class Clock:
    """Seconds that pass only when a fake target says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Fake:
    """Takes given seconds per prefill and per step, multiplied by what `slowness` gives for each timed turn."""

    def __init__(self, name, clock, log, *, prefill, step, slowness=(), vocabulary=50) -> None:
        self.name, self.clock, self.log, self.vocabulary = name, clock, log, vocabulary
        self.seconds = {"prefill": prefill, "step": step}
        # Two prefills a turn: one untimed, one timed; the first turn warms up.
        self.factors = [1000.0, 1000.0] + [factor for timed in slowness for factor in (1000.0, timed)]
        self.prompts = []
        self.turn = -1

    def logits(self, kind, rows):
        self.clock.now += self.seconds[kind] * (self.factors[self.turn] if self.factors[2:] else 1.0)
        self.log.append((self.name, kind))
        return torch.arange(self.vocabulary).float().expand(rows, 1, -1)

    def prefill(self, ids):
        self.turn += 1
        self.prompts.append(ids)
        return self.logits("prefill", len(ids)), 0

    def step(self, token, state):
        assert token.tolist() == [[self.vocabulary - 1]] * len(token)
        return self.logits("step", len(token)), state + 1


def test_speeds_are_tokens_over_seconds():
    clock = Clock()
    models = {"a": Fake("a", clock, [], prefill=0.5, step=0.25)}
    speed = measure_generation(models, batch=2, prompt=10, new_tokens=5, rounds=3, clock=clock)["a"]
    assert speed.prefill == Spread(40.0, 40.0, 40.0)
    assert speed.decode == Spread(8.0, 8.0, 8.0)
    assert speed.first_token == Spread(0.5, 0.5, 0.5)
    assert speed.prefill_ratio == speed.decode_ratio == Spread(1.0, 1.0, 1.0)
    assert (speed.batch, speed.prompt, speed.new_tokens, speed.rounds, speed.baseline) == (2, 10, 5, 3, "a")


def test_models_take_turns_round_by_round():
    clock, log = Clock(), []
    models = {name: Fake(name, clock, log, prefill=1.0, step=1.0) for name in "abc"}
    measure_generation(models, new_tokens=3, rounds=2, clock=clock)
    turn = ["prefill", "step", "prefill", "step", "step"]
    assert log == [(name, kind) for _ in range(3) for name in "abc" for kind in turn]


def test_the_ratio_is_the_median_of_those_within_a_round():
    clock, log = Clock(), []
    # The machine is slower by 1, 10, 2 in the three rounds, and the second model twice as fast but for one hiccup.
    models = {
        "dense": Fake("dense", clock, log, prefill=1.0, step=1.0, slowness=(1.0, 10.0, 2.0)),
        "small": Fake("small", clock, log, prefill=0.5, step=0.25, slowness=(1.0, 10.0, 8.0)),
    }
    small = measure_generation(models, prompt=8, new_tokens=3, rounds=3, clock=clock)["small"]
    assert small.prefill_ratio == Spread(2.0, 0.5, 2.0)
    assert small.decode_ratio == Spread(4.0, 1.0, 4.0)
    # Seconds to the first token: 0.5, 5 and 4; the warm-up and the untimed runs, 1,000 times slower, do not show.
    assert small.first_token == Spread(4.0, 0.5, 5.0)
    assert small.baseline == "dense"


def test_all_models_get_the_same_prompt_within_every_vocabulary():
    clock = Clock()
    models = {
        "large": Fake("large", clock, [], prefill=1.0, step=1.0, vocabulary=1000),
        "small": Fake("small", clock, [], prefill=1.0, step=1.0, vocabulary=7),
    }
    measure_generation(models, batch=3, prompt=40, new_tokens=2, rounds=1, seed=5, clock=clock)
    first = models["large"].prompts[0]
    assert first.shape == (3, 40)
    assert first.max() < 7
    assert all(torch.equal(first, ids) for model in models.values() for ids in model.prompts)
    again = Fake("again", clock, [], prefill=1.0, step=1.0, vocabulary=7)
    measure_generation({"again": again}, batch=3, prompt=40, new_tokens=2, rounds=1, seed=6, clock=clock)
    assert not torch.equal(first, again.prompts[0])


def test_progress_counts_rounds_with_the_warm_up():
    clock, calls = Clock(), []
    models = {"a": Fake("a", clock, [], prefill=1.0, step=1.0)}
    measure_generation(models, rounds=2, clock=clock, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 3), (2, 3), (3, 3)]


def test_no_models_is_an_error():
    with pytest.raises(OptionError, match=r"^\[OPTION-002\] models=\{\} is out of range: one or more is expected"):
        measure_generation({})


@pytest.mark.parametrize(("option", "value"), [("batch", 0), ("prompt", 0), ("new_tokens", 1), ("rounds", 0)])
def test_options_out_of_range_are_errors(option, value):
    clock = Clock()
    models = {"a": Fake("a", clock, [], prefill=1.0, step=1.0)}
    with pytest.raises(OptionError, match=rf"^\[OPTION-002\] {option}={value} is out of range"):
        measure_generation(models, clock=clock, **{option: value})


def test_speed_is_printed_with_its_settings():
    speed = Speed(
        prefill=Spread(8000.4, 7000.0, 9000.0),
        decode=Spread(250.0, 240.0, 260.0),
        first_token=Spread(0.0157, 0.01, 0.02),
        prefill_ratio=Spread(1.254, 1.0, 2.0),
        decode_ratio=Spread(1.5, 1.0, 2.0),
        baseline="dense",
        batch=1,
        prompt=128,
        new_tokens=64,
        rounds=7,
        seed=0,
    )
    assert str(speed) == (
        "decode 250 (240-260) tokens/s, 1.50x dense; prefill 8,000 (7,000-9,000) tokens/s, 1.25x; first token 15.7 ms "
        "(batch 1, prompt 128, 64 new tokens, medians of 7 rounds)"
    )


def test_spread_is_of_all_rounds():
    assert Spread.of([3.0, 1.0, 10.0, 2.0]) == Spread(2.5, 1.0, 10.0)


def llama():
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=61,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
    )


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=61, n_positions=64, n_embd=32, n_layer=2, n_head=4))


@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_hugging_face_target_steps_as_the_model_generates(make):
    torch.manual_seed(0)
    model = make().eval()
    # Larger weights than a fresh model's, so that the likeliest tokens are clearly so and differ.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)
        ids = torch.randint(0, 61, (3, 9))
        expected = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=8,
            min_new_tokens=8,
            do_sample=False,
            pad_token_id=0,
        )
        target = HuggingFaceTarget(model)
        logits, state = target.prefill(ids)
        assert logits.shape == (3, 1, 61)
        tokens = [ids]
        for _ in range(8):
            tokens.append(logits[:, -1].argmax(-1, keepdim=True))
            logits, state = target.step(tokens[-1], state)
        full = model(input_ids=torch.cat(tokens, dim=1)).logits[:, -1]
    assert torch.equal(torch.cat(tokens, dim=1), expected)
    torch.testing.assert_close(logits[:, -1], full, atol=1e-4, rtol=1e-4)
    assert target.vocabulary == 61


def test_a_hugging_face_target_is_measured():
    speeds = measure_generation({"llama": HuggingFaceTarget(llama().eval())}, prompt=4, new_tokens=3, rounds=1)
    assert speeds["llama"].decode.low > 0


def test_a_model_that_takes_no_cache_is_an_error():
    with pytest.raises(
        ModelError, match=r"^\[MODEL-004\] Linear keeps no cache.*\n  its forward does not name past_key_values"
    ):
        HuggingFaceTarget(nn.Linear(2, 2), vocabulary=2)


def test_a_model_that_hands_back_no_cache_is_an_error():
    class Forgetful(nn.Module):
        def forward(self, input_ids, past_key_values=None, use_cache=False):
            return (torch.zeros(*input_ids.shape, 2),)

    with pytest.raises(
        ModelError, match=r"^\[MODEL-004\] Forgetful keeps no cache.*\n  forward\(\.\.\., use_cache=True\) returned no"
    ):
        HuggingFaceTarget(Forgetful(), vocabulary=2).prefill(torch.zeros(1, 3, dtype=torch.int64))
