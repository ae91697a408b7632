"""Kinds of parameters, rules, partitions and the state of a block."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import precond
from precond import RMS, AdaGrad, Composition, Dense, Fixed, Preconditioner, Route, State
from precond.optim.blocks import (
    Block,
    Leaf,
    by_group,
    by_layer,
    by_tensor,
    is_decayed,
    is_matrix,
    join,
    matches,
    spans,
    together,
)
from precond.optim.inputs.roles import kind_of
from precond.optim.optimizer.models import Models
from precond.optim.preconditioners import Split
from precond.optim.preconditioners.split import over


def leaves_of(module):
    return Models([module]).leaves(
        [{"params": list(module.parameters()), "param_names": [n for n, _ in module.named_parameters()]}]
    )


class RootNorm(nn.Module):
    """A normalization layer of a user's own."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(3))


class Prompt(nn.Module):
    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.ones(3))
        self.bias_table = nn.Parameter(torch.ones(3, 3))


@pytest.mark.parametrize(
    ("module", "kinds"),
    [
        (nn.Linear(3, 2), {"weight": "weight", "bias": "bias"}),
        (nn.Conv2d(2, 2, 1), {"weight": "weight", "bias": "bias"}),
        (nn.LayerNorm(3), {"weight": "norm", "bias": "norm"}),
        (nn.BatchNorm1d(3), {"weight": "norm", "bias": "norm"}),
        (nn.GroupNorm(1, 3), {"weight": "norm", "bias": "norm"}),
        (nn.RMSNorm(3), {"weight": "norm"}),
        (nn.InstanceNorm1d(3, affine=True), {"weight": "norm", "bias": "norm"}),
        (RootNorm(), {"gain": "norm"}),
        (nn.Embedding(4, 3), {"weight": "embedding"}),
        (nn.EmbeddingBag(4, 3), {"weight": "embedding"}),
        (nn.LSTM(2, 2), {"weight_ih_l0": "weight", "weight_hh_l0": "weight", "bias_ih_l0": "bias", "bias_hh_l0": "bias"}),
        (nn.MultiheadAttention(2, 1), {
            "in_proj_weight": "weight", "in_proj_bias": "bias", "out_proj.weight": "weight", "out_proj.bias": "bias"
        }),
        (Prompt(), {"token": "weight", "bias_table": "bias"}),
    ],
    ids=lambda x: type(x).__name__,
)  # fmt: skip
def test_kinds(module, kinds):
    leaves = leaves_of(module)
    assert {leaf.name: leaf.kind for leaf in leaves} == kinds
    assert [is_decayed(leaf) for leaf in leaves] == [leaf.kind == "weight" and leaf.ndim >= 2 for leaf in leaves]
    assert [is_matrix(leaf) for leaf in leaves] == [leaf.kind == "weight" and leaf.ndim >= 2 for leaf in leaves]


