"""What the subcommands share: the one exception, and the filters of those that read logs."""

from __future__ import annotations

import argparse
import re

__all__ = ["UsageError", "add_filters", "pattern", "positive"]


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
