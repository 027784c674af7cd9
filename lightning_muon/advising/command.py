"""``lightning-muon advise``: its options, and what it does with them."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from lightning_muon.advising.advice import advise
from lightning_muon.advising.observed import PERCENTS, observe
from lightning_muon.advising.report import figures, table
from lightning_muon.logs import LogError
from lightning_muon.orthogonalize import Auto
from lightning_muon.usage import UsageError, add_filters, write

__all__ = ["add_advise"]

_DESCRIPTION = """\
The cheapest orthogonalisation of every layer, from the logs of MomentumSpectrumMonitor: for each layer type and quarter
of the depth the fewest steps of Polar Express, on input divided by its Schatten-4 norm, that bring a quantile of the
singular values of every matrix, as low as it was in the last quarter of the logged steps, into the band around 1; what
that saves; and code to paste. TensorBoard and CSV logs are read.
"""

_EPILOG = """\
  lightning-muon advise runs/demo
  lightning-muon advise runs/demo --quantile q75 --band 0.2 --exclude router --json advice.json

It is the rule of orthogonalization="auto", for a run that is over: never finer than what rounding in the iteration's
precision leaves of small singular values. docs/orthogonalization.md explains it.
"""


def add_advise(subcommands: Any) -> None:
    """Add ``advise`` to the subcommands of a parser."""
    parser: argparse.ArgumentParser = subcommands.add_parser(
        "advise",
        help="the cheapest orthogonalisation of every layer, from logged momentum spectra",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("logdir", type=Path, metavar="LOGDIR", help="logs of a run, at any depth below")
    parser.add_argument(
        "--quantile",
        choices=[f"q{percent}" for percent in PERCENTS],
        default="q90",
        help="of the singular values, from the top, that has to end in the band; those below it are given up"
        " (default: %(default)s)",
    )
    parser.add_argument(
        "--band", type=_band, default=0.1, metavar="B", help="1 - B to 1 + B, 0.01 to 0.5 (default: %(default)g)"
    )
    add_filters(parser)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all figures and the code there")


def run(options: argparse.Namespace) -> str:
    """The output of ``lightning-muon advise``.

    Raises:
        UsageError: The logs cannot be read, or have no spectra.
    """
    percent = int(options.quantile.removeprefix("q"))
    try:
        observed = observe(options.logdir, percent, options.include, options.exclude)
    except LogError as error:
        raise UsageError(str(error)) from None
    advices = advise(observed.needs, percent, Auto(band=options.band))
    if options.json:
        write(options.json, json.dumps(figures(observed, advices, percent, options.band), indent=1) + "\n")
    return table(observed, advices, percent, options.band)


def _band(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.01 <= value <= 0.5:
        raise argparse.ArgumentTypeError(f"expected a number from 0.01 to 0.5, got {text!r}")
    return value
