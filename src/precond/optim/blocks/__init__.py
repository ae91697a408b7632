"""Leaves (parameters with what is known of them), blocks (leaves that one map acts on jointly) and their state."""

from precond.optim.blocks.block import Block, Stack
from precond.optim.blocks.leaf import Leaf, Rule, WholeLeaf, is_decayed, is_hidden, is_matrix, matches, state_dtype
from precond.optim.blocks.partition import by_group, by_layer, by_tensor, join, together, with_scores
from precond.optim.blocks.state import COUNTS, Counts, State, counted_together, spans, whole_numbers, within

__all__ = [
    "COUNTS",
    "Block",
    "Counts",
    "Leaf",
    "Rule",
    "Stack",
    "State",
    "WholeLeaf",
    "by_group",
    "by_layer",
    "by_tensor",
    "counted_together",
    "is_decayed",
    "is_hidden",
    "is_matrix",
    "join",
    "matches",
    "spans",
    "state_dtype",
    "together",
    "whole_numbers",
    "with_scores",
    "within",
]
