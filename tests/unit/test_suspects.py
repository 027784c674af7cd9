"""A head whose name says nothing is asked about."""

import warnings

import pytest
from torch import nn

import lightning_muon as lm


class Model(nn.Module):
    def __init__(self, head="final", tokens=50, features=8):
        super().__init__()
        self.tok = nn.Embedding(tokens, features)
        self.blocks = nn.ModuleList([nn.Linear(features, tokens, bias=False)])  # of the same shape, in a layer
        self.mix = nn.Linear(features, features)
        self.add_module(head, nn.Linear(features, tokens, bias=False))


def said(model, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lm.Muon(model, **options)
    return [str(one.message) for one in caught]


def test_line_to_paste_silences_the_question():
    (question,) = said(Model())
    assert question.startswith("'final.weight' goes to Muon and has the shape of the embedding 'tok.weight', (50, 8).")
    (line,) = [part.split("]")[0] + "]" for part in [question.split("rules=")[1]]]
    rules = eval(line, {"lm": lm})
    assert lm.Muon(Model(), rules=rules).routes["final.weight"].algorithm == "adamw"
    assert said(Model(), rules=rules) == []
    assert said(Model(), rules=[lm.Rule("final", algorithm="muon")]) == []


@pytest.mark.parametrize("options", [{"head": "lm_head"}, {"head": "to_logits"}])
def test_heads_that_are_known_and_other_matrices_are_not_asked_about(options):
    assert said(Model(**options)) == []


def test_tied_head_is_the_embedding():
    model = Model()
    model.final.weight = model.tok.weight
    assert said(model) == []


def test_the_warning_points_at_the_users_line():
    with pytest.warns(UserWarning, match="output head") as caught:
        lm.Muon(Model())
    assert caught[0].filename == __file__
