"""The routed experts' weights, and the product of each token with its expert's.

Shape suffixes: S token-expert pairs, sorted by expert; E routed experts, H hidden size, I an expert's inner width,
M inputs and N outputs of one product.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from .config import ModelConfig


class Experts(nn.Module):
    """The routed experts' weights, as stacks of matrices: each of a parameter's E slices is a matrix of its own."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        num, hidden, inner = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_proj = nn.Parameter(torch.empty(num, inner, hidden))
        self.up_proj = nn.Parameter(torch.empty(num, inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(num, hidden, inner))

    @override
    def forward(self, x_SH: Tensor, tokens_per_expert_E: Tensor) -> Tensor:
        """``(S, H)``, sorted by expert, to the same shape."""
        ends_E = tokens_per_expert_E.cumsum(0, dtype=torch.int32)
        gate_SI = F.silu(expert_matmul(x_SH, self.gate_proj, ends_E))
        return expert_matmul(gate_SI * expert_matmul(x_SH, self.up_proj, ends_E), self.down_proj, ends_E)


def expert_matmul(x_SM: Tensor, stack_ENM: Tensor, ends_E: Tensor) -> Tensor:
    """``x[s] @ stack[e].T`` for every row ``s`` of expert ``e``: ``(S, N)``.

    One grouped product where torch has it for the device, the dtype and the shapes, else a loop over the experts. An
    expert without rows is not skipped, so that its gradient is zero and not missing: DDP waits for every parameter's
    gradient, and an optimizer that shards its state needs the same parameters on each rank.

    Args:
        x_SM: rows sorted by expert.
        stack_ENM: one matrix per expert.
        ends_E: int32, where each expert's rows end; the last is S.
    """
    device = x_SM.device.type
    if torch.is_autocast_enabled(device):  # as F.linear would
        dtype = torch.get_autocast_dtype(device)
        x_SM, stack_ENM = x_SM.to(dtype), stack_ENM.to(dtype)
    if can_group(x_SM, stack_ENM):
        return F.grouped_mm(x_SM, stack_ENM.transpose(-2, -1), offs=ends_E)
    chunks = x_SM.tensor_split(ends_E.tolist()[:-1])
    # One `unbind` makes the backward write the stack's gradient once.
    return torch.cat([F.linear(x, weight) for x, weight in zip(chunks, stack_ENM.unbind(), strict=True)])


def can_group(x_SM: Tensor, stack_ENM: Tensor) -> bool:
    """Whether ``torch.nn.functional.grouped_mm`` takes these.

    It takes bf16 on CUDA from compute capability 8.0, and fp32, bf16 or fp16 on a CPU; of one dtype, with rows of whole
    16 bytes on either side of the product.
    """
    if x_SM.dtype != stack_ENM.dtype:
        return False
    if any(width * x_SM.element_size() % 16 for width in stack_ENM.shape[1:]):
        return False
    if x_SM.is_cuda:
        return x_SM.dtype == torch.bfloat16 and torch.cuda.get_device_capability(x_SM.device) >= (8, 0)
    return x_SM.device.type == "cpu" and x_SM.dtype in (torch.float32, torch.bfloat16, torch.float16)
