"""Skink models that the tests share, made once per process, and what is compared with them. Nothing may change them."""

import hashlib
from functools import cache

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import PreTrainedTokenizerFast

from skink.export.huggingface import SkinkForCausalLM, to_huggingface
from skink.graph.program import Program
from skink.graph.rewriter import Rewriter
from tests.models import VOCABULARY, tiny
from tests.programs import canonical

aten = torch.ops.aten


@cache
def skink_model(family: str) -> SkinkForCausalLM:
    """The tiny model of `family` in our form."""
    source = tiny(family)
    return to_huggingface(canonical(family), source.config, source.generation_config)


def fresh(family: str) -> SkinkForCausalLM:
    """The same, not shared."""
    source = tiny(family)
    return to_huggingface(canonical(family), source.config, source.generation_config)


def factored_program(family: str = "llama", rank: int = 6) -> Program:
    """The tiny model with its query and up projections as two thin layers each, as a low-rank pass leaves them."""
    program = canonical(family)
    rewriter = Rewriter(program, "test")
    for node in list(program.graph.nodes):
        if node.target is not aten.linear.default:
            continue
        name = node.args[1].target
        if not name.endswith(("q_proj.weight", "up_proj.weight")):
            continue
        layer = name.removesuffix(".weight")
        u, s, v = torch.linalg.svd(program.weight(name), full_matrices=False)
        with rewriter.before(node):
            down = rewriter.weight(f"{layer}.down.weight", (s[:rank, None] * v[:rank]).contiguous())
            up = rewriter.weight(f"{layer}.up.weight", u[:, :rank].contiguous())
            thin = rewriter.call(aten.linear.default, node.args[0], down)
            rewriter.replace(node, rewriter.call(aten.linear.default, thin, up), rule="factor")
    rewriter.finish()
    return program


@cache
def factored_model() -> SkinkForCausalLM:
    """The factored tiny LLaMA in our form."""
    source = tiny("llama")
    return to_huggingface(factored_program(), source.config, source.generation_config)


@cache
def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of as many words as the tiny models have tokens: `w5` is token 5."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{index}": index for index in range(3, VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


def fingerprint(model: nn.Module) -> str:
    """A hash of every parameter and buffer, with names, shapes and dtypes."""
    digest = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} {tensor.requires_grad}".encode())
        digest.update(tensor.detach().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
