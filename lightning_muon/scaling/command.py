"""``lightning-muon fit``: its options, and what it does with them."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from lightning_muon.logs import LogError
from lightning_muon.scaling.ladder import read_ladder
from lightning_muon.scaling.plot import plot
from lightning_muon.scaling.report import Target, figures, fit_ladder, table
from lightning_muon.usage import UsageError, add_filters, write

__all__ = ["add_fit"]

_UNITS = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
_QUANTILES = ("q10", "q25", "q50", "q75", "q90", "q95")

_DESCRIPTION = """\
Power laws of the momentum's spectrum over model sizes, from the logs of MomentumSpectrumMonitor: per layer type and
depth the exponent of σ and of σ·√r with intervals, local slopes, a test of curvature, the extrapolation to a target
size, and the cheapest orthogonalisation that still resolves it. TensorBoard and CSV logs are read.
"""

_EPILOG = """\
  lightning-muon fit runs/ladder
  lightning-muon fit runs/ladder --target-size 300B --plot laws.png --json laws.json
  lightning-muon fit runs/small runs/medium runs/large --quantile q90 --include 'q_proj|k_proj'

Every folder with scalars at or below a LOGDIR is a run; its size is that of muon_model.json beside them. A run's value
is the geometric mean over the last quarter of its logged steps. Depths are the blocks N/4, N/2, 3N/4 and N of N.
docs/scaling.md explains how to record runs, and how to read the table.
"""


def add_fit(subcommands: Any) -> None:
    """Add ``fit`` to the subcommands of a parser."""
    parser: argparse.ArgumentParser = subcommands.add_parser(
        "fit",
        help="power laws of logged momentum spectra over model sizes",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("logdirs", nargs="+", type=Path, metavar="LOGDIR", help="logs of runs, at any depth below")
    parser.add_argument(
        "--quantile",
        choices=_QUANTILES,
        default="q50",
        help="of the singular values, from the top: q10 is a large one, q95 a small one (default: %(default)s)",
    )
    add_filters(parser)
    parser.add_argument(
        "--target-size",
        type=_size,
        metavar="M",
        help="extrapolate to a model of so many trained parameters: 300e9 or 300B",
    )
    parser.add_argument(
        "--target-rank",
        type=int,
        metavar="R",
        help="shorter side of its matrices; σ is then extrapolated by the law of σ·√r. For one kind of matrix: see"
        " --include",
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all figures there")
    parser.add_argument("--plot", type=Path, metavar="PATH.png", help="draw the laws there; needs matplotlib")


def run(options: argparse.Namespace) -> str:
    """The output of ``lightning-muon fit``.

    Raises:
        UsageError: The logs cannot be read, or have fewer than two sizes.
    """
    target = _target(options)
    try:
        ladder = read_ladder(options.logdirs, options.quantile, options.include, options.exclude)
    except LogError as error:
        raise UsageError(str(error)) from None
    fits, unfitted = fit_ladder(ladder)
    if not fits:
        sizes = sorted({point.size for points in ladder.points.values() for point in points})
        raise UsageError(
            f"a law needs runs of at least 2 sizes, better 4 or more, that have the same parameters; got"
            f" {', '.join(f'{size:,}' for size in sizes)} trained parameters"
        )
    warnings = [*ladder.warnings, *unfitted]
    if options.json:
        write(options.json, json.dumps(figures(fits, options.quantile, target, warnings), indent=1) + "\n")
    if options.plot:
        write(options.plot, plot(fits, options.quantile, target, options.plot.suffix))
    return table(fits, options.quantile, target, warnings)


def _target(options: argparse.Namespace) -> Target | None:
    if options.target_rank is not None and options.target_size is None:
        raise UsageError("--target-rank is of the model that --target-size is the size of: give both")
    if options.target_rank is not None and options.target_rank < 1:
        raise UsageError(f"--target-rank is 1 or more, got {options.target_rank}")
    return None if options.target_size is None else Target(options.target_size, options.target_rank)


def _size(text: str) -> float:
    unit = _UNITS.get(text[-1:].upper(), 1.0)
    try:
        value = unit * float(text if unit == 1 else text[:-1])
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number of parameters, like 300e9 or 300B; got {text!r}")
    return value
