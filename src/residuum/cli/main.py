"""The command `residuum`: its subcommands, and what becomes of errors."""

from __future__ import annotations

import io
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from types import FrameType

from cyclopts import App, CycloptsError

import residuum
from residuum.cli import console
from residuum.errors import ResiduumError
from residuum.training.stopping import Stopped

app = App(
    name="residuum",
    help="Residual networks: train them, judge them, put them to use.\n\nStart with: `residuum train`",
    version=residuum.__version__,
    print_error=False,
    exit_on_error=False,
    help_format="markdown",
    result_action="return_value",
)
app.command("residuum.cli.train:train", name="train")
app.command("residuum.cli.evaluate:evaluate", name="evaluate")
app.command("residuum.cli.predict:predict", name="predict")
app.command("residuum.cli.explain:explain", name="explain")
app.command("residuum.cli.push:push", name="push")
app.command("residuum.cli.serve:serve", name="serve")
app.command("residuum.cli.inspect:inspect", name="inspect")
app.command("residuum.cli.study:study", name="study")
app.command("residuum.cli.weights:import_", name="import")
app.command("residuum.cli.weights:export", name="export")

data = App(name="data", help="Check data before you train on them; pack them into shards.")
data.command("residuum.cli.data:check", name="check")
data.command("residuum.cli.data:pack", name="pack")
app.command(data)

detect = App(name="detect", help="Find objects on pictures: train a detector on boxes, judge it, use it.")
segment = App(name="segment", help="Say what every pixel shows: train a segmenter on masks, judge it, use it.")
for command in ("train", "evaluate", "predict", "export"):
    detect.command(f"residuum.cli.detect:{command}", name=command)
    segment.command(f"residuum.cli.segment:{command}", name=command)
detect.command("residuum.cli.detect:localise", name="localise")
app.command(detect)
app.command(segment)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command and exits: 0, 1 (it failed), 2 (it was asked for wrongly) or 128 + signal (it was stopped)."""
    # until a command has its own: a container's first process has no default action
    signal.signal(signal.SIGTERM, _stop)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # a file's name goes out as the bytes that it is
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def _stop(signum: int, _: FrameType | None) -> None:
    signal.signal(signum, signal.SIG_DFL)  # a second one ends it at once, not in the middle of saying so
    raise Stopped(signum, "stopped.")


def run(arguments: Sequence[str]) -> int:
    """Runs one command; its exit code. Errors become one sentence on standard error."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default", UserWarning)
            warnings.showwarning = console.Warner()
            app([_at_home(argument) for argument in arguments] or ["--help"])
        if sys.stdout is not None:
            sys.stdout.flush()
    except CycloptsError as error:
        console.fail(" ".join(str(error).split()) + " (residuum --help lists what there is)")
        return 2
    except ResiduumError as error:
        console.fail(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        console.fail("interrupted.")
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OSError, MemoryError, UnicodeError) as error:  # what no command has a better sentence for
        console.fail(f"{error.__class__.__name__}: {error}")
        return 1
    except BaseException as error:
        if (code := getattr(error, "exit_code", None)) is None:
            raise
        console.fail(str(error))
        return int(code)
    return 0


def _at_home(argument: str) -> str:
    """--out=~/runs as --out ~/runs: shells replace ~ only where a word begins with it, and a folder called ~ is a trap."""
    option, _, value = argument.partition("=")
    at_home = option.startswith("--") and value.startswith("~")
    return f"{option}={os.path.expanduser(value)}" if at_home else argument
