"""``lightning-muon plan``: its options, and what it does with them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_muon.muon import Muon
from lightning_muon.planning import models
from lightning_muon.planning.devices import DEVICES, device
from lightning_muon.planning.exposed import Speeds
from lightning_muon.planning.models import NamedParameters
from lightning_muon.planning.optimizers import optimizer_of
from lightning_muon.planning.report import figures, table
from lightning_muon.usage import UsageError, positive

__all__ = ["add_plan"]

_DESCRIPTION = """\
What training a model with Muon on N ranks will cost, before anything runs: who owns which matrices, bytes of optimizer
state, bytes sent and received per step, Newton–Schulz FLOPs and how even they are, and an estimate of the time that the
model waits. Side by side for AdamW under DDP, AdamW under torch's ZeroRedundancyOptimizer, Muon replicated under DDP,
and strategy="muon_zero1". The model is built on the meta device: no GPU, no memory, no processes.
"""

_EPILOG = """\
The model, one of:
  lightning-muon plan --world-size 8 --model my.package.LitModel --args '{"width": 1024}'
  lightning-muon plan --world-size 8 --model my.package.LitModel --config config.yaml    LightningCLI(LitModel)
  lightning-muon plan --world-size 8 --config config.yaml                                model: {class_path, init_args}
  lightning-muon plan --world-size 8 --hf path/to/config.json
  lightning-muon plan --world-size 8 --shapes shapes.csv       lines such as layers.0.wq.weight,4096x4096
A LightningModule is asked for its optimizer by configure_optimizers(); if that is a lightning_muon.Muon, the routes
and options are those of the run. In all other cases, and with --muon, lightning_muon.Muon(model) is planned.

The time that the model waits is estimated so:
  optimizer  Newton–Schulz FLOPs / FLOP/s + (3 x bytes of weights updated + 2 x bytes of state) / memory bandwidth
  gradients  the larger of bytes sent and received / link speed, less the time of backward
  weights    the same for weights, less the time of the next forward; ZeroRedundancyOptimizer hides none of them
  forward    2 x active parameters x tokens / FLOP/s; backward is twice that; without --tokens-per-rank both are 0
Each is that of the slowest rank. Left out: latencies, launches of kernels, the last bucket that nothing can hide, links
of different speeds within and between machines, collectives slower than the link, attention's own products (they
would hide more), and products of small matrices, which are slower than the device's rate.

