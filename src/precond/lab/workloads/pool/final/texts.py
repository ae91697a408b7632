"""Bytecode of Python's library, names of Unicode's characters, and formulas, of the sixth set."""

from __future__ import annotations

import dis
import random
import string
import sysconfig
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import CodeType

import torch

from precond.lab.workloads.data import Part
from precond.lab.workloads.text import ALPHABET, windows

KINDS = 48
"""Of instructions that are told apart, the most frequent ones; 0 stands for all others."""


def instructions(source: str) -> Iterator[int]:
    """Numbers of a module's instructions, without the places of caches, and those of its functions and classes behind them."""
    waiting = [compile(source, "a module", "exec", dont_inherit=True)]
    while waiting:
        code = waiting.pop()
        yield from (op for op in code.co_code[::2] if dis.opname[op] != "CACHE")
        waiting += [constant for constant in code.co_consts if isinstance(constant, CodeType)]


def bytecode(context: int) -> dict[str, Part]:
    """Windows of the instructions of every third module at the top of Python's library, 49 kinds."""
    folder = Path(sysconfig.get_path("stdlib"))
    paths = sorted(folder.glob("*.py"), key=lambda path: path.name)[1::3]
    modules = [list(instructions(path.read_text(encoding="utf-8", errors="ignore"))) for path in paths]
    frequent = Counter(op for module in modules for op in module).most_common(KINDS)
    number = {op: i for i, (op, _) in enumerate(frequent, start=1)}
    return windows(["".join(ALPHABET[number.get(op, 0)] for op in module) for module in modules], context, 400_000, str(folder))


SIGNS = "\n -" + string.digits + string.ascii_uppercase
_IN_NAMES = torch.tensor([max(0, SIGNS.find(sign)) for sign in ALPHABET])
_PARTS = 50


def character_names(context: int, seed: int) -> dict[str, Part]:
    """Windows of names like GREEK SMALL LETTER ALPHA WITH TONOS, a line each in any order: those of the first 12,288 characters."""
    names = sorted(name for code in range(0x3000) if (name := unicodedata.name(chr(code), "")))
    random.Random(seed).shuffle(names)
    texts = ["\n".join(names[i::_PARTS]) for i in range(_PARTS)]
    found = windows(texts, context, 1_000_000, "Unicode's names")
    return {name: Part(_IN_NAMES[part.inputs], _IN_NAMES[part.targets]) for name, part in found.items()}


INFIX, POSTFIX = "_abcdefgh+-*/()", "_abcdefgh+-*/"
"""Signs of formulas as people write them, and of those that a stack computes; the first is for what is left over."""
SOURCE, TARGET, START = 15, 10, len(POSTFIX)
_RANK = {"+": 1, "-": 1, "*": 2, "/": 2}

Tree = str | tuple[str, "Tree", "Tree"]


def infix(tree: Tree) -> str:
    """With no more brackets than are needed from left to right."""
    if isinstance(tree, str):
        return tree
    sign, left, right = tree
    a, b = infix(left), infix(right)
    a = f"({a})" if not isinstance(left, str) and _RANK[left[0]] < _RANK[sign] else a
    return a + sign + (f"({b})" if not isinstance(right, str) and _RANK[right[0]] <= _RANK[sign] else b)


def postfix(tree: Tree) -> str:
    """Both sides, then the sign between them."""
    return tree if isinstance(tree, str) else postfix(tree[1]) + postfix(tree[2]) + tree[0]


def formulas(seed: int, n: int) -> Part:
    """Formulas of three to five letters, none twice: their signs, and behind them the start and all but the last of the ten in which a stack
    computes them (N, 15 + 10); these ten (N, 10)."""
    drawn, rows = random.Random(seed), dict[str, str]()

    def grown(leaves: int) -> Tree:
        if leaves == 1:
            return drawn.choice("abcdefgh")
        left = drawn.randrange(1, leaves)
        return drawn.choice("+-*/"), grown(left), grown(leaves - left)

    while len(rows) < n:
        tree = grown(drawn.choice((3, 4, 5)))
        if len(written := infix(tree)) <= SOURCE:
            rows[written] = postfix(tree)
    source = torch.tensor([[INFIX.index(sign) for sign in row.ljust(SOURCE, "_")] for row in rows])
    target = torch.tensor([[POSTFIX.index(sign) for sign in row.ljust(TARGET, "_")] for row in rows.values()])
    return Part(torch.cat([source, torch.full((n, 1), START), target[:, :-1]], 1), target)
