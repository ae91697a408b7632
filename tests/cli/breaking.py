"""The command line, broken on purpose: ``python tests/cli/breaking.py kill 50``.

Each way to break has a function here, of a number of trials. Commands run in forks of a process that has imported everything, so that a trial
takes a second. What is asserted after each: no traceback, every file whole, and the same command again ends with the numbers of a run that
nothing broke.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import fashion
from precond.lab.cli.entry import main
from precond.lab.evidence import study

_SMALL = ["--widths", "8", "--steps", "60", "--evaluations", "4", "--checkpoint-seconds", "0.005"]
# Each in a folder of its own, its output in ``out``.
COMMANDS: dict[str, list[str]] = {
    "train": ["train", "digits", "--recipe", "adamw+SAM(0.01,space='z')", "--lr", "search", "--trials", "2", *_SMALL],
    "compare": ["compare", "wine", "--recipes", "adam,sgd", "--trials", "2", "--seeds", "0,1", *_SMALL],
    "bench": ["bench", "fashion-mnist", "--tasks", "MLP, batch 60", "--entrants", "Adam", "--trials", "1", "--seeds", "0", "--scale",
              "0.02", "--examples", "300", "--data-dir", "data", "--checkpoint-seconds", "0.005"],
    "logistic": ["logistic", "--data", "wine", "--limit", "300"],
    "report": ["report", "of"],
    "verify": ["verify", "--only", "rate,best-alpha"],
    "study": ["verify", "--experiment", "z-versus-p", "--only", "digits-adam"],
    "diagnose": ["diagnose", "digits", "--recipe", "adam", "--steps", "20"],
}  # fmt: skip
_TIMES = ("seconds", "cpu_seconds", "created")
LOCKS = (".lock", ".lock-shared")


def argv(name: str) -> list[str]:
    return [*COMMANDS[name], "--out", "out/report.html" if name == "report" else "out"]


# --- running -----------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def folder(name: str) -> Iterator[Path]:
    """A fresh folder with what the command reads."""
    path = Path(tempfile.mkdtemp(prefix=f"{name}-"))
    (path / "out").mkdir()
    if name == "bench":
        shutil.copytree(_data(), path / "data")
    if name == "report":
        (path / "of").mkdir()
        shutil.copy(whole("compare")[0] / "results.json", path / "of")
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@cache
def _data() -> Path:
    return fashion.noise(Path(tempfile.mkdtemp(prefix="fashion-mnist-")), 400)


def start(name: str, where: Path, before: Callable[[], object] = lambda: None) -> int:
    """The command in a fork, its words in ``words``; the number of the process."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    code = 70
    try:
        os.chdir(where)
        words = os.open("words", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(words, 1)
        os.dup2(words, 2)
        before()
        # Of what is there now; the old ones may think that they are files.
        sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
        code = main(argv(name))
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else 70
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code)


