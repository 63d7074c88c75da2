import pytest
import torch
from torch import nn

from skink.errors import CODES, CalibrationError
from skink.graph import calibration
from skink.graph.calibration import input_covariances, stream_covariances, token_batches
from skink.graph.capture import capture
from skink.graph.passes import linear_weight
from skink.graph.pipeline import Pipeline
from skink.passes.canonicalize import Canonicalize
from tests.graph.programs import canonical
from tests.models import VOCABULARY, build, tiny


def token_windows(count=5, length=13):
    return torch.randint(0, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(2))


def weights(program):
    return list(dict.fromkeys(name for node in program.graph.nodes if (name := linear_weight(program, node))))


def hooked(model, windows):
    """Covariances by forward hooks on every layer of the model itself, from one forward over all windows."""
    found, handles = {}, []

    def watch(name):
        def hook(module, arguments, result):
            x = arguments[0].detach().double().flatten(0, -2)
            found[name] = found.get(name, 0) + x.T @ x

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            handles.append(module.register_forward_hook(watch(f"{name}.weight")))
    with torch.no_grad():
        model(
            input_ids=windows,
            attention_mask=torch.ones_like(windows),
            position_ids=torch.arange(windows.shape[1]).expand(windows.shape),
        )
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gpt_neox", "opt"])
def test_covariances_are_those_that_hooks_on_the_model_find(family):
    model, windows = tiny(family), token_windows()
    program = canonical(family)
    names = [name for name in weights(program) if name not in program.aliases.values()]
    expected = hooked(model, windows)
    found = input_covariances(program, windows, names, batch=2)
    assert set(found) == set(names)
    for name in names:
        assert found[name].tokens == windows.numel()
        assert found[name].total.dtype == torch.float64
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(found[name].total, expected[name], rtol=0, atol=2e-5 * scale)
    assert len(names) >= 8


def test_batches_do_not_matter():
    program, windows = canonical("llama"), token_windows()
    names = weights(program)
    one = input_covariances(program, windows, names, batch=5)
    other = input_covariances(program, windows, names, batch=1)
    for name in names:
        torch.testing.assert_close(one[name].total, other[name].total, rtol=1e-5, atol=1e-5)


def test_layers_that_read_one_input_share_one_matrix():
    program = canonical("llama")
    found = input_covariances(program, token_windows(), weights(program))
    layer = "model.layers.0."
    query, key, value = (found[f"{layer}self_attn.{name}_proj.weight"] for name in "qkv")
    assert query is key is value
    assert found[f"{layer}mlp.gate_proj.weight"] is found[f"{layer}mlp.up_proj.weight"]
    assert found[f"{layer}self_attn.o_proj.weight"] is not query


@pytest.mark.parametrize("width", [5, 64, 300])
def test_sums_are_exact_to_float64(width, monkeypatch):
    # Strips and chunks that do not divide the sizes.
    monkeypatch.setattr(calibration, "_STRIP", 24)
    monkeypatch.setattr(calibration, "_CHUNK", 7 * width)
    program = capture(nn.Linear(width, 3), (torch.randn(4, width),))
    x = torch.randn(50, width, generator=torch.Generator().manual_seed(0))
    # Beside a large feature, a small one would drown in float32.
    x[:, 0] *= 1e6
    x[:, 1] *= 1e-6
    found = input_covariances(program, x, ["weight"], batch=9)["weight"]
    # Relative to each pair's own scale: 1e-12 of the largest entry would be larger than the smallest.
    scale = x.double().norm(dim=0).reciprocal()
    error = (found.total - x.double().T @ x.double()) * scale[:, None] * scale
    assert float(error.abs().max()) < 1e-13
    assert torch.equal(found.total, found.total.T.contiguous())
    assert found.tokens == 50
    torch.testing.assert_close(found.absolute, x.double().abs().sum(0))


