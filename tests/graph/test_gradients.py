import dataclasses

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from skink.errors import CalibrationError, OptionError
from skink.graph.calibration import input_covariances, token_batches
from skink.graph.capture import capture
from skink.graph.gradients import stream_moments
from skink.graph.objective import objective_of
from skink.graph.passes import linear_weight
from skink.graph.pipeline import Pipeline
from skink.graph.rewriter import Rewriter
from skink.passes.canonicalize import Canonicalize
from tests.graph.programs import canonical
from tests.models import VOCABULARY, build, tiny

SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def token_windows(count=3, length=9, seed=2):
    return torch.randint(0, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))


def weights(program):
    return list(dict.fromkeys(name for node in program.graph.nodes if (name := linear_weight(program, node))))


def moments(program, windows, names=None, **options):
    names = weights(program) if names is None else names
    return {name: found for step in stream_moments(program, windows, names, **options) for name, found in step.items()}


def close(found, expected, relative=2e-5):
    torch.testing.assert_close(found, expected, rtol=0, atol=relative * float(expected.abs().max()))


class Hooks:
    """Inputs and gradients of every layer of the model itself, for one loss at a time."""

    def __init__(self, model):
        self.seen, self.handles = {}, []
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
                self.handles.append(module.register_forward_hook(self._watch(f"{name}.weight")))

    def _watch(self, name):
        def hook(module, arguments, result):
            # A leaf where nothing before it has a gradient.
            if not result.requires_grad:
                result = result.detach().requires_grad_()
            result.retain_grad()
            self.seen.setdefault(name, []).append((arguments[0].detach(), result))
            return result

        return hook

    def close(self):
        for handle in self.handles:
            handle.remove()


def hooked(model, windows, loss, padding=None):
    """C, G and row Fisher by plain autograd over the whole model, one window after the other."""
    hooks, found = Hooks(model), {}
    padding = torch.ones_like(windows) if padding is None else padding
    for index, window in enumerate(windows):
        mask = padding[index : index + 1]
        hooks.seen.clear()
        with torch.enable_grad():
            result = model(input_ids=window[None], attention_mask=mask)
            loss(result, index).backward()
        for name, calls in hooks.seen.items():
            ((x, y),) = calls
            g = torch.zeros_like(y) if y.grad is None else y.grad
            x, g = (value.double().reshape(-1, value.shape[-1]) for value in (x, g))
            if len(x) == len(window):  # a pooled value is one row of the window
                x, g = x[mask[0] != 0], g[mask[0] != 0]
            c, outer, fisher = found.get(name, (0, 0, 0))
            found[name] = (c + x.T @ x, outer + g.T @ g, fisher + (g.T @ x).square().sum(1))
    hooks.close()
    return found


def next_token_loss(windows):
    def loss(result, index):
        return nn.functional.cross_entropy(result.logits[0, :-1], windows[index, 1:], reduction="sum")

    return loss


