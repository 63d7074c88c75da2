"""The map: every point of a design space made and measured, and what is best at each size and speed."""

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from skink.errors import OptionError, SkinkError
from skink.evaluation import machine
from skink.exploration.latency import measure_latency
from skink.exploration.options import ExploreOptions
from skink.exploration.points import DENSE, Point, expand
from skink.exploration.result import Exploration, PointResult
from skink.exploration.space import Space, load_space
from skink.exploration.store import Store
from skink.exploration.workbench import Workbench, point_key
from skink.exploration.workers import Runner, runner
from skink.export.huggingface import load
from skink.graph.progress import silent
from skink.graph.versions import versions

Progress = Callable[[str, int, int], None]
# Compressed models that wait for their speed to be measured, in a folder of this name.
_WAITING = ".waiting"
# So many points for each process are made before the speed of all of them is measured.
_WAVE = 8
_COUNTED = ("skink", "torch", "transformers", "python")


def explore(
    model: Any,
    space: "str | Path | Mapping[str, Any] | Space",
    out: str | Path | None = None,
    options: ExploreOptions | None = None,
    *,
    tokenizer: Any = None,
    progress: Progress = silent,
) -> Exploration:
    """Explore a design space on a model, and write `explore.json` and `explore.html`.

    Every finished point is kept in the folder at once: after an interruption, the same call goes on from there. First
    points are made and their size and quality measured, `options.jobs` side by side; then, with nothing else running,
    their speed, one after another and each in turn with the dense model.

    Args:
        model: a Hugging Face model, or a hub id or folder of one, or `stdlib-llama`. An object allows one job only.
        space: the name of a space that ships, a YAML file, or what such a file holds; see docs/explore.md.
        out: a folder; where None, nothing is kept.
        options: see `ExploreOptions`.
        tokenizer: of a model object.
        progress: called as (what, done, total).

    Raises:
        SkinkError: SPACE-001 to -006, and what loading, capture, text and the dense model's measurement raise; see
            docs/errors.md. What a single point raises is recorded with it.
    """
    options = options or ExploreOptions()
    loaded = load_space(space)
    bench = _bench(model, tokenizer, options, progress)
    points = expand(loaded, bench.facts, most=options.max_points, seed=options.seed)
    bench.refuse(points)
    with ExitStack() as stack:
        folder = Path(out) if out is not None else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        store = Store(folder, model=bench.name, fingerprint=bench.fingerprint)
        work = _Work(bench, store, folder, options, progress, (DENSE, *points))
        work.run()
        found = work.result(loaded)
        if found.dense.error is not None:
            # All other numbers are beside its numbers. It is run again by the next call.
            raise _failed(found.dense.error)
        if out is not None:
            found.write(folder)
    return found


def _failed(error: Mapping[str, str]) -> SkinkError:
    return SkinkError(
        error["code"],
        f"the dense model cannot be measured: {error['what']}",
        where=error.get("where") or "",
        why=error.get("why") or "",
        fix=error.get("fix") or "",
    )


def _bench(model: Any, tokenizer: Any, options: ExploreOptions, progress: Progress) -> Workbench:
    progress("load", 0, 1)
    if isinstance(model, str | Path):
        bench = Workbench.load(str(model), options)
    elif options.jobs > 1:
        raise OptionError(
            "OPTION-002",
            f"jobs={options.jobs} with a model object: other processes could not load it.",
            fix="save the model and give its folder, or choose jobs=1.",
        )
    else:
        bench = Workbench(model, tokenizer, str(getattr(model.config, "name_or_path", "") or "a model"), options)
    progress("load", 1, 1)
    return bench


