import json
from dataclasses import replace

import pytest

import skink
from skink.errors import OptionError, SkinkError, SpaceError
from skink.exploration import explore
from skink.exploration.store import POINTS_FILE
from skink.exploration.workbench import Workbench


@pytest.fixture(scope="module")
def finished(captured, tokenizer, options, space, tmp_path_factory):
    folder = tmp_path_factory.mktemp("explored")
    return folder, explore(captured, space, folder, options, tokenizer=tokenizer)


@pytest.fixture
def made(monkeypatch):
    """The recipes of the points that are made from here on."""
    texts = []
    run = Workbench.run

    def counted(self, point, folder=None):
        texts.append(str(point.recipe))
        return run(self, point, folder)

    monkeypatch.setattr(Workbench, "run", counted)
    return texts


def test_every_point_is_measured(finished):
    folder, found = finished
    assert [point.family for point in found.everything] == ["", "share", "share", "nowhere"]
    for point in found.everything[:3]:
        assert set(point.metrics) == {
            *("perplexity", "accuracy", "parameters", "linear_parameters"),
            *("bytes", "macs_per_token", "latency"),
        }
    assert found.dense.metrics["latency"] == 1.0
    assert found.points[1].metrics["linear_parameters"] < 0.45 * found.dense.metrics["linear_parameters"]
    assert found.points[2].error["code"] == "OPTION-002"
    assert sorted(path.name for path in folder.iterdir()) == ["explore.html", "explore.json", POINTS_FILE]
    assert json.loads((folder / "explore.json").read_text())["fronts"]["perplexity"]["bytes"]


def test_nothing_is_done_twice(finished, captured, tokenizer, options, space, made):
    folder, found = finished
    again = explore(captured, space, folder, options, tokenizer=tokenizer)
    assert made == []
    assert again.points == found.points


def test_failures_run_again_when_asked(finished, captured, tokenizer, options, space, made):
    folder, _ = finished
    explore(captured, space, folder, replace(options, retry=True), tokenizer=tokenizer)
    assert made == ['low-rank{method=plain,targets=["*.nowhere"]}']


def test_other_settings_are_other_points(finished, captured, tokenizer, options, space, made):
    folder, _ = finished
    changed = replace(options, seed=1, latency=False, max_points=1)
    explore(captured, space, folder, changed, tokenizer=tokenizer)
    assert len(made) == 2


def test_a_wider_space_does_what_is_new(finished, captured, tokenizer, options, made):
    folder, _ = finished
    wider = {"axes": {"keep": [0.4, 0.6]}, "recipe": "low-rank{keep=$keep,method=plain}"}
    found = explore(captured, wider, folder, replace(options, latency=False), tokenizer=tokenizer)
    assert made == ["low-rank{keep=0.6,method=plain}"]
    assert [point.values["keep"] for point in found.points] == [0.4, 0.6]


@pytest.mark.parametrize("lines", [2, 6])
def test_killed_at_any_moment_it_goes_on(finished, captured, tokenizer, options, space, tmp_path, made, lines):
    folder, found = finished
    data = (folder / POINTS_FILE).read_text().splitlines(keepends=True)
    # The header, some points, and half of the next one.
    (tmp_path / POINTS_FILE).write_text("".join(data[:lines]) + data[lines][:25])
    again = explore(captured, space, tmp_path, options, tokenizer=tokenizer)
    assert len(made) == max(0, 4 - (lines - 1))
    for one, two in zip(again.everything, found.everything):
        costs = {"latency"}
        assert {k: v for k, v in one.metrics.items() if k not in costs} == {
            k: v for k, v in two.metrics.items() if k not in costs
        }
        assert set(one.metrics) == set(two.metrics)


def test_progress_counts_points(finished, captured, tokenizer, options, space):
    seen = []
    folder, _ = finished
    explore(captured, space, folder, options, tokenizer=tokenizer, progress=lambda *said: seen.append(said))
    assert seen[:2] == [("load", 0, 1), ("load", 1, 1)]
    assert seen[-1] == ("points", 4, 4)


def test_an_interruption_leaves_what_is_finished(captured, tokenizer, options, space, tmp_path, monkeypatch):
    run = Workbench.run

    def interrupted(self, point, folder=None):
        if point.values.get("keep") == 0.4:
            raise KeyboardInterrupt
        return run(self, point, folder)

    monkeypatch.setattr(Workbench, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        explore(captured, space, tmp_path, options, tokenizer=tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == [POINTS_FILE]
    assert len((tmp_path / POINTS_FILE).read_text().splitlines()) == 3


def test_without_a_folder_nothing_is_kept(captured, tokenizer, options, space, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = skink.explore(captured, space, options=replace(options, max_points=1, latency=False), tokenizer=tokenizer)
    assert isinstance(found, skink.Exploration)
    assert list(tmp_path.iterdir()) == []


def test_another_model_s_folder_is_refused(finished, tokenizer, options, space):
    from tests.models import tiny

    folder, _ = finished
    small = replace(options, quality=("perplexity",))
    model = tiny("llama")
    with pytest.raises(SpaceError, match="another model") as caught:
        explore(model, space, folder, small, tokenizer=tokenizer)
    assert caught.value.code == "SPACE-005"


def test_recipes_are_read_before_anything_runs(captured, tokenizer, options, tmp_path, made):
    wrong = {"axes": {"keep": [0.5, 2]}, "recipe": "low-rank{keep=$keep,method=plain}"}
    with pytest.raises(SpaceError, match="SPACE-003"):
        explore(captured, wrong, tmp_path / "out", options, tokenizer=tokenizer)
    assert made == []
    assert not (tmp_path / "out").exists()


def test_a_model_object_cannot_be_shared_out(captured, tokenizer, options, space):
    with pytest.raises(OptionError, match="jobs=2 with a model object") as caught:
        explore(captured, space, options=replace(options, jobs=2), tokenizer=tokenizer)
    assert caught.value.code == "OPTION-002"


def test_a_dense_model_that_cannot_be_measured_ends_it(captured, tokenizer, options, space, tmp_path, monkeypatch):
    def failing(self, texts):
        raise ValueError("no such thing")

    with monkeypatch.context() as patch:
        patch.setattr("skink.exploration.qualities.PerplexityQuality.__call__", failing)
        with pytest.raises(SkinkError, match=r"the dense model cannot be measured: ValueError: no such thing"):
            explore(captured, space, tmp_path, options, tokenizer=tokenizer)
    # Nothing of it stays in the way.
    assert explore(captured, space, tmp_path, replace(options, retry=True), tokenizer=tokenizer).dense.error is None