def check(found, expected, names):
    for name in names:
        close(found[name].inputs.total, expected[name][0])
        close(found[name].gradients.total, expected[name][1], 1e-4)
        close(found[name].row_fisher, expected[name][2], 1e-4)
        assert found[name].gradients.total.dtype == found[name].row_fisher.dtype == torch.float64


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral"])
def test_moments_are_those_of_plain_autograd_over_the_model(family):
    model, windows, program = tiny(family), token_windows(), canonical(family)
    expected = hooked(model, windows, next_token_loss(windows))
    names = [name for name in weights(program) if name not in program.aliases.values() and name in expected]
    assert len(names) >= 8
    found = moments(program, windows, names, labels="text", row_fisher=True, batch=2)
    check(found, expected, names)
    for name in names:
        assert found[name].inputs.tokens == found[name].gradients.tokens == windows.numel()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("bloom", {"n_layer": 2, "n_head": 4}),
        ("gpt_oss", {"num_key_value_heads": 2, "num_local_experts": 4, "head_dim": 8, "sliding_window": 5}),
    ],
)
def test_attention_with_alibi_or_sinks(kind, options):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL | options)).eval()
    program, windows = capture(model), token_windows()
    Pipeline((Canonicalize(),)).run(program, verify=0)
    expected = hooked(model, windows, next_token_loss(windows))
    names = [name for name in weights(program) if name in expected and name not in program.aliases.values()]
    assert len(names) >= 8
    check(moments(program, windows, names, labels="text", row_fisher=True), expected, names)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_counts_nowhere(side):
    model, program = tiny("llama"), canonical("llama")
    windows, padding = token_windows(4, 9), torch.ones(4, 9, dtype=torch.int64)
    padding[0, :4] = 0
    padding[2, :1] = 0
    if side == "right":
        padding = padding.flip(1)
    names = [name for name in weights(program) if name not in program.aliases.values()]

    def loss(result, index):
        real = padding[index] != 0
        logits, labels = result.logits[0][real], windows[index][real]
        return nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="sum")

    expected = hooked(model, windows, loss, padding)
    # Rubbish under the padding.
    other = torch.where(padding != 0, windows, (windows + 5) % VOCABULARY)
    found = moments(program, other, names, labels="text", row_fisher=True, padding=padding)
    check(found, expected, names)
    for name in names:
        assert found[name].inputs.tokens == found[name].gradients.tokens == 31
    covariances = input_covariances(program, other, names, padding=padding, batch=3)
    for name in names:
        assert covariances[name].tokens == 31
        close(covariances[name].total, expected[name][0])


def tiny_bert():
    torch.manual_seed(0)
    return AutoModel.from_config(AutoConfig.for_model("bert", **SMALL)).eval()


def encoder(model):
    program = capture(model)
    Pipeline((Canonicalize(),)).run(program, verify=0)
    return program


def test_an_encoder_is_probed_at_its_outputs():
    model = tiny_bert()
    program, windows = encoder(model), token_windows(3, 7)
    padding = torch.ones_like(windows)
    padding[1, 4:] = 0
    batches = token_batches(program, windows, padding=padding)
    objective = objective_of(program, batches, labels="sampled", samples=1, seed=3)
    (values,) = [program(**batch) for batch in batches]
    probes = []
    for node, value in zip(objective.nodes, values, strict=False):
        objective.observe(node, value, 0)
    probes = [objective.gradient(node, value, 0, 0) for node, value in zip(objective.nodes, values, strict=False)]

    def loss(result, index):
        outputs = [getattr(result, name) for name in program.outputs[: len(probes)]]
        return sum((probe[index] * output[0]).sum() for probe, output in zip(probes, outputs, strict=True))

    expected = hooked(model, windows, loss, padding)
    names = weights(program)
    assert len(names) >= 12
    found = moments(program, windows, names, seed=3, padding=padding, row_fisher=True, batch=2)
    check(found, expected, names)
    assert {name: entry.uses for name, entry in found.items() if entry.uses != 1} == {"pooler.dense.weight": 3 / 18}


def test_the_price_of_an_encoder_is_its_relative_squared_error():
    torch.manual_seed(0)
    layer = nn.Linear(12, 5, bias=False)
    program = capture(layer, (torch.randn(4, 12),))
    x = torch.randn(200, 12) @ torch.randn(12, 12)
    change = torch.randn(5, 12, dtype=torch.float64)
    found = moments(program, x, samples=40)["weight"]
    c = found.inputs.total / found.inputs.tokens
    g = found.gradients.total / found.gradients.tokens
    price = 0.5 * float((g @ change @ c @ change.T).trace())
    outputs = x.double() @ layer.weight.detach().double().T
    error = (x.double() @ change.T).square().sum() / outputs.square().sum()
    assert price == pytest.approx(float(error), rel=0.03)
    assert found.gradients.tokens == 40 * found.inputs.tokens == 8000


