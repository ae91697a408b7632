"""torch.optim's registered inputs give torch.optim's steps, and its registered errors its errors."""

from __future__ import annotations

import copy
import re
import warnings

import pytest
import torch
from torch import nn

import precond
from peers.registry import ERRORS, FURTHER, INPUTS, OURS_TAKES, SHARED, Bad, parameter, same
from precond import RECIPES, RMS, PreconditionedGD

VALID = [(name, options) for table in (INPUTS, FURTHER) for name in table for options in table[name]]
INVALID = [(name, case) for name, cases in ERRORS.items() for case in cases]


def ours(name: str):
    return RECIPES[name.lower()]


def ends(make, muon: bool):
    """A few steps on ‖w x + b − 1‖², in float64."""
    torch.manual_seed(0)
    model = nn.Linear(5, 3, bias=not muon, dtype=torch.float64)
    x = torch.randn(7, 5, dtype=torch.float64)
    optimizer = make(model.parameters())
    for _ in range(30):
        optimizer.zero_grad()
        (model(x) - 1).square().sum().backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def holds_tensor(value) -> bool:
    return isinstance(value, torch.Tensor) or (isinstance(value, tuple) and any(map(holds_tensor, value)))


@pytest.mark.parametrize(("name", "options"), VALID, ids=str)
def test_registered_inputs_take_torch_s_steps(name, options):
    muon = {"where": lambda leaf: True, "adjust_lr_fn": None, "arithmetic": "full"} if name == "Muon" else {}
    got = ends(lambda p: ours(name)(p, **{**muon, **copy.deepcopy(options)}), bool(muon))
    expected = ends(lambda p: getattr(torch.optim, name)(p, **copy.deepcopy(options)), bool(muon))
    # Of the length of 30 steps: torch's Muon computes in bfloat16, with 8 bits, and numbers that are float32 tensors are
    # rounded with 24 bits in each operation.
    rounded = 0.05 if muon else 2e-5 if any(map(holds_tensor, options.values())) else 0.0
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12 + rounded * 30 * float(options.get("lr", 0.001)))


def raised(make, bad: Bad) -> str:
    """The message of what a bad argument raises (or warns of)."""
    if issubclass(bad.error, Warning):
        with pytest.warns(bad.error) as caught:
            make(bad.params(), **bad.options)
        return str(caught[0].message)
    with pytest.raises(BaseException) as info:
        make(bad.params(), **bad.options)
    assert type(info.value) is bad.error
    return str(info.value)


@pytest.mark.parametrize(("name", "case"), INVALID)
def test_bad_arguments_raise_torch_s_types_and_say_what_to_do(name, case):
    bad = ERRORS[name][case]
    theirs, mine = raised(getattr(torch.optim, name), bad), raised(ours(name), bad)
    assert re.search(bad.theirs, theirs), theirs
    assert re.search(bad.words, mine), mine


def needs_model(name: str) -> bool:
    return name in ("bnp", "whitening", "auto")


@pytest.mark.parametrize("case", SHARED)
@pytest.mark.parametrize("name", ["bnp", "whitening", "shampoo", "soap", "auto", "PreconditionedGD"])
def test_every_other_recipe_refuses_the_same(name, case):
    bad = SHARED[case]

    def make(params, **options):
        if name == "PreconditionedGD":
            return PreconditionedGD(params, preconditioner=RMS(), **options)
        if needs_model(name) and isinstance(params, list) and case not in ("nothing", "no tensors", "a set", "computed"):
            rest = params if params and isinstance(params[0], dict) else [{"params": params}]
            params = [{"params": nn.Linear(2, 2)}, *rest]  # a model beside, whose inputs are observed
        return RECIPES[name](params, **options)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*the model has no layer")
        assert re.search(bad.words, raised(make, bad))


def test_a_parameter_twice_takes_one_step():
    ends = []
    for times in (1, 2):
        p = parameter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            optimizer = precond.adamw([p] * times)
        assert len(optimizer.param_groups[0]["params"]) == 1
        p.grad = torch.ones_like(p)
        optimizer.step()
        ends.append(p.detach().clone())
    assert torch.equal(*ends)


def test_what_torch_s_muon_refuses_takes_adam_s_steps():
    p = parameter(2, 3, 4)
    q = nn.Parameter(p.detach().clone())
    for optimizer, x in ((precond.muon([p], where="none", lr=0.01), p), (torch.optim.AdamW([q], lr=0.01, weight_decay=0.1), q)):
        x.grad = torch.ones_like(x)
        optimizer.step()
    torch.testing.assert_close(p, q)


def test_the_tables_are_torch_s_own():
    """The registered inputs and errors are in the tables, each and every one."""
    pytest.importorskip("expecttest", reason="torch's own registry imports expecttest")
    from torch.testing._internal.common_optimizers import optim_db

    infos = {info.optim_cls.__name__: info for info in optim_db}
    for name, table in INPUTS.items():
        theirs = [dict(i.kwargs) for i in infos[name].optim_inputs_func(device="cpu")]
        assert len(theirs) == len(table) and all(any(same(t, o) for o in table) for t in theirs), name
        for error in infos[name].optim_error_inputs_func(device="cpu", dtype=torch.float32):
            what = error.optimizer_error_input
            if what.desc in OURS_TAKES.get(name, {}):
                continue
            known = [b for b in ERRORS[name].values() if b.error is error.error_type]
            message = raised(
                getattr(torch.optim, name),
                Bad(error.error_type, "", None, what.kwargs, lambda w=what: w.params or [parameter()]),
            )
            if what.params is None:
                assert any(same(dict(what.kwargs), b.options) for b in known), (name, what.desc)
            else:
                assert any(re.search(b.theirs, message) for b in known), (name, what.desc)
