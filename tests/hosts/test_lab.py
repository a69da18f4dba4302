"""The lab itself: what is cut is cut, what is frozen is silent, and two holders of an address are seen."""

import signal
import time
from collections.abc import Callable

import pytest

from tests.hosts.fence import AGENT, FenceDevice
from tests.hosts.host import Host, now
from tests.hosts.lab import CLUSTER_IP, Lab
from tests.hosts.namespace import LabError
from tests.hosts.probe import Probe, serve
from tests.hosts.switch import some
from tests.hosts.timeline import Answer, Span, Timeline

pytestmark = pytest.mark.root

_SEND = """
import socket, sys
s = socket.socket(type=socket.SOCK_DGRAM)
for _ in range(int(sys.argv[3])):
    s.sendto(b"x", (sys.argv[1], int(sys.argv[2])))
"""
_RECEIVE = """
import select, socket, sys
ports = {}
for port in map(int, sys.argv[1:]):
    s = socket.socket(type=socket.SOCK_DGRAM)
    s.bind(("", port))
    ports[s] = port
print("ready", flush=True)
while True:
    for s in sorted(select.select(list(ports), [], [])[0], key=ports.get):
        s.recv(9)
        print(ports[s], flush=True)
"""
_LAST_PORT = 700
# clone3(CLONE_VFORK), the same number on every architecture: the parent waits, not to be interrupted, for its child.
_WAITS_FOR_ITS_CHILD = """
import ctypes, struct, time
arguments = struct.pack("8Q", 0x4000, 0, 0, 0, 17, 0, 0, 0)
ctypes.CDLL(None).syscall(435, arguments, len(arguments)) or (print("ready", flush=True), time.sleep(600))
"""


def _reaches(source: Host, target: Host, address: str = "") -> bool:
    """Whether one of several questions is answered: the first may still get the verdict on an older one, by ARP."""
    return any(_answers(source, target, address) for _ in range(5))


def _answers(source: Host, target: Host, address: str = "") -> bool:
    return source.try_run("ping", "-c", "1", "-W", "1", address or target.address).returncode == 0


def _take(host: Host) -> None:
    host.run("ip", "address", "add", f"{CLUSTER_IP}/24", "dev", "eth0")


def test_a_host_has_its_own_name_processes_network_and_disk(lab: Lab) -> None:
    assert lab.node1.run("uname", "-n") == "node1\n"
    lab.node1.write("/etc/ha.d/ha.cf", "node node1 node2\n")
    lab.node1.write("/run/pid", "1")
    assert lab.node2.read("/etc/ha.d/ha.cf") != lab.node1.read("/etc/ha.d/ha.cf")
    assert len(lab.node1.namespace.processes()) == 1
    assert _reaches(lab.node1, lab.node2) and _reaches(lab.client, lab.node1)


def test_a_power_cut_takes_everything_but_the_disk(lab: Lab) -> None:
    lab.node1.spawn("sleeper", "sleep", "1000")
    lab.node1.write("/etc/replica/replica.toml", "kept")
    lab.node1.write("/run/lost", "lost")
    lab.node1.power_cut()
    assert not lab.node1.on
    assert lab.node1.read("/etc/replica/replica.toml") == "kept"
    assert not _answers(lab.client, lab.node1)
    lab.node1.boot()
    assert lab.node1.run("cat", "/etc/replica/replica.toml") == "kept"
    assert lab.node1.read("/run/lost") == ""
    assert len(lab.node1.namespace.processes()) == 1
    assert _reaches(lab.client, lab.node1)


def test_a_host_that_reboots_itself_is_off(lab: Lab) -> None:
    restart = "import ctypes; ctypes.CDLL(None).reboot(0x1234567)"
    lab.node1.try_run(Host.interpreter, "-c", restart)
    lab.node1.wait_off()
    lab.node1.boot()
    assert _reaches(lab.client, lab.node1)


def test_cables_are_pulled_and_plugged_in(new_lab: Callable[..., Lab]) -> None:
    lab = new_lab(second_network=True)
    lab.node1.pull("eth0")
    assert "NO-CARRIER" in lab.node1.run("ip", "link", "show", "eth0")
    assert not _answers(lab.node2, lab.node1) and _reaches(lab.node2, lab.node1, "10.0.0.1")
    lab.node1.plug("eth0")
    assert _reaches(lab.node2, lab.node1)


def test_a_frozen_host_says_nothing_and_goes_on_later(lab: Lab) -> None:
    lab.node1.freeze()
    assert not _answers(lab.client, lab.node1)
    lab.node1.thaw()
    assert _reaches(lab.client, lab.node1)


def test_a_process_that_cannot_stop_before_another_one_goes_on_is_frozen_too(lab: Lab) -> None:
    with lab.node1.popen(Host.interpreter, "-c", _WAITS_FOR_ITS_CHILD, stdout=-1) as waiting:
        assert waiting.stdout is not None and waiting.stdout.readline() == b"ready\n"
        lab.node1.freeze()
        lab.node1.thaw()
        lab.node1.power_cut()


def test_a_frozen_host_loses_power_too(lab: Lab) -> None:
    lab.node1.freeze()
    lab.node1.power_cut()
    lab.node1.boot()
    assert _reaches(lab.client, lab.node1)


