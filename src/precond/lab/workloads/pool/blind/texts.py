"""Tokens of Python's own packages and lines of logs of the seventh set."""

from __future__ import annotations

import io
import random
import sysconfig
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

from precond.lab.workloads.data import Part
from precond.lab.workloads.idx import DataError

PACKAGES = (
    "asyncio",
    "collections",
    "concurrent",
    "email",
    "http",
    "importlib",
    "json",
    "logging",
    "multiprocessing",
    "unittest",
    "urllib",
)
KINDS = 160
"""Of tokens that are told apart, the most frequent ones; 0 stands for all others."""
_NAMED = {
    tokenize.NEWLINE: "new line",
    tokenize.INDENT: "indent",
    tokenize.DEDENT: "dedent",
    tokenize.NUMBER: "number",
    tokenize.STRING: "string",
}


def tokens(source: str) -> Iterator[str]:
    """Names and signs of a module as they are written, kinds of all others; no comments, no empty lines."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.NAME, tokenize.OP):
            yield token.string
        elif token.type in _NAMED:
            yield _NAMED[token.type]


def packages(context: int) -> dict[str, Part]:
    """Windows of tokens of modules in eleven packages (N, context), and the tokens that follow each; one module in ten is for validation,
    one for testing.

    Raises:
        DataError: where the library's sources are not installed.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    paths = [path for package in PACKAGES for path in sorted((folder / package).rglob("*.py"), key=str)]
    modules = [list(tokens(path.read_text(encoding="utf-8"))) for path in paths]
    frequent = Counter(token for module in modules for token in module).most_common(KINDS)
    number = {token: i for i, (token, _) in enumerate(frequent, start=1)}
    found: dict[str, list[torch.Tensor]] = {"train": [], "validation": [], "test": []}
    for i, module in enumerate(modules):
        if len(module) > context:
            codes = torch.tensor([number.get(token, 0) for token in module])
            found[{8: "validation", 9: "test"}.get(i % 10, "train")].append(codes.unfold(0, context + 1, context))
    if not all(found.values()):
        raise DataError(f"{folder}: the sources of the packages {', '.join(PACKAGES)} are not there")
    joined = {name: torch.cat(windows).unique(dim=0) for name, windows in found.items()}
    return {name: Part(w[:, :-1].contiguous(), w[:, 1:].contiguous()) for name, w in joined.items()}


SIGNS = "\0 abcdefghijklmnopqrstuvwxyz0123456789.:/=-"
LENGTH = 40
"""Of lines; shorter ones end in zeros, longer ones are cut."""
LINES = {
    "ssh": ("accepted key for {w} from {a}", "closed by {a} port {n}", "failed password for {w} port {n}"),
    "web": ("get /{w}/{w} {n} from {a}", "post /{w} {n} {n}ms", "{a} timed out on /{w}"),
    "mail": ("from={w}.{w} size={n}", "to={w} relay={a} sent", "queue {h} removed in {n}ms"),
    "disk": ("read error on {w} sector {n}", "{w} mounted at /{w}", "{n} blocks of {w} remapped"),
    "network": ("link {w} up {n} mbit", "lease of {a} for {h}", "{w} dropped {n} from {a}"),
    "timer": ("job {w} started pid {n}", "job {w} ended in {n}ms", "next run of {w} at {n}:{n}"),
    "database": ("select on {w} took {n}ms", "{n} rows of {w} locked", "commit {h} by {w}"),
    "cache": ("miss {h} in {w}", "evicted {n} keys of {w}", "hit {h} after {n}ms"),
    "printer": ("job {n} of {w} held", "page {n} printed for {w}", "{w} out of paper at {a}"),
    "backup": ("copied {n} files of {w}", "archive {h} closed", "skipped /{w}/{w} in {n}ms"),
    "name server": ("{w}.{w} is at {a}", "zone {w} serial {n}", "refused {w} from {a}"),
    "login": ("session of {w} opened", "{w} became {w} at {n}:{n}", "wrong code from {w} {n}"),
}
"""Services and what they write: {w} a word, {n} a number, {a} an address, {h} eight hexadecimal digits."""
KNOWN, NEW = tuple(LINES)[:6], tuple(LINES)[6:]


def logs(seed: int, n: int, services: tuple[str, ...], lost: float = 0.15) -> Part:
    """Lines that services write, some of whose signs are lost, as numbers of signs (N, 40), and which service each is of (N,)."""
    drawn, rows, kinds = random.Random(seed), list[list[int]](), list[int]()
    for _ in range(n):
        kinds.append(drawn.randrange(len(services)))
        line = filled(drawn, drawn.choice(LINES[services[kinds[-1]]]))
        line = f"{drawn.randrange(24):02}:{drawn.randrange(60):02} {line}"[:LENGTH].ljust(LENGTH, "\0")
        rows.append([0 if drawn.random() < lost else SIGNS.index(sign) for sign in line])
    return Part(torch.tensor(rows), torch.tensor(kinds))


def filled(drawn: random.Random, line: str) -> str:
    """A line with something drawn at each place that is left open."""
    made = {
        "{w}": lambda: "".join(drawn.choice("bdfgklmnprst") + drawn.choice("aeiou") for _ in range(drawn.randrange(1, 4))),
        "{n}": lambda: str(drawn.randrange(10 ** drawn.randrange(1, 5))),
        "{a}": lambda: f"10.{drawn.randrange(256)}.{drawn.randrange(256)}",
        "{h}": lambda: f"{drawn.randrange(16**8):08x}",
    }
    for place, make in made.items():
        while place in line:
            line = line.replace(place, make(), 1)
    return line
