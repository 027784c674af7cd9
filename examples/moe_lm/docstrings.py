"""Pairs of an instruction and its answer out of source code: a function, and the docstring that its author gave it."""

from __future__ import annotations

import ast
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from .corpus import Document

__all__ = ["docstring_pairs"]

_Function = (ast.FunctionDef, ast.AsyncFunctionDef)


def docstring_pairs(documents: Sequence[Document]) -> list[dict[str, Any]]:
    """One pair per function that has a docstring, in the order of the files and of the functions in them.

    The prompt is the function's source without its docstring, the response is the docstring, both without the
    indentation that they share. Files that are no Python of this interpreter are left out.

    Returns:
        ``{"prompt": …, "response": …}`` each.
    """
    return [pair for document in documents for pair in _pairs(document.content)]


def _pairs(content: bytes) -> Iterator[dict[str, Any]]:
    try:
        source = content.decode().replace("\r\n", "\n").replace("\r", "\n")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the library's own escapes in its strings
            tree = ast.parse(source)
    except (UnicodeDecodeError, SyntaxError, ValueError):
        return
    lines = source.split("\n")  # as ast counts them; splitlines() also ends a line at a form feed
    functions = [node for node in ast.walk(tree) if isinstance(node, _Function)]
    for function in sorted(functions, key=lambda node: node.lineno):
        docstring = ast.get_docstring(function)
        first = function.body[0]
        # a docstring that shares a line with code cannot be cut out by lines
        shares = first.lineno == function.lineno or any(node.lineno == first.end_lineno for node in function.body[1:2])
        if docstring and not shares:
            above, below = lines[function.lineno - 1 : first.lineno - 1], lines[first.end_lineno : function.end_lineno]
            yield {"prompt": textwrap.dedent("\n".join(above + below)), "response": docstring}
