"""Every input of the corpus, and every one that ever broke something, keeps all invariants; and the fuzzers run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.targets import CORPUS, CRASHES, TARGETS, inputs

KEPT = [*inputs(CORPUS), *inputs(CRASHES)]


@pytest.mark.parametrize(("name", "file"), KEPT, ids=[f"{name}-{file.name}" for name, file in KEPT])
def test_an_input_that_was_kept(name: str, file: Path) -> None:
    data = file.read_bytes()
    TARGETS[name].run(data)
    if name.startswith(("nbd", "peer-frames")):  # the same input, delivered in every other way
        for mode in range(64):
            TARGETS[name].run(bytes([mode]) + data[1:])


def test_every_target_has_a_corpus() -> None:
    assert {name for name, _ in inputs(CORPUS)} == set(TARGETS)


@pytest.mark.parametrize("options", [[], ["--blind"]], ids=["guided if possible", "blind"])
def test_the_fuzzers_run(options: list[str], tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", "--seconds", "1", "--target", "control", "--seed", "1", *options],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing found" in done.stdout
    assert ("blindly" in done.stdout) or ("guided by coverage" in done.stdout)
