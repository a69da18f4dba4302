"""The benches' own arithmetic: histograms, ratios, verdicts, tables, charts."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from bench import (
    charts,
    compare,
    cpu_time,
    document,
    handshake,
    in_kernel,
    peers,
    resync_time,
    steps,
    strain,
    switchover,
)
from bench.expectation import Expectation
from bench.follower import Follower
from bench.latency import Latencies, duration, merged
from bench.load import Workload, offsets, read_fio
from bench.measure import Row, Sample
from bench.spread import Spread, outside_noise, spread


def _sample(rate: float, latency_us: float = 100.0, cpu_us: float = 10.0) -> Sample:
    return Sample(rate, Latencies([round(latency_us * 1e3)] * 10), cpu_us)


def _comparison(rates: dict[str, list[float]]) -> peers.Comparison:
    rows = [
        Row(each, {name: [_sample(rate) for rate in many] for name, many in rates.items()}) for each in peers.WORKLOADS
    ]
    return peers.Comparison("command", ["a fact"], list(rates), rows, dict.fromkeys(rates, 1 << 20), ["fio"])


# ── latencies ────────────────────────────────────────────────────────────────────────────────────────────────


def test_percentiles_are_those_of_all_that_was_counted() -> None:
    latencies = Latencies(range(1_000, 1_001_000, 1_000))
    assert latencies.count == 1000
    assert latencies.percentile_us(50) == pytest.approx(500, rel=0.002)
    assert latencies.percentile_us(99) == pytest.approx(990, rel=0.002)
    assert Latencies().percentile_us(50) is None


def test_histograms_of_rounds_are_merged() -> None:
    whole = merged([Latencies([1_000] * 99), Latencies([2_000_000])])
    assert whole.count == 100
    assert whole.percentile_us(50) == pytest.approx(1, rel=0.002)
    assert whole.percentile_us(100) == pytest.approx(2000, rel=0.002)


def test_what_is_beyond_the_histogram_counts_at_its_end() -> None:
    assert Latencies([0]).count == Latencies([10**15]).count == 1


@pytest.mark.parametrize(
    ("microseconds", "text"),
    [(None, "–"), (0.5, "0.50 µs"), (87.3, "87.3 µs"), (999.0, "999 µs"), (999.6, "1.00 ms"), (2_500_000, "2.50 s")],
)
def test_durations_have_three_digits(microseconds: float | None, text: str) -> None:
    assert duration(microseconds) == text


def test_the_report_of_fio_is_read() -> None:
    bins = {"100000": 90, "900000": 10}
    job = {"write": {"total_ios": 100, "iops": 1234.5, "clat_ns": {"bins": bins}}, "read": {}}
    seen = read_fio("fio: this is not JSON\n" + json.dumps({"jobs": [job]}), "write")
    assert (seen.requests, seen.rate, seen.latencies.count) == (100, 1234.5, 100)
    assert seen.latencies.percentile_us(99) == pytest.approx(900, rel=0.002)


# ── ratios ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_ratios_are_made_in_each_round() -> None:
    """The machine is ten times as slow in the second round, and the ratio is the same."""
    assert spread([200.0, 20.0, 200.0], [100.0, 10.0, 100.0]) == Spread(2.0, 2.0, 2.0, False)
    assert spread([1.0], [2.0]) == Spread(0.5, 0.5, 0.5, False)
    assert spread([], []) is None


def test_the_quartiles_say_how_far_the_rounds_are_apart() -> None:
    found = spread([1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5)
    assert found is not None
    assert (found.median, found.low, found.high) == (3.0, 2.0, 4.0)
    assert str(found) == "3.00 (2.00–4.00)"


def test_a_difference_is_real_when_the_rounds_agree_more_than_chance_would() -> None:
    assert outside_noise([1.01] * 8)
    assert outside_noise([0.99] * 8)
    assert not outside_noise([1.5] * 7)
    assert not outside_noise([1.5] * 7 + [0.9])
    assert outside_noise([1.5] * 11 + [0.9])
    assert not outside_noise([1.0] * 20)
    assert not outside_noise([])


def test_verdicts_name_the_side_and_say_noise() -> None:
    def word(ratio: Spread | None) -> str:
        return compare.verdict(ratio, more_is="dearer", less_is="cheaper")

    assert word(Spread(1.2, 1.1, 1.3, True)) == "**dearer**"
    assert word(Spread(0.8, 0.7, 0.9, True)) == "**cheaper**"
    assert word(Spread(0.8, 0.7, 0.9, False)) == word(None) == "~"


def test_every_client_does_the_same_work() -> None:
    assert offsets(4096) == offsets(4096)
    assert all(offset % 4096 == 0 for offset in offsets(4096))


# ── what is expected ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("measured", "at_most", "verdict"),
    [(1.3, False, "met"), (1.29, False, "**missed**"), (1.3, True, "met"), (1.31, True, "**missed**")],
)
def test_expectations_are_met_or_missed(measured: float, at_most: bool, verdict: str) -> None:
    assert Expectation("rate", measured, 1.3, at_most=at_most).verdict == verdict


def test_what_was_not_measured_is_not_met() -> None:
    assert Expectation("rate", None, 1.3).row() == ["rate", "≥ 1.3 ×", "–", "not measured"]


def test_the_ratio_is_to_the_faster_mirror() -> None:
    comparison = _comparison({"Replica C": [300.0, 600.0], "C mirror": [100.0, 100.0], "C mirror, TCP": [150.0, 200.0]})
    ratio = comparison.ratio(comparison.rows[0])
    assert ratio is not None and ratio.median == 2.5
    first = peers.expectations(comparison)[0]
    assert (first.measured, first.verdict) == (2.5, "met")
    assert peers.expectations(comparison)[-1].verdict == "not measured"


def test_the_tables_of_the_comparison_have_every_server_and_workload() -> None:
    comparison = _comparison({"Replica C": [300.0], "C mirror": [100.0]})
    lines = peers.as_markdown(comparison)
    heads = [line for line in lines if "Replica C |" in line]
    assert len(heads) == 3 and all("C mirror" in head for head in heads)
    for workload in peers.WORKLOADS:
        assert any(line.startswith(f"| {workload.name} |") for line in lines)
    assert "| write 4 KiB, depth 64: p99.9 | 100 µs | 100 µs |" in lines
    assert any("3.00 (3.00–3.00)" in line for line in lines)
    assert json.loads(json.dumps(peers.as_json(comparison)))["rows"][0]["rates"]["C mirror"] == [100.0]


def test_the_table_of_two_revisions() -> None:
    rows = [
        Row(
            Workload("write", 4096), {"abc": [_sample(100.0, cpu_us=8)] * 8, "this one": [_sample(150.0, cpu_us=4)] * 8}
        )
    ]
    *_, line = compare.table("abc", rows)
    assert "| 1.50 (1.50–1.50) | **faster** | 8.0 µs | 4.0 µs | 0.50 (0.50–0.50) | **cheaper** |" in line


def test_the_table_of_pauses() -> None:
    pauses = switchover.Pauses("command", ["a fact"])
    for pause_s in (0.1, 0.2):
        pauses.add(switchover.TAKEOVER, pause_s)
    lines = switchover.as_markdown(pauses)
    assert "| `takeover` | 2 | 100 ms | 200 ms | 200 ms |" in lines
    assert [each.verdict for each in switchover.expectations(pauses)] == ["met", "not measured", "met"]


def test_the_table_of_resyncs() -> None:
    times = {"resync": {0.01: [0.1, 0.3, 0.2], 1.0: [2.0]}, "nbdcopy": {1.0: [1.0]}}
    lines = resync_time.as_markdown(times, 1 << 30)
    assert "| resync, 1.00% of 1024 MiB | 200 ms | 51 MiB/s |" in lines
    assert lines[-1].endswith("| 0.5 × | **missed** |")
    assert "nbdcopy" in resync_time.chart(times)
    assert resync_time.as_markdown({"resync": {1.0: [2.0]}, "nbdcopy": {}}, 1 << 30)[-1].endswith("| not measured |")


def test_a_pause_is_the_longest_time_between_two_answers() -> None:
    client = Follower([], "r0")
    client.answered_s += [1.0, 5.0, 5.1, 5.2, 7.0, 7.1]
    assert client.longest_pause_s(5.15) == pytest.approx(1.8)
    assert client.first_answer_s(5.15) == 5.2
    assert client.longest_pause_s(4.0) == 4.0


# ── steps ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_each_step_is_the_difference_of_two_servers() -> None:
    costs = {"receive": 10.0, "write": 13.0, "floor": 40.0, "Replica C": 50.0}
    row = Row(Workload("write", 4096), {name: [_sample(1.0, cpu_us=cost)] for name, cost in costs.items()})
    figures = [line.split("|")[2].strip() for line in steps.by_step([row])[2:]]
    assert figures == ["10.0 µs", "3.0 µs", "27.0 µs", "10.0 µs", "50.0 µs"]


def test_the_summary_of_strace_is_read() -> None:
    summary = """% time     seconds  usecs/call     calls    errors syscall
