"""From what every rank has measured to a table, and to the two figures that decide."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.two_hosts.sharded_report import print_updates, sharded_limits

__all__ = ["figures", "print_run"]

_REFERENCE, _OURS = "ddp_adamw", "muon_zero1"
_ADAMW = (_REFERENCE, "ddp_zero_adamw")  # the variants without any orthogonalisation
_MAX_BYTES = 1.03  # of the reference's
_MAX_EXCESS = 1.15  # of the time of orthogonalising what the busiest rank owns
_MAX_STEP, _MANY_TOKENS = 1.05, 8192  # of the reference's, where a rank has so many tokens per step


def figures(
    ranks: Sequence[dict[str, Any]], steps: int, tokens_per_rank: int, absent: dict[str, str]
) -> dict[str, Any]:
    """One run's figures. A step takes as long as on the slowest rank; bytes are those of the host with the most.

    Args:
        ranks: What each rank has measured.
        steps: Steps of a block.
        tokens_per_rank: Tokens of a rank's batch.
        absent: Variants that were not tried, and why.
    """
    rows: dict[str, dict[str, Any]] = {}
    for name in ranks[0]["blocks"]:
        rows[name] = _row([rank["blocks"][name] for rank in ranks], steps, ranks[0]["parameter_bytes"])
        if name in ranks[0].get("updates", {}):
            counts = max((rank["collectives"][name] for rank in ranks), key=lambda counts: sum(counts.values()))
            rows[name]["update"] = {
                **_row([rank["updates"][name] for rank in ranks], steps, ranks[0]["parameter_bytes"]),
                "num_collectives": sum(counts.values()),
                "collectives": counts,
            }
    slowest = [max(times) for times in zip(*(rank["orthogonalization_seconds"] for rank in ranks), strict=True)]
    return {
        "rows": rows,
        "limits": [
            {"what": what, "is": value, "at_most": limit, "holds": value <= limit}
            for what, value, limit in [*_limits(rows, slowest, tokens_per_rank), *sharded_limits(rows)]
        ],
        "left_out": {**absent, **ranks[0]["left_out"]},
        "orthogonalization_seconds": statistics.median(slowest),
        "orthogonalization_seconds_by_round": slowest,
        "owned_matrices_by_rank": [rank["owned_matrices"] for rank in ranks],
        **{key: ranks[0][key] for key in ("num_parameters", "num_matrices", "parameter_bytes")},
    }


def _row(by_rank: list[list[dict[str, Any]]], steps: int, parameter_bytes: int) -> dict[str, Any]:
    seconds = [max(block["seconds"] for block in blocks) / steps for blocks in zip(*by_rank, strict=True)]
    return {
        "step_seconds": statistics.median(seconds),
        "step_seconds_by_block": seconds,
        "sent_parameter_bytes": _bytes_per_step(by_rank, "sent", steps) / parameter_bytes,
        "received_parameter_bytes": _bytes_per_step(by_rank, "received", steps) / parameter_bytes,
    }


def _bytes_per_step(by_rank: list[list[dict[str, Any]]], direction: str, steps: int) -> float:
    """Of the host with the most, over all blocks."""
    by_host = [sum(int(block[direction]) for block in blocks) / len(blocks) for blocks in by_rank]
    return max(by_host) / steps


def _limits(
    rows: dict[str, dict[str, Any]], orthogonalization: list[float], tokens_per_rank: int
) -> list[tuple[str, float, float]]:
    """The figures that decide: what, how much, at most how much. Times are compared block by block: those of a round
    have seen the same machine."""
    if _OURS not in rows or _REFERENCE not in rows:
        return []
    ours, reference = rows[_OURS], rows[_REFERENCE]
    seconds, reference_seconds = ours["step_seconds_by_block"], reference["step_seconds_by_block"]
    excess = [
        (mine - other) / alone for mine, other, alone in zip(seconds, reference_seconds, orthogonalization, strict=True)
    ]
    found = [
        (
            f"bytes sent, {_OURS} / {_REFERENCE}",
            ours["sent_parameter_bytes"] / reference["sent_parameter_bytes"],
            _MAX_BYTES,
        ),
        (
            f"step, ({_OURS} - {_REFERENCE}) / orthogonalisation of what the busiest rank owns",
            statistics.median(excess),
            _MAX_EXCESS,
        ),
    ]
    if tokens_per_rank >= _MANY_TOKENS:
        ratios = [mine / other for mine, other in zip(seconds, reference_seconds, strict=True)]
        found.append((f"step, {_OURS} / {_REFERENCE}", statistics.median(ratios), _MAX_STEP))
    muons = [name for name in rows if name not in (_OURS, *_ADAMW)]
    rivals = [min(muons, key=lambda name: rows[name]["step_seconds"])] if muons else []  # the fastest
    rivals += [name for name in _ADAMW if name in rows and name != _REFERENCE]
    for rival in rivals:
        ratios = [mine / other for mine, other in zip(seconds, rows[rival]["step_seconds_by_block"], strict=True)]
        found.append((f"step, {_OURS} / {rival}", statistics.median(ratios), 1.0))
    return found


def print_run(run: dict[str, Any]) -> None:
    """The table, what was left out, and whether the limits hold."""
    rows = run["rows"]
    print(f"\n{run['hosts']} hosts, {run['tokens_per_rank']} tokens per rank and step, {run['rounds']} blocks of each")
    print(f"{'':24}{'step s':>8}{'from – to':>16}{'ratio':>7}{'sent':>8}{'received':>10}  (parameter bytes, a step)")
    for name, row in rows.items():
        low, median, high = min(row["step_seconds_by_block"]), row["step_seconds"], max(row["step_seconds_by_block"])
        ratio = f"{median / rows[_REFERENCE]['step_seconds']:.2f}" if _REFERENCE in rows else ""
        print(
            f"{name:24}{median:>8.3f}{f'{low:.3f} – {high:.3f}':>16}{ratio:>7}"
            f"{row['sent_parameter_bytes']:>8.4f}{row['received_parameter_bytes']:>10.4f}"
        )
    print_updates(rows)
    for name, reason in run["left_out"].items():
        print(f"{name:24} left out: {reason.splitlines()[0]}")
    if run["orthogonalization_seconds"]:
        print(f"orthogonalisation of what the busiest rank owns, alone: {run['orthogonalization_seconds']:.3f} s")
    for limit in run["limits"]:
        verdict = "holds" if limit["holds"] else "does not hold"
        print(f"{limit['what']}: {limit['is']:.3f}, at most {limit['at_most']:.2f}: {verdict}")
