"""Attention's largest logits: which rows make a head, what they lead to, and how they are clipped."""

from lightning_muon.attention.clipper import QKClipper
from lightning_muon.attention.heads import AttentionHeads, DescribeHeads, HeadRows
from lightning_muon.attention.observe import observe_attention

__all__ = ["AttentionHeads", "DescribeHeads", "HeadRows", "QKClipper", "observe_attention"]
