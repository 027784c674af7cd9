"""What a strategy does around a module and its optimizer, without Lightning."""

from __future__ import annotations

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from lightning_muon.sharding.zero1 import Zero1, Zero1Options

# The models are small: with the default, all their weights would be one stage.
MANY_STAGES = {"gather_mb": 0.0005}


class Training:
    """One process: the module and ``loss.backward()`` as they are."""

    rank, world_size = 0, 1

    def __init__(self, module, optimizer):
        self.module, self.optimizer = module, optimizer

    def __call__(self, *inputs):
        return self.module(*inputs)

    def backward(self, loss):
        loss.backward()


class ShardedTraining(Training):
    """All processes of the group: DistributedDataParallel with ZeRO-1."""

    def __init__(self, module, optimizer, zero1=None, options=None, **ddp_options):
        options = Zero1Options(**MANY_STAGES, **(options or {}))
        super().__init__(DistributedDataParallel(module, **options.ddp_options(ddp_options)), optimizer)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.zero1 = zero1 or Zero1("test", options)
        self.zero1.attach(self.module)
        self.zero1.adopt([optimizer])

    def backward(self, loss):
        self.zero1.before_backward()
        loss.backward()
        self.zero1.after_backward()
