"""The page and the table of measured statements."""

from html.parser import HTMLParser

from precond.lab.evidence import Bars, Finding, Line, Plot, Section, Statement
from precond.lab.report.evidence import markdown, render_evidence, save_evidence

PLOT = Plot("α", "rate", (Line("measured", (0.1, 1.0), (0.5, 0.2), True), Line("predicted", (0.1, 1.0), (0.5, 0.2))), "xy")
SECTIONS = [
    Section(
        "Rates & more",
        (
            Statement("rate", "(3)", "r = |λ_min| <script>", Finding("rate", 0.9, 0.9, 0.1, figure=PLOT)),
            Statement("sign", "(10)", "plus", Finding("error", 0.0, 1e-15, 1e-12, printed=0.5), "Printed: minus."),
            Statement(
                "lost", "(9)", "lost", Finding("κ", 10.0, 12.0, relation="≤", figure=Bars("κ", (("H", 10.0), ("P", 12.0))))
            ),
        ),
    )
]


def test_the_page_is_self_contained_and_escaped():
    page = render_evidence(SECTIONS, {"torch": "2"}, "precond verify --only <x>")
    assert "<script>" not in page and "&lt;script&gt;" in page and "Rates &amp; more" in page
    assert "λ<sub>min</sub>" in page
    assert page.count("<svg") == 2
    loaded = []

    class Loads(HTMLParser):
        def handle_starttag(self, tag, attrs):
            loaded.extend(v for k, v in attrs if k in ("src", "href", "xlink:href") and not v.startswith(("#", "data:")))

    Loads().feed(page)
    assert loaded == []
    for text in ("✓ holds", "✎ holds as corrected", "✗ fails", "As printed: 0.5"):
        assert text in page


def test_the_table_keeps_its_columns():
    text = markdown(SECTIONS, "precond verify")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 5
    assert {line.replace(r"\|", "").count("|") for line in rows} == {8}
    assert "1 hold, 1 hold as corrected (✎, below), 0 hold with some seeds and not with others, and 1 fail" in text
    assert "0.5 as printed, 1e-15 as corrected" in text


def test_both_are_written(tmp_path):
    save_evidence(tmp_path / "new", SECTIONS, {}, "precond verify")
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["evidence.html", "verify.md"]
