"""What a terminal has no room for is told otherwise, and never cut."""

import pytest
from rich.console import Console

from precond.lab.cli.tables import drawn

HEADINGS = ("entrant", "lr", "training", "validation", "test", "test accuracy", "steps", "gradients", "CPU time")
ROWS = [
    ["sgd(momentum=0.9)", "0.00178", "1.09 (1.06–1.13)", "1.08 (1.02–1.2)", "1.1", "38.9 % (33.3–40.1)", "5", "5", "0.00942 s"],
    ["adamw + SAM(0.05, space='z')", "1.47", "1.56 (1.26–8,257)", "1.6 (1.28–1.7)", "1.57", "27.8 %", "–", "–", "–"],
]


@pytest.mark.parametrize("width", [160, 120, 80, 40, 24])
def test_numbers_are_whole_at_every_width(width: int) -> None:
    console = Console(width=width, highlight=False)
    with console.capture() as caught:
        console.print(drawn("precond compare wine", HEADINGS, ROWS, width))
    words = caught.get().replace("│", " ").replace(";", " ").split()
    assert {part for row in ROWS for cell in row[1:] for part in cell.split()} <= set(words)
    assert {part for heading in HEADINGS[1:] for part in heading.split()} <= {word.strip("┃") for word in words}
    assert all(len(line) <= width for line in caught.get().splitlines())