class Twice(nn.Module):
    """One layer on two inputs."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6, bias=False)
        self.other = nn.Linear(6, 2)

    def forward(self, x):
        return self.other(self.layer(torch.relu(self.layer(x))))


def test_a_weight_read_twice_gets_the_sum():
    model = Twice()
    program = capture(model, (torch.randn(4, 6),))
    x = torch.randn(20, 6)
    found = input_covariances(program, x, ["layer.weight", "other.weight"])
    second = torch.relu(model.layer(x)).detach().double()
    first = x.double()
    torch.testing.assert_close(found["layer.weight"].total, first.T @ first + second.T @ second, rtol=1e-6, atol=1e-6)
    assert found["layer.weight"].tokens == 40
    torch.testing.assert_close(found["layer.weight"].absolute, first.abs().sum(0) + second.abs().sum(0))
    third = model.layer(second.float()).detach().double()
    torch.testing.assert_close(found["other.weight"].total, third.T @ third, rtol=1e-6, atol=1e-6)


def test_a_tied_weight_goes_by_either_name():
    program = canonical("llama", tie_word_embeddings=True)
    found = input_covariances(program, token_windows(), ["lm_head.weight"])
    assert list(found) == [program.aliases["lm_head.weight"]]


def test_streamed_covariances_come_layer_by_layer_and_are_the_same():
    program, windows = canonical("llama", num_hidden_layers=4), token_windows()
    names = weights(program)
    whole = input_covariances(program, windows, names)
    steps, progress = [], []
    for found in stream_covariances(program, windows, names, progress=lambda *step: progress.append(step)):
        steps.append(list(found))
        for name, covariance in found.items():
            assert torch.equal(covariance.total, whole[name].total)
    assert [len(step) for step in steps] == [4, 3, 4, 3, 4, 3, 4, 3, 1]
    assert [name for step in steps for name in step] == names
    assert progress[-1][0] == progress[-1][1]


def test_the_last_layer_need_not_run_to_be_complete():
    program = canonical("llama")
    last = "model.layers.1.mlp.down_proj.weight"
    assert list(input_covariances(program, token_windows(), [last])) == [last]


def test_a_weight_that_no_linear_layer_reads():
    program = canonical("gpt2")
    with pytest.raises(KeyError, match="wpe"):
        input_covariances(program, token_windows(), ["transformer.wpe.weight"])


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), ()])
def test_windows_without_a_token(shape):
    program = canonical("llama")
    with pytest.raises(CalibrationError, match="holds no token") as caught:
        token_batches(program, torch.zeros(shape, dtype=torch.int64))
    assert caught.value.code == "CALIBRATION-001"


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_name_the_layer(broken):
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[3] = broken
    program = capture(model)
    Pipeline((Canonicalize(),)).run(program, verify=0)
    with pytest.raises(CalibrationError, match="not finite") as caught:
        input_covariances(program, token_windows(), weights(program))
    assert caught.value.code == "CALIBRATION-003"
    assert "model.layers.1.mlp.gate_proj" in caught.value.where


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x, y):
        return self.layer(x + y)


@pytest.mark.parametrize(
    ("make", "windows", "why"),
    [
        (lambda: canonical("llama"), torch.full((2, 8), VOCABULARY), "the model knows 0 to 96"),
        (lambda: canonical("llama"), torch.full((2, 8), -1), "tokens run from -1 to -1"),
        (lambda: canonical("llama"), torch.zeros(8, dtype=torch.int64), "input_ids is int64"),
        (lambda: canonical("llama"), torch.zeros(2, 8), "input_ids is int64"),
        (lambda: capture(nn.Linear(6, 6), (torch.randn(4, 6),)), torch.zeros(2, 6, dtype=torch.int64), "float32"),
        (lambda: capture(Pair(), (torch.randn(4, 6), torch.randn(4, 6))), torch.zeros(2, 6), "further inputs"),
    ],
)
def test_windows_that_do_not_fit_the_inputs(make, windows, why):
    with pytest.raises(CalibrationError, match="do not fit") as caught:
        token_batches(make(), windows)
    assert caught.value.code == "CALIBRATION-004"
    assert why in caught.value.why


def test_batches_attend_to_every_token_from_position_zero():
    program = canonical("llama")
    batches = token_batches(program, token_windows(5, 13), batch=2)
    assert [list(batch["input_ids"].shape) for batch in batches] == [[2, 13], [2, 13], [1, 13]]
    for batch in batches:
        assert list(batch) == [entry.name for entry in program.inputs]
        assert bool(batch["attention_mask"].all())
        assert torch.equal(batch["position_ids"][0], torch.arange(13))
    assert len(token_batches(program, token_windows(9, 1024 // 2))) == 2


class Encoder(nn.Module):
    """A layer on every token, and one on the first of each window."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, 6)
        self.each, self.pooled = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, input_ids, attention_mask, token_type_ids):
        x = self.each(self.table(input_ids) + token_type_ids[..., None] * attention_mask[..., None])
        return x, self.pooled(x[:, 0])


def encoder_program(model):
    tokens = torch.ones(2, 4, dtype=torch.int64)
    names = ("input_ids", "attention_mask", "token_type_ids")
    return capture(model, {name: tokens.clone() for name in names})


def test_padding_does_not_count_and_pooled_values_have_none():
    model = Encoder()
    program, windows = encoder_program(model), token_windows(5, 7)
    padding = torch.ones_like(windows)
    padding[0, 3:] = 0
    padding[4, 1:] = 0
    found = input_covariances(program, windows, weights(program), padding=padding, batch=2)
    embedded = model.table(windows).detach()
    x = embedded[padding != 0].double()
    first = model.each(embedded)[:, 0].detach().double()
    assert [entry.tokens for entry in found.values()] == [25, 5]
    torch.testing.assert_close(found["each.weight"].total, x.T @ x)
    torch.testing.assert_close(found["pooled.weight"].total, first.T @ first)


def test_positions_count_text_only():
    padding = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]])
    (batch,) = token_batches(canonical("llama"), token_windows(3, 4), padding=padding)
    assert torch.equal(batch["attention_mask"], padding)
    assert batch["position_ids"].tolist() == [[0, 0, 0, 1], [0, 1, 2, 2], [0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("padding", "code", "why"),
    [
        (torch.zeros(5, 13, dtype=torch.int64), "CALIBRATION-001", ""),
        (torch.ones(5, 12, dtype=torch.int64), "CALIBRATION-004", "one number for each token"),
    ],
)
def test_padding_that_does_not_fit(padding, code, why):
    with pytest.raises(CalibrationError) as caught:
        token_batches(canonical("llama"), token_windows(), padding=padding)
    assert caught.value.code == code
    assert why in caught.value.why


def test_padding_of_a_program_that_is_not_told_of_it():
    program = capture(nn.Linear(6, 6), (torch.randn(4, 6),))
    with pytest.raises(CalibrationError, match="do not fit") as caught:
        token_batches(program, torch.randn(4, 6), padding=torch.ones(4, 6))
    assert "no input 'attention_mask'" in caught.value.why


def test_the_codes_are_registered():
    assert {f"CALIBRATION-00{number}" for number in (1, 3, 4)} <= set(CODES)
