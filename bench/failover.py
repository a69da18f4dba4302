"""`replica-heartbeat` beside Debian's `heartbeat`: the same files, the same faults, on hosts made of namespaces.

    python -m bench.failover [--rounds N] [--deadtime S] [--only SCENARIO …] [--json FILE] [--write-docs]

As root. Every round plays each scenario with one product after the other (A B A B …); the median of the rounds counts.
A client asks every 20 ms. The hosts are those of tests/hosts.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Final

from bench import document
from bench.timeline_svg import Strip, picture
from tests.hosts.lab import Lab
from tests.hosts.products import Ours, Product, RealHeartbeat
from tests.hosts.scenarios import SCENARIOS, Phase, Scenario, play
from tests.hosts.timeline import Span, Timeline

_SECTION: Final = "figures"


@dataclass
class Run:
    """One scenario played once."""

    scenario: str
    product: str
    phases: list[Phase]
    strip: Strip
    #: For how long the client itself did not get to ask.
    blind_s: float


def measure(scenario: Scenario, product: Product, deadtime_s: float, quiet_s: float) -> Run:
    """Play it in a new lab."""
    with Lab() as lab:
        phases, seen = play(lab, product, scenario, deadtime_s, quiet_s)
    since, until = phases[0].since, phases[-1].until
    strip = _strip(product.name, phases, seen, scenario.web)
    return Run(scenario.name, product.name, phases, strip, seen.blind_s(since, until))


def _strip(product: str, phases: Sequence[Phase], seen: Timeline, pages: bool) -> Strip:
    since, until = phases[0].since, phases[-1].until

    def from_start(span: Span) -> Span:
        return Span(span.begin - since, span.end - since)

    held: dict[str, list[Span]] = {}
    for node, span in seen.holder_runs(since, until):
        held.setdefault(node, []).append(from_start(span))
    return Strip(
        product,
        held,
        [from_start(span) for span in seen.outages(since, until, pages)],
        [moment - since for moment in seen.two_holders(since, until)],
        [(phase.since - since, phase.name) for phase in phases],
        until - since,
    )


# ── results ──────────────────────────────────────────────────────────────────────────────────────────────────


def table(runs: Sequence[Run], products: Sequence[str]) -> list[str]:
    """In Markdown: for each phase and product, how long nobody answered, and how long two did."""
    head = "".join(f" {product}: no answer | two holders | ends on |" for product in products)
    lines = [f"| scenario | what is done |{head}", "|---|---|" + "---:|---:|---|" * len(products)]
    for scenario, phase in dict.fromkeys((run.scenario, phase.name) for run in runs for phase in run.phases):
        cells = ""
        for product in products:
            found = [
                each
                for run in runs
                if (run.scenario, run.product) == (scenario, product)
                for each in run.phases
                if each.name == phase
            ]
            cells += _cells(found)
        lines.append(f"| {scenario} | {phase} |{cells}")
    return lines


def _cells(phases: Sequence[Phase]) -> str:
    if not phases:
        return " – | – | – |"
    ends = ", ".join(sorted({phase.holder or "nobody" for phase in phases}))
    two_s = statistics.median(phase.two_holders_s for phase in phases)
    return f" {_figure([phase.outage_s for phase in phases])} | {f'**{two_s:.2f}**' if two_s else '0'} | {ends} |"


def _figure(values: Sequence[float]) -> str:
    spread = f" ({min(values):.2f}–{max(values):.2f})" if len(values) > 1 else ""
    return f"{statistics.median(values):.2f}{spread}"


def _machine() -> list[str]:
    package = shutil.which("dpkg-query") and subprocess.run(
        ["dpkg-query", "-W", "-f=${Version}", "heartbeat"], capture_output=True, text=True, check=False
    )
    return [
        f"- {os.cpu_count()} cores, Linux {platform.release()}, Python {platform.python_version()}",
        f"- heartbeat {package.stdout if package and package.stdout else 'is not installed'}",
    ]


def write_docs(runs: Sequence[Run], products: Sequence[str], command: str) -> None:
    """The table in docs/failover.md and the picture beside it."""
    rounds = max(
        sum(run.scenario == first.scenario and run.product == first.product for run in runs) for first in runs[:1]
    )
    text = [f"Measured on {date.today()} with `{command}`; seconds, medians of {rounds} (least–most).", "", *_machine()]
    text += ["", *table(runs, products)]
    document.write_section(document.DOCS / "failover.md", _SECTION, text)
    panels = [(name, list(_last_strips(runs, name))) for name in dict.fromkeys(run.scenario for run in runs)]
    (document.DOCS / "failover.svg").write_text(picture(panels))


def _last_strips(runs: Sequence[Run], scenario: str) -> Iterable[Strip]:
    last = {run.product: run.strip for run in runs if run.scenario == scenario}
    return last.values()


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Failover, measured beside Debian's heartbeat.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--deadtime", type=float, default=5.0, help="seconds")
    parser.add_argument("--quiet", type=float, default=4.0, help="so many seconds nothing changes when a phase is over")
    parser.add_argument("--only", nargs="*", default=[], choices=[scenario.name for scenario in SCENARIOS])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write-docs", action="store_true")
    args = parser.parse_args()
    if os.geteuid():
        print("bench.failover: making hosts of namespaces takes root", file=sys.stderr)
        return 1
    products: list[Product] = []
    for product in (RealHeartbeat(), Ours()):
        if missing := product.missing():
            print(f"{product.name} is left out: {missing}", file=sys.stderr)
        else:
            products.append(product)
    scenarios = [scenario for scenario in SCENARIOS if not args.only or scenario.name in args.only]
    runs: list[Run] = []
    for number in range(1, args.rounds + 1):
        for scenario in scenarios:
            if missing := scenario.missing():
                print(f"{scenario.name} is left out: {missing}", file=sys.stderr)
                continue
            for product in products:
                run = measure(scenario, product, args.deadtime, args.quiet)
                runs.append(run)
                words = ", ".join(
                    f"{phase.name} {phase.outage_s:.2f} s"
                    + (f" (two holders {phase.two_holders_s:.2f} s)" if phase.two_holders_s else "")
                    for phase in run.phases
                )
                print(f"{number}/{args.rounds} {product.name}: {scenario.name}: {words}", flush=True)
    names = [product.name for product in products]
    print("\n".join(table(runs, names)))
    if args.json:
        args.json.write_text(json.dumps([asdict(run) for run in runs], indent=1) + "\n")
    if args.write_docs:
        write_docs(runs, names, f"python -m bench.failover --rounds {args.rounds} --deadtime {args.deadtime:g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
