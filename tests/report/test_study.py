"""The study of z against p as a file and as tables."""

import json
import math

import pytest

from precond.lab.cli.main import main
from precond.lab.evidence import study
from precond.lab.report.study import load_study, save_study, study_markdown

LOSSES = [0.1 * k for k in range(1, 9)]
SETTINGS = study.settings(lambda: None)


def result(method, losses, twice=2.0):
    trials = (study.Trial(0.01, 0.1, 0.2), study.Trial(0.01, 0.2, math.inf))
    scores = tuple(study.Score(x, x, 0.9) for x in losses)
    return study.Result("digits-adam", method, 0.01, 0.1, trials, scores, (tuple(twice * x for x in losses), (0.5,) * 8))


RESULTS = [
    result("SAM in p", LOSSES),
    result("SAM in z, δ = 0.1", [x - 0.05 for x in LOSSES], math.inf),
    result("L2 in z", LOSSES),
]


def test_z_is_paired_with_p():
    text = study_markdown(SETTINGS, RESULTS, "precond verify --experiment z-versus-p")
    assert "| SAM in z, δ = 0.1 | **-0.0500 ± 0.0000** |" in text
    assert "| SAM in z, δ = 0.1 | z diverged in 8 of 8 |" in text
    assert "| L2 in z | – |" in text  # L2 in p is missing
    assert "| SAM in p | 0.01 | 0.1 † | 0.450 ± 0.205 | 90.0 ± 0.0 % | 0.900 ± 0.410 | 0.500 ± 0.000 |" in text
    assert "fashion-mnist-adam" not in text  # not measured yet


def test_what_is_written_is_read_and_is_json(tmp_path):
    save_study(tmp_path, SETTINGS, RESULTS[1:] + RESULTS[:1], {"torch": "2"}, "precond verify")
    file = tmp_path / "results.json"
    json.loads(file.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert list(load_study(file, SETTINGS)) == [RESULTS[2], *RESULTS[:2]]  # in the order of the methods
    assert load_study(tmp_path / "none.json", SETTINGS) == ()


@pytest.mark.parametrize(("change", "message"), [("[", "is damaged"), (None, "other seeds, data or strengths")])
def test_another_study_is_not_gone_on_with(tmp_path, monkeypatch, change, message):
    save_study(tmp_path, SETTINGS, RESULTS, {}, "precond verify")
    file = tmp_path / "results.json"
    if change is None:
        monkeypatch.setattr(study, "EPOCHS", 3)
    else:
        file.write_text(change)
    with pytest.raises(ValueError, match=message):
        load_study(file, SETTINGS)


def test_the_command_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    measured = []

    def instead(setting, method):
        measured.append(method.label)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return study.Result(setting.name, method.label, 0.01, 0.1, RESULTS[0].trials, RESULTS[0].scores, RESULTS[0].stronger)

    monkeypatch.setattr(study, "result", instead)
    command = ["verify", "--experiment", "z-versus-p", "--only", "digits-a*m", "--out", str(tmp_path)]
    assert main(command) == 130
    assert main(command) == 0
    labels = [m.label for m in study.methods()]
    assert measured == labels[:3] + labels[2:]
    assert "## digits-adam" in (tmp_path / "z-versus-p.md").read_text()
    assert main([*command, "--only", "digit"]) == 2
    assert "there are digits-adam" in capsys.readouterr().err
