"""`python -m tests.zoo [--jobs N] [FAMILY ...]`: try every family, or those named, and write docs/zoo.md."""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from queue import Empty, Queue
from threading import Thread

from tests.zoo.table import PAGE, read, render
from tests.zoo.trial import DECODERS, ENCODERS, Row, try_decoder, try_encoder

_SECONDS = 180  # for one family


def work(kind: str, families: Sequence[str]) -> None:
    """Try families in turn, one line of JSON for each."""
    for family in families:
        row = try_decoder(family) if kind == "decoder" else try_encoder(family)
        print("row " + json.dumps(asdict(row)), flush=True)  # noqa: T201


def tried(kind: str, families: Sequence[str]) -> Iterator[Row]:
    """Rows of `families`, from a process that is started anew where a family kills it or takes too long."""
    left = list(families)
    while left:
        command = [sys.executable, "-m", "tests.zoo", "--worker", kind, *left]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        lines: Queue[str] = Queue()
        Thread(target=_read, args=(process, lines), daemon=True).start()
        while left:
            try:
                line = lines.get(timeout=_SECONDS)
            except Empty:
                yield Row(left.pop(0), "", why=f"took more than {_SECONDS} s")
                break
            if not line:
                yield Row(left.pop(0), "", why="the process died")
                break
            if line.startswith("row "):
                yield Row(**json.loads(line[4:]))
                left.pop(0)
        process.kill()
        process.wait()


def _together(kind: str, families: Sequence[str], jobs: int) -> Iterator[Row]:
    """Rows of `families` as they come, from several processes at a time."""
    rows: Queue[Row] = Queue()

    def one_job(own: Sequence[str]) -> None:
        for row in tried(kind, own):
            rows.put(row)

    for job in range(jobs):
        Thread(target=one_job, args=(families[job::jobs],), daemon=True).start()
    for _ in families:
        yield rows.get()


def _read(process: "subprocess.Popen[str]", lines: "Queue[str]") -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    lines.put("")


def main(arguments: Sequence[str]) -> None:
    """Try, print each row, and write the page; rows of families that were not tried stay as they are in it."""
    if arguments[:1] == ["--worker"]:
        work(arguments[1], arguments[2:])
        return
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="try these only; the other rows stay")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 2), help="how many at a time")
    options = parser.parse_args(arguments)
    wanted, jobs = options.families, options.jobs
    begun = time.perf_counter()
    before = read(PAGE.read_text(encoding="utf-8")) if wanted else ({}, {})
    tables = []
    for kind, names, rows in zip(("decoder", "encoder"), (DECODERS, ENCODERS), before):
        for row in _together(kind, [name for name in names if not wanted or name in wanted], jobs):
            rows[row.model_type] = row
            marks = " ".join(
                f"{part}={getattr(row, part) or '-'}" for part in ("captured", "raised", "stepped", "onnx")
            )
            print(f"{time.perf_counter() - begun:6.0f} s  {row.model_type:24} {marks}  {row.why}", flush=True)  # noqa: T201
        tables.append([rows[name] for name in names if name in rows])
    PAGE.write_text(render(*tables), encoding="utf-8")


main(sys.argv[1:])
