"""Pictures of a run, from its TensorBoard event files."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curve = list[tuple[int, float]]  # (optimizer step, value)

NOT_MUON = "embedding, head"

# One entry per kind of matrix, in the order of the legend. Colours differ in lightness as well as in hue.
GROUPS: dict[str, tuple[str, str]] = {
    "attention": (r"self_attn", "#4c72b0"),
    "dense": (r"layers\.0\.mlp\.(gate|up|down)_proj", "#8c8c8c"),
    "router": (r"mlp\.gate\.weight", "#c44e52"),
    "experts": (r"mlp\.experts", "#dd8452"),
    "shared experts": (r"shared_experts", "#e3b23c"),
    NOT_MUON: (r"embed_tokens|lm_head", "#55a868"),
}


def read_scalars(folder: Path) -> dict[str, Curve]:
    """Every logged scalar of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})  # 0: all points
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def draw_loss(scalars: dict[str, Curve], path: Path, tokens_per_step: int, title: str) -> Path:
    """Training and validation loss over tokens; the right axis tells bits per byte."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for tag, label, style in (("train/loss", "training", "-"), ("val/loss", "validation", "o-")):
        curve = scalars.get(tag, [])
        millions = [(step + 1) * tokens_per_step / 1e6 for step, _ in curve]
        colour = "#9db4d6" if label == "training" else "#1f3a68"
        losses = [value for _, value in curve]
        if label == "training":  # single batches, pale, below their running mean
            axes.plot(millions, losses, color=colour, alpha=0.35, linewidth=1)
            losses = _running_mean(losses, 10)
        axes.plot(millions, losses, style, color=colour, label=label, linewidth=1.8, markersize=5)
        if curve and label == "validation":
            axes.annotate(
                f"{curve[-1][1]:.3f}", (millions[-1], curve[-1][1]), (0, 9), textcoords="offset points", ha="center"
            )
    _frame(axes, "tokens (millions)", "loss (nats per byte)")
    bits = axes.secondary_yaxis("right", functions=(_nats_to_bits, _bits_to_nats))
    bits.set_ylabel("bits per byte")
    axes.legend(frameon=False)
    axes.set_title(title, loc="left", fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def draw_matrices(scalars: dict[str, Curve], path: Path, title: str) -> Path:
    """Update RMS, weight RMS, spectral norm and SVD entropy over steps: each kind of matrix's mean and range."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {
        "muon/update_rms": "update RMS (before the learning rate)",
        "muon/weight_rms": "weight RMS",
        "muon/weight_spectral_norm": "largest singular value of the weight",
        "muon/weight_svd_entropy": "SVD entropy of the weight (1 = all equal)",
    }
    figure, grid = plt.subplots(2, 2, figsize=(10, 6.4), layout="constrained", sharex=True)
    for axes, (metric, label) in zip(grid.flat, panels.items(), strict=True):
        for group, (pattern, colour) in GROUPS.items():
            if group == NOT_MUON and "update" not in metric:
                continue  # AdamW lets their rare rows grow without bound in comparison; they would flatten the rest
            curves = {
                tag: curve for tag, curve in scalars.items() if tag.startswith(metric + "/") and _is(pattern, tag)
            }
            if not curves:
                continue
            # A stack of matrices has its extremes beside its mean: they belong to the range alone.
            mean = _by_step(curve for tag, curve in curves.items() if not tag.endswith((".min", ".max")))
            span = _by_step(curves.values())
            axes.plot(list(mean), [sum(v) / len(v) for v in mean.values()], color=colour, label=group, linewidth=1.8)
            lowest, highest = [min(v) for v in span.values()], [max(v) for v in span.values()]
            axes.fill_between(list(span), lowest, highest, color=colour, alpha=0.12, linewidth=0)
        _frame(axes, "", label)
        axes.set_title(label, loc="left", fontsize=10)
        axes.set_ylabel("")
    for axes in grid[-1]:
        axes.set_xlabel("optimizer step")
    handles = {text: line for axes in grid.flat for line, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(GROUPS), frameon=False)
    figure.suptitle(f"{title}: mean and range over each kind of matrix", x=0.01, ha="left", fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _is(pattern: str, tag: str) -> bool:
    """Whether a logged matrix is of a kind; norms' vectors are of none."""
    return re.search(pattern, tag) is not None and "norm.weight" not in tag


def _by_step(curves: Iterable[Curve]) -> dict[int, list[float]]:
    """All values at each step, steps in order."""
    values: dict[int, list[float]] = {}
    for step, value in sorted(point for curve in curves for point in curve):
        values.setdefault(step, []).append(value)
    return values


def _running_mean(values: list[float], window: int) -> list[float]:
    """The mean of the values around each; fewer near the ends, as many before as after."""
    halves = [min(window // 2, i, len(values) - 1 - i) for i in range(len(values))]
    parts = [values[i - half : i + half + 1] for i, half in enumerate(halves)]
    return [sum(part) / len(part) for part in parts]


def _nats_to_bits(nats: Any) -> Any:
    return nats / math.log(2)


def _bits_to_nats(bits: Any) -> Any:
    return bits * math.log(2)


def _frame(axes: Axes, x_label: str, y_label: str) -> None:
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
