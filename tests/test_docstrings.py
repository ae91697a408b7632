"""Every public name says what it is, what it takes, what it gives, what it raises, how it is used and where it comes from.

Each rule is a function of a public name that returns what is lacking, nothing where all is there. What a rule leaves out it leaves out for
a reason that holds for a kind of names, never for one name.
"""

from __future__ import annotations

import ast
import dataclasses
import doctest
import enum
import importlib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import precond
from precond.optim.preconditioners.base import Resolved
from precond.optim.torch_classes import Recipe

ROOT = Path(__file__).parents[1]
MODULES = (
    "precond",
    "precond.optim",
    "precond.optim.inputs",
    "precond.optim.preconditioners",
    "precond.optim.regularizers",
    "precond.optim.recipes",
    "precond.algebra.maps",
    "precond.analysis.curvature",
    "precond.analysis.convergence",
    "precond.analysis.normalization",
    "precond.analysis.diagnostics",
)
MEASURES = ("precond.analysis.curvature", "precond.analysis.convergence")
"""Where functions are methods of numerics."""


@dataclasses.dataclass(frozen=True)
class Name:
    """A public class or function, under the first name that it has."""

    path: str
    object: Any

    @property
    def is_class(self) -> bool:
        return isinstance(self.object, type)

    @property
    def doc(self) -> str:
        """Its own docstring, not a base class's; a frozen class without one would show its signature."""
        own = vars(self.object).get("__doc__") if self.is_class else self.object.__doc__
        return "" if own is None or own.startswith(f"{self.object.__name__}(") else inspect.cleandoc(own)

    def section(self, *titles: str) -> str:
        """The text under some of the titles."""
        return "\n".join(
            found for title in titles for found in re.findall(rf"^{title}:\n((?:[ ]+.*\n|\n)*)", self.doc + "\n", re.M)
        )

    @property
    def parameters(self) -> list[str]:
        """What it is called with; ``*args`` and ``**options`` are somebody else's arguments."""
        try:
            signature = inspect.signature(self.object)
        except ValueError:
            return []
        variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        return [p.name for p in signature.parameters.values() if p.kind not in variadic and not p.name.startswith("_")]

    @property
    def source(self) -> list[ast.AST]:
        """The code that a call runs itself: the function, or the methods that make an instance; not what these define inside."""
        functions = [self.object] if not self.is_class else [
            function
            for name in ("__init__", "__post_init__")
            if (function := vars(self.object).get(name)) and inspect.unwrap(function).__qualname__.startswith(self.object.__name__)
        ]  # fmt: skip
        out: list[ast.AST] = []
        for function in functions:
            try:
                tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
            except OSError:
                continue  # what dataclasses write has no source
            out += _own(tree.body[0])
        return out


def _own(function: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(function):
        if not isinstance(node, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            yield node
            yield from _own(node)


def _function(member: Any) -> Any:
    """What a property, cached or not, a class method or a static one wraps; anything else as it is."""
    wrapped = (getattr(member, inside, None) for inside in ("fget", "func", "__func__"))
    return next(filter(None, wrapped), member)


@cache
def public() -> tuple[Name, ...]:
    found: dict[int, Name] = {}
    for module in MODULES:
        for name in importlib.import_module(module).__all__:
            thing = getattr(importlib.import_module(module), name)
            if isinstance(thing, type) or inspect.isfunction(thing):
                found.setdefault(id(thing), Name(f"{module}.{name}", thing))
    return tuple(found.values())


def referred(name: Name) -> Callable[..., Any] | None:
    """The recipe that a class of ``precond.optim`` is, which its docstring names: what the recipe's says is said of the class."""
    if not (name.is_class and issubclass(name.object, Recipe) and name.object is not Recipe):
        return None
    recipe = name.object.recipe
    assert inspect.signature(name.object).parameters.keys() == inspect.signature(recipe).parameters.keys()
    return recipe if f":func:`precond.{recipe.__name__}`" in name.doc else None


@cache
def handed() -> frozenset[str]:
    """Classes whose objects the library makes: what functions and methods return, what authors' own methods are given, and their fields."""
    annotated: list[Any] = []
    for name in public():
        if not name.is_class:
            annotated.append(inspect.signature(name.object).return_annotation)
            continue
        for member in vars(name.object).values():
            function = _function(member)
            if inspect.isfunction(function) and not function.__name__.startswith("_"):
                signature = inspect.signature(function)
                annotated.append(signature.return_annotation)
                if inspect.isabstract(name.object):
                    annotated += [p.annotation for p in signature.parameters.values()]
    known = {name.object.__name__: name.object for name in public() if name.is_class}
    found: set[str] = set()
    while new := {word for a in annotated for word in re.findall(r"\w+", str(a))} & known.keys() - found:
        found |= new
        annotated = [a for one in new if dataclasses.is_dataclass(known[one]) for a in known[one].__annotations__.values()]
    return frozenset(found)


def told(thing: Any) -> set[str]:
    """What Args and Attributes name, of a class those of its bases too."""
    texts = [Name("", kind).section("Args", "Attributes") for kind in (thing.__mro__ if isinstance(thing, type) else (thing,))]
    return {word for text in texts for line in re.findall(r"^ +([\w, *]+):", text, re.M) for word in re.findall(r"\w+", line)}


def is_error(name: Name) -> bool:
    return name.is_class and issubclass(name.object, Exception)


def nothing_said(name: Name) -> str:
    """A docstring, of a class and of each of its public methods and properties, but for those that a base class or Attributes tell of."""
    if not name.doc:
        return "no docstring of its own"
    if not name.is_class:
        return ""
    bases = [vars(base) for base in name.object.__mro__]
    silent = [
        member
        for member, value in vars(name.object).items()
        if not member.startswith("_")
        and inspect.isfunction(_function(value))
        and not any(_function(base[member]).__doc__ for base in bases if member in base)
    ]
    lacking = sorted(set(silent) - told(name.object))
    return f"methods without a word: {', '.join(lacking)}" if lacking else ""


def arguments(name: Name) -> str:
    """Each argument, field of a record and member of an enumeration under Args or Attributes, several in one line where they go together.

    A class that is a recipe refers to it. Fields that a class has from its base may be told there.
    """
    if referred(name) or is_error(name):
        return ""
    wanted = name.parameters
    if name.is_class and issubclass(name.object, enum.Enum):
        wanted = list(name.object.__members__)
    lacking = [p for p in wanted if p not in told(name.object)]
    return f"arguments without a word: {', '.join(lacking)}" if lacking else ""


def returned(name: Name) -> str:
    """What a function returns: under Returns or Yields, or in the first paragraph, where that holds an equation for it (=, ≈, ↦)."""
    if name.is_class or inspect.signature(name.object).return_annotation in ("None", None, inspect.Signature.empty):
        return ""
    first = name.doc.split("\n\n")[0]
    return "" if name.section("Returns", "Yields") or re.search("[=↦≈]", first) else "no Returns"


def raised(name: Name) -> str:
    """Each exception that its own code raises, by name under Raises, and so for the methods of a class, which may leave it to the class or to
    the method of a base class. (That a number must lie in its range, Args say.)
    """
    lacking = sorted(_raised(name) - _words(name.section("Raises")))
    for member, value in vars(name.object).items() if name.is_class else ():
        if not member.startswith("_") and inspect.isfunction(function := _function(value)):
            own = [_function(vars(base).get(member)) for base in name.object.__mro__]
            docs = [name, *(Name("", f) for f in own if inspect.isfunction(f))]
            said = _words("\n".join(doc.section("Raises") for doc in docs))
            lacking += [f"{member}: {error}" for error in sorted(_raised(Name("", function)) - said)]
    return f"raises without a word: {', '.join(lacking)}" if lacking else ""


def _raised(name: Name) -> set[str]:
    calls = [
        node.exc.func if isinstance(node.exc, ast.Call) else node.exc for node in name.source if isinstance(node, ast.Raise)
    ]
    return {c.id for c in calls if isinstance(c, ast.Name) and c.id[0].isupper()} - {"NotImplementedError"}


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text))


