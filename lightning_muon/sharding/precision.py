"""Which precisions the sharded strategies take."""

from __future__ import annotations

__all__ = ["refuse_float16"]


def refuse_float16(plugin: object, strategy: str) -> None:
    """Refuse a precision plugin in float16: with a scaler, each rank would decide by itself whether to skip a step;
    without one, gradients overflow.

    Raises:
        ValueError: The plugin computes in float16.
    """
    precision = str(getattr(plugin, "precision", ""))
    if getattr(plugin, "scaler", None) is not None or precision in ("16-mixed", "16-true"):
        raise ValueError(
            f"{strategy} does not support precision={precision!r} yet: whether a step overflows must be decided for"
            " all processes together. Use 'bf16-mixed', 'bf16-true' or '32-true'."
        )
