"""Each statement of the paper as a measurement on real data: the library's pieces against explicit computations.

Data are those that scikit-learn ships, everything is computed in float64 on the CPU, random numbers come from generators of their own.
"""

from precond.lab.evidence.statement import Bars, Chapter, Entry, Finding, Line, Plot, Statement
from precond.lab.evidence.verify import CHAPTERS, Section, as_expected, chosen, measured, sections

__all__ = [
    "CHAPTERS",
    "Bars",
    "Chapter",
    "Entry",
    "Finding",
    "Line",
    "Plot",
    "Section",
    "Statement",
    "as_expected",
    "chosen",
    "measured",
    "sections",
]