def example(name: Name) -> str:
    """An Example that can fail: it prints something that is compared, or asserts.

    Of all that others call, construct or derive from. What the library makes is shown where it is made; an error is shown by what raises it.
    """
    if is_error(name) or referred(name) or (name.is_class and name.object.__name__ in handed()):
        return ""
    examples = doctest.DocTestParser().get_examples(name.section("Example"))
    proves = any(e.want or e.source.startswith(("assert ", "torch.testing.")) for e in examples)
    return "" if proves else "no Example that can fail"


def source(name: Name) -> str:
    """Author and year, Ye's equation, or the page of docs that derives it.

    Of methods: concrete preconditioners (not those that only choose among others), regularizers, averages, recipes, and functions that
    measure or predict. A function that gives the same map in another form is no method.
    """
    thing = name.object
    if name.is_class:
        method = issubclass(thing, precond.Preconditioner | precond.Regularizer | precond.WeightAverage | precond.Momentum)
        method = method and not inspect.isabstract(thing) and not issubclass(thing, Resolved)
    else:
        measures = name.object.__module__.startswith(MEASURES)
        same_map = str(inspect.signature(thing).return_annotation) in ("LinearMap", "LinearOperator")
        method = thing in precond.RECIPES.values() or (measures and not same_map)
    if not method:
        return ""
    pages = re.findall(r"docs/[\w-]+\.md", name.doc)
    if missing := [page for page in pages if not (ROOT / page).exists()]:
        return f"no such page: {', '.join(missing)}"
    return "" if pages or re.search(r"\bYe, |\((?:19|20)\d\d\)|et al\., (?:19|20)\d\d", name.doc) else "no source"


RULES = (nothing_said, arguments, returned, raised, example, source)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_public_names_say_what_they_are(rule):
    lacking = [f"{name.path}: {what}" for name in public() if (what := rule(name))]
    assert not lacking, "\n".join(["", *lacking])


def _specimen(doc: str) -> Callable[[float, float], float]:
    def specimen(a: float, b: float) -> float:
        if a < 0:
            raise ValueError("a")
        return a + b

    specimen.__doc__, specimen.__module__ = doc, "precond.analysis.curvature"
    return specimen


GOOD = """A sum (Ye, eq. 1).

    Args:
        a, b: numbers.

    Returns:
        Their sum.

    Raises:
        ValueError: for a < 0.

    Example:
        >>> 1 + 1
        2
    """


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_rule_finds_what_lacks(rule):
    assert not rule(Name("specimen", _specimen(GOOD)))
    lack = {
        nothing_said: "",
        arguments: GOOD.replace("a, b:", "a:"),
        returned: GOOD.replace("Returns:", "Gives:"),
        raised: GOOD.replace("ValueError:", "an error"),
        example: GOOD.replace("        2\n", ""),
        source: GOOD.replace("(Ye, eq. 1)", "as in docs/nowhere.md"),
    }[rule]
    assert rule(Name("specimen", _specimen(lack)))
