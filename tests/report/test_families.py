"""The picture of work by family, on curves made by hand."""

import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest
from tests.report.test_pooled import ONE, TWO, entry, results, run

from precond.lab.cli.main import main
from precond.lab.report import save_results
from precond.lab.report.families import by_family, families_figure

SVG = "{http://www.w3.org/2000/svg}"


def test_rows_are_families_and_all_tasks() -> None:
    rows = by_family(results(ONE, TWO))
    assert list(rows) == ["nets (1)", "trees (1)", "all tasks (2)"]
    # ref 80, 80, 80 and fast 40, 20, never; ref 80, 80 and fast 20, 40.
    means = {name: {one.label: one.steps.value for one in found} for name, found in rows.items()}
    assert means["nets (1)"]["fast"] == pytest.approx(0.5)
    assert means["trees (1)"]["fast"] == pytest.approx(0.375)
    assert means["all tasks (2)"]["fast"] == pytest.approx((0.5 * 0.375) ** 0.5)


def test_the_picture_is_a_file_that_names_families_and_entrants() -> None:
    texts = [node.text for node in ET.fromstring(families_figure(results(ONE, TWO))).iter(f"{SVG}text")]
    assert {"nets (1)", "trees (1)", "all tasks (2)", "fast", "steps (of ref's)", "seconds (of ref's)"} <= set(texts)
    assert "ref" not in texts  # which is the line at 1


def test_a_missed_target_is_an_open_mark() -> None:
    missed = results(ONE, TWO)
    assert [one.steps.reached for one in by_family(missed)["nets (1)"] if one.label == "fast"] == [True]

    never = replace(TWO, entries=(TWO.entries[0], entry("fast", run(None, 0), run(None, 1))))
    found = by_family(results(ONE, never))
    assert [one.steps.reached for one in found["trees (1)"] if one.label == "fast"] == [False]
    assert families_figure(results(ONE, never)).count("#ffffff") > families_figure(missed).count("#ffffff")


def test_the_command_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_results(tmp_path / "results.json", results(ONE, TWO), [[], []])
    assert main(["report", str(tmp_path), "--picture", str(tmp_path / "a.svg"), "--entrants", "fast"]) == 0
    assert ET.parse(tmp_path / "a.svg").getroot().tag == f"{SVG}svg"
    assert main(["report", str(tmp_path), "--picture", str(tmp_path / "b.svg"), "--entrants", "slow"]) == 2
    assert "'slow'" in capsys.readouterr().err
    assert not (tmp_path / "b.svg").exists()


def test_results_without_a_reference_are_refused() -> None:

    with pytest.raises(ValueError, match="no reference"):
        families_figure(results(replace(ONE, reference=None)))
