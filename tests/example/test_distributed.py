"""Several ranks, a part of the batch each: the same gradients and the same balancing as one process."""

from __future__ import annotations

import os
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from examples.moe_lm.config import ModelConfig
from examples.moe_lm.model import MoELM, next_token_nll
from tests.example.test_model import TINY
from tests.processes import run_processes

NUM_MICRO_BATCHES = 2


def one_step(num_ranks: int) -> dict[str, Tensor]:
    """Gradients, biases and MaxVio after two micro-batches of eight windows over all ranks."""
    torch.manual_seed(0)
    model = MoELM(ModelConfig(initializer_range=0.2, **TINY)).train()
    windows = torch.randint(257, (NUM_MICRO_BATCHES, 8, 17))
    rank = int(os.environ["RANK"]) if num_ranks > 1 else 0
    wrapped = DistributedDataParallel(model) if num_ranks > 1 else model
    for number, batch in enumerate(windows):
        last = number == NUM_MICRO_BATCHES - 1
        mine = batch[rank::num_ranks]
        hold = nullcontext() if last or not isinstance(wrapped, DistributedDataParallel) else wrapped.no_sync()
        with hold:
            loss = next_token_nll(wrapped(mine[:, :-1]), mine[:, 1:]).mean() / NUM_MICRO_BATCHES
            loss.backward()
    result = {f"max_vio {layer}": value for layer, value in model.balance_experts().items()}
    result |= {name: buffer for name, buffer in model.named_buffers() if name.endswith("bias")}
    return result | {f"gradient {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_ranks_balance_and_differentiate_as_one_process() -> None:
    expected = one_step(1)
    assert sum("gradient" in key for key in expected) == len(list(MoELM(ModelConfig(**TINY)).parameters()))
    for result in run_processes(2, one_step, 2):
        assert result.keys() == expected.keys()
        for key, value in expected.items():
            if key.startswith("gradient"):
                torch.testing.assert_close(result[key], value, atol=1e-6, rtol=1e-4)
            else:
                assert torch.equal(result[key], value), key
