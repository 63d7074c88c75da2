import logging
import os
from dataclasses import replace

import pytest

from skink.errors import SpaceError
from skink.exploration import workers
from skink.exploration.points import DENSE, Point
from skink.exploration.workbench import Workbench
from skink.exploration.workers import runner
from skink.passes.recipe import load_recipe

POINTS = (DENSE, Point("a", {}, load_recipe("low-rank{keep=0.5,method=plain}")))


@pytest.fixture(scope="module")
def folder(captured, tokenizer, tmp_path_factory):
    """In Skink's form, which needs no capture in each process."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    captured.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_one_job_is_this_process(captured, tokenizer, options, tmp_path):
    bench = Workbench(captured, tokenizer, "tiny", options)
    with runner(bench, options) as run:
        found = dict(run([(point, tmp_path / point.family if point.family else None) for point in POINTS]))
    assert set(found) == {0, 1}
    assert found[1]["metrics"]["parameters"] < found[0]["metrics"]["parameters"]
    assert (tmp_path / "a" / "config.json").is_file()


class Fatal:
    """Ends the process that unpickles it."""

    def __reduce__(self):
        return os._exit, (3,)


@pytest.mark.slow
def test_several_jobs_give_the_same_and_one_that_dies_is_an_error(folder, options):
    bench = Workbench.load(str(folder), options)
    tasks = [(point, None) for point in POINTS]
    with runner(bench, options) as run:
        expected = dict(run(tasks))
    fatal = replace(DENSE, values={"x": Fatal()})
    found = {}
    with (  # noqa: PT012
        pytest.raises(SpaceError, match="a worker process died") as caught,
        runner(bench, replace(options, jobs=2)) as run,
    ):
        found.update(run(tasks))
        list(run([(fatal, None)]))
    assert caught.value.code == "SPACE-006"
    for index in expected:
        assert found[index]["metrics"] == pytest.approx(expected[index]["metrics"], rel=1e-5)


def test_a_worker_runs_nothing_before_it_has_started(folder, options, monkeypatch):
    monkeypatch.setattr(workers, "_bench", None)
    with pytest.raises(RuntimeError, match="before it has started"):
        workers._run(DENSE, None)
    import signal
    import warnings

    import torch

    threads, level = torch.get_num_threads(), signal.getsignal(signal.SIGINT)
    try:
        with warnings.catch_warnings():
            workers._start(str(folder), options, threads)
        assert "metrics" in workers._run(DENSE, None)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, level)
        logging.disable(logging.NOTSET)
