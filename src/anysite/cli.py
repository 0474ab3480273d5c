"""The command line: its verbs, its exit codes, and how errors are told."""

from __future__ import annotations

import sys
import traceback
from typing import Annotated, Any, NoReturn, cast

import typer

from anysite import __version__
from anysite.commands.data import check, info, methods
from anysite.commands.demo import demo, phantom
from anysite.commands.prediction import judge, predict
from anysite.commands.results import benchmark, evaluate, report
from anysite.commands.training import pretrain, reflect, train
from anysite.errors import AnysiteError, ConfigError, FileFormatError, Interrupted

CRASHED = 70  # the exit code of a defect: EX_SOFTWARE of sysexits.h

# Click's UsageError, which Typer brings along under a name of its own.
UsageError = cast("type[Exception]", typer.BadParameter.__mro__[1])

app = typer.Typer(
    name="anysite",
    help="Segmentation trained on the hospitals you have, tested on those you don't.",
    add_completion=False,
    pretty_exceptions_enable=False,
    epilog="Exit codes: 0 done, 1 done but cases failed or were rejected, 2 misuse or bad input, "
    "3 interrupted and saved, 70 a defect of anysite, 130 interrupted.",
)


def main() -> None:
    """Run the command line and exit with its documented code."""
    try:
        code = app(sys.argv[1:] or ["--help"], prog_name="anysite", standalone_mode=False)
        if code == Interrupted.exit_code:  # Typer's answer to Ctrl-C
            raise Interrupted("interrupted", fix="run it again: what was finished before is kept")
        sys.exit(code)
    except AnysiteError as error:
        _fail(error)
    except UsageError as error:
        _fail(_explain(error))
    except OSError as error:
        _fail(
            FileFormatError(
                error.strerror or str(error),
                where=error.filename or "",
                fix="check the path, its permissions and the space left",
            )
        )
    except Exception:  # noqa: BLE001 - by default it would end with 1, which scripts take for work that is done
        traceback.print_exc()
        sys.exit(CRASHED)


def _fail(error: AnysiteError) -> NoReturn:
    from anysite import console

    console.complain(error)
    sys.exit(error.exit_code)


def _explain(error: Any) -> ConfigError:
    text = " ".join(error.format_message().split())
    return ConfigError(text, fix=f"see {error.ctx.command_path} --help" if error.ctx else "")


def _show_version(value: bool) -> bool:
    if value:
        typer.echo(f"anysite {__version__}")
        raise typer.Exit
    return value


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    pass


for verb in (
    demo, check, train, pretrain, reflect, predict, judge, evaluate, report, benchmark, methods, info, phantom,
):  # fmt: skip
    app.command()(verb)
