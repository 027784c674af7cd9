"""Arguments that several callbacks take, checked where they are given."""

from __future__ import annotations

import re
from typing import Any, Literal, get_args

__all__ = ["Mode", "check_interval", "check_mode", "check_pattern"]

Mode = Literal["brief", "detailed"]


def check_pattern(argument: str, value: Any) -> None:
    """A regular expression, or nothing.

    Raises:
        TypeError: It is no text.
        ValueError: It is no regular expression.
    """
    if value is None:
        return
    if not isinstance(value, str):
        raise TypeError(f"{argument}={value!r} must be a regular expression as text; several are 'one|other'.")
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"{argument}={value!r} is no regular expression: {error}.") from None


def check_interval(every_n_steps: Any) -> None:
    """A number of optimizer steps, or nothing.

    Raises:
        ValueError: It is no whole number of 1 or more.
    """
    if every_n_steps is None:
        return
    if not isinstance(every_n_steps, int) or isinstance(every_n_steps, bool) or every_n_steps < 1:
        raise ValueError(f"every_n_steps={every_n_steps!r} must be a whole number of optimizer steps, 1 or more.")


def check_mode(mode: Any) -> None:
    """How much is logged.

    Raises:
        ValueError: It is none of `Mode`.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"mode={mode!r} is not known; choose 'brief' or 'detailed'.")
