"""The page is made and read back."""

from tests.zoo.table import escape, read, render
from tests.zoo.trial import Row

DECODERS = [
    Row("llama", "LlamaForCausalLM", "yes", "yes", "yes", "yes"),
    Row("odd", "", why="cannot be built: KeyError: 'a_b | c'"),
    Row("half", "HalfForCausalLM", "yes", "no", "no", why="STATE-001 [x] reads *this*"),
]
ENCODERS = [Row("bert", "BertForMaskedLM", "yes", "yes")]


def test_what_is_written_is_read_back() -> None:
    decoders, encoders = read(render(DECODERS, ENCODERS))
    assert list(decoders.values()) == DECODERS
    assert list(encoders.values()) == ENCODERS


def test_no_mark_of_a_reason_is_markdown() -> None:
    assert escape("a_b [x] *y* `z` <w> |") == r"a\_b \[x\] \*y\* \`z\` \<w> \|"


def test_counts_stand_above_the_table() -> None:
    text = render(DECODERS, ENCODERS)
    assert "3 model types, 3 classes, 2 built: 2 captured, 1 raised, 1 stepped, 1 onnx." in text