def ended(pid: int) -> int:
    """The exit code, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run(name: str, where: Path, before: Callable[[], object] = lambda: None) -> int:
    return ended(start(name, where, before))


def words(where: Path) -> str:
    """What the last command printed."""
    path = where / "words"
    found = path.read_text(errors="replace") if path.exists() else ""
    path.unlink(missing_ok=True)
    return found


@cache
def whole(name: str) -> tuple[Path, Any, float]:
    """What comes of the command when nothing breaks it: the folder, its numbers, the seconds it takes."""
    with folder(name) as where:
        began = time.monotonic()
        code, seconds = run(name, where), time.monotonic() - began
        assert code == 0, words(where)
        kept = Path(tempfile.mkdtemp(prefix=f"whole-{name}-"))
        shutil.copytree(where / "out", kept, dirs_exist_ok=True)
        return kept, numbers(kept), seconds


# --- looking ------------------------------------------------------------------------------------------------------------------


def numbers(out: Path) -> Any:
    """Every number in the folder that is not a time, and the names of the files."""

    def stripped(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: stripped(v) for k, v in value.items() if k not in _TIMES}
        return [stripped(item) for item in value] if isinstance(value, list) else value

    found: dict[str, Any] = {}
    for path in sorted(p for p in out.rglob("*") if p.is_file() and p.name not in LOCKS):
        name = str(path.relative_to(out))
        if path.suffix == ".json":
            found[name] = stripped(json.loads(path.read_bytes()))
        elif path.suffix == ".pt":
            found[name] = {k: v.tolist() for k, v in torch.load(path, weights_only=True).items()}
        else:
            found[name] = None
    return found


def check_files(out: Path) -> None:
    """Whatever is there is whole, but for temporary files."""
    for path in (p for p in out.rglob("*") if p.is_file()):
        if path.suffix == ".json":
            json.loads(path.read_bytes())
        elif path.suffix == ".html":
            assert path.read_text().rstrip().endswith("</html>"), path
        elif path.suffix == ".md":
            assert path.read_text().endswith("\n"), path
        elif path.suffix == ".pt":
            torch.load(path, weights_only=True)
        else:
            assert path.name in LOCKS or path.suffix == ".tmp", path


def check_again(name: str, where: Path) -> None:
    """The same command once more ends as if nothing had been."""
    check_files(where / "out")
    said = words(where)
    code = run(name, where)
    assert code == 0, (code, words(where), said)
    assert numbers(where / "out") == whole(name)[1], name


def check_refusal(code: int, said: str) -> None:
    """One line of error and no traceback, or nothing was wrong."""
    assert "Traceback" not in said and "Warning" not in said, said
    assert code == 0 or (code == 2 and said.count("precond: error: ") == 1), (code, said)


# --- breaking -----------------------------------------------------------------------------------------------------------------


def kill(name: str, trials: int) -> str:
    """SIGKILL at a random moment; each third run is killed twice."""
    seconds, amount = whole(name)[2], 0
    for trial in range(trials):
        with folder(name) as where:
            for _ in range(1 + (trial % 3 == 2)):
                pid = start(name, where)
                time.sleep(random.uniform(0, seconds))
                os.kill(pid, signal.SIGKILL)
                amount += ended(pid) == -signal.SIGKILL
                check_files(where / "out")
            check_again(name, where)
    return f"{amount} killed under way"


def interrupt(name: str, trials: int) -> str:
    """SIGTERM or SIGINT at a random moment."""
    seconds, amount = whole(name)[2], 0
    for trial in range(trials):
        with folder(name) as where:
            pid = start(name, where)
            time.sleep(random.uniform(0, seconds))
            os.kill(pid, (signal.SIGINT, signal.SIGTERM)[trial % 2])
            code = ended(pid)
            said = words(where)
            assert "Traceback" not in said and code in (0, 130, 143, -signal.SIGTERM), (code, said)
            amount += code != 0
            check_again(name, where)
    return f"{amount} stopped under way"


def small_files(name: str, trials: int) -> str:
    """No file may be longer than a random number of bytes, as on a disk that is full or with a quota."""
    largest = max(p.stat().st_size for p in whole(name)[0].rglob("*") if p.is_file())
    refused = 0
    for _ in range(trials):
        limit = random.randrange(largest)
        with folder(name) as where:

            def limited(limit: int = limit) -> None:
                # Words go to a pipe: they are not what is limited.
                cat = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=os.dup(1))
                os.dup2(cat.stdin.fileno(), 1)  # type: ignore[union-attr]
                os.dup2(1, 2)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

            code = run(name, where, limited)
            time.sleep(0.05)
            said = words(where)
            check_refusal(code, said)
            refused += code == 2
            check_again(name, where)
    return f"{refused} refused"


def mounted(name: str, trials: int) -> str:
    """A small tmpfs that fills, then one that turns read-only under way, then one that was from the start (as root)."""
    seconds, amount = whole(name)[2], 0
    used = sum(max(4096, p.stat().st_size) for p in whole(name)[0].rglob("*") if p.is_file())
    for trial in range(trials):
        with folder(name) as where:
            out = where / "out"
            size = random.randrange(4096, used + 4096) if trial % 3 == 0 else 1 << 26
            if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", out], capture_output=True).returncode:
                return "not tried: mounting takes root"
            try:
                if trial % 3 == 2:
                    subprocess.run(["mount", "-o", "remount,ro", out], check=True)
                pid = start(name, where)
                if trial % 3 == 1:
                    time.sleep(random.uniform(0, seconds))
                    # Busy while a file is open for writing.
                    for _ in range(1000):
                        if not subprocess.run(["mount", "-o", "remount,ro", out], capture_output=True).returncode:
                            break
                code = ended(pid)
                said = words(where)
                check_refusal(code, said)
                assert code == 2 or trial % 3 < 2, said
                amount += code == 2
                subprocess.run(["mount", "-o", f"remount,rw,size={1 << 26}", out], check=True)
                check_again(name, where)
            finally:
                subprocess.run(["umount", out], check=True)
    return f"{amount} refused"


def together(name: str, trials: int) -> str:
    """Three processes in one folder: one works, or each in turn; the others say so."""
    refused = 0
    for _ in range(trials):
        with folder(name) as where:
            pids = []
            for _ in range(3):
                pids.append(start(name, where))
                time.sleep(random.choice((0, random.uniform(0, whole(name)[2] / 2))))
            codes = list(map(ended, pids))
            said = words(where)
            assert 0 in codes and set(codes) <= {0, 2} and "Traceback" not in said, (codes, said)
            assert said.count("another process works in out") == codes.count(2), (codes, said)
            refused += codes.count(2)
            assert numbers(where / "out") == whole(name)[1]
            check_again(name, where)
    return f"{refused} of {3 * trials} refused"


def silent(name: str, trials: int) -> str:
    """Nobody reads what is printed: a closed pipe, a full device."""
    codes = []

    def pipe() -> None:
        read, write = os.pipe()
        os.close(read)
        os.dup2(write, 1)

    def full() -> None:
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)

    for trial in range(trials):
        with folder(name) as where:
            codes.append(run(name, where, (pipe, full)[trial % 2]))
            said = words(where)
            assert "Traceback" not in said and codes[-1] in (0, 2, 141), (codes, said)
            check_again(name, where)
    return f"exit codes {sorted(set(codes))}"


# --- hostile files --------------------------------------------------------------------------------------------------------------

NAMES = [
    "", " ", "<script>alert(1)</script>", "\"'><img src=x onerror=alert(1)>", "</style></svg><b>", "javascript:alert(1)", "../../../etc/passwd",
    "/etc/passwd", "a\x00b", "\x1b[31mred", "[bold red]x[/]", "[/]", "$\\frac{1}{2$", "{{ 7 * 7 }}", "{% include 'x' %}", "%s%n", "\ud800",
    "\u202eright to left",     "日本語 🙂 ñ", "a|b\n# c", "x" * 20_000, "&lt;&amp;", "]]>", "<!--", "_", "_legend",
]  # fmt: skip
VALUES: list[Any] = [
    None, True, -1, 0, 1, 2**31, 2**63, 10**400, 1e308, -1e308, 1e-320, 0.5, "NaN", [], {}, [None], [[]], {"a": {}}, [1e308, -1e308],
    [0.0] * 1000, *NAMES,
]  # fmt: skip


def spoiled(value: Any, draw: random.Random) -> Any:
    """A JSON value with one place in it replaced, removed or repeated."""
    places: list[tuple[Any, Any]] = []

    def walk(at: Any) -> None:
        for key, item in list(at.items() if isinstance(at, dict) else enumerate(at)):
            places.append((at, key))
            if isinstance(item, dict | list):
                walk(item)

    value = json.loads(json.dumps(value))
    walk(value)
    at, key = draw.choice(places)
    how = draw.randrange(8)
    if how == 0:
        del at[key]
    elif how == 1 and isinstance(at, list):
        at.insert(key, at[key])
    else:
        at[key] = draw.choice(VALUES)
    return value


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Spoiled JSON, or bytes that were cut, flipped, doubled or replaced."""
    how = draw.randrange(12)
    at = draw.randrange(1, max(2, len(content)))
    special = [b"", b"[" * 100_000, b"\xff\xfe", b'{"a": ' * 5000, b"NaN", b"Infinity", b"1" * 10_000, b"null", b"\x00" * 100]
    if how == 0:
        return content[:at]
    if how == 1:
        return content[:at] + bytes([draw.randrange(256)]) + content[at + 1 :]
    if how == 2:
        return content + content
    if how == 3:
        return draw.choice(special)
    if how == 4:
        return content.replace(b"0.", draw.choice([b"NaN, 0.", b"1e999", b"-", b"0"]), 1)
    value = json.loads(content)
    for _ in range(draw.choice((1, 1, 1, 3))):
        value = spoiled(value, draw)
    return json.dumps(value).encode()


