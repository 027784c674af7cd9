"""Whoever reads a parameter in flight, in whatever way, gets its new values; who asks for its shape does not wait."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from torch.optim.swa_utils import AveragedModel

from lightning_muon.sharding.in_flight import InFlight, arrive, can_depart, depart


class Travelling:
    """Every parameter of a module is on its way, and will be all ones."""

    def __init__(self, module):
        self.params = [param for param in module.parameters() if can_depart(param)]
        self.landings = 0
        self.seen = False
        for param in self.params:
            depart(param, self)

    def land(self):
        self.landings += 1
        for param in self.params:
            arrive(param)
            with torch.no_grad():
                param.detach().fill_(1.0)

    def seen_by_compiler(self):
        self.seen = True


class Odd(nn.Module):
    """Reads its child's weight without calling the child."""

    def __init__(self):
        super().__init__()
        self.child = nn.Linear(3, 2, bias=False)
        self.as_list = [self.child.weight]

    def forward(self, x):
        return linear(x, self.child.weight)


X = torch.arange(6.0).view(2, 3)
ONES = X.sum(-1, keepdim=True).expand(2, 2)


def averaged(module):
    average = AveragedModel(module)
    average.update_parameters(module)
    return next(average.parameters())


def pickled(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False).child.weight


def compiled(module):
    return torch.compile(module, backend="eager")(X)


def inferred(module):
    with torch.inference_mode():
        return module(X)


READERS = {
    "forward": lambda module: module(X),
    "inference": inferred,
    "compiled": compiled,
    "the tensor in a list": lambda module: module.as_list[0] * 1,
    "state_dict": lambda module: module.state_dict()["child.weight"],
    "deepcopy": lambda module: copy.deepcopy(module).child.weight,
    "save": pickled,
    "foreach": lambda module: torch._foreach_mul(list(module.parameters()), 1.0)[0],
    "data": lambda module: module.child.weight.data,
    "numpy": lambda module: torch.from_numpy(module.child.weight.detach().numpy()),
    "functional_call": lambda module: torch.func.functional_call(module, dict(module.named_parameters()), (X,)),
    "vmap": lambda module: torch.vmap(module)(X),
    "checkpoint": lambda module: torch.utils.checkpoint.checkpoint(module, X, use_reentrant=False),
    "parameters_to_vector": lambda module: nn.utils.parameters_to_vector(module.parameters()),
    "average": averaged,
    "to": lambda module: module.to(torch.float64).child.weight,
    "custom op": lambda module: torch.ops.aten.mul(module.child.weight, 1.0),
    "out": lambda module: torch.mul(module.child.weight, 1.0, out=torch.empty(2, 3)),
}


@pytest.mark.parametrize("reader", READERS)
def test_who_reads_gets_the_new_values(reader):
    module = Odd()
    flight = Travelling(module)
    with torch.no_grad():
        found = READERS[reader](module)
    expected = ONES if found.shape == (2, 2) else torch.ones(found.shape)
    torch.testing.assert_close(found.detach().clone(), expected, check_dtype=False)
    assert flight.landings >= 1
    assert type(module.child.weight) is nn.Parameter
    assert "flight" not in vars(module.child.weight)
    assert flight.seen == (reader == "compiled")


@pytest.mark.parametrize(
    "module", [nn.LSTM(3, 4), nn.GRU(3, 4), nn.MultiheadAttention(4, 2)], ids=["lstm", "gru", "mha"]
)
def test_modules_that_pass_their_weights_on(module):
    inputs = (torch.ones(5, 1, 4),) * 3 if isinstance(module, nn.MultiheadAttention) else (torch.ones(5, 1, 3),)
    reference = copy.deepcopy(module)
    for param in reference.parameters():
        param.data.fill_(1.0)
    Travelling(module)
    torch.testing.assert_close(module(*inputs)[0], reference(*inputs)[0])


def test_gradients_reach_the_parameter():
    module = Odd()
    Travelling(module)
    module(X).sum().backward()
    torch.testing.assert_close(module.child.weight.grad, X.sum(0).expand(2, 3))


@pytest.mark.parametrize(
    "look",
    [
        lambda p: p.shape,
        lambda p: p.dtype,
        lambda p: p.device,
        lambda p: p.grad,
        lambda p: p.requires_grad,
        lambda p: p.numel(),
        lambda p: p.size(0),
        lambda p: p.is_floating_point(),
        lambda p: p in {p},
        lambda p: setattr(p, "grad", None),
        lambda p: setattr(p, "grad", torch.zeros(2, 3)),
        lambda p: isinstance(p, nn.Parameter),
        lambda p: nn.Module.zero_grad(nn.ParameterList([p])),
    ],
)
def test_who_does_not_read_does_not_wait(look):
    module = Odd()
    flight = Travelling(module)
    look(module.child.weight)
    assert flight.landings == 0
    assert isinstance(module.child.weight, InFlight)


def test_a_parameter_of_another_class_stays_as_it_is():
    class Mine(nn.Parameter):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            return super().__torch_function__(func, types, args, kwargs or {})

    assert not can_depart(Mine(torch.zeros(2)))
    assert can_depart(nn.Parameter(torch.zeros(2)))