class Reader(nn.Module):
    """A language model of 11 words, which mixes its tokens by a running sum."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(11, 8)
        self.inner = nn.Linear(8, 6)
        self.head = nn.Linear(6, 11)

    def forward(self, input_ids):
        return self.head(torch.tanh(self.inner(self.table(input_ids).cumsum(1))))


def reader():
    model = Reader()
    program = capture(model, {"input_ids": torch.zeros(2, 3, dtype=torch.int64)})
    return model, dataclasses.replace(program, outputs=("logits",))


def test_sampled_labels_give_the_fisher_information():
    model, program = reader()
    window = torch.tensor([[3, 7, 1, 10]])
    state = model.table(window).cumsum(1).detach()
    inner = model.inner(state).detach().requires_grad_()
    logits = model.head(torch.tanh(inner))
    share = logits.softmax(-1).detach()[0]
    # Every label of every position, weighted by its probability: labels of different positions are independent.
    exact = torch.zeros(6, 6, dtype=torch.float64)
    for position in range(4):
        for label in range(11):
            nll = -logits.log_softmax(-1)[0, position, label]
            (g,) = torch.autograd.grad(nll, inner, retain_graph=True)
            g = g[0].double()
            exact += share[position, label] * (g.T @ g)
    found = moments(program, window.expand(100, 4), samples=40)["inner.weight"]
    assert found.gradients.tokens == 40 * 400
    estimate = found.gradients.total / 4000
    assert float((estimate - exact).norm() / exact.norm()) < 0.05
    # The text's own labels give something else.
    text = moments(program, window, labels="text")["inner.weight"].gradients.total
    assert float((text - exact).norm() / exact.norm()) > 0.2


def test_batches_do_not_matter_and_seeds_do():
    program, windows = canonical("llama"), token_windows(5)
    one, other = (moments(program, windows, batch=batch, seed=1, samples=2, row_fisher=True) for batch in (5, 2))
    again, different = (moments(program, windows, batch=5, seed=seed, samples=2) for seed in (1, 2))
    for name in one:
        close(other[name].gradients.total, one[name].gradients.total)
        close(other[name].inputs.total, one[name].inputs.total)
        close(other[name].row_fisher, one[name].row_fisher)
        assert torch.equal(again[name].gradients.total, one[name].gradients.total)
        assert not torch.allclose(different[name].gradients.total, one[name].gradients.total, rtol=1e-2)
        assert again[name].row_fisher is None


def test_moments_come_from_the_last_layers_to_the_first():
    program, windows = canonical("llama", num_hidden_layers=4), token_windows()
    names = weights(program)
    progress = []
    steps = [
        list(found) for found in stream_moments(program, windows, names, progress=lambda *step: progress.append(step))
    ]
    assert [len(step) for step in steps] == [1, 3, 4, 3, 4, 3, 4, 3, 4]
    assert sorted(name for step in steps for name in step) == sorted(names)
    assert all("layers.3" in name for name in steps[1] + steps[2])
    assert [done for done, _ in progress] == list(range(1, progress[0][1] + 1))


def test_layers_that_read_one_input_share_one_matrix():
    found = moments(canonical("llama"), token_windows())
    layer = "model.layers.0."
    query, key, value = (found[f"{layer}self_attn.{name}_proj.weight"] for name in "qkv")
    assert query.inputs is key.inputs is value.inputs
    assert query.gradients is not value.gradients


def test_a_tied_weight_goes_by_either_name_and_only_as_a_head():
    model = build("llama", tie_word_embeddings=True)
    program, windows = canonical("llama", tie_word_embeddings=True), token_windows()
    (name,) = found = moments(program, windows, ["lm_head.weight"], labels="text", row_fisher=True)
    assert name == program.aliases["lm_head.weight"]
    expected = hooked(model, windows, next_token_loss(windows))
    check({"lm_head.weight": found[name]}, expected, ["lm_head.weight"])


class Twice(nn.Module):
    """One layer on two inputs, in regions of their own; another layer on two values of the first."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 6, bias=False)
        self.others = nn.ModuleList([nn.Linear(6, 6) for _ in range(12)])

    def forward(self, x):
        x = self.layer(x)
        for other in self.others:
            x = torch.tanh(other(x))
        return self.layer(x)


