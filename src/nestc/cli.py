"""The command line: one module a command, and one place that turns every failure into a sentence and an exit status."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer
from typer.exceptions import TyperException

from nestc import __version__
from nestc.commands.bench import bench
from nestc.commands.calibrate import calibrate
from nestc.commands.compile import compile_
from nestc.commands.demo import demo
from nestc.commands.evaluate import evaluate
from nestc.commands.explain import explain
from nestc.commands.partition import partition
from nestc.commands.quantize import quantize
from nestc.commands.report import report
from nestc.commands.run import run
from nestc.commands.targets import targets
from nestc.commands.tune import tune
from nestc.errors import Error

DONE, OUR_BUG, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

# What the user can mend: no such file, no permission, a full or read-only disk, a folder where a file is meant.
_USERS_ERRNO = {
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.EFBIG,
}

app = typer.Typer(
    name="nestc",
    help="Compile trained networks (ONNX) to native code for the CPU and other devices.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("compile")(compile_)
app.command("run")(run)
app.command("bench")(bench)
app.command("evaluate")(evaluate)
app.command("calibrate")(calibrate)
app.command("quantize")(quantize)
app.command("partition")(partition)
app.command("demo")(demo)
app.command("explain")(explain)
app.command("report")(report)
app.command("targets")(targets)
app.command("tune")(tune)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"nestc {__version__}")
        raise typer.Exit


@app.callback()
def _root(  # pyright: ignore[reportUnusedFunction]
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Compile trained networks (ONNX) to native code for the CPU and other devices."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and leave with its status: 0 done, 2 bad input, 1 a bug of ours."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    sys.exit(status(given))


def status(arguments: Sequence[str]) -> int:
    """Run a command and give its exit status; failures are printed on stderr, in one sentence."""
    debug = "--debug" in arguments
    try:
        try:
            result = app(list(arguments), prog_name="nestc", standalone_mode=False)
        except SystemExit:
            # Typer leaves by itself, with 1, where the reader of our output has; nothing else of it does.
            raise BrokenPipeError from None
        sys.stdout.flush()
        # A bare `nestc` has printed its help.
        return result if isinstance(result, int) else DONE
    except typer.Exit as leaving:
        return leaving.exit_code
    except TyperException as error:
        message = " ".join(error.format_message().split())
        # Without arguments the whole help is the message; it has been asked for, in a way, and is not an error's text.
        return _report(message or "give a command; nestc --help lists them", BAD_INPUT, debug)
    except Error as error:
        return _report(str(error), BAD_INPUT, debug)
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output left (`| head`); point stdout elsewhere so that the interpreter's flush is quiet.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except OSError as error:
        if error.errno not in _USERS_ERRNO:
            return _bug(error, debug)
        where = f"{error.filename}: " if error.filename else ""
        return _report(f"{where}{error.strerror}", BAD_INPUT, debug)
    except Exception as error:  # noqa: BLE001 - the last resort: whatever it is, it is ours, and is reported as such
        return _bug(error, debug)


def _report(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"nestc: {message}", file=sys.stderr)
    return code


def _bug(error: Exception, debug: bool) -> int:
    hint = "" if debug else " (--debug shows where)"
    return _report(f"a bug in nestc, {type(error).__name__}: {error}{hint}", OUR_BUG, debug)
