"""The product of every token with its expert's matrix: grouped where torch can, else a loop; the same either way."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from examples.moe_lm import experts
from examples.moe_lm.experts import expert_matmul


def row_by_row(x: Tensor, stack: Tensor, ends: list[int]) -> Tensor:
    rows = []
    for row in range(len(x)):
        owner = next(e for e, end in enumerate(ends) if row < end)
        rows.append(stack[owner] @ x[row])
    return torch.stack(rows) if rows else x.new_zeros(0, stack.shape[1])


@pytest.fixture
def grouped_calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The dtype of every grouped product."""
    calls: list[torch.dtype] = []
    real = F.grouped_mm

    def noted(x: Tensor, stack: Tensor, *, offs: Tensor) -> Tensor:
        calls.append(x.dtype)
        return real(x, stack, offs=offs)

    monkeypatch.setattr(experts.F, "grouped_mm", noted)
    return calls


@pytest.mark.parametrize(
    ("inputs", "outputs", "dtype", "is_grouped"),
    [
        (32, 16, torch.float32, True),
        (20, 12, torch.float32, True),  # 4 floats make 16 bytes
        (32, 18, torch.float32, False),
        (18, 32, torch.float32, False),
        (20, 12, torch.bfloat16, False),
        (32, 16, torch.bfloat16, True),
        (32, 16, torch.float64, False),
    ],
)
@pytest.mark.parametrize("ends", [[3, 3, 8, 11], [0, 0, 0, 5], [6, 6, 6, 6], [0, 0, 0, 0]], ids=str)
def test_values_and_gradients_equal_row_by_row(
    inputs: int,
    outputs: int,
    dtype: torch.dtype,
    is_grouped: bool,
    ends: list[int],
    grouped_calls: list[torch.dtype],
) -> None:
    x = torch.randn(ends[-1], inputs).to(dtype).requires_grad_()
    stack = torch.randn(4, outputs, inputs).to(dtype).requires_grad_()
    weight = torch.randn(ends[-1], outputs).to(dtype)
    found = expert_matmul(x, stack, torch.tensor(ends, dtype=torch.int32))
    assert bool(grouped_calls) == is_grouped
    expected = row_by_row(x, stack, ends)
    tolerance = {"atol": 0.3, "rtol": 0.02} if dtype == torch.bfloat16 else {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(found, expected, **tolerance)
    gradients = torch.autograd.grad((found * weight).sum(), [x, stack])
    assert gradients[0].shape == x.shape  # there is one for the experts without rows, and it is zero
    if ends[-1]:
        for one, other in zip(gradients, torch.autograd.grad((expected * weight).sum(), [x, stack]), strict=True):
            torch.testing.assert_close(one, other, **tolerance)
    else:
        assert gradients[1].abs().max() == 0


def test_autocast_decides_the_dtype_as_for_a_linear_layer(grouped_calls: list[torch.dtype]) -> None:
    x, stack = torch.randn(6, 32), torch.randn(2, 16, 32)
    with torch.autocast("cpu", torch.bfloat16):
        found = expert_matmul(x, stack, torch.tensor([2, 6], dtype=torch.int32))
        assert F.linear(x, stack[0]).dtype == found.dtype == torch.bfloat16
    assert grouped_calls == [torch.bfloat16]
