"""Taking over torch's state by the owners of its parts."""

import torch

import lightning_muon as lm
from tests.models import awkward_model, token_batches
from tests.processes import run_processes
from tests.references import relative_error
from tests.sharding import ShardedTraining, Training

BATCHES = token_batches(8, 12)


class Loss(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = awkward_model()

    def forward(self, tokens):
        return self.model.loss(tokens)


def go_on(kind):
    module = Loss()
    adamw = torch.optim.AdamW(module.named_parameters(), lr=1e-2)
    for batch in BATCHES[:3]:
        adamw.zero_grad()
        module(batch).backward()
        adamw.step()
    training = kind(module, lm.Muon(module, lr=1e-2, orthogonalization_dtype=torch.float32))
    lm.take_over(training.optimizer, adamw.state_dict())
    for batch in BATCHES[3:]:
        training.optimizer.zero_grad()
        training.backward(training(batch[training.rank :: training.world_size]))
        training.optimizer.step()
    return {name: param.detach().clone() for name, param in module.named_parameters()}


def test_sharded_equals_one_process():
    expected = go_on(Training)
    for weights in run_processes(2, go_on, ShardedTraining):
        assert all(relative_error(weights[name], weight) <= 1e-5 for name, weight in expected.items())