class _Work:
    """Points to do, and how far they are."""

    def __init__(
        self,
        bench: Workbench,
        store: Store,
        folder: Path,
        options: ExploreOptions,
        progress: Progress,
        points: Sequence[Point],
    ) -> None:
        self._bench, self._store, self._options, self._progress = bench, store, options, progress
        self._points = points
        self._waiting = folder / _WAITING
        self._latency = options.latency and not bench.encoder
        self._versions = {name: text for name, text in versions().items() if name in _COUNTED}
        self._machine = asdict(machine())
        self._keys = [point_key(bench.fingerprint, bench.settings, self._versions, point) for point in points]
        # Speed is of a machine, and of a workload.
        timed = {"workload": options.workload(), "machine": self._machine}
        self._timed_keys = [point_key(key, timed, {}, point) for key, point in zip(self._keys, points, strict=True)]
        self._dense: Any = None

    def run(self) -> None:
        """Do what is not done."""
        todo = [index for index in range(len(self._points)) if self._is_open(index)]
        self._say()
        # What a run that was cut off left may be half of a model.
        shutil.rmtree(self._waiting, ignore_errors=True)
        wave = _WAVE * self._options.jobs
        try:
            with runner(self._bench, self._options) as run:
                for start in range(0, max(len(todo), 1), wave):
                    self._measure(run, todo[start : start + wave])
                    # All other processes wait.
                    self._time(start + wave >= len(todo))
        finally:
            shutil.rmtree(self._waiting, ignore_errors=True)

    def result(self, space: Space) -> Exploration:
        """What was found."""
        results = [self._result(index) for index in range(len(self._points))]
        return Exploration(
            model={
                "name": self._bench.name,
                "model_type": str(self._bench.source.config.model_type),
                "fingerprint": self._bench.fingerprint,
            },
            space={"name": space.name, "description": space.description, "yaml": space.text},
            settings={**self._bench.settings, "latency": self._options.workload() if self._latency else None},
            machine=self._machine,
            versions=self._versions,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            dense=results[0],
            points=tuple(results[1:]),
        )

    def _is_open(self, index: int) -> bool:
        record = self._store.get("point", self._keys[index])
        return record is None or ("error" in record and (self._options.retry or index == 0))

    def _measure(self, run: Runner, indices: Sequence[int]) -> None:
        """Make points and measure their size and quality."""
        tasks = [(self._points[index], self._place(index) if self._latency and index else None) for index in indices]
        for place, record in run(tasks):
            index = indices[place]
            point = self._points[index]
            content = {"family": point.family, "values": dict(point.values), "recipe": point.text, **record}
            self._store.add("point", self._keys[index], content)
            self._say()

    def _time(self, last: bool) -> None:
        """Measure the speed of points that are made; of all that lack it, in the last round."""
        if not self._latency:
            return
        lacking = [
            index
            for index in range(1, len(self._points))
            if "metrics" in (self._store.get("point", self._keys[index]) or {})
            and self._store.get("latency", self._timed_keys[index]) is None
            and (last or self._place(index).is_dir())
        ]
        for done, index in enumerate(lacking):
            self._progress(f"speed of {len(lacking)}", done, len(lacking))
            if self._dense is None:
                self._dense = self._bench.model(self._bench.program)
            record = measure_latency(self._dense, self._made(index), self._options)
            self._store.add("latency", self._timed_keys[index], record)
            shutil.rmtree(self._place(index), ignore_errors=True)
        if lacking:
            self._progress(f"speed of {len(lacking)}", len(lacking), len(lacking))

    def _made(self, index: int) -> Any:
        """The point's model: as a worker left it, or made again where a run was cut off between the two."""
        folder = self._place(index)
        if folder.is_dir():
            return load(folder, device=self._options.device, dtype=self._options.dtype)
        return self._bench.model(self._bench.compress(self._points[index])[0])

    def _place(self, index: int) -> Path:
        return self._waiting / self._keys[index][:16]

    def _say(self) -> None:
        done = sum(not self._is_open(index) for index in range(len(self._points)))
        self._progress("points", done, len(self._points))

    def _result(self, index: int) -> PointResult:
        point = self._points[index]
        record = self._store.get("point", self._keys[index]) or {}
        timed = (self._store.get("latency", self._timed_keys[index]) or {}) if self._latency else {}
        if self._latency and index == 0 and record:
            # Others are measured in turn with it.
            timed = {"metrics": {"latency": 1.0}}
        details = {**record.get("details", {}), **({"latency": timed["details"]} if "details" in timed else {})}
        return PointResult(
            family=point.family,
            values=dict(point.values),
            recipe=point.text,
            metrics={**record.get("metrics", {}), **timed.get("metrics", {})},
            details=details,
            error=record.get("error"),
        )