------ ----------- ----------- --------- --------- ----------------
 61.29    0.000874           4       200        17 recvfrom
 38.71    0.000552           2       183           pwrite64
------ ----------- ----------- --------- --------- ----------------
100.00    0.001426           3       383        17 total
"""
    assert steps.read_strace(summary) == {"recvfrom": 200, "pwrite64": 183}


def test_samples_are_counted_by_the_innermost_function() -> None:
    folded = "main (a.py:1);run (b.py:20) 7\nmain (a.py:1);run (b.py:21) 3\nmain (a.py:2) 1\n"
    folded += "boot (t.py:9);_worker (concurrent/futures/thread.py:81) 50\n"
    assert steps.read_stacks(folded) == {"run (b.py)": 10, "main (a.py)": 1}


# ── documents ────────────────────────────────────────────────────────────────────────────────────────────────


def test_only_what_is_between_the_markers_is_replaced(tmp_path: Path) -> None:
    file = tmp_path / "figures.md"
    kept = ["<!-- two: begin -->", "kept", "<!-- two: end -->"]
    file.write_text("\n".join(["before", "<!-- one: begin -->", "old", "<!-- one: end -->", *kept]))
    document.write_section(file, "one", ["new", "lines"])
    assert file.read_text().splitlines() == [
        *("before", "<!-- one: begin -->", "new", "lines", "<!-- one: end -->"),
        *kept,
    ]
    with pytest.raises(RuntimeError, match="three"):
        document.write_section(file, "three", [])


@pytest.mark.parametrize("bench", [peers, switchover, strain, resync_time, handshake, steps, in_kernel])
def test_the_document_has_the_markers(bench: Any) -> None:
    text = document.BENCHMARKS.read_text()
    assert f"<!-- {bench.SECTION}: begin -->" in text and f"<!-- {bench.SECTION}: end -->" in text


def test_charts_are_the_same_each_time_and_need_no_background() -> None:
    latencies = {
        "ours": Latencies(range(1000, 100_000, 10)),
        "theirs <3>": Latencies([5_000] * 1000),
        "none": Latencies(),
    }
    picture = charts.latency_percentiles("latency", latencies)
    assert picture == charts.latency_percentiles("latency", latencies)
    texts = [each.text for each in ElementTree.fromstring(picture).iter() if each.text]
    assert "theirs <3>" in texts and "99.9 %" in texts
    assert "<script" not in picture and "<!--" not in picture
    assert "100 µs" in texts and "1.00 µs" in texts
    rates = charts.rate_by_depth("rate", {"ours": {1: 5.0, 16: 50.0}, "theirs": {1: 4.0, 16: None}})
    assert ElementTree.fromstring(rates).tag.endswith("svg")


# ── the machine ────────────────────────────────────────────────────────────────────────────────────────────────


def test_processor_time_of_another_process_counts_its_threads() -> None:
    code = "import sys, threading\nt = threading.Thread(target=lambda: sum(range(1_000_000)))\nt.start(); t.join()\n"
    code += "print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdout.readline()
        spent_ns = cpu_time.spent_ns([process.pid])
        assert spent_ns > 5_000_000
        assert cpu_time.spent_ns([process.pid, os.getpid()]) > spent_ns
        process.stdin.close()


def test_processor_time_counts_children_that_have_ended() -> None:
    code = "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'sum(range(3_000_000))'])\n"
    code += "print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdout.readline()
        own_ns = time.clock_gettime_ns((~process.pid << 3) | 2)
        assert cpu_time.spent_ns([process.pid]) > own_ns + 10_000_000
        process.stdin.close()


def test_a_revision_that_does_not_exist_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main(["no-such-revision"]) == 1
    assert "there is no commit 'no-such-revision'" in capsys.readouterr().err


def test_dirty_memory_is_bounded_and_put_back(tmp_path: Path) -> None:
    """As in /proc/sys/vm, but for the zeroes that the kernel writes into the other one of a pair."""
    names = ("dirty_bytes", "dirty_ratio", "dirty_background_bytes", "dirty_background_ratio")
    before = dict(zip(names, ("0", "20", "4096", "0"), strict=True))
    for name, value in before.items():
        (tmp_path / name).write_text(value + "\n")
    with pytest.raises(KeyboardInterrupt), strain.bounded_dirty_memory(1 << 20, tmp_path):
        assert int((tmp_path / "dirty_bytes").read_text()) == 1 << 20
        assert int((tmp_path / "dirty_background_bytes").read_text()) == 1 << 19
        raise KeyboardInterrupt
    assert (tmp_path / "dirty_ratio").read_text() == "20"
    assert (tmp_path / "dirty_background_bytes").read_text() == "4096"