def _received(source: Host, target: Host, port: int) -> bool:
    """Whether a datagram arrives: before another one that was sent after it."""
    with target.popen(Host.interpreter, "-c", _RECEIVE, str(port), str(_LAST_PORT), stdout=-1) as receiver:
        assert receiver.stdout is not None and receiver.stdout.readline() == b"ready\n"
        for each in (port, _LAST_PORT):
            source.run(Host.interpreter, "-c", _SEND, target.address, str(each), "1")
        first = int(receiver.stdout.readline())
        target.signal(signal.SIGKILL, f"{Host.interpreter} -c {_RECEIVE}")
    return first == port


def test_one_port_is_cut_in_one_direction(lab: Lab) -> None:
    lab.cut(lab.node1, lab.node2, "udp dport 694")
    assert not _received(lab.node1, lab.node2, 694)
    assert _received(lab.node2, lab.node1, 694) and _received(lab.node1, lab.node2, 695)
    lab.mend(lab.node1, lab.node2, "udp dport 694")
    assert _received(lab.node1, lab.node2, 694)


def test_a_path_loses_some(lab: Lab) -> None:
    lab.cut(lab.node1, lab.node2, f"udp dport 694 {some(30)}")
    lab.node1.run(Host.interpreter, "-c", _SEND, lab.node2.address, "694", "500")
    assert 75 <= lab.switch.frames_dropped() <= 225, "30 % of 500 is 150"  # 7 standard deviations


def test_the_probe_sees_who_answers_and_when_two_do(lab: Lab) -> None:
    for node in lab.nodes:
        serve(node)
    with Probe(lab) as probe:
        start = now()
        _take(lab.node1)
        probe.wait_answer(lab.node1)
        _take(lab.node2)
        probe.wait(lambda seen: bool(seen.two_holders(start, now())), "both have it")
        lab.node1.freeze()
        alone = probe.watch(0.1)
        probe.watch(0.2)
        assert probe.timeline.two_holders(alone, now()) == []
        lab.node1.thaw()
        lab.node2.power_cut()
        probe.wait_answer(lab.node1)


def test_the_fence_device_cuts_the_power(lab: Lab) -> None:
    ask = "action={}\nplug=node1\n".format
    with FenceDevice(lab) as fence:
        assert lab.node2.run(AGENT, stdin=ask("status")) == ""
        lab.node2.run(AGENT, stdin=ask("off"))
        assert not lab.node1.on
        with pytest.raises(LabError, match="ended with 2"):
            lab.node2.run(AGENT, stdin=ask("status"))
        lab.node2.run(AGENT, stdin=ask("on"))
        assert lab.node1.on
        lab.node2.run(AGENT, stdin=ask("reboot"))
        assert lab.node1.on
        fence.broken = True
        with pytest.raises(LabError, match="the device does not answer"):
            lab.node2.run(AGENT, stdin=ask("off"))
        assert fence.asked == ["off node1", "on node1", "reboot node1", "off node1"]


def test_programs_are_found_by_their_command_line(lab: Lab) -> None:
    lab.node1.spawn("sleeper", "sleep", "1000")
    assert lab.node1.signal(signal.SIGKILL, "sleep 1001") == []
    while not (reached := lab.node1.signal(signal.SIGKILL, "sleep 1000")):
        time.sleep(0.02)  # it has been started, and is on the way to being that program
    assert len(reached) == 1
    lab.node2.spawn("sleeper", "sleep", "1000")
    assert lab.node1.signal(signal.SIGKILL, "sleep 1000") == []


def test_a_timeline_tells_outages_from_answers() -> None:
    seen = Timeline(0.02, {"02:00:00:00:00:2c": "node1", "02:00:00:00:00:2d": "node2"})
    for number in range(100):
        moment = 10 + number * 0.02
        seen.add(["tick", moment])
        if not 30 <= number < 60:
            seen.add(["answer", moment + 0.001, "node1" if number < 30 else "node2"])
        seen.add(["holder", moment, "02:00:00:00:00:2c"])
        if number >= 90:
            seen.add(["holder", moment, "02:00:00:00:00:2d"])
    (outage,) = seen.outages(10, 12)
    assert outage == pytest.approx(Span(10.581, 11.201))
    assert [who for who, _ in seen.runs(10, 12)] == ["node1", "node2"]
    assert len(seen.two_holders(10, 12)) == 10 and seen.two_holders_s(10, 11.5) == 0
    assert seen.blind_s(10, 12) == 0 and seen.blind_s(10, 13) == pytest.approx(1.02)
    assert seen.answers[0] == Answer(10.001, "node1") and seen.last() == "node2"


def test_a_copy_of_a_timeline_stands_still() -> None:
    seen = Timeline(0.02, {"02:00:00:00:00:2c": "node1", "02:00:00:00:00:2d": "node2"})
    lines = (["tick", 1.0], ["holder", 1.0, "02:00:00:00:00:2c"], ["answer", 1.1, "node1"], ["http", 1.2, "page"])
    for line in lines:
        seen.add(line)
    copy, before = seen.copy(), repr(seen)
    for line in (*lines, ["holder", 1.0, "02:00:00:00:00:2d"], ["holder", 2.0, "02:00:00:00:00:2d"]):
        seen.add(line)
    assert repr(copy) == before != repr(seen)
