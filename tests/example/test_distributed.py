"""Several ranks, a part of the batch each: the same gradients and the same balancing as one process."""

from __future__ import annotations

import os
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from examples.moe_lm.config import ModelConfig
from examples.moe_lm.model import MoELM, next_token_nll
from tests.example.moe_lm_reference import balanced_bias_reference
from tests.example.test_model import TINY
from tests.processes import run_processes

NUM_MICRO_BATCHES = 2


def one_step(num_ranks: int, checkpointing: bool = False) -> dict[str, Tensor]:
    """Gradients, biases and MaxVio after two micro-batches of twelve windows over all ranks."""
    torch.manual_seed(0)
    config = ModelConfig(initializer_range=0.2, aux_loss_alpha=0.1, **TINY)
    model = MoELM(config, activation_checkpointing=checkpointing).train()
    windows = torch.randint(257, (NUM_MICRO_BATCHES, 12, 17))
    rank = int(os.environ["RANK"]) if num_ranks > 1 else 0
    wrapped = DistributedDataParallel(model) if num_ranks > 1 else model
    for number, batch in enumerate(windows):
        last = number == NUM_MICRO_BATCHES - 1
        mine = batch[rank::num_ranks]
        hold = nullcontext() if last or not isinstance(wrapped, DistributedDataParallel) else wrapped.no_sync()
        with hold:
            loss = next_token_nll(wrapped(mine[:, :-1]), mine[:, 1:]).mean()
            (model.with_auxiliary_loss(loss) / NUM_MICRO_BATCHES).backward()
    result = {f"max_vio {layer}": value for layer, value in model.balance_experts().items()}
    result |= {name: buffer for name, buffer in model.named_buffers() if name.endswith("bias")}
    return result | {f"gradient {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}


def choices_of_one_step() -> dict[str, list[Tensor]]:
    """All choices of the step's tokens by router, seen by hooks in one process."""
    choices: dict[str, list[Tensor]] = {}
    torch.manual_seed(0)
    model = MoELM(ModelConfig(initializer_range=0.2, aux_loss_alpha=0.1, **TINY)).train()
    for name, layer in model.moe_layers.items():
        seen = choices.setdefault(name, [])
        layer.gate.register_forward_hook(lambda _, __, routing, seen=seen: seen.append(routing.experts.flatten()))
    for batch in torch.randint(257, (NUM_MICRO_BATCHES, 12, 17)):
        model(batch[:, :-1])
    return choices


def test_biases_of_one_process_equal_the_reference() -> None:
    found, choices = one_step(1), choices_of_one_step()
    assert len(choices) == TINY["num_hidden_layers"] - 1
    for name, chosen in choices.items():
        expected = balanced_bias_reference(chosen, TINY["n_routed_experts"], rate=1e-3)
        assert expected.abs().max() > 0
        torch.testing.assert_close(found[f"{name}.gate.e_score_correction_bias"], expected, atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_ranks_balance_and_differentiate_as_one_process(num_ranks: int, checkpointing: bool) -> None:
    expected = one_step(1)
    assert sum("gradient" in key for key in expected) == len(list(MoELM(ModelConfig(**TINY)).parameters()))
    found = (
        [one_step(1, checkpointing)] if num_ranks == 1 else run_processes(num_ranks, one_step, num_ranks, checkpointing)
    )
    for result in found:
        assert result.keys() == expected.keys()
        for key, value in expected.items():
            if key.startswith("gradient"):
                torch.testing.assert_close(result[key], value, atol=1e-6, rtol=1e-4)
            else:
                assert torch.equal(result[key], value), key
