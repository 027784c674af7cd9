"""Which rows of which projections make the queries and keys of each head."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

__all__ = ["AttentionHeads", "DescribeHeads", "HeadRows"]


@dataclass(frozen=True)
class HeadRows:
    """Rows of a projection that are scaled when a head is clipped.

    Attributes:
        projection: Name of a submodule of the attention module, with a ``weight`` of ``(rows, in_features)`` and
            perhaps a ``bias`` of ``(rows,)``: an ``nn.Linear``.
        start, stop: The rows.
        power: A head clipped by γ has these rows, and their entries of the bias, multiplied by ``γ**power``.

    Raises:
        ValueError: No rows, or a power that is not positive.
    """

    projection: str
    start: int
    stop: int
    power: float

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop or not 0 < self.power < float("inf"):
            raise ValueError(f"{self}: expected 0 <= start < stop and a positive power.")


@dataclass(frozen=True)
class AttentionHeads:
    """The rows of every query head of an attention module.

    ``grouped_query`` and ``latent`` build it for the usual kinds. For another, say it in full: a head's logits are to
    become γ times what they were, so that the powers of a part of the query and of the part of the key that it meets
    must sum to 1, and what several heads share must be left out.

    Attributes:
        rows: For each query head, in the order in which attention has them, what is scaled when it is clipped.

    Raises:
        ValueError: No heads, a head without rows, or rows that two heads share.
    """

    rows: tuple[tuple[HeadRows, ...], ...]

    def __post_init__(self) -> None:
        if not self.rows or not all(self.rows):
            raise ValueError("AttentionHeads needs at least one head, and at least one HeadRows for each.")
        taken = sorted((own.projection, own.start, own.stop) for head in self.rows for own in head)
        for (projection, _, stop), (other, start, _) in itertools.pairwise(taken):
            if projection == other and start < stop:
                raise ValueError(
                    f"Row {start} of {projection!r} would be scaled twice. Rows that several heads share are to be left"
                    " out, and the query's rows scaled by power 1."
                )

    @property
    def num_heads(self) -> int:
        """How many query heads there are."""
        return len(self.rows)

    @classmethod
    def grouped_query(
        cls,
        num_heads: int,
        head_dim: int,
        num_key_value_heads: int | None = None,
        *,
        query: str = "q_proj",
        key: str = "k_proj",
        query_start: int = 0,
        key_start: int = 0,
    ) -> AttentionHeads:
        """Multi-head attention, and grouped-query attention, where query heads ``i·g … i·g+g-1`` share key head ``i``.

        A head with a key head of its own is clipped by √γ on either side. A key head that several query heads share
        is left alone, so that the others stay as they are: its query head is clipped by γ.

        Args:
            num_heads: Query heads.
            head_dim: Rows of a head.
            num_key_value_heads: Key heads; ``None`` means as many.
            query: Name of the queries' projection.
            key: Name of the keys' projection; the same one if it is fused.
            query_start: The first row of the first head's query.
            key_start: The first row of the first head's key. A wrong one scales other rows, and nobody notices.
        """
        shared_by = _ratio(num_heads, num_key_value_heads or num_heads)
        heads: list[tuple[HeadRows, ...]] = []
        for head in range(num_heads):
            first = query_start + head * head_dim
            if shared_by > 1:
                heads.append((HeadRows(query, first, first + head_dim, 1.0),))
            else:
                other = key_start + head * head_dim
                heads.append(
                    (HeadRows(query, first, first + head_dim, 0.5), HeadRows(key, other, other + head_dim, 0.5))
                )
        return cls(tuple(heads))

    @classmethod
    def latent(
        cls,
        num_heads: int,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        *,
        query: str = "q_proj",
        key_value: str = "kv_b_proj",
    ) -> AttentionHeads:
        """Multi-head latent attention (DeepSeek): a query head is ``[plain, rotated]``, and ``[plain key, value]`` of
        each head come from one projection. One rotated key is shared by all heads.

        The plain parts are clipped by √γ, and the rotated part of the query by γ, since the shared key stays as it is.

        Args:
            num_heads: Heads.
            qk_nope_head_dim: Rows of the plain part of a query or key head.
            qk_rope_head_dim: Rows of the rotated part of a query head.
            v_head_dim: Rows of a value head.
            query: Name of the projection to queries: ``q_b_proj`` where they are compressed first.
            key_value: Name of the projection from the latent to keys and values.
        """
        heads = []
        for head in range(num_heads):
            first, other = head * (qk_nope_head_dim + qk_rope_head_dim), head * (qk_nope_head_dim + v_head_dim)
            plain = first + qk_nope_head_dim
            rows = [HeadRows(query, first, plain, 0.5), HeadRows(key_value, other, other + qk_nope_head_dim, 0.5)]
            if qk_rope_head_dim:
                rows.append(HeadRows(query, plain, plain + qk_rope_head_dim, 1.0))
            heads.append(tuple(rows))
        return cls(tuple(heads))


DescribeHeads = Mapping[str, AttentionHeads] | Callable[[str, nn.Module], AttentionHeads | None]
"""What ``heads=`` may be: descriptions by name of the attention module; or a function that is asked for every module
with its name, and says ``None`` for those that it does not describe."""


def _ratio(num_heads: int, num_key_value_heads: int) -> int:
    if num_heads < 1 or num_key_value_heads < 1 or num_heads % num_key_value_heads:
        raise ValueError(f"num_heads={num_heads} must be a multiple of num_key_value_heads={num_key_value_heads}.")
    return num_heads // num_key_value_heads
