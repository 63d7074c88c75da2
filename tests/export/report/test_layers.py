from skink.export.report import Rejection
from skink.export.report import formatting as fmt
from skink.export.report.layers import layers_sentence, rejections_by_reason, roles


def test_rejections_are_grouped_commonest_first(report):
    record = report.passes[1].model_copy(
        update={"rejections": [Rejection(where=w, reason=r) for w, r in (("a", "x"), ("b", "y"), ("c", "y"))]}
    )
    assert rejections_by_reason(record) == [("y", ["b", "c"]), ("x", ["a"])]


def test_roles_gather_the_same_work_over_blocks(report):
    found = roles(report.layers)
    assert [role.name for role in found] == ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj", "other layers"]
    assert [label for label, _ in found[0].layers] == ["0", "1", "2"]
    assert [label for label, _ in found[3].layers] == ["lm_head"]
    assert sum(len(role.layers) for role in found) == len(report.layers)


def test_roles_whose_short_names_agree_keep_their_long_ones(report):
    layer = report.layers[0]
    names = [f"{side}.layers.{i}.q" for side in ("encoder", "decoder") for i in range(2)]
    found = roles([layer.model_copy(update={"name": name}) for name in names])
    assert [role.name for role in found] == ["encoder.layers.*.q", "decoder.layers.*.q"]


def test_roles_of_experts_and_of_names_without_numbers(report):
    layer = report.layers[0]
    names = ["layers.0.experts.0.w1", "layers.0.experts.1.w1", "layers.1.experts.0.w1", "head"]
    found = roles([layer.model_copy(update={"name": name}) for name in names])
    assert [(role.name, [label for label, _ in role.layers]) for role in found] == [
        ("experts.*.w1", ["0.0", "0.1", "1.0"]),
        ("other layers", ["head"]),
    ]
    assert [role.name for role in roles([layer.model_copy(update={"name": n}) for n in ("fc", "head")])] == ["layers"]
    assert roles([]) == []


def test_layers_sentence(report):
    assert layers_sentence(report.layers) == (
        f"8 of 10 layers factored, 2 kept dense: 590 k parameters became 459 k ({fmt.MINUS}22.2%). "
        "At equal rank the relative output error is below plain SVD's in 8 of 8, and 0.60 of it in the median."
    )
    dense = [layer for layer in report.layers if layer.decision == "kept dense"]
    assert layers_sentence(dense) == "0 of 2 layers factored, 2 kept dense: 65.5 k parameters became 65.5 k (±0.0%)."
