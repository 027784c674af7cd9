"""A picture of singular-value spectra over time, from a run's TensorBoard histograms."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0)

# One matrix of each kind, the first that matches; a stack of experts shows all its matrices' values together.
PANELS = {
    "attention, keys and values": r"self_attn\.(kv_b_proj|k_proj)\.weight",
    "attention, output": r"self_attn\.o_proj\.weight",
    "experts, down": r"experts\.down_proj$",
    "router": r"mlp\.gate\.weight",
}

Spectrum = list[tuple[int, list[float]]]  # (optimizer step, QUANTILES of the singular values)


def read_spectra(folder: Path) -> dict[str, Spectrum]:
    """The quantiles of every matrix's singular values at every step that logged them, by parameter name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"histograms": 0})  # 0: all of them
    events.Reload()
    prefix = "muon/weight_singular_values/"
    return {
        tag.removeprefix(prefix): [(e.step, _quantiles(e.histogram_value)) for e in events.Histograms(tag)]
        for tag in events.Tags()["histograms"]
        if tag.startswith(prefix)
    }


def draw_spectra(spectra: dict[str, Spectrum], path: Path, title: str) -> Path:
    """Median, quartiles, deciles and maximum of the singular values over steps, for one matrix of each kind."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(2, 2, figsize=(10, 6.4), layout="constrained", sharex=True)
    for axes, (label, pattern) in zip(grid.flat, PANELS.items(), strict=True):
        name = next((name for name in spectra if re.search(pattern, name)), None)
        if name is None:
            axes.set_axis_off()
            continue
        steps = [step for step, _ in spectra[name]]
        d1, q1, median, q3, d9, highest = zip(*(values for _, values in spectra[name]), strict=True)
        axes.fill_between(steps, d1, d9, color="#4c72b0", alpha=0.2, linewidth=0, label="10 – 90 %")
        axes.fill_between(steps, q1, q3, color="#4c72b0", alpha=0.35, linewidth=0, label="25 – 75 %")
        axes.plot(steps, median, color="#1f3a68", linewidth=1.8, label="median")
        axes.plot(steps, highest, color="#c44e52", linewidth=1.4, label="largest")
        axes.set_yscale("log")
        axes.set_title(f"{label}: {name}", loc="left", fontsize=9)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[-1]:
        axes.set_xlabel("optimizer step")
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(f"{title}: singular values of the weights", x=0.01, ha="left", fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _quantiles(histogram: Any) -> list[float]:
    """``QUANTILES`` of a TensorBoard histogram, interpolated within its bins."""
    edges, counts = list(histogram.bucket_limit), list(histogram.bucket)
    found = []
    for quantile in QUANTILES:
        rank, below, value = quantile * sum(counts), 0.0, histogram.max
        for number, (edge, count) in enumerate(zip(edges, counts, strict=True)):
            if count and below + count >= rank:
                start = max(edges[number - 1] if number else histogram.min, histogram.min)
                value = start + (min(edge, histogram.max) - start) * (rank - below) / count
                break
            below += count
        found.append(value)
    return found
