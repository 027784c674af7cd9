"""Tables and sentences of results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float | None, digits: int = 3, sign: bool = False) -> str:
    """A number with so many decimals, or a dash for none."""
    if value is None:
        return "–"
    return f"{value:{'+' if sign else ''}.{digits}f}"


def p_value(p: float | None) -> str:
    """A probability, as far as it is worth saying."""
    if p is None:
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def verdict(is_seen: bool) -> str:
    """How a finding on a claim begins."""
    return "Seen" if is_seen else "Not seen"


def listed(items: Sequence[str]) -> str:
    """``a, b and c``."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
