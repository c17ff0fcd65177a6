"""The command `resnetlab`: its subcommands and its error handling."""

from __future__ import annotations

import io
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from types import FrameType

from cyclopts import App, CycloptsError

import resnetlab
from resnetlab.cli import console
from resnetlab.errors import ResNetLabError
from resnetlab.training.stopping import StopSignal

app = App(
    name="resnetlab",
    help="Residual networks: train, evaluate and deploy them.\n\nStart with: `resnetlab train`",
    version=resnetlab.__version__,
    print_error=False,
    exit_on_error=False,
    help_format="markdown",
    result_action="return_value",
)
app.command("resnetlab.cli.train:train", name="train")
app.command("resnetlab.cli.launch:train_process", name="_train-process", show=False)
app.command("resnetlab.cli.evaluate:evaluate", name="evaluate")
app.command("resnetlab.cli.predict:predict", name="predict")
app.command("resnetlab.cli.explain:explain", name="explain")
app.command("resnetlab.cli.push:push", name="push")
app.command("resnetlab.cli.serve:serve", name="serve")
app.command("resnetlab.cli.inspect:inspect", name="inspect")
app.command("resnetlab.cli.study:study", name="study")
app.command("resnetlab.cli.weights:import_", name="import")
app.command("resnetlab.cli.weights:export", name="export")

data = App(name="data", help="Check data before training; pack them into shards.")
data.command("resnetlab.cli.data:check", name="check")
data.command("resnetlab.cli.data:pack", name="pack")
app.command(data)

detect = App(name="detect", help="Detect objects: train a detector on boxes, evaluate it, use it.")
segment = App(name="segment", help="Label every pixel: train a segmenter on masks, evaluate it, use it.")
for command in ("train", "evaluate", "predict", "export"):
    detect.command(f"resnetlab.cli.annotated:detect_{command}", name=command)
    segment.command(f"resnetlab.cli.annotated:segment_{command}", name=command)
detect.command("resnetlab.cli.annotated:detect_localise", name="localise")
app.command(detect)
app.command(segment)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command and exits: 0, 1 (failed), 2 (wrong request) or 128 + signal (stopped)."""
    # until a command sets its own handler: the first process of a container has no default action
    signal.signal(signal.SIGTERM, _handle_sigterm)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # file names are printed as their bytes
    sys.exit(run_command(sys.argv[1:] if arguments is None else arguments))


def _handle_sigterm(signum: int, _: FrameType | None) -> None:
    signal.signal(signum, signal.SIG_DFL)  # a second signal ends the process at once
    raise StopSignal(signum, "stopped.")


def run_command(arguments: Sequence[str]) -> int:
    """Runs one command and returns its exit code. Errors become one sentence on standard error."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default", UserWarning)
            warnings.showwarning = console.WarningPrinter()
            app([_expand_home(argument) for argument in arguments] or ["--help"])
        if sys.stdout is not None:
            sys.stdout.flush()
    except CycloptsError as error:
        console.log_error(" ".join(str(error).split()) + " (resnetlab --help lists what there is)")
        return 2
    except ResNetLabError as error:
        console.log_error(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        console.log_error("interrupted.")
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OSError, MemoryError, UnicodeError) as error:  # without a better message from the command
        console.log_error(f"{error.__class__.__name__}: {error}")
        return 1
    except BaseException as error:
        if (code := getattr(error, "exit_code", None)) is None:
            raise
        console.log_error(str(error))
        return int(code)
    return 0


def _expand_home(argument: str) -> str:
    """Expands ~ in --out=~/runs: shells expand it only at the start of a word, and a folder named ~ is a trap."""
    option, _, value = argument.partition("=")
    at_home = option.startswith("--") and value.startswith("~")
    return f"{option}={os.path.expanduser(value)}" if at_home else argument
