"""Every layout goes on from every other's checkpoint; and what is no checkpoint of it is refused untouched."""

import re
from pathlib import Path

import pytest

from tests.fsdp.resume_matrix import LAYOUTS, SOURCES, Matrix, is_same


@pytest.fixture(scope="module")
def matrix(tmp_path_factory):
    return Matrix(tmp_path_factory.mktemp("checkpoints"))


@pytest.mark.parametrize("target", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("source", SOURCES, ids=lambda layout: layout.name)
def test_resume(matrix, source, target):
    distance = matrix.cell(source, target)
    assert distance <= (0 if is_same(source, target) else 1e-5)


def test_the_documents_show_every_cell():
    text = Path("docs/resume.md").read_text()
    rows = {row.split("|")[1].strip(): row for row in text.splitlines() if row.startswith("| ")}
    for source in SOURCES:
        cells = [cell.strip() for cell in rows[source.name].split("|")[2:-1]]
        assert len(cells) == len(LAYOUTS)
        for cell, target in zip(cells, LAYOUTS, strict=True):
            assert cell == "bitwise" or (not is_same(source, target) and float(re.sub("[^0-9e.-]", "", cell)) <= 1e-5)
