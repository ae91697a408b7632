"""Entrants as text."""

import math

import pytest

from precond import BNP, L2, SAM, GradientNorm, PolynomialAverage, TimesLr, Warmup
from precond.lab.workloads import parse_entrants


def test_reads_recipes_options_and_penalties() -> None:
    text = "sgd, adam(lr=0.01, betas=(0.8, 0.9)), adamw + SAM(0.05, space='p') + L2(TimesLr(1.0)), "
    text += "sgd+GradientNorm(Warmup(0.1, 50), q=inf)"
    plain, options, penalties, schedules = parse_entrants(text)
    assert (plain.label, plain.recipe, plain.lr, plain.regularizers) == ("sgd", "sgd", None, ())
    assert options.options == {"lr": 0.01, "betas": (0.8, 0.9)}
    assert options.lr == 0.01
    assert penalties.regularizers == (SAM(0.05, space="p"), L2(TimesLr(1.0)))
    assert schedules.regularizers == (GradientNorm(Warmup(0.1, 50), q=math.inf),)
    assert not schedules.exact
    assert parse_entrants("sgd+GradientNorm(0.1,method='exact')")[0].exact
    assert parse_entrants("adam(inputs=BNP(decay=0.9))")[0].options == {"inputs": BNP(decay=0.9)}
    assert parse_entrants("auto(average=PolynomialAverage(3))")[0].options == {"average": PolynomialAverage(3)}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "write recipe"),
        ("sgd,,adam", "write recipe"),
        ("adma", "unknown recipe 'adma'; did you mean 'adam'"),
        ("AdamW", "did you mean 'adamw'"),
        ("adam+sam(0.1)", "unknown penalty 'sam'; did you mean 'SAM'"),
        ("SAM(0.1)", "SAM is a penalty; a recipe comes first"),
        ("adam(0.1)", "options of adam need their names"),
        ("adam(beta=0.9)", "adam has no option 'beta'; did you mean 'betas'"),
        ("adam(params=3)", "adam has no option 'params'"),
        ("adam(lr=-1)", "lr must be a number > 0"),
        ("adam(lr='fast')", "lr must be a number > 0"),
        ("adam+SAM(0.1, spce='z')", "SAM has no option 'spce'; did you mean 'space'"),
        ("adam+SAM(0.1, space='q')", "space must be one of 'z', 'p'"),
        ("adam+SAM(-0.1)", "rho must be a finite number >= 0"),
        ("adam+SAM()", "missing 1 required positional argument"),
        ("adam+L2(TimesLR(1))", "unknown value 'TimesLR'; did you mean 'TimesLr'"),
        ("adam+L2(lam)", "lam is no number"),
        ("adam(average=WeightAverage())", "unknown value 'WeightAverage'"),
        ("adam+L2(open('x'))", "unknown value 'open'"),
        ("adam+L2(1+1)", "is no number"),
        ("adam+L2(**{'lam': 1})", "is not understood"),
        ("adam-L2(1)", "cannot read"),
        ("__import__('os').system('true')", "cannot read"),
        ("adam, adam", "'adam' is there 2 times"),
        ("adam(", "cannot read"),
    ],
)
def test_what_cannot_be_read_is_named(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("(", r"\(").replace(")", r"\)")):
        parse_entrants(text)
