"""The report's two files in an output folder."""

import os
import secrets
from pathlib import Path

from pydantic import ValidationError

from skink.errors import InputError, OutputError
from skink.export.report import formatting as fmt
from skink.export.report.html import page
from skink.export.report.model import Report

JSON_NAME = "report.json"
HTML_NAME = "report.html"
_PROBLEMS_SHOWN = 5


def write_report(report: Report, folder: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Write `report.json` and `report.html` into `folder`, which exists, and return their paths.

    Each is written under another name and then renamed, so that no reader ever sees half a file; if anything fails, or
    the user interrupts, what was there before stays and nothing is added.

    Raises:
        OutputError: OUTPUT-002, the folder cannot be written.
    """
    root = Path(folder)
    mark = secrets.token_hex(4)
    texts = {root / HTML_NAME: page(report), root / JSON_NAME: report.to_json()}
    parts = {target: root / f".{target.name}.{mark}.part" for target in texts}
    added: list[Path] = []
    complete = False
    try:
        for target, text in texts.items():
            with open(parts[target], "x", encoding="utf-8", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        # Once the first is renamed there is no way back for it: so what can be known of the second is asked before.
        for target in texts:
            if target.is_dir():
                raise IsADirectoryError(f"{str(target)!r} is a folder")
        for target, part in parts.items():
            existed = target.exists()
            os.replace(part, target)
            if not existed:
                added.append(target)
        complete = True
    except OSError as error:
        raise OutputError(
            "OUTPUT-002",
            f"The report could not be written in {str(root)!r}.",
            why=str(error),
            fix="choose a folder that exists, that you may write to, and that has space left.",
        ) from error
    finally:
        for leftover in (*parts.values(), *(() if complete else added)):
            leftover.unlink(missing_ok=True)
    return root / JSON_NAME, root / HTML_NAME


def read_report(folder: str | os.PathLike[str]) -> Report:
    """The report that `write_report` left in `folder`.

    Raises:
        InputError: INPUT-001, no report there, or one that is damaged or of a newer Skink.
    """
    path = Path(folder) / JSON_NAME
    try:
        return Report.from_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        found = [
            fmt.clean(f"{'.'.join(map(str, each['loc'])) or 'the text'}: {each['msg']}") for each in error.errors()
        ]
        more = [f"and {len(found) - _PROBLEMS_SHOWN} more"] if len(found) > _PROBLEMS_SHOWN else []
        raise InputError(
            "INPUT-001",
            f"{str(path)!r} is not a report that this Skink can read.",
            why="\n".join(found[:_PROBLEMS_SHOWN] + more),
            fix="run `skink compress` again, or use the version of Skink that wrote the folder.",
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            "INPUT-001",
            f"The report {str(path)!r} cannot be read.",
            why=str(error),
            fix="give the folder that `skink compress` wrote.",
        ) from error
