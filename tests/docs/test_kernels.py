"""The page of each op names its kernels, its schema and its dims."""

import re

import pytest

from skink.kernels import OPS, OpDef
from tests.docs.pages import page, pages


def test_every_op_has_a_page() -> None:
    documented = {entry.path for entry in pages() if entry.path.startswith("skink/kernels/")}
    assert documented == {f"skink/kernels/{op.name}/README.md" for op in OPS}


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_kernels_are_listed_in_order_of_preference(op: OpDef) -> None:
    listed = re.findall(r"^\| `(\w+)` \| ", page(f"skink/kernels/{op.name}/README.md").text, flags=re.MULTILINE)
    assert listed == [*(variant.name for variant in op.variants), "reference"]


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_arguments_are_named(op: OpDef) -> None:
    text = page(f"skink/kernels/{op.name}/README.md").text
    signature = re.search(r"`skink::\w+\((.*?)\)`", text, flags=re.DOTALL)
    assert signature is not None
    shown = [part.partition("=")[0].strip() for part in signature[1].split(",") if part.strip() != "*"]
    assert shown == [argument.name for argument in op.overload._schema.arguments]