def hostile(name: str, trials: int) -> str:
    """Damaged results.json for ``report``, other damaged files of the folder for the commands that go on from it."""
    refused = 0
    kept = whole("compare" if name == "report" else name)[0]
    for trial in range(trials):
        draw = random.Random(trial)
        with folder(name) as where:
            if name == "report":
                file = where / "of" / "results.json"
            else:
                shutil.copytree(kept, where / "out", dirs_exist_ok=True)
                read = [p for p in (where / "out").rglob("*.json") if p.name != "results.json" or name == "study"]
                if not read:
                    return "reads nothing that it wrote"
                file = draw.choice(sorted(read))
            content = damaged(file.read_bytes(), draw)
            file.write_bytes(content)
            code = run(name, where)
            said = words(where)
            assert "Traceback" not in said and "Warning" not in said, (trial, said)
            assert code == 0 or (code == 2 and said.count("precond: error: ") == 1) or (code == 1 and name != "report"), (
                trial,
                code,
                said,
            )
            refused += code == 2
            check_page(where / "out" / "report.html")
    return f"{refused} refused"


def check_page(page: Path) -> None:
    """Nothing in it runs or loads."""
    from html.parser import HTMLParser

    class Tags(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            assert tag not in ("script", "iframe", "object", "embed", "img", "b", "base", "form"), tag
            for key, value in attrs:
                assert not key.startswith("on"), key
                if key in ("src", "href", "xlink:href", "data", "srcset", "action"):
                    assert (value or "").startswith(("#", "data:,")), value

    if page.exists():
        Tags().feed(page.read_text())


WAYS: dict[str, Callable[[str, int], str]] = {
    f.__name__: f for f in (kill, interrupt, small_files, mounted, together, silent, hostile)
}


def _quick_study() -> None:
    """A study of two methods, three trials and two seeds: what is broken is its file, not its numbers."""
    methods = study.methods()[:2]
    study.methods = lambda: methods  # type: ignore[assignment]
    study.EPOCHS, study.SEARCH_SEEDS, study.SEEDS = 1, study.SEARCH_SEEDS[:1], study.SEEDS[:2]


def _warm_up() -> None:
    """Import and make what the first command of a process does, so that forks have it."""
    with folder("logistic") as where, contextlib.redirect_stdout(io.StringIO()):
        assert main(["logistic", "--data", "wine", "--limit", "10", "--out", str(where)]) == 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    _quick_study()
    _warm_up()
    if sys.argv[1:] == ["sample"]:
        chosen = [(way, 2, "logistic") for way in ("kill", "small_files", "together", "silent")]
    else:
        chosen = [(sys.argv[1], int(sys.argv[2]), command) for command in sys.argv[3:] or COMMANDS]
    for way, trials, command in chosen:
        print(f"{way} {command}: {trials} trials, {WAYS[way](command, trials)}", flush=True)