def test_a_weight_read_twice_gets_the_sum_when_its_first_reader_has_run():
    model = Twice()
    program = capture(model, (torch.randn(4, 6),))
    x = torch.randn(20, 6)
    steps = list(stream_moments(program, x, ["layer.weight", "others.3.weight"], row_fisher=True))
    assert [list(step) for step in steps] == [["others.3.weight"], ["layer.weight"]]
    found = steps[1]["layer.weight"]
    assert found.inputs.tokens == found.gradients.tokens == 40
    assert [found.uses, steps[0]["others.3.weight"].uses] == [2.0, 1.0]
    first, middle = x, model.layer(x).detach().requires_grad_()
    second = middle
    for other in model.others:
        second = torch.tanh(other(second))
    output = model.layer(second)
    (objective,) = [objective_of(program, token_batches(program, x), labels="sampled", samples=1, seed=0)]
    objective.observe(objective.nodes[0], output.detach(), 0)
    probe = objective.gradient(objective.nodes[0], output.detach(), 0, 0)
    (g,) = torch.autograd.grad(output, middle, probe)
    close(found.gradients.total, g.double().T @ g.double() + probe.double().T @ probe.double())
    inner = second.detach().double()
    close(found.inputs.total, first.double().T @ first.double() + inner.T @ inner)
    # Examples without a token axis are windows of one token.
    expected = g.double().square().sum(0) * 0
    for gradient, value in ((g, first), (probe, second.detach())):
        expected += (gradient.double().square() * value.double().square().sum(1, keepdim=True)).sum(0)
    close(found.row_fisher, expected)


def test_layers_may_be_rewritten_between_steps():
    windows = token_windows()
    expected = moments(canonical("llama"), windows)
    program = canonical("llama").clone()
    rewriter = Rewriter(program, "test")
    for found in stream_moments(program, windows, weights(program)):
        for name, entry in found.items():
            close(entry.gradients.total, expected[name].gradients.total)
            reader = next(node for node in program.graph.nodes if linear_weight(program, node) == name)
            with rewriter.before(reader):
                weight = rewriter.weight(f"{name}_zero", torch.zeros_like(program.weight(name)))
                new = rewriter.call(reader.target, reader.args[0], weight, *reader.args[2:])
            rewriter.replace(reader, new, rule="zero")
        rewriter.finish()
        program.drop_unused_weights()
    assert float(program(**token_batches(program, windows)[0])[0].abs().max()) == 0.0


def test_gradients_in_bfloat16_are_near_those_in_float32():
    program, windows = canonical("llama"), token_windows()
    exact = moments(program, windows, labels="text")
    found = moments(program.with_dtype(torch.bfloat16), windows, labels="text")
    for name, entry in found.items():
        error = (entry.gradients.total - exact[name].gradients.total).norm() / exact[name].gradients.total.norm()
        assert float(error) < 0.1


class Overflow(nn.Module):
    """Finite values whose gradients are not: the slope of a root at zero."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6, bias=False)

    def forward(self, x):
        return torch.sqrt(self.layer(x).square()) + 1.0


def test_gradients_that_are_not_finite_name_the_layer():
    program = capture(Overflow(), (torch.randn(4, 6),))
    with pytest.raises(CalibrationError, match="gradients at a layer are not finite") as caught:
        moments(program, torch.zeros(3, 6))
    assert caught.value.code == "CALIBRATION-003"
    assert "linear" in caught.value.where


@pytest.mark.parametrize("samples", [0, -1])
def test_samples_out_of_range(samples):
    with pytest.raises(OptionError, match="samples") as caught:
        moments(canonical("llama"), token_windows(), samples=samples)
    assert caught.value.code == "OPTION-002"


def test_a_weight_that_no_linear_layer_reads():
    with pytest.raises(KeyError, match="wpe"):
        moments(canonical("gpt2"), token_windows(), ["transformer.wpe.weight"])


def test_no_weight_has_no_moments():
    assert moments(canonical("llama"), token_windows(), []) == {}
