"""The machines themselves: what a power cut costs, and what it does not."""

from pathlib import Path

import pytest

from tests.vm.machine import Machine, need_image, new_disk

_MIB = 1 << 20


@pytest.mark.slow
def test_a_power_cut_loses_the_page_cache_and_nothing_else(short_dir: Path) -> None:
    image = need_image()
    disk = new_disk(short_dir / "disk", 16 * _MIB)
    with Machine("machine", image, short_dir, [disk]) as machine:
        machine.power_on()
        machine.wait_ready()
        # When a device is closed by the last that has it open, the kernel writes everything back.
        machine.run("sh", "-c", "sleep 1000 < /dev/vdb > /dev/null 2>&1 &")
        machine.run("sysctl", "-w", "vm.dirty_writeback_centisecs=60000")
        machine.run(
            "sh", "-c", "printf flushed | dd of=/dev/vdb conv=fdatasync; printf lost | dd of=/dev/vdb seek=4096"
        )
        assert machine.run("head", "-c", "7", "/dev/vdb") == "flushed"
        machine.power_cut()
        content = disk.read_bytes()
        assert content.startswith(b"flushed\0")
        assert b"lost" not in content

        machine.power_on()
        machine.wait_ready()
        machine.run("sh", "-c", "printf kept | dd of=/dev/vdb seek=4096; echo gone > /root/file")
        machine.shut_down()
        assert disk.read_bytes()[4096 * 512 :].startswith(b"kept\0")


@pytest.mark.slow
def test_what_runs_in_a_machine_is_told_apart(short_dir: Path) -> None:
    image = need_image()
    with Machine("machine", image, short_dir) as machine:
        machine.power_on()
        machine.wait_ready()
        assert machine.run("sh", "-c", "echo one; echo two >&2") == "one\ntwo\n"
        with pytest.raises(AssertionError, match="ended with 3: no"):
            machine.run("sh", "-c", "echo no; exit 3")
        with pytest.raises(AssertionError, match="TimeoutExpired"):
            machine.run("sleep", "60", timeout_s=1)
        assert machine.call("os.path:basename", p="/a/b") == "b"
        with pytest.raises(AssertionError, match="AttributeError"):
            machine.call("os.path:nothing_like_it")
        (machine.job / "from-host").write_text("hello")
        assert machine.run("cat", "/job/from-host") == "hello"
        with pytest.raises(AssertionError, match="has ended"):
            machine.run("sh", "-c", "echo o > /proc/sysrq-trigger; sleep 60")
