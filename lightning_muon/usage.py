"""What the subcommands share: the one exception, and the filters of those that read logs."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

__all__ = ["UsageError", "add_filters", "columns", "pattern", "positive", "write"]


class UsageError(ValueError):
    """The user's input cannot be used; the message says what was wrong and what to do."""


def add_filters(parser: argparse.ArgumentParser) -> None:
    """Add ``--include`` and ``--exclude``, regular expressions over the names of parameters."""
    parser.add_argument("--include", type=pattern, metavar="REGEX", help="only parameters whose name matches")
    parser.add_argument("--exclude", type=pattern, metavar="REGEX", help="no parameter whose name matches")


def pattern(text: str) -> str:
    """The type of an argument that is a regular expression."""
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"expected a regular expression, got {text!r}: {error}") from None
    return text


def positive(text: str) -> int:
    """The type of an argument that is a whole number of 1 or more."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of 1 or more, got {text!r}")
    return value


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """A table's lines: left-aligned, with a rule below the first row."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [lines[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *lines[1:]]


def write(path: Path, content: str | bytes) -> None:
    """Write a file that the user has asked for, and the folders above it.

    Raises:
        UsageError: It cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from None
