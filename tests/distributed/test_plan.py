"""What ``lightning-muon plan`` says of the example is what real ranks send, compute and keep, exactly."""

import json

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import lightning_muon as lm
from examples.moe_lm.config import ModelConfig
from examples.moe_lm.model import MoELM, next_token_nll
from lightning_muon.cli import main
from tests.distributed.test_gathering import PayloadCounter
from tests.processes import run_processes
from tests.sharding import ShardedTraining


class Loss(nn.Module):
    """DDP's hooks run on ``forward``."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = MoELM(ModelConfig())

    def forward(self, windows):
        return next_token_nll(self.model(windows[:, :-1]), windows[:, 1:]).mean()


def measure():
    module = Loss()
    optimizer = lm.Muon(module.model)
    training = ShardedTraining(module, optimizer)
    windows = torch.randint(0, 257, (8, 65), generator=torch.Generator().manual_seed(dist.get_rank()))
    for _ in range(2):
        optimizer.zero_grad()
        with PayloadCounter() as gradients:
            training.backward(training(windows))
        with PayloadCounter() as weights, FlopCounterMode(display=False) as flops:
            optimizer.step()
    return {
        "sent_gradient_bytes": gradients.sent,
        "received_gradient_bytes": gradients.received,
        "sent_weight_bytes": weights.sent,
        "received_weight_bytes": weights.received,
        "newton_schulz_flops": flops.get_total_flops(),
        "state_bytes": optimizer.local_state_bytes(),
    }


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_plan_of_the_example_is_what_happens(world_size, capsys):
    config = "examples/moe_lm/configs/small.yaml"
    assert not main(
        [
            "plan",
            "--world-size",
            str(world_size),
            "--model",
            "examples.moe_lm.model.MoELM",
            "--config",
            config,
            "--json",
        ]
    )
    planned = json.loads(capsys.readouterr().out)["schemes"]["muon_zero1"]["ranks"]
    measured = run_processes(world_size, measure)
    for plan, found in zip(planned, measured, strict=True):
        assert {key: plan[key] for key in found} == found
