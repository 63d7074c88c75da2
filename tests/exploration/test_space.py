import pytest
import yaml

from skink.errors import SpaceError
from skink.exploration.axes import ModelFacts
from skink.exploration.points import expand
from skink.exploration.space import load_space, shipped_spaces

FACTS = ModelFacts(tuple(range(8)), ("self_attn.q_proj", "mlp.up_proj"))


@pytest.mark.parametrize("name", shipped_spaces())
def test_spaces_that_ship_are_whole(name):
    space = load_space(name)
    assert space.name == name
    assert space.description
    assert expand(space, FACTS)


def test_spaces_are_read_from_files_names_and_mappings(tmp_path):
    content = {"axes": {"keep": [0.5]}, "recipe": "low-rank{keep=$keep,method=plain}"}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    assert load_space(str(path)).name == load_space(path).name == "mine"
    found = load_space(content)
    assert load_space(found) is found
    assert [family.name for family in found.families] == ["space"]


def test_values_go_into_the_recipe():
    family = load_space(
        {
            "axes": {"layers": [[0, 3]], "tensors": [["q", "v"]], "keep": [0.5], "flag": [True], "none": [None]},
            "patterns": {"targets": "*.$layers.*.$tensors"},
            "recipe": "p{targets=$targets,keep=$keep,flag=$flag,none=$none,both=[$keep,$keep]}",
        }
    ).families[0]
    values = {"layers": [0, 3], "tensors": ["q", "v"], "keep": 0.5, "flag": True, "none": None}
    assert family.fill(values) == (
        "p{targets=[*.0.*.q,*.0.*.v,*.3.*.q,*.3.*.v],keep=0.5,flag=true,none=null,both=[0.5,0.5]}"
    )


def test_values_keep_their_types_in_a_list_of_passes():
    family = load_space(
        {
            "axes": {"keep": [0.5], "layers": [[1, 2]]},
            "recipe": [{"p": {"keep": "$keep", "layers": "$layers", "name": "l$keep"}}, "q{keep=$keep}"],
        }
    ).families[0]
    assert family.fill({"keep": 0.5, "layers": [1, 2]}) == [
        {"p": {"keep": 0.5, "layers": [1, 2], "name": "l0.5"}},
        "q{keep=0.5}",
    ]


AXES = {"keep": [0.5]}


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [
        ({"axes": AXES}, "SPACE-001", "has no recipe"),
        ({"axes": AXES, "recipe": "$keep", "rcipe": 1}, "SPACE-001", "unknown key 'rcipe'"),
        ({"families": []}, "SPACE-001", "not a list of families"),
        ({"families": [3]}, "SPACE-001", "not a list of families"),
        ({"families": [{"recipe": "a", "name": "x"}] * 2}, "SPACE-001", "two families 'x'"),
        ({"axes": [1], "recipe": "a"}, "SPACE-001", "not a mapping"),
        ({"axes": AXES, "recipe": "$keep", "sample": 0}, "SPACE-001", "sample of"),
        ({"axes": AXES, "recipe": "$keep", "seed": "x"}, "SPACE-001", "seed of"),
        ({"axes": AXES, "recipe": "low-rank{keep=$kep}"}, "SPACE-002", r"\$kep stands in the recipe"),
        ({"axes": AXES, "recipe": "low-rank"}, "SPACE-002", "'keep' changes nothing"),
        ({"axes": AXES, "patterns": {"t": "$nothing"}, "recipe": "$t $keep"}, "SPACE-002", r"\$nothing"),
    ],
)
def test_what_is_no_space_is_refused(content, code, message):
    with pytest.raises(SpaceError, match=message) as caught:
        load_space(content)
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("quik", None, "there is no space 'quik'"),
        ("none.yaml", None, "cannot be read"),
        ("bad.yaml", "a: [", "is not YAML"),
        ("list.yaml", "- 1", "is a list"),
    ],
)
def test_files_that_are_no_spaces(name, text, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(SpaceError, match=message) as caught:
        load_space(name)
    assert caught.value.code == "SPACE-001"
