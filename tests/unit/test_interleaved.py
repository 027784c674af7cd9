"""Matrices whose rows, or columns, lie in turn within a parameter."""

import itertools

import pytest
import torch
from torch import nn

import lightning_muon as lm
from lightning_muon.matrices import MatrixLayout
from lightning_muon.sharding.fsdp.shards import Shard

LAYOUTS = [
    MatrixLayout.create(1, 12, 5, split_sizes=(4, 4, 4), interleaved=4),
    MatrixLayout.create(1, 16, 3, split_sizes=(8, 4, 4), interleaved=2),
    MatrixLayout.create(1, 16, 3, split_sizes=(8, 4, 4), interleaved=4),
    MatrixLayout.create(3, 12, 4, split_sizes=(6, 6), interleaved=3),
    MatrixLayout.create(1, 3, 12, split_sizes=(6, 6), interleaved=6, transposed=True),
    MatrixLayout.create(2, 5, 12, split_sizes=(6, 6), interleaved=6, transposed=True),
    MatrixLayout.create(2, 5, 12, split_sizes=(4, 8), interleaved=2, transposed=True),
]


def by_hand(layout, param):
    """The matrices, element by element."""
    table = param.reshape(layout.stack, layout.rows, layout.cols)
    found = []
    for one in table:
        lines = one if layout.dim == 0 else one.T
        picked = [[] for _ in layout.sizes]
        position = 0
        for _ in range(layout.interleaved):
            for number, size in enumerate(layout.sizes):
                for _ in range(size // layout.interleaved):
                    picked[number].append(lines[position])
                    position += 1
        found += [torch.stack(own) if layout.dim == 0 else torch.stack(own).T for own in picked]
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_matrices_are_dealt_out(layout):
    param = torch.arange(layout.stack * layout.rows * layout.cols).reshape(layout.stack, layout.rows, layout.cols)
    expected = by_hand(layout, param)
    assert layout.num_matrices == len(expected)
    assert layout.shapes() == tuple(tuple(matrix.shape) for matrix in expected)
    assert all(torch.equal(a, b) for a, b in zip(layout.matrices(param), expected, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_blocks_hold_whole_matrices(layout):
    blocks = list(layout.blocks())
    assert [block.start for block in blocks] == [0, *(block.stop for block in blocks[:-1])]
    assert blocks[-1].stop == layout.stack * layout.rows * layout.cols
    for block in blocks:
        assert sum(rows * cols for rows, cols in block.shapes) == block.stop - block.start == block.rows * layout.cols
        runs = [(block.start // layout.cols, block.stop // layout.cols)]
        assert [part.key[1] for part in layout.parts("p", runs)] == [
            block.index + n for n in range(len(block.shapes))
        ], "one part each"
        assert all(part.size == part.shape for part in layout.parts("p", runs))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_piece_knows_where_its_elements_lie(layout):
    """Of any run of rows and any run of columns; each element is in one part."""
    height = layout.stack * layout.rows
    whole = torch.arange(height * layout.cols).float().reshape(height, layout.cols)
    matrices = by_hand(layout, whole)
    for top, left in itertools.product(range(height), range(layout.cols)):
        for bottom, right in ((height, layout.cols), (min(height, top + 5), min(layout.cols, left + 4))):
            shard = Shard((height, layout.cols), (((top, bottom),), ((left, right),)))
            held = shard.take(whole).contiguous().view(-1)
            seen = torch.zeros_like(held)
            for part in shard.parts("p", layout):
                rows, cols = (slice(*part.rows), slice(*part.cols))
                assert part.shape == tuple(matrices[part.key[1]].shape)
                assert torch.equal(part.view(held).reshape(part.size), matrices[part.key[1]][rows, cols])
                part.view(seen).add_(1)
            assert torch.equal(seen, torch.ones_like(seen))


def test_several_runs_of_rows():
    layout = MatrixLayout.create(1, 12, 2, split_sizes=(4, 4, 4), interleaved=4)
    whole = torch.arange(24.0).reshape(12, 2)
    shard = Shard((12, 2), (((1, 4), (7, 11)), ((0, 2),)))
    held = shard.take(whole).view(-1)
    found = {}
    for part in shard.parts("p", layout):
        for row, values in zip(range(*part.rows), part.view(held).reshape(part.size), strict=True):
            found[part.key[1], row] = values
    expected = {(n % 3, n // 3): whole[n] for n in (1, 2, 3, 7, 8, 9, 10)}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[place], expected[place]) for place in expected)


def test_heads_of_interleaved_blocks_are_matrices_of_their_own():
    layout = MatrixLayout.create(1, 24, 6, split_sizes=(12, 6, 6), num_heads=(4, 2, 2), interleaved=2)
    assert layout.sizes == (3,) * 8  # per group two heads of q, one of k, one of v
    assert layout.interleaved == 1


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"split_sizes": (4, 8), "interleaved": 3}, "interleaved=3 must divide each block"),
        ({"split_sizes": (6, 6), "interleaved": 0}, "interleaved=0 must be a positive"),
        ({"split_sizes": (6, 6), "interleaved": 2.0}, "interleaved=2.0 must be a positive"),
        ({"split_sizes": (6, 6), "interleaved": True}, "interleaved=True must be a positive"),
        ({"interleaved": 3}, r"say their sizes, split_sizes"),
        ({"split_sizes": (6, 6), "interleaved": 3, "num_heads": (2, 1)}, "must hold whole heads"),
    ],
)
def test_runs_that_do_not_fit_are_refused(options, fault):
    layer = nn.Linear(5, 12, bias=False)
    with pytest.raises(ValueError, match=f"'weight' of shape .*{fault}"):
        lm.Muon(layer, rules=[lm.Rule("weight", **options)])


def test_a_rule_a_mark_and_a_group_say_the_same():
    def layout_of(params, **kwargs):
        return lm.Muon(params, **kwargs).routes["weight"].layout

    options = {"split_sizes": (4, 4, 4), "interleaved": 2}
    by_rule = layout_of(nn.Linear(5, 12, bias=False), rules=[lm.Rule("weight", **options)])
    marked = nn.Linear(5, 12, bias=False)
    lm.mark(marked.weight, **options)
    group = {"params": list(nn.Linear(5, 12, bias=False).named_parameters()), **options}
    assert by_rule == layout_of(marked) == layout_of([group]) == MatrixLayout.create(1, 12, 5, **options)
    assert "3 x (4, 5) interleaved in 2 runs" in by_rule.describe()


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("scale", ["match_rms_adamw", "spectral"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_is_that_of_the_matrices_apart(layout, nesterov, scale):
    torch.manual_seed(0)
    shape = (layout.stack, layout.rows, layout.cols)
    fused = nn.ParameterDict({"fused": torch.randn(shape)})
    apart = nn.ParameterDict({f"m{n}": matrix.clone() for n, matrix in enumerate(by_hand(layout, fused["fused"].data))})
    lengths = {"split_sizes": layout.sizes, "transposed": layout.transposed}
    options = {"lr": 0.1, "nesterov": nesterov, "scale": scale}
    ours = lm.Muon(fused, rules=[lm.Rule("fused", **lengths, interleaved=layout.interleaved)], **options)
    theirs = lm.Muon(apart, rules=[lm.Rule("m", transposed=layout.transposed)], **options)
    for _ in range(3):
        gradient = torch.randn(shape)
        fused["fused"].grad = gradient
        for n, matrix in enumerate(by_hand(layout, gradient)):
            apart[f"m{n}"].grad = matrix.clone()
        ours.step()
        theirs.step()
        for n, matrix in enumerate(layout.matrices(fused["fused"])):
            torch.testing.assert_close(matrix, apart[f"m{n}"].data, rtol=0, atol=1e-6)


def test_a_state_read_otherwise_is_refused():
    def optimizer(interleaved):
        layer = nn.Linear(5, 12, bias=False)
        layer.weight.grad = torch.ones_like(layer.weight)
        made = lm.Muon(layer, rules=[lm.Rule("weight", split_sizes=(6, 6), interleaved=interleaved)])
        made.step()
        return made

    state = optimizer(3).state_dict()
    optimizer(3).load_state_dict(state)
    with pytest.raises(ValueError, match=r"2 x \(6, 5\) interleaved in 3 runs saved, as 2 x \(6, 5\) now"):
        optimizer(1).load_state_dict(state)
