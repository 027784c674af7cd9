"""What a user's type checker sees of the package."""

import torch
from typing_extensions import assert_type

import lightning_muon as lm

optimizer = lm.Muon(torch.nn.Linear(2, 2), lr=1e-3, rules=[lm.Rule("weight", num_heads=2)])
assert_type(optimizer.explain(), str)
strategy = lm.MuonZero1Strategy(overlap=False)
