"""What SKINK_DUMP leaves."""

import json
from pathlib import Path

from skink.graph.dump import dump_edits, dump_program, program_text
from skink.graph.pipeline import Pipeline
from skink.graph.program import Edit
from skink.passes.canonicalize import Canonicalize
from tests.programs import captured


def test_the_text_has_the_pass_and_the_weights(tmp_path: Path) -> None:
    program = captured("llama")
    dump_program(tmp_path / "new", 3, Canonicalize(), program)
    text = (tmp_path / "new" / "03_canonicalize.txt").read_text()
    assert text.startswith("after canonicalize\n\nprogram captured(")
    assert "  @lm_head.weight : f32[97,64]\n" in text


def test_edits_are_lines_of_json_in_the_order_of_their_indices(tmp_path: Path) -> None:
    program = captured("llama")
    Pipeline((Canonicalize(),)).attempt(program, dump=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "edits.jsonl").read_text().splitlines()]
    assert [Edit(**line) for line in lines] == program.edits
    assert [line["index"] for line in lines] == list(range(len(lines)))
    assert any(line["rule"] == "raise-rms-norm" for line in lines)
    assert any("modeling_llama.py" in line["source"] for line in lines)


def test_later_passes_add_and_another_program_begins_anew(tmp_path: Path) -> None:
    edits = [Edit(index, "pass", "rule", f"node_{index}", "") for index in range(3)]
    dump_edits(tmp_path, edits[:2])
    dump_edits(tmp_path, edits[2:])
    dump_edits(tmp_path, [])
    assert len((tmp_path / "edits.jsonl").read_text().splitlines()) == 3
    dump_edits(tmp_path, edits[:1])
    assert len((tmp_path / "edits.jsonl").read_text().splitlines()) == 1


def test_a_program_that_cannot_be_printed_says_why() -> None:
    program = captured("llama")
    assert program_text(program) == str(program)
    program.outputs = ("one", "two")
    assert program_text(program).startswith("(it cannot be printed: ValueError: ")
