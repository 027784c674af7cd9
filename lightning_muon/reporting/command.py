"""``lightning-muon report``: its options, and what it does with them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lightning_muon.logs import LogError
from lightning_muon.reporting.contents import contents
from lightning_muon.reporting.page import page
from lightning_muon.reporting.runs import read_runs
from lightning_muon.usage import UsageError, add_filters, pattern, positive

__all__ = ["add_report"]

_LOSS = r"(^|[/_.-])loss(_step|_epoch)?$"
_MAX_ROWS = 120

_DESCRIPTION = """\
What the monitors have logged, as one HTML page that needs nothing else: loss curves, heat maps of layer over time
(update RMS, SVD entropy, the momentum's median, directions that Newton-Schulz misses, and more), spectra of each
matrix with the zone in which the polynomials fail, norms, alarms, and a table of the layers. TensorBoard and CSV logs
are read; several runs are put side by side.
"""

_EPILOG = """\
  lightning-muon report runs/demo
  lightning-muon report runs/muon runs/adamw -o muon_and_adamw.html
  lightning-muon report runs/large --include 'layers\\.(0|13|26)\\.'

Every folder with scalars at or below a LOGDIR is a run. Failure zones and widths come from muon_model.json beside them,
which MomentumSpectrumMonitor writes. docs/report.md shows the page.
"""


def add_report(subcommands: Any) -> None:
    """Add ``report`` to the subcommands of a parser."""
    parser: argparse.ArgumentParser = subcommands.add_parser(
        "report",
        help="one HTML page of pictures from a run's logs, or of several to compare",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("logdirs", nargs="+", type=Path, metavar="LOGDIR", help="logs of runs, at any depth below")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("report.html"),
        metavar="PATH.html",
        help="the page (default: %(default)s)",
    )
    parser.add_argument(
        "--loss",
        type=pattern,
        default=_LOSS,
        metavar="REGEX",
        help="keys of the loss curves (default: those whose last word is loss)",
    )
    parser.add_argument(
        "--max-rows",
        type=positive,
        default=_MAX_ROWS,
        metavar="N",
        help="layers in a picture; of more, blocks spread over the depth are shown (default: %(default)s)",
    )
    add_filters(parser)


def run(options: argparse.Namespace) -> str:
    """The output of ``lightning-muon report``.

    Raises:
        UsageError: The logs cannot be read, plotly is missing, or the page cannot be written.
    """
    plotly_js = _plotly_js()
    try:
        found = read_runs(options.logdirs, options.include, options.exclude)
    except LogError as error:
        raise UsageError(str(error)) from None
    sections = contents(found.runs, options.loss, options.max_rows)
    content = page(found.runs, sections, found.notes, plotly_js).encode()
    try:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_bytes(content)
    except OSError as error:
        raise UsageError(f"cannot write {options.output}: {error.strerror}") from None
    number, charts = len(found.runs), sum(len(section.charts) for section in sections)
    size = f"{charts} figures of {number} run{'s' * (number > 1)}, {len(content) / 1e6:.1f} MB"
    return "\n".join([f"{options.output}: {size}", *(f"  {note}" for note in found.notes)])


def _plotly_js() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise UsageError("the page's figures need plotly: pip install 'lightning-muon[report]'") from None
    source: str = get_plotlyjs()
    return source
