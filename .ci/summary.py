"""Print what a JUnit report of pytest holds: counts, failures, and why how many were skipped."""

import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter


def main() -> None:
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    failures: list[str] = []
    for case in ElementTree.parse(sys.argv[1]).iter("testcase"):
        outcome = next((kind for kind in ("error", "failure", "skipped") if case.find(kind) is not None), "passed")
        counts[outcome] += 1
        found = case.find(outcome)
        if found is not None:
            message = (found.get("message") or "no reason given").splitlines()[0]
            if outcome == "skipped":
                reasons[message] += 1
            else:
                failures.append(f"{case.get('classname')}.{case.get('name')}: {message}")
    print("       " + ", ".join(f"{number} {outcome}" for outcome, number in sorted(counts.items())))
    for failure in failures:
        print(f"  FAILED {failure}")
    for reason, number in reasons.most_common():
        print(f"  skipped {number}: {reason}")


main()
