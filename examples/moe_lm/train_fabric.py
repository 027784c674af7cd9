"""The same training as a Fabric loop: what the Trainer does in ``train.py``, line by line.

``python examples/moe_lm/train_fabric.py --devices 2 --max-steps 100``
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path

if not __package__:  # run as a file: the repository's root makes `examples` importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from lightning.fabric import Fabric
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

import lightning_muon as lm
from examples.moe_lm.data import TextDataModule
from examples.moe_lm.model import MoELM, next_token_nll, validation_figures


def parse_args(args: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategy", default="muon_zero1")
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--num-nodes", type=int, default=1)
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--lr", type=float, default=8e-3, help="of the matrices")
    parser.add_argument("--adamw-lr", type=float, default=1.6e-2, help="of embedding, head and norms")
    parser.add_argument("--max-steps", type=int, default=900, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=16, help="windows per batch, over all ranks")
    parser.add_argument("--accumulate", type=int, default=1, help="batches per optimizer step")
    parser.add_argument("--val-every", type=int, default=100, help="optimizer steps between validations")
    parser.add_argument("--log-every", type=int, default=10, help="optimizer steps between log lines")
    parser.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/fabric"))
    return parser.parse_args(args)


def endless(loader: Iterable[Tensor]) -> Iterator[Tensor]:
    """Batches for ever, epoch after epoch."""
    while True:
        yield from loader


@torch.no_grad()
def validate(fabric: Fabric, model: nn.Module, loader: Iterable[Tensor]) -> dict[str, Tensor]:
    """Loss, perplexity and bits per byte over all ranks' windows."""
    model.eval()
    sums = torch.zeros(2, device=fabric.device)  # nats, tokens
    for batch in loader:
        nll = next_token_nll(model(batch[:, :-1]), batch[:, 1:])
        sums += torch.stack((nll.sum(), torch.tensor(float(nll.numel()), device=fabric.device)))
    model.train()
    nll_sum, num_tokens = fabric.all_reduce(sums, reduce_op="sum")
    return validation_figures(nll_sum / num_tokens)


def main(args: list[str] | None = None) -> dict[str, float]:
    """Trains and returns the last validation's figures."""
    options = parse_args(args)
    fabric = Fabric(
        accelerator=options.accelerator,
        devices=options.devices,
        num_nodes=options.num_nodes,
        strategy=options.strategy,
        precision=options.precision,
        loggers=CSVLogger(options.out.parent, name=options.out.name),
    )
    fabric.launch()
    fabric.seed_everything(options.seed)
    data = TextDataModule(batch_size=options.batch_size, num_ranks=fabric.world_size, rank=fabric.global_rank)
    train_loader, val_loader = fabric.setup_dataloaders(data.train_dataloader(), data.val_dataloader())
    module = MoELM(optimizer=options.optimizer, lr=options.lr, adamw_lr=options.adamw_lr)
    model, optimizer = fabric.setup(module, module.make_optimizer())
    loads = lm.ExpertLoads(model)
    scheduler = module.make_scheduler(optimizer, options.max_steps)
    batches, figures = endless(train_loader), {}
    model.train()
    for step in range(1, options.max_steps + 1):
        is_logged = step % options.log_every == 0
        if is_logged:
            loads.start()
        loss = torch.zeros((), device=fabric.device)
        for micro in range(1, options.accumulate + 1):
            batch = next(batches)
            # Gradients travel once per optimizer step, with the last batch's backward.
            with fabric.no_backward_sync(model) if micro < options.accumulate else nullcontext():
                part = next_token_nll(model(batch[:, :-1]), batch[:, 1:]).mean()
                fabric.backward(module.with_auxiliary_loss(part) / options.accumulate)
            loss += part.detach() / options.accumulate
        fabric.clip_gradients(model, optimizer, max_norm=options.clip)
        module.balance_experts()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if is_logged:
            fabric.log_dict({"train/loss": fabric.all_reduce(loss), "lr": scheduler.get_last_lr()[0]}, step)
            fabric.log_dict(loads.collect(step), step)
            lm.log_optimizer(fabric, optimizer, step)
        if step % options.val_every == 0 or step == options.max_steps:
            figures = {name: float(value) for name, value in validate(fabric, model, val_loader).items()}
            fabric.log_dict(figures, step)
            fabric.print(f"step {step}: " + ", ".join(f"{name} {value:.3f}" for name, value in figures.items()))
    fabric.save(options.out / "last.ckpt", {"model": model, "optimizer": optimizer, "step": options.max_steps})
    return figures


if __name__ == "__main__":
    main()
