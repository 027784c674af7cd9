"""What ``orthogonalization=`` may say, and which sequence it means."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lightning_muon.orthogonalize.auto import Auto
from lightning_muon.orthogonalize.generator import polar_express
from lightning_muon.orthogonalize.published import PUBLISHED
from lightning_muon.orthogonalize.sequence import PolynomialSequence

__all__ = [
    "Orthogonalization",
    "auto_settings",
    "available_sequences",
    "nominal_sequence",
    "plain",
    "polynomial_sequence",
    "same_orthogonalization",
]

Orthogonalization = str | Mapping[str, Any] | Sequence[Sequence[float]]


def available_sequences() -> tuple[str, ...]:
    """The names that stand for one sequence."""
    return (*PUBLISHED, "exact")


def polynomial_sequence(orthogonalization: Orthogonalization) -> PolynomialSequence | None:
    """The sequence that an ``orthogonalization`` argument means.

    Args:
        orthogonalization: A name from ``available_sequences``; the ``(a, b, c)`` of each step; or a mapping:
            ``{"name": "keller5", "norm": "schatten4"}``, one of the names with another norm to divide the input by, or
            ``{"name": "polar_express", "steps": 6, "lower": 1e-4}``, the arguments of ``polar_express``.

    Returns:
        The sequence, or ``None`` for ``"exact"``, which is no polynomial.

    Raises:
        ValueError: The name or an argument is unknown, a step is not three finite numbers, or it is ``"auto"``, which
            is no one sequence.
    """
    if isinstance(orthogonalization, str):
        return _named(orthogonalization, {})
    if isinstance(orthogonalization, Mapping):
        arguments = dict(orthogonalization)
        if "name" not in arguments:
            raise ValueError(f'orthogonalization={dict(orthogonalization)!r} needs a "name".')
        return _named(arguments.pop("name"), arguments)
    if not isinstance(orthogonalization, Sequence):
        raise TypeError(
            f"orthogonalization={orthogonalization!r} is not understood: give a name,"
            f" {', '.join(available_sequences())} or auto, the (a, b, c) of each step, or a mapping with a 'name'."
        )
    steps = []
    for step in orthogonalization:
        if not isinstance(step, Sequence) or isinstance(step, str) or len(step) != 3 or not all(map(_is_number, step)):
            raise ValueError(
                f"Each step of `orthogonalization` is three finite numbers (a, b, c); got {step!r}. The same step five"
                " times is [(a, b, c)] * 5."
            )
        steps.append((float(step[0]), float(step[1]), float(step[2])))
    if not steps:
        raise ValueError("`orthogonalization` needs at least one step (a, b, c).")
    return PolynomialSequence("custom", tuple(steps), "given by the caller")


def auto_settings(orthogonalization: Orthogonalization) -> Auto | None:
    """The settings of ``"auto"``, or ``None`` for anything else.

    Args:
        orthogonalization: ``"auto"``, or ``{"name": "auto", "quantile": 0.1, ...}`` with the arguments of ``Auto``.

    Raises:
        ValueError: An argument of ``Auto`` is unknown or out of range.
    """
    if orthogonalization == "auto":
        return Auto()
    if isinstance(orthogonalization, Mapping) and orthogonalization.get("name") == "auto":
        arguments = {key: value for key, value in orthogonalization.items() if key != "name"}
        _check_keys("auto", arguments, ("quantile", "band", "every", "most_steps"))
        return Auto(**arguments)
    return None


def nominal_sequence(orthogonalization: Orthogonalization) -> PolynomialSequence | None:
    """The sequence to count with before anything was measured: for ``"auto"`` five steps."""
    auto = auto_settings(orthogonalization)
    return polynomial_sequence(orthogonalization) if auto is None else auto.sequence(5)


def same_orthogonalization(one: Orthogonalization, other: Orthogonalization) -> bool:
    """Whether two arguments mean the same, to 10 digits: a name and its definition in full, say."""
    return bool(_meaning(one) == _meaning(other))


def _meaning(orthogonalization: Orthogonalization) -> Any:
    auto = auto_settings(orthogonalization)
    sequence = None if auto is not None else polynomial_sequence(orthogonalization)
    if sequence is None:
        return auto or "exact"
    steps = [tuple(float(f"{value:.10g}") for value in step) for step in sequence.steps]
    return steps, sequence.safety, sequence.norm


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def plain(orthogonalization: Orthogonalization) -> str | dict[str, Any] | tuple[tuple[float, ...], ...]:
    """The same in strings, numbers, tuples and dictionaries, as it goes into checkpoints."""
    if isinstance(orthogonalization, str):
        return orthogonalization
    if isinstance(orthogonalization, Mapping):
        return dict(orthogonalization)
    return tuple(tuple(map(float, step)) for step in orthogonalization)


def _named(name: Any, arguments: dict[str, Any]) -> PolynomialSequence | None:
    if name == "polar_express":
        _check_keys(name, arguments, ("steps", "lower", "cushion", "safety", "norm"))
        if not {"steps", "lower"} <= set(arguments):
            raise ValueError('{"name": "polar_express"} needs "steps" and "lower", 6 and 1e-4 say.')
        for key in ("lower", "cushion", "safety"):
            if key in arguments and not _is_number(arguments[key]):
                raise ValueError(
                    f"{key}={arguments[key]!r} of 'polar_express' must be a finite number (YAML wants 1.0e-4 for 1e-4)."
                )
        if not isinstance(arguments["steps"], int) or isinstance(arguments["steps"], bool):
            raise ValueError(f"steps={arguments['steps']!r} of 'polar_express' must be a whole number.")
        return polar_express(**arguments)
    if name == "auto":
        raise ValueError('"auto" is no one sequence: lightning_muon.Muon chooses one for each matrix.')
    if name == "exact":
        _check_keys(name, arguments, ())
        return None
    if name not in PUBLISHED:
        raise ValueError(
            f"orthogonalization={name!r} is not known. Choose one of {', '.join(available_sequences())}, auto,"
            ' or give a sequence of (a, b, c), or {"name": "polar_express", "steps": 6, "lower": 1e-4}.'
        )
    _check_keys(name, arguments, ("norm",))
    norm = arguments.get("norm", "frobenius")
    if norm not in ("frobenius", "schatten4"):
        raise ValueError(f"norm={norm!r} of {name!r} is not known; choose 'frobenius' or 'schatten4'.")
    return replace(PUBLISHED[name], norm=norm)


def _check_keys(name: str, arguments: Mapping[str, Any], known: Sequence[str]) -> None:
    unknown = sorted(set(arguments) - set(known))
    if unknown:
        raise ValueError(
            f"orthogonalization={name!r} does not know {', '.join(map(repr, unknown))};"
            f" it knows {', '.join(map(repr, known)) if known else 'no arguments'}."
        )
