"""Leaves (parameters with what is known of them), blocks (leaves that one map acts on jointly) and their state."""

from precond.optim.blocks.block import Block, Stack
from precond.optim.blocks.leaf import Gathered, Leaf, Rule, is_decayed, is_hidden, is_matrix, matches, state_dtype
from precond.optim.blocks.partition import by_group, by_layer, by_tensor, join, together
from precond.optim.blocks.state import COUNTS, Counts, State, counted_together, spans, whole_numbers, within

__all__ = [
    "COUNTS",
    "Block",
    "Counts",
    "Gathered",
    "Leaf",
    "Rule",
    "Stack",
    "State",
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
    "within",
]