def test_scales_slopes_and_gates_are_not_decayed():
    """Whether the module is known or not: as of named parameters, which is the usual rule."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.slope = nn.Linear(4, 4), nn.PReLU(4)
            self.gamma, self.gate = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(()))

    model = Scaled()
    of_model, of_names = (precond.decay_groups(params, 0.1) for params in (model, list(model.named_parameters())))
    names = [[[name for name, _ in group["params"]] for group in groups] for groups in (of_model, of_names)]
    assert sorted(names[0][0]) == ["layer.weight"]
    assert [sorted(group) for group in names[0]] == [sorted(group) for group in names[1]]


@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [("param_0", (3,), "vector"), ("param_0", (), "vector"), ("param_0", (3, 2), "weight"), ("a.b.bias", (3,), "bias")],
)
def test_kinds_where_no_module_is_known(name, shape, kind):
    assert kind_of(name, torch.zeros(shape), None) == kind


NET = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2), nn.Linear(2, 1, bias=False))
LEAVES = leaves_of(NET)


@pytest.mark.parametrize(
    ("rule", "names"),
    [
        (None, ["0.weight", "0.bias", "1.weight", "1.bias", "2.weight"]),
        ("*.bias", ["0.bias", "1.bias"]),
        ("0.*", ["0.weight", "0.bias"]),
        ("[01].weight", ["0.weight", "1.weight"]),
        ("*.BIAS", []),
        (is_matrix, ["0.weight", "2.weight"]),
        (lambda leaf: leaf.numbers if hasattr(leaf, "numbers") else leaf.layer == "1", ["1.weight", "1.bias"]),
    ],
)
def test_rules(rule, names):
    assert [leaf.name for leaf in LEAVES if matches(rule, leaf)] == names


def leaf(name="a", layer="", group=0, dtype=torch.float32, kind="weight"):
    return Leaf(name, torch.zeros(2, dtype=dtype), kind, layer or name, None, group)


@pytest.mark.parametrize(
    ("split", "leaves", "blocks"),
    [
        (by_tensor, LEAVES, [(0,), (1,), (2,), (3,), (4,)]),
        (by_layer, LEAVES, [(0, 1), (2, 3), (4,)]),
        (by_layer, [leaf("b", "x", kind="bias"), leaf("c", "y"), leaf("w", "x")], [(2, 0), (1,)]),
        (together, LEAVES, [(0, 1, 2, 3, 4)]),
        (together, [], []),
        (by_group, LEAVES, [(0, 1, 2, 3, 4)]),
        (by_group, [leaf(group=1), leaf(group=0), leaf(group=1)], [(0, 2), (1,)]),
        # bfloat16 is stepped in float32: with the float32 ones
        (by_group, [leaf(), leaf(dtype=torch.float64), leaf(dtype=torch.bfloat16)], [(0, 2), (1,)]),
    ],
)
def test_partitions(split, leaves, blocks):
    assert split(leaves) == blocks


@pytest.mark.parametrize(
    ("a", "b", "joined"),
    [
        ([], [], []),
        ([(0,), (1,)], [(1,), (0,)], [(0,), (1,)]),
        ([(0,), (1,), (2,)], [(0, 1, 2)], [(0, 1, 2)]),
        ([(2, 1, 0)], [(0,), (1,), (2,)], [(2, 1, 0)]),
        ([(0, 1), (2, 3), (4,)], [(1, 2), (0,), (3,), (4,)], [(0, 1, 2, 3), (4,)]),
        ([(0, 2), (1, 3)], [(0, 1), (2, 3)], [(0, 2, 1, 3)]),
    ],
)
def test_join(a, b, joined):
    assert join(a, b) == joined  # its laws: tests/test_properties.py


DENSE, NOTHING = Fixed(Dense(torch.eye(12))), Fixed()


@pytest.mark.parametrize(
    ("preconditioner", "parts"),
    [
        (RMS(), [((0, 1, 2, 3, 4), RMS())]),
        (DENSE, [((0, 1, 2, 3, 4), DENSE)]),
        (
            Route([("*.bias", RMS()), (is_matrix, AdaGrad(), 2.0)], NOTHING),
            [((1, 3), RMS()), ((0, 4), AdaGrad()), ((2,), NOTHING)],
        ),
        (Route([("*", RMS()), ("*.bias", AdaGrad())]), [((0, 1, 2, 3, 4), RMS())]),
        (RMS() @ AdaGrad(), [((0, 1, 2, 3, 4), RMS() @ AdaGrad())]),
        (RMS() @ DENSE, [((0, 1, 2, 3, 4), RMS() @ DENSE)]),
        (DENSE @ RMS(), [((0, 1, 2, 3, 4), DENSE @ RMS())]),
        (
            Route([("*.bias", RMS())], otherwise=AdaGrad()) @ RMS(0.5),
            [((1, 3), RMS() @ RMS(0.5)), ((0, 2, 4), AdaGrad() @ RMS(0.5))],
        ),
    ],
)
def test_what_acts_on_which_leaves(preconditioner: Preconditioner, parts):
    found = preconditioner.partition(LEAVES)
    assert sorted(((p.index, p.preconditioner) for p in found), key=lambda x: x[0]) == sorted(parts, key=lambda x: x[0])


def test_a_block_that_joins_several_is_split_again():
    """A dense map over a route: one block, in which each branch keeps its own leaves, wherever they stand."""
    route = Route([("*.bias", RMS())], otherwise=AdaGrad())
    (part,) = (route @ DENSE).partition(LEAVES)
    assert part.index == (0, 1, 2, 3, 4) and isinstance(part.preconditioner, Composition)
    outer, inner = part.preconditioner.outer, part.preconditioner.inner
    assert [(p.index, p.preconditioner) for p in outer.parts] == [((1, 3), RMS()), ((0, 2, 4), AdaGrad())]
    assert inner == DENSE  # all leaves in the order of its matrix
    assert outer.diagonal and not inner.diagonal and not part.preconditioner.diagonal


def test_over_an_entrywise_map_takes_any_leaves():
    parts = RMS().partition(LEAVES)
    assert over((3, 1), parts) == RMS()
    assert isinstance(over((3, 1), DENSE.partition(LEAVES)), Split)


HALF, THIRD = Route([("*.bias", RMS(), 0.5)], RMS()), Route([("0.*", AdaGrad(), 3.0)], RMS())


@pytest.mark.parametrize(
    ("preconditioner", "scales"),
    [
        (RMS() @ DENSE, [1, 1, 1, 1, 1]),
        (HALF, [1, 0.5, 1, 0.5, 1]),
        (HALF @ RMS(), [1, 0.5, 1, 0.5, 1]),
        (RMS() @ HALF, [1, 0.5, 1, 0.5, 1]),
        (HALF @ THIRD, [3, 1.5, 1, 0.5, 1]),
        (Route([(is_matrix, RMS(), 4.0)], otherwise=HALF), [4, 0.5, 1, 0.5, 4]),
        (Route([("*.bias", THIRD, 5.0)], RMS()), [1, 15, 1, 5, 1]),
    ],
)
def test_learning_rate_scales_of_routes_multiply(preconditioner, scales):
    assert [preconditioner.lr_scale(x) for x in LEAVES] == scales


def states():
    block = Block((leaf("a"), leaf("b")))
    steps = (torch.tensor(1.0), torch.tensor(4.0))
    inner = State(block, s=(torch.zeros(2), torch.ones(2)), step=steps)
    return State(block, r=(torch.zeros(2), torch.ones(2)), count=torch.tensor(7.0), inner=inner, step=steps)


def test_ahead_is_a_copy_one_step_on():
    state = states()
    ahead = state.ahead()
    assert ahead.steps == [2.0, 5.0] and ahead["inner"].steps == [2.0, 5.0]
    for t in (*ahead["r"], ahead["count"], *ahead["inner"]["s"], *ahead["step"]):
        t += 1
    assert state.steps == [1.0, 4.0] and state["count"] == 7
    assert [t.tolist() for t in (*state["r"], *state["inner"]["s"])] == [[0, 0], [1, 1]] * 2


def test_restricted_shares_its_tensors():
    state = states()
    part = state.restricted((1,))
    assert part.block.leaves == state.block.leaves[1:] and part.steps == [4.0]
    assert part["r"][0] is state["r"][1] and part["inner"]["s"][0] is state["inner"]["s"][1] and part["count"] is state["count"]


def test_entries_name_every_tensor_but_the_steps():
    found = [(x.name, key) for x, key, _ in states().entries()]
    assert found == [("a", "r"), ("b", "r"), ("a", "count"), ("a", "inner.s"), ("b", "inner.s")]


def test_a_block_knows_its_leaves():
    block = Block(tuple(LEAVES))
    assert block.name == "0.weight … 2.weight" and block.subset((1,)).name == "0.bias"
    assert [t.shape for t in block.zeros()] == [p.shape for p in NET.parameters()]
    low = Block((leaf(dtype=torch.bfloat16), leaf(dtype=torch.float64)))
    assert [t.dtype for t in low.zeros(0.5)] == [torch.float32, torch.float64] and float(low.zeros(0.5)[0][0]) == 0.5


def test_spans_are_runs_of_true_in_pieces_of_a_length():
    chosen = [True] * 5 + [False] + [True] * 2
    assert spans(chosen) == [slice(0, 5), slice(6, 8)]
    assert spans(chosen, 2) == [slice(0, 2), slice(2, 4), slice(4, 5), slice(6, 8)]
    assert spans([False], 2) == []
