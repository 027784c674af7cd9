"""The one exception of the command line."""

from __future__ import annotations

__all__ = ["UsageError"]


class UsageError(ValueError):
    """The user's input cannot be planned; the message says what was wrong and what to do."""
