"""The command `resnetlab`, also as `python -m resnetlab`."""

from __future__ import annotations

from resnetlab.stopping import end_on_stop_signals


def main() -> None:
    """Runs the command line. Signals are handled before its imports, which take most of a start."""
    with end_on_stop_signals():
        from resnetlab.cli.main import main as run

        run()


if __name__ == "__main__":
    main()
