"""The table of what tests reach, from a report of two files."""

from covered import folder, table


def entry(*counts: int) -> dict[str, dict[str, int]]:
    return {"summary": dict(zip(("num_statements", "covered_lines", "num_branches", "covered_branches"), counts, strict=True))}


REPORT = {
    "files": {"src/precond/optim/engine/loop.py": entry(80, 60, 10, 5), "src/precond/lab/cli/main.py": entry(1920, 40, 0, 0)}
}


def test_lines_and_branches_add_up_by_folder_and_by_wing() -> None:
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table(REPORT).splitlines()[2:]]
    assert rows == [
        ["`lab/cli`", "1,920", "2.1 %", "0", ""],
        ["`optim/engine`", "80", "75.0 %", "10", "50.0 %"],
        ["`all`", "2,000", "5.0 %", "10", "50.0 %"],
    ]
    assert [row.split("|")[1].strip() for row in table(REPORT, "optim").splitlines()[2:]] == ["`optim/engine`", "`all`"]
    assert folder("src/precond/optim/momentum.py") == "optim" and folder("src/precond/__init__.py") == "precond"
