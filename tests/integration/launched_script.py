"""What ``test_launchers`` starts: a few steps, then a check that the replicas agree."""

import sys

import lightning as L
import torch

import lightning_muon as lm
from tests.lightning_runs import AwkwardLightningModule


class CheckedModule(AwkwardLightningModule):
    def on_train_end(self):
        check(self.trainer.strategy, self.parameters())


def check(strategy, parameters):
    flat = torch.cat([param.detach().reshape(-1) for param in parameters])
    first = strategy.broadcast(flat, src=0)
    assert torch.equal(flat, first)
    if strategy.is_global_zero:
        print(f"replicas agree on {strategy.world_size} processes")


def fabric_main(fabric):
    model = AwkwardLightningModule().model
    model.forward_tokens = model.forward
    module, optimizer = fabric.setup(model, lm.Muon(model, lr=1e-2))
    for step in range(3):
        tokens = torch.randint(0, 17, (4, 8), generator=torch.Generator().manual_seed(step + 10 * fabric.global_rank))
        fabric.backward(module(tokens).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    check(fabric.strategy, model.parameters())


if __name__ == "__main__":
    api, strategy = sys.argv[1:]
    torch.set_num_threads(1)
    options = {"accelerator": "cpu", "devices": 2, "strategy": strategy}
    if api == "trainer":
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0}
        L.Trainer(max_steps=3, **options, **quiet).fit(CheckedModule())
    else:
        fabric = L.Fabric(**options)
        if strategy.endswith("spawn"):
            fabric.launch(fabric_main)
        else:
            if api == "fabric":  # `fabric run` has launched already, and Fabric refuses to do it again
                fabric.launch()
            fabric_main(fabric)
