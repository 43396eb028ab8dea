"""Pages whose commands are run: every ```bash block is typed into one shell, the ```text block behind it is what it
printed.

    python tests/documented.py docs/first_run.md    # run in an empty folder and write what was printed into the page
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEP = re.compile(r"```bash\n(?P<command>.*?)```\n(?:\n```text\n(?P<output>.*?)```\n)?", re.DOTALL)
KEPT = 24  # lines of an output in the page
# What differs from run to run and machine to machine: figures, digests, bars, and white space that depends on them.
VARIES = re.compile(r"[0-9a-f]{7,}|[+-]?\d[\d.,:]*(e[+-]?\d+)?|[━╸╺█─┏┓┗┛┡┩┳╇┴└┘│┃\s|]+")


@dataclass(frozen=True)
class Step:
    """A command of a page and what the page says it prints."""

    command: str
    output: str


def steps(page: Path) -> list[Step]:
    """The page's commands in their order."""
    return [Step(found["command"].strip(), found["output"] or "") for found in STEP.finditer(page.read_text())]


def run(step: Step, folder: Path, timeout_s: float = 300) -> str:
    """Output of the command in `folder`; AssertionError with its end if it fails. Commands run from the environment of
    this Python, and `examples/` is the repository's."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "COLUMNS": "110", "OMP_NUM_THREADS": "1"}
    script = f"set -euo pipefail\n{step.command}\n"
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    assert done.returncode == 0, f"{step.command}\n{(done.stdout + done.stderr)[-3000:]}"
    return done.stdout


def shape(output: str) -> list[str]:
    """Lines of an output without what varies."""
    lines = (" ".join(VARIES.sub(" ", line).split()) for line in output.splitlines())
    return [line for line in lines if line]


def unsaid(documented: str, printed: str) -> Iterator[str]:
    """Documented lines that the output lacks; an ellipsis stands for lines left out."""
    found = set(shape(printed))
    yield from (line for line in shape(documented) if line not in found and line != "...")


def prepare(folder: Path) -> None:
    """What a clone has beside the working folder."""
    (folder / "examples").symlink_to(ROOT / "examples")


def write(page: Path) -> None:
    """Run the page's commands and put what they print into it."""
    with tempfile.TemporaryDirectory() as scratch:
        prepare(Path(scratch))
        printed = iter([run(step, Path(scratch)) for step in steps(page)])

    def block(found: re.Match[str]) -> str:
        lines = next(printed).replace(scratch, ".").strip().splitlines()
        lines = lines if len(lines) <= KEPT else [*lines[: KEPT // 2], "...", *lines[-KEPT // 2 :]]
        text = "\n".join(line.rstrip() for line in lines)
        return f"```bash\n{found['command']}```\n" + (f"\n```text\n{text}\n```\n" if text else "")

    page.write_text(STEP.sub(block, page.read_text()))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
