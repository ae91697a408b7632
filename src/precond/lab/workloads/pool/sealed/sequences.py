"""Claims, dates, demand, pendulums and purchases of the fifth set, drawn with a seed, and texts of Python's own sources."""

from __future__ import annotations

import ast
import io
import itertools
import keyword
import sysconfig
import tokenize
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

from precond.lab.workloads.data import Part
from precond.lab.workloads.pool.member import standard, uniform
from precond.lab.workloads.text import ALPHABET, windows

π = torch.pi
CLAIM_NUMBERS = (
    "driver's age",
    "years without a claim",
    "car's age",
    "car's value",
    "power in kW",
    "kilometers in a year",
    "inhabitants per km²",
)


def claims(seed: int, n: int) -> Part:
    """Seven numbers of policies, four of them with heavy tails (N, 7), and costs of claims (N, 1): some are far from what is expected."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    age = 18 + 60 * torch.rand(n, generator=g)
    free = (age - 18) * torch.rand(n, generator=g)
    old = -7 * (1e-6 + torch.rand(n, generator=g)).log()
    value = 24_000 * (0.7 * normal(n) - 0.08 * old).exp()
    power = 80 * (value / 24_000) ** 0.4 * (0.3 * normal(n)).exp()
    distance, density = 12_000 * (0.6 * normal(n)).exp(), 300 * (1.5 * normal(n)).exp()
    young, town = (-(age - 18) / 8).exp(), density.log1p() - 5.5
    cost = 0.6 * (value / 20_000).log1p() + 0.9 * young * (power / 80) - 0.03 * free + 0.35 * town * (distance / 12_000).log1p()
    cost = 1.5 * (cost + 0.4 * torch.sigmoid((age - 68) / 2) + 0.1 * (old > 12) * town)
    # Student's t of two degrees of freedom: the variance is infinite.
    noise = normal(n) / normal(n, 2).square().mean(1).sqrt()
    return Part(torch.stack([age, free, old, value, power, distance, density], 1), (cost + 0.15 * noise)[:, None])


MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)
WRITTEN, READ = " ,./ADFJMNOSabceghilmnoprstuvy0123456789", "-0123456789"
"""Signs of dates as people write them, the first for what is left over, and of ISO 8601."""
SOURCE, START = 18, len(READ)


def written(day: date, form: int) -> str:
    """One of five forms, no longer than 18 signs."""
    month = MONTHS[day.month - 1]
    forms = f"{day.day} {month} {day.year}", f"{month} {day.day}, {day.year}", f"{day.day}. {month[:3]}. {day.year}"
    return (*forms, f"{day.month}/{day.day}/{day.year}", f"{day.day:02d}.{day.month:02d}.{day.year}")[form]


def dates(seed: int, n: int) -> Part:
    """Dates of 1900 to 2099, none twice: signs in one of five forms, and behind them the start and all but the last of the ten of ISO 8601
    (N, 18 + 10); these ten (N, 10)."""
    g = torch.Generator().manual_seed(seed)
    first = date(1900, 1, 1).toordinal()
    days = (first + torch.randperm(date(2100, 1, 1).toordinal() - first, generator=g)[:n]).tolist()
    rows = []
    for ordinal, form in zip(days, torch.randint(5, (n,), generator=g).tolist(), strict=True):
        day = date.fromordinal(ordinal)
        signs = [WRITTEN.index(sign) for sign in written(day, form).ljust(SOURCE)]
        rows.append([*signs, START, *(READ.index(sign) for sign in day.isoformat())])
    found = torch.tensor(rows)
    return Part(found[:, :-1], found[:, SOURCE + 1 :])


SEEN, AHEAD = 36, 12


def demand(seed: int, n: int) -> Part:
    """Demand of electricity every two hours: three days (N, 36, 1), and the fourth (N, 12).

    A day has a peak in the morning and one in the evening; a week has two days with a late and flat morning; weather and noise go on top.
    """
    g = torch.Generator().manual_seed(seed)
    drawn = uniform(g, n, 1)

    hours = 2 * torch.arange(SEEN + AHEAD) + (168 * torch.rand(n, 1, generator=g)).floor()
    clock, free = hours % 24, (hours // 24) % 7 >= 5
    morning = drawn(0.5, 1.5) * torch.where(free, 0.5, 1.0) * bump(clock - torch.where(free, 10.0, 7.5), 2.0)
    evening = drawn(0.8, 2.0) * bump(clock - drawn(18, 20), 2.5)
    weather = torch.empty(n, SEEN + AHEAD)
    weather[:, :1] = torch.randn(n, 1, generator=g)
    for i in range(1, SEEN + AHEAD):
        weather[:, i] = 0.97 * weather[:, i - 1] + 0.24 * torch.randn(n, generator=g)
    series = drawn(0.5, 1.5) + morning + evening + 0.3 * weather + 0.08 * torch.randn(n, SEEN + AHEAD, generator=g)
    series = (series - series.mean()) / series.std()
    return Part(series[:, :SEEN, None], series[:, SEEN:])


def bump(hours: Tensor, width: float) -> Tensor:
    """exp(-t²/2w²) of the time to the hour in question on the face of a clock of 24 hours."""
    return (-(((hours + 12) % 24 - 12) / width).square() / 2).exp()


DURATION, NODES, EVERY, ASKED = 3.0, 60, 3, 8


def forced(seed: int, n: int) -> tuple[Tensor, Tensor]:
    """Forces on pendulums and their angles, θ'' = -sin θ + f(t) from rest: f (N, 121) and θ (N, 61), both float64, evenly from t = 0 to 3.

    Forces are drawn from a Gaussian process, its covariance 4 exp(-(t-s)²/2·0.4²); Runge-Kutta steps of 0.05.
    """
    t = torch.linspace(0, DURATION, 2 * NODES + 1, dtype=torch.float64)
    covariance = 4 * (-(t[:, None] - t).square() / (2 * 0.4**2)).exp() + 1e-8 * torch.eye(len(t), dtype=torch.float64)
    noise = torch.randn(n, len(t), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    force, h = noise @ torch.linalg.cholesky(covariance).T, DURATION / NODES
    state, angles = torch.zeros(2, n, dtype=torch.float64), [torch.zeros(n, dtype=torch.float64)]

    def slope(s: Tensor, i: int) -> Tensor:
        return torch.stack([s[1], force[:, i] - s[0].sin()])

    for i in range(0, 2 * NODES, 2):
        a = slope(state, i)
        b = slope(state + h / 2 * a, i + 1)
        c = slope(state + h / 2 * b, i + 1)
        state = state + h / 6 * (a + 2 * b + 2 * c + slope(state + h * c, i + 2))
        angles.append(state[0])
    return force, torch.stack(angles, 1)


def pendulums(seed: int, n: int) -> Part:
    """Forces at 41 places and eight times of 0 to 1 (N, 49), and angles at these times (N, 8); all standardized but the times."""
    force, angles = forced(seed, n)
    asked = torch.randint(NODES + 1, (n, ASKED), generator=torch.Generator().manual_seed(seed + 1))
    sensors = force[:, ::EVERY] / 2
    targets = (angles / angles.std()).gather(1, asked)
    return Part(torch.cat([sensors, asked / NODES], 1).float(), targets.float())


CUSTOMERS, GOODS, COUNTRIES, CATEGORIES, EACH = 600, 800, 12, 24, 30


def purchases(seed: int) -> Part:
    """What customers bought, in any order, nothing twice: (N, 8), customer, country, age, income, good, category, price, age of the good.

    Tastes of 6 dimensions follow from what is told about either side, and from what is not.
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    def side(rows: int, kinds: int) -> tuple[Tensor, Tensor]:
        kind, numbers = torch.randint(kinds, (rows,), generator=g), standard(normal(rows, 2))
        taste = 0.7 * normal(kinds, 6)[kind] + 0.5 * numbers @ normal(2, 6) + 0.5 * normal(rows, 6)
        return torch.cat([torch.stack([torch.arange(rows), kind], 1), numbers], 1), taste

    (customers, wanted), (goods, offered) = side(CUSTOMERS, COUNTRIES), side(GOODS, CATEGORIES)
    popular = -0.5 * torch.randperm(GOODS, generator=g).add(1.0).log()
    bought = torch.multinomial((0.7 * wanted @ offered.T + popular).softmax(1), EACH, generator=g).flatten()
    rows = torch.cat([customers.repeat_interleave(EACH, 0), goods[bought]], 1)
    rows = rows[torch.randperm(len(rows), generator=g)]
    return Part(rows, torch.zeros(len(rows), 1))