Bytes and FLOPs are exact: bytes are the payload handed to collectives; the few numbers that clipping and the check for
finite gradients exchange are not counted. docs/plan.md explains the figures.
"""


def add_plan(subcommands: Any) -> None:
    """Add ``plan`` to the subcommands of a parser."""
    parser: argparse.ArgumentParser = subcommands.add_parser(
        "plan",
        help="what training with Muon on N ranks will cost, without running it",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("--world-size", type=positive, required=True, metavar="N", help="number of ranks")
    source = parser.add_argument_group("the model")
    source.add_argument("--model", metavar="CLASS", help="import path of a module's class, or of a function")
    source.add_argument("--args", type=_mapping, metavar="JSON", help="its arguments, by name")
    source.add_argument(
        "--config",
        type=Path,
        action="append",
        metavar="FILE",
        help="YAML in LightningCLI's form, of which `model` and `trainer.precision` are read; may be repeated, later"
        " files override earlier ones",
    )
    source.add_argument("--hf", type=Path, metavar="PATH", help="a Hugging Face config.json, or its folder")
    source.add_argument("--shapes", type=Path, metavar="FILE", help="names and shapes, as .csv or .json")
    source.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of parameters and gradients; by default as the model is built. bfloat16 is what"
        " precision='bf16-true' trains; mixed precision keeps float32",
    )
    source.add_argument(
        "--muon",
        type=_mapping,
        metavar="JSON",
        help="plan lightning_muon.Muon(model, ...) with these arguments; `rules` is a list of lightning_muon.Rule's"
        """ arguments: '{"rules": [{"pattern": "router", "algorithm": "adamw"}]}'""",
    )
    speeds = parser.add_argument_group("the machine")
    speeds.add_argument(
        "--device", default="h200", metavar="NAME", help=f"{', '.join(DEVICES)}, or your own (default: %(default)s)"
    )
    speeds.add_argument(
        "--flops", type=_positive_number, metavar="TFLOP/S", help="what its bfloat16 products reach, in place of ours"
    )
    speeds.add_argument(
        "--memory-bandwidth",
        type=_positive_number,
        metavar="GB/S",
        help="reads and writes of its memory, in place of ours",
    )
    speeds.add_argument(
        "--link-speed",
        type=_positive_number,
        default=400.0,
        metavar="GBIT/S",
        help="what a rank can send and, at the same time, receive; between machines, its share of the network"
        " (default: %(default)g)",
    )
    speeds.add_argument("--tokens-per-rank", type=positive, metavar="N", help="tokens of a rank in a step")
    speeds.add_argument(
        "--active-parameters",
        type=_positive_number,
        metavar="N",
        help="parameters that a token passes through (2.2e9, say); by default all but embeddings, and needed with"
        " --tokens-per-rank if there are experts",
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON, with every rank's, by name")


def run(options: argparse.Namespace) -> str:
    """The output of ``lightning-muon plan``.

    Raises:
        UsageError: The options cannot be planned.
    """
    machine = device(options.device, options.flops, options.memory_bandwidth)
    source, model = _model(options)
    dtype = getattr(torch, options.dtype) if options.dtype else models.dtype_of_configs(options.config or [])
    if dtype is not None:
        model = model.to(dtype) if isinstance(model, nn.Module) else _cast(model, dtype)
    optimizer, origin = optimizer_of(model, options.muon)
    everything = list(model.parameters()) if isinstance(model, nn.Module) else [param for _, param in model]
    dtypes = {str(param.dtype).removeprefix("torch."): None for _, param in optimizer.named_parameters()}
    found = figures(
        optimizer,
        options.world_size,
        Speeds(
            machine,
            1e9 / 8 * options.link_speed,
            options.tokens_per_rank,
            _active_parameters(options, optimizer, everything),
        ),
        {
            "source": source,
            "optimizer": origin,
            "dtype": " and ".join(dtypes),
            "frozen_parameters": sum(param.numel() for param in everything if not param.requires_grad),
        },
    )
    return json.dumps(found, indent=1) if options.json else table(found)


def _model(options: argparse.Namespace) -> tuple[str, nn.Module | NamedParameters]:
    """The model, and its name in words."""
    sources = [name for name in ("hf", "shapes") if getattr(options, name)]
    sources += ["model/config"] if options.model or options.config else []
    if len(sources) != 1:
        raise UsageError("give the model by one of --model and --config, --hf, --shapes; see --help for examples")
    if options.args is not None and (options.config or not options.model):
        raise UsageError("--args are the arguments of --model; with --config, write them into a file")
    if options.hf:
        return str(options.hf), models.from_hugging_face(options.hf)
    if options.shapes:
        return str(options.shapes), models.from_shapes(options.shapes)
    if options.config:
        module = models.from_configs(options.model, options.config)
        return f"{options.model or type(module).__name__} ({', '.join(file.name for file in options.config)})", module
    return options.model, models.from_class(options.model, options.args or {})


def _cast(named: NamedParameters, dtype: torch.dtype) -> NamedParameters:
    return [(name, nn.Parameter(param.detach().to(dtype))) for name, param in named]


def _active_parameters(options: argparse.Namespace, optimizer: Muon, everything: list[nn.Parameter]) -> int:
    if options.active_parameters is not None:
        return int(options.active_parameters)
    if options.tokens_per_rank and any("expert" in name.lower() for name in optimizer.routes):
        raise UsageError(
            "the model has experts, and a token passes through a few of them: say with --active-parameters how many"
            " parameters that are, or leave out --tokens-per-rank"
        )
    embeddings = (param for name, param in optimizer.named_parameters() if optimizer.routes[name].rule == "embedding")
    return sum(param.numel() for param in everything) - sum(param.numel() for param in embeddings)


def _positive_number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return value


def _mapping(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"expected JSON like '{{\"width\": 1024}}', got {text!r}: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object like '{{\"width\": 1024}}', got {text!r}")
    return value
