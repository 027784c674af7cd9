"""docs/coming-from.md: each line makes the update of the other's rule, written out slowly, in float64."""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import lightning_muon as lm
from lightning_muon.orthogonalize import polynomial_sequence
from tests.references import polar_factor, relative_error

PAGE = (Path(__file__).parents[2] / "docs" / "coming-from.md").read_text()
LINES = dict(re.findall(r"^\| (.+?) \| `(lm\.Muon\(.+?\))` \|$", PAGE, flags=re.MULTILINE))
SHAPES = [(6, 6), (12, 4), (4, 12)]

KELLER = ((3.4445, -4.7750, 2.0315),) * 5
YOU = ((4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037), (2.8769, -3.1427, 1.2046),
       (2.8366, -3.0525, 1.2012))  # fmt: skip
POLAR_EXPRESS = ((8.156554524902461, -22.48329292557795, 15.878769915207462),
                 (4.042929935166739, -2.808917465908714, 0.5000178451051316),
                 (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
                 (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
                 (2.3465413258596377, -1.7097828382687081, 0.42323551169305323))  # fmt: skip


def original(rows: int, cols: int) -> float:
    return max(1, rows / cols) ** 0.5


def matched(rows: int, cols: int) -> float:
    return 0.2 * math.sqrt(max(rows, cols))


def spectral(rows: int, cols: int) -> float:
    return math.sqrt(rows / cols)


def unscaled(rows: int, cols: int) -> float:
    return math.sqrt(max(rows, cols))


# by the words that name it in the page: its defaults, as its source has them
OTHERS = {
    "`torch.optim.Muon`": (1e-3, 0.1, "average", True, original, KELLER),
    'adjust_lr_fn="match_rms_adamw"': (1e-3, 0.1, "average", True, matched, KELLER),
    "KellerJordan/Muon": (0.02, 0.0, "average", True, original, KELLER),
    "Moonlight": (1e-3, 0.1, "sum", True, matched, KELLER),
    "[dion]": (0.01, 0.01, "sum", False, spectral, POLAR_EXPRESS),
    'adjust_lr="rms_norm"': (0.01, 0.01, "sum", False, matched, POLAR_EXPRESS),
    "[Emerging-Optimizers]": (3e-4, 0.01, "average", False, unscaled, YOU),
    "extra_scale_factor=0.2": (3e-4, 0.01, "average", False, matched, YOU),
    "DeepSpeed": (0.02, 0.0, "average", True, original, KELLER),
}
# AdamW's learning rate and ε where they are not those of the matrices and 1e-8
OTHERS_ADAMW = {"KellerJordan/Muon": (3e-4, 1e-10), "DeepSpeed": (3e-4, 1e-10)}


def test_every_line_of_the_page_is_tested() -> None:
    assert len(LINES) == len(OTHERS) == 9
    assert {_words(name) for name in OTHERS} == set(LINES)


@pytest.mark.parametrize("name", OTHERS)
def test_update_is_the_others(name: str) -> None:
    lr, decay, momentum, nesterov, scale, _ = OTHERS[name]
    model = torch.nn.ParameterDict({f"w{rows}x{cols}": _matrix(rows, cols) for rows, cols in SHAPES})
    weights = {name: parameter.detach().clone() for name, parameter in model.items()}
    sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    optimizer = _optimizer(name, model)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        for key, weight in weights.items():
            gradient = torch.randn(weight.shape, dtype=torch.float64, generator=generator)
            model[key].grad = gradient.clone()
            weighted = 0.05 * gradient if momentum == "average" else gradient
            sums[key] = 0.95 * sums[key] + weighted
            fed = weighted + 0.95 * sums[key] if nesterov else sums[key]
            update = scale(*weight.shape) * polar_factor(fed)
            weights[key] = weight - lr * decay * weight - lr * update
        optimizer.step()
    for key, weight in weights.items():
        assert relative_error(model[key], weight) < 1e-10


@pytest.mark.parametrize("name", OTHERS)
def test_iteration_is_the_others(name: str) -> None:
    orthogonalization = re.search(r'orthogonalization="(\w+)"', _line(name))
    assert orthogonalization is not None
    assert polynomial_sequence(orthogonalization[1]).steps == OTHERS[name][-1]


@pytest.mark.parametrize("name", OTHERS)
def test_adamw_is_the_others(name: str) -> None:
    optimizer = _optimizer(name, torch.nn.ParameterDict({"vector": torch.nn.Parameter(torch.ones(4))}))
    (group,) = optimizer.param_groups
    assert group["algorithm"] == "adamw"
    assert (group["lr"], group["eps"]) == OTHERS_ADAMW.get(name, (OTHERS[name][0], 1e-8))
    assert group["betas"] == (0.9, 0.95)


def _words(name: str) -> str:
    """The line's first cell; of several with the name, the shortest."""
    return min((words for words in LINES if name in words), key=len)


def _line(name: str) -> str:
    """The call in the page."""
    return LINES[_words(name)]


def _optimizer(name: str, model: torch.nn.ParameterDict) -> lm.Muon:
    """The call in the page, but with the exact polar factor, and with everything by Muon."""

    def exact(model: torch.nn.Module, **arguments: object) -> lm.Muon:
        rules = [lm.Rule(".*", algorithm="muon")]  # passes over vectors
        return lm.Muon(model, **{**arguments, "orthogonalization": "exact"}, rules=rules)

    optimizer = eval(_line(name), {"lm": SimpleNamespace(Muon=exact), "model": model})
    assert isinstance(optimizer, lm.Muon)
    return optimizer


def _matrix(rows: int, cols: int) -> torch.nn.Parameter:
    generator = torch.Generator().manual_seed(rows + 100 * cols)
    return torch.nn.Parameter(torch.randn(rows, cols, dtype=torch.float64, generator=generator))
