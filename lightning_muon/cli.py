"""The command ``lightning-muon``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lightning_muon.advising.command import add_advise
from lightning_muon.planning.command import add_plan
from lightning_muon.reporting.command import add_report
from lightning_muon.scaling.command import add_fit
from lightning_muon.usage import UsageError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand and print what it returns.

    Args:
        arguments: The command line; ``None`` is the process's own.

    Returns:
        The exit status: 0, or 2 for input that cannot be used, with the reason on stderr.
    """
    parser = argparse.ArgumentParser(prog="lightning-muon", description="Tools around the Muon optimizer.")
    subcommands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    add_plan(subcommands)
    add_fit(subcommands)
    add_advise(subcommands)
    add_report(subcommands)
    options, unknown = parser.parse_known_args(arguments)
    if unknown:  # argparse by itself would show the usage of the command above
        subcommands.choices[options.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        output = options.run(options)
    except UsageError as error:
        sys.stderr.write(f"lightning-muon {options.command}: error: {error}\n")
        return 2
    sys.stdout.write(output + "\n")
    return 0
