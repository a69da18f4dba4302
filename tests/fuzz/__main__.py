"""`python -m tests.fuzz`: fuzz every parser for a while; `--replay FILE` runs one input again.

With atheris (libFuzzer for Python) the search is guided by coverage: inputs that reach new code are kept in
build/fuzz/ and are where the next search begins. Without it the corpus is mutated blindly, and the report says so. Both
use the same targets and the same mutator, which knows the messages.
"""

import argparse
import hashlib
import importlib.util
import logging
import os
import random
import re
import subprocess
import sys
import time
import traceback
import types
from pathlib import Path

from tests.fuzz.mutate import mutate
from tests.fuzz.targets import CORPUS, CRASHES, TARGETS, Target, inputs

_FOUND = Path("build/fuzz")
_TIMEOUT_S = 20
_RSS_LIMIT_MB = 1024
_INSTRUMENTED = ("nbdserver.", "replica.")


def main() -> int:
    options = _parse()
    logging.disable()  # thousands of refusals a second
    if options.replay is not None:
        return _replay(options.replay, options.target)
    if options.guided is not None:
        return _guided(options.guided, options.seconds, options.seed)
    names = [options.target] if options.target else list(TARGETS)
    guided = importlib.util.find_spec("atheris") is not None and not options.blind
    if not guided:
        why = "as asked" if options.blind else "atheris is not installed"
        print(f"fuzz: no coverage guidance ({why}): the corpus is mutated blindly")
    seed = options.seed if options.seed is not None else random.SystemRandom().getrandbits(31)
    print(f"fuzz: {len(names)} targets, {options.seconds:g} s; repeat with --seed {seed}", flush=True)
    failed = []
    for name in names:
        seconds = max(1, round(options.seconds / len(names)))
        if not (_guide(name, seconds, seed) if guided else _blind(name, TARGETS[name], seconds, seed)):
            failed.append(name)
    for name, file in inputs(CRASHES):
        if name in failed:
            print(f"fuzz: {name}: see it again with: python -m tests.fuzz --replay {os.path.relpath(file)}")
    print(f"fuzz: {'failed: ' + ', '.join(failed) if failed else 'nothing found'}")
    return 1 if failed else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="for all targets together (default: 60)")
    parser.add_argument("--target", choices=TARGETS, help="only this one")
    parser.add_argument("--seed", type=int, help="of the random choices")
    parser.add_argument("--blind", action="store_true", help="do without atheris")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="run this input of --target, show what it raises")
    parser.add_argument("--guided", choices=TARGETS, help=argparse.SUPPRESS)  # the process that atheris takes over
    options = parser.parse_args()
    if options.replay is not None and options.target is None:
        options.target = options.replay.resolve().parent.name
        if options.target not in TARGETS:
            parser.error(f"--target is missing: {options.replay} is not in a target's folder")
    return options


def _replay(file: Path, name: str) -> int:
    TARGETS[name].run(file.read_bytes())
    print(f"fuzz: {name}: {file} is fine")
    return 0


def _blind(name: str, target: Target, seconds: float, seed: int) -> bool:
    """Mutate inputs of the corpus until the time is over or one breaks an invariant, which is then written down."""
    rng = random.Random(f"{seed} {name}")
    corpus = [file.read_bytes() for owner, file in inputs(CORPUS) if owner == name]
    end = time.monotonic() + seconds
    runs = 0
    while time.monotonic() < end:
        data = mutate(target.split(rng.choice(corpus)), rng, target.split(rng.choice(corpus)), target.fields)
        runs += 1
        try:
            target.run(data)
        except Exception:
            traceback.print_exc()
            file = CRASHES / name / f"crash-{hashlib.sha1(data).hexdigest()}"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
            print(f"fuzz: {name}: failed after {runs} inputs")
            return False
    print(f"fuzz: {name}: {runs} inputs, without coverage", flush=True)
    return True


def _guide(name: str, seconds: float, seed: int) -> bool:
    """Let a process of its own search, and say how it went."""
    command = [sys.executable, "-m", "tests.fuzz", "--guided", name, "--seconds", str(seconds), "--seed", str(seed)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False
    )
    if done.returncode:
        print(done.stdout)
    runs = re.search(r"number_of_executed_units: *(\d+)", done.stdout)
    kept = len(list((_FOUND / name).glob("*")))
    print(
        f"fuzz: {name}: {runs[1] if runs else 'unknown'} inputs, guided by coverage; {kept} kept in {_FOUND / name}",
        flush=True,
    )
    return done.returncode == 0


def _guided(name: str, seconds: float, seed: int) -> int:
    """Hand this process over to libFuzzer. It does not come back: its status is 0 when nothing was found."""
    import atheris

    for module in [module for module in sys.modules if module.startswith(_INSTRUMENTED)]:
        _instrument(atheris, module)
    target = TARGETS[name]
    corpus = [file.read_bytes() for owner, file in inputs(CORPUS) if owner == name]

    def custom(data: bytes, max_size: int, number: int) -> bytes:
        rng = random.Random(number)
        if rng.random() < 0.2:
            return bytes(atheris.Mutate(data, max_size))
        return mutate(target.split(data), rng, target.split(rng.choice(corpus)), target.fields)[:max_size]

    found, crashes = _FOUND / name, CRASHES / name
    for folder in (found, crashes):
        folder.mkdir(parents=True, exist_ok=True)
    arguments = [
        name,
        f"-max_total_time={seconds:.0f}",
        f"-seed={seed}",
        f"-timeout={_TIMEOUT_S}",
        f"-rss_limit_mb={_RSS_LIMIT_MB}",
        "-max_len=131072",
        "-len_control=0",  # a stream that is cut short says nothing
        "-print_final_stats=1",
        f"-artifact_prefix={crashes}{os.sep}",
        str(found),
        str(CORPUS / name),
    ]
    atheris.Setup(arguments, target.run, custom_mutator=custom)
    atheris.Fuzz()
    return 0


def _instrument(atheris: object, module: str) -> None:
    """Put coverage counters into every function of a module that is imported already."""

    def visit(holder: object) -> None:
        for value in list(vars(holder).values()):
            value = getattr(value, "__func__", value)
            if isinstance(value, property):
                value = value.fget
            if isinstance(value, types.FunctionType) and value.__module__ == module:
                atheris.instrument_func(value)  # type: ignore[attr-defined]
            elif isinstance(value, type) and value.__module__ == module and value is not holder:
                visit(value)

    visit(sys.modules[module])


if __name__ == "__main__":
    sys.exit(main())
