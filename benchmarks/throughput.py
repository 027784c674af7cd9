"""Tokens per second of the example's model with Muon and with AdamW, and the optimizer step's share of the time.

``python -m benchmarks.throughput [--tokens 2048 8192 32768] [--json benchmarks/results/throughput.json]``

One process. A training step is forward, backward, the experts' balancing and the optimizer's step, on one batch that
stays the same. AdamW is ``torch.optim.AdamW(fused=True)`` with one rate. The optimizer's share is what a step takes
longer than its forward and backward, run by themselves in the same turns. On a GPU: ``--device cuda --precision bf16
--config examples/moe_lm/configs/100m.yaml --tokens 32768 131072``.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.optim import AdamW, Optimizer

from benchmarks.timing import time_alternating
from benchmarks.timing import write as write_figures
from examples.moe_lm.config import ModelConfig
from examples.moe_lm.flops import flops_per_token
from examples.moe_lm.model import MoELM, next_token_nll

VARIANTS = ("forward, backward", "AdamW", "Muon")


def training_step(
    config: ModelConfig, optimizer: str, num_windows: int, device: torch.device, precision: str
) -> Callable[[], None]:
    """A model with its optimizer, as a function that trains one step and waits for the device."""
    torch.manual_seed(0)
    model = MoELM(config).to(device).train()
    chosen: Optimizer | None = None
    if optimizer == "Muon":
        chosen = model.make_optimizer()
    elif optimizer == "AdamW":
        chosen = AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    windows = torch.randint(config.vocab_size, (num_windows, config.max_seq_len + 1), device=device)

    def step() -> None:
        autocast = torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()
        with autocast:
            loss = next_token_nll(model(windows[:, :-1]), windows[:, 1:]).mean()
        torch.autograd.backward(model.with_auxiliary_loss(loss))
        model.balance_experts()
        if chosen is not None:
            chosen.step()
        model.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def measure(config: ModelConfig, tokens: int, device: torch.device, precision: str, rounds: int) -> dict[str, Any]:
    """Medians for one number of tokens per step."""
    num_windows = tokens // config.max_seq_len
    steps = {name: training_step(config, name, num_windows, device, precision) for name in VARIANTS}
    seconds = time_alternating(steps, rounds)
    bare, adamw, muon = (statistics.median(seconds[name]) for name in VARIANTS)
    # Each round's own ratio, since the machine's speed changes from round to round.
    ratio = statistics.median(a / m for a, m in zip(seconds["AdamW"], seconds["Muon"], strict=True))
    counted = num_windows * config.max_seq_len
    return {
        "tokens": counted,
        "tokens_per_sec": {"AdamW": counted / adamw, "Muon": counted / muon},
        "muon_over_adamw": ratio,
        "optimizer_share": {"AdamW": max(0.0, 1 - bare / adamw), "Muon": max(0.0, 1 - bare / muon)},
        "forward_backward_tflops": counted * flops_per_token(config, config.max_seq_len) / bare / 1e12,
        "seconds": seconds,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """As Markdown."""
    lines = ["| tokens per step | AdamW, tokens/s | Muon, tokens/s | Muon / AdamW | optimizer's share: AdamW | Muon |"]
    lines.append("|---|---|---|---|---|---|")
    for row in rows:
        rate, share = row["tokens_per_sec"], row["optimizer_share"]
        cells = [f"{row['tokens']:,}", f"{rate['AdamW']:,.0f}", f"{rate['Muon']:,.0f}", f"{row['muon_over_adamw']:.2f}"]
        cells += [f"{100 * share['AdamW']:.0f} %", f"{100 * share['Muon']:.0f} %"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure each number of tokens, print a table, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("examples/moe_lm/configs/small.yaml"))
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192, 32768], help="per step")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = ModelConfig.of(yaml.safe_load(options.config.read_text())["model"]["config"])
    if min(options.tokens) < config.max_seq_len:
        parser.error(f"--tokens counts whole windows of {config.max_seq_len} tokens: at least one")
    rows = []
    for tokens in options.tokens:
        found = measure(config, tokens, options.device, options.precision, options.rounds)
        rows.append(found)
        print(f"{found['tokens']} tokens: Muon / AdamW {found['muon_over_adamw']:.3f}", flush=True)
    print("\n" + table(rows))
    if options.json is not None:
        total, active = config.num_parameters()
        write_figures(
            options.json,
            config=options.config.as_posix(),
            parameters=total,
            active_parameters=active,
            device=torch.cuda.get_device_name() if options.device.type == "cuda" else "cpu",
            precision=options.precision,
            threads=options.threads,
            rounds=options.rounds,
            rows=rows,
        )


if __name__ == "__main__":
    main()
