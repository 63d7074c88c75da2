import json
import subprocess
import sys

import pytest
import torch

from skink.errors import ExportError
from skink.export.onnx.cases import Case, make_cases, save_cases
from skink.export.onnx.check import CheckResult, check_in_fresh_process, compare, main
from skink.graph.state import derive_step
from tests.export.onnx.exported import exported, program


@pytest.fixture(scope="module")
def cases():
    return make_cases(program("llama"), derive_step(program("llama")), torch.float32)[0]


def _compare(cases, tmp_path, tolerance=1e-4):
    save_cases(cases, tmp_path / "cases")
    return compare(exported("llama").folder, tmp_path / "cases", tolerance)


def _changed(case, **outputs):
    return Case(case.name, case.inputs, {**case.outputs, **outputs}, case.real, case.chunks, case.greedy_from)


def test_a_difference_is_located(cases, tmp_path):
    logits = cases[1].outputs["logits"].clone()
    logits[1, 20, 7] += 0.01
    result = _compare([_changed(cases[1], logits=logits)], tmp_path)
    assert not result.ok
    assert result.cases[0].where == "logits, row 1, token 20, index 7"
    assert result.cases[0].error == pytest.approx(0.01, rel=1e-3)
    assert len(result.failures()) == 1


def test_what_is_computed_for_padding_does_not_count(cases, tmp_path):
    logits = cases[1].outputs["logits"].clone()
    assert not cases[1].real[1, 0]
    logits[1, 0] = float("nan")
    assert _compare([_changed(cases[1], logits=logits)], tmp_path).ok


def test_what_is_not_a_number_fails(cases, tmp_path):
    logits = cases[1].outputs["logits"].clone()
    logits[0, 3, 3] = float("nan")
    result = _compare([_changed(cases[1], logits=logits)], tmp_path)
    assert not result.ok
    assert result.cases[0].error == float("inf")


def test_a_wrong_token_fails_even_where_logits_pass(cases, tmp_path):
    case = cases[0]
    logits = case.outputs["logits"]
    position, row = 20, 1
    best, second = logits[row, position - 1].topk(2).indices.tolist()
    assert case.inputs["input_ids"][row, position] == best
    margin = float(logits[row, position - 1, best] - logits[row, position - 1, second])
    scale = float(logits[case.real].abs().max())
    # PyTorch is said to have chosen the runner-up: ONNX Runtime then has another token, and says so ...
    ids = case.inputs["input_ids"].clone()
    ids[row, position] = second
    swapped = logits.clone()
    swapped[row, position - 1, best], swapped[row, position - 1, second] = (
        logits[row, position - 1, second],
        logits[row, position - 1, best],
    )
    inputs = {**case.inputs, "input_ids": ids}
    # ... after that token the context differs, so nothing later is compared.
    end = position + 1
    cut = Case(
        case.name,
        {name: tensor[:, :end] for name, tensor in inputs.items()},
        {"logits": swapped[:, :end]},
        torch.arange(end).lt(position - 1)[None, :] & case.real[:, :end],
        (12, *[1] * (end - 12)),
        case.greedy_from,
    )
    strict = _compare([cut], tmp_path, tolerance=margin / scale * 0.4)
    assert strict.cases[0].relative < strict.tolerance
    assert strict.cases[0].wrong == (f"row 1, token 20: {best} instead of {second}, {margin:.3g} less likely",)
    # Within twice the tolerance rounding alone decides: a tie.
    loose = _compare([cut], tmp_path, tolerance=margin / scale * 0.6)
    assert loose.ok
    assert loose.ties == 1


def test_the_result_survives_json(cases, tmp_path):
    result = _compare(cases, tmp_path)
    assert CheckResult.from_json(json.loads(json.dumps(result.as_json()))) == result


def test_the_command_prints_json_and_its_status_says_whether_all_is_well(cases, tmp_path, capsys):
    save_cases(cases, tmp_path / "cases")
    arguments = [str(exported("llama").folder), "--cases", str(tmp_path / "cases"), "--tolerance"]
    assert main([*arguments, "1e-4"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    assert main([*arguments, "1e-12"]) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False


def test_a_graph_that_does_not_load_fails_in_the_fresh_process_too(cases, tmp_path):
    save_cases(cases, tmp_path / "cases")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "model.onnx").write_bytes((exported("llama").folder / "model.onnx").read_bytes()[:5000])
    with pytest.raises(ExportError) as caught:
        check_in_fresh_process(broken, tmp_path / "cases", 1e-4)
    assert caught.value.code == "EXPORT-003"
    assert "cannot load" in caught.value.what
    assert caught.value.why


def test_a_graph_that_does_not_run_fails(cases, tmp_path):
    case = cases[1]
    inputs = {**case.inputs, "position_ids": case.inputs["position_ids"][:, :3]}
    save_cases([Case(case.name, inputs, case.outputs, case.real, (), None)], tmp_path / "cases")
    with pytest.raises(ExportError) as caught:
        compare(exported("llama").folder, tmp_path / "cases", 1e-4)
    assert caught.value.code == "EXPORT-003"
    assert "cannot run" in caught.value.what


def test_a_fresh_process_that_dies_is_reported(tmp_path, monkeypatch):
    def killed(*_, **__):
        return subprocess.CompletedProcess([], -9, stdout="", stderr="out of memory")

    monkeypatch.setattr(subprocess, "run", killed)
    with pytest.raises(ExportError) as caught:
        check_in_fresh_process(tmp_path, tmp_path / "cases", 1e-4)
    assert caught.value.code == "EXPORT-003"
    assert "status -9" in caught.value.what
    assert "out of memory" in caught.value.why


def test_the_check_needs_neither_the_exporter_nor_pytorch():
    code = (
        "import sys, skink.export.onnx.check; print([m for m in ('torch', 'onnx', 'onnxscript') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