def docstrings(context: int) -> dict[str, Part]:
    """Windows of the docstrings in every second module at the top of Python's library, one below the other."""
    folder = Path(sysconfig.get_path("stdlib"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = []
    for path in sorted(folder.glob("*.py"), key=lambda path: path.name)[::2]:
        tree = ast.parse(path.read_text(encoding="utf-8", errors="ignore"))
        found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented))
        texts.append("\n".join(docstring for docstring in found if docstring))
    return windows(texts, context, 400_000, str(folder))


TOKENS = ("space", "keyword", "name", "number", "string", "comment", "operator")
_TOKENS = {
    tokenize.NAME: "name",
    tokenize.NUMBER: "number",
    tokenize.STRING: "string",
    tokenize.COMMENT: "comment",
    tokenize.OP: "operator",
}


def highlighted(source: str, n: int) -> str:
    """For each of the first n signs of a module's source the number, from 0 to 6, of the kind of token that it is in."""
    starts = [0, *itertools.accumulate(map(len, source.splitlines(keepends=True)))]
    found = ["0"] * len(source)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        a, b = (starts[row - 1] + column for row, column in (token.start, token.end))
        if a >= n:
            break
        kind = "keyword" if keyword.iskeyword(token.string) else _TOKENS.get(token.type, "space")
        # Python 3.12 cuts formatted strings into several tokens.
        kind = "string" if tokenize.tok_name[token.type].startswith("FSTRING") else kind
        found[a:b] = [str(TOKENS.index(kind))] * (b - a)
    return "".join(found[:n])


BEGINNING = 6000


def tokens(context: int) -> dict[str, Part]:
    """Windows (N, context) of how every second module at the top of Python's library begins, and in what kind of token each sign is."""
    folder = Path(sysconfig.get_path("stdlib"))
    signs, kinds = list[str](), list[str]()
    for path in sorted(folder.glob("*.py"), key=lambda path: path.name)[::2]:
        source = path.read_text(encoding="utf-8", errors="ignore")
        kept = [pair for pair in zip(source, highlighted(source, BEGINNING), strict=False) if pair[0] in ALPHABET]
        signs.append("".join(sign for sign, _ in kept))
        kinds.append("".join(kind for _, kind in kept))
    found, told = (windows(texts, context, 500_000, str(folder)) for texts in (signs, kinds))
    return {name: Part(found[name].inputs, told[name].inputs - ALPHABET.index("0")) for name in found}


MASK = len(ALPHABET)
"""The sign that stands for hidden ones."""


def masked(part: Part, seed: int) -> Part:
    """Windows with 15 % of their signs hidden; these are the targets, and -100, which cross entropy leaves out, elsewhere."""
    hidden = torch.rand(part.inputs.shape, generator=torch.Generator().manual_seed(seed)) < 0.15
    return Part(part.inputs.masked_fill(hidden, MASK), part.inputs.masked_fill(~hidden, -100))
