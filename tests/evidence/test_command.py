"""``precond verify``."""

from precond.algebra.maps import Dense
from precond.lab.cli.main import main


def test_some_statements(tmp_path, capsys):
    assert main(["verify", "--only", "l2-p, scale-*", "--seeds", "2", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "1 holds, 1 holds as corrected" in shown and "2 of 2" in shown
    assert "l2-p" in shown and "scale-adjusted" in shown
    assert (tmp_path / "evidence.html").exists() and "Not as printed" in (tmp_path / "verify.md").read_text()


def test_a_failure_is_an_exit_code(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Dense, "rmv", lambda self, v: self.mv(v))
    assert main(["verify", "--only", "implicit", "--seeds", "1", "--out", str(tmp_path)]) == 1
    assert "✗ fails" in capsys.readouterr().out


def test_no_seed(capsys):
    assert main(["verify", "--only", "l2-p", "--seeds", "0"]) == 2
    assert "--seeds must be at least 1, got 0" in capsys.readouterr().err


def test_an_unknown_name(capsys):
    assert main(["verify", "--only", "raet"]) == 2
    assert "no statement is called 'raet'" in capsys.readouterr().err
