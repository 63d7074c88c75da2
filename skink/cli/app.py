"""The commands in one place, and what happens when one fails."""

import errno
import sys
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from skink.cli.arguments import VariadicCommand
from skink.cli.bench import bench
from skink.cli.bisect import bisect
from skink.cli.compress import compress
from skink.cli.console import DEFECT, INTERRUPTED, Session
from skink.cli.evaluate import evaluate
from skink.cli.explore import explore
from skink.cli.export import export
from skink.cli.generate import generate
from skink.cli.inspect import inspect
from skink.cli.passes import passes
from skink.cli.quiet import quiet_python
from skink.cli.repro import repro
from skink.cli.signals import hear_signals
from skink.errors import OutputError, SkinkError

# A command line that cannot be read: click's class, or in later versions typer's own.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


class SkinkGroup(TyperGroup):
    """Runs a command in a session, and turns what it raises into text, JSON and an exit status."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        options = args[: args.index("--")] if "--" in args else args
        ctx.obj = Session.start(as_json="--json" in options)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        session: Session = ctx.obj
        try:
            with quiet_python(session):
                return super().invoke(ctx)
        except SkinkError as error:
            session.fail(error)
            raise typer.Exit(1) from error
        except _UsageError as error:
            session.fail_usage(str(getattr(error, "format_message", error.__str__)()))
            raise
        except KeyboardInterrupt as error:
            session.interrupted()
            raise typer.Exit(INTERRUPTED) from error
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                # The reader of our output has gone; typer ends quietly.
                raise
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                session.fail(_no_space(error))
                raise typer.Exit(1) from error
            session.defect(error)
            raise typer.Exit(DEFECT) from error


def _no_space(error: OSError) -> OutputError:
    return OutputError(
        "OUTPUT-002",
        "no space left on the device.",
        where=str(error.filename or ""),
        why=str(error),
        fix="free some space, or set TMPDIR to a folder with more of it.",
    )


app = typer.Typer(
    name="skink",
    cls=SkinkGroup,
    help="A compiler for smaller, faster language models.",
    epilog="Start with: skink compress stdlib-llama --recipe quickstart --out smaller",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"skink {version('skink')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


for _name, _command in (
    ("compress", compress),
    ("inspect", inspect),
    ("eval", evaluate),
    ("generate", generate),
    ("export", export),
    ("bench", bench),
    ("explore", explore),
    ("passes", passes),
    ("bisect", bisect),
    ("repro", repro),
):
    app.command(_name, cls=VariadicCommand)(_command)


def main() -> NoReturn:
    """The console script."""
    hear_signals()
    try:
        app(prog_name="skink")
    except KeyboardInterrupt:
        # Before or after the command itself.
        sys.exit(INTERRUPTED)
    sys.exit(0)
