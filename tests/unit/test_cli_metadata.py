"""``replicactl create-md`` and ``dump-md``, on real files."""

import fcntl
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from replica import cli

MIB = 1 << 20

Main = Callable[..., tuple[int, str, str]]


@pytest.fixture
def main(make_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Main:
    """Run a command in this process as node1; returns exit code, standard output and standard error."""
    monkeypatch.setenv("REPLICA_CONFIG", str(make_config()))
    monkeypatch.setenv("REPLICA_NODE", "node1")

    def run(*args: str) -> tuple[int, str, str]:
        code = cli.main(args)
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def backing(short_dir: Path) -> Path:
    return short_dir / "r0.img"


@pytest.fixture
def metadata(short_dir: Path) -> Path:
    return short_dir / "state/node1/r0-0.md"


def refusal(result: tuple[int, str, str]) -> str:
    code, out, err = result
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    return err


def dump(main: Main) -> dict[str, Any]:
    code, out, err = main("dump-md", "r0")
    assert (code, err) == (0, "")
    document: dict[str, Any] = json.loads(out)
    return document


def test_a_new_backing_file_is_sparse_and_private(main: Main, backing: Path, metadata: Path) -> None:
    code, out, err = main("create-md", "r0", "--size", "64M")
    assert (code, err) == (0, "")
    assert out == f"r0: metadata for {backing} (64.0 MiB) written to {metadata}\n"
    status = backing.stat()
    assert (status.st_size, status.st_blocks, status.st_mode & 0o777) == (64 * MIB, 0, 0o600)
    assert metadata.parent.stat().st_mode & 0o777 == 0o700


def test_what_was_created_is_dumped_as_json(main: Main) -> None:
    main("create-md", "--size", "64M")
    document = dump(main)
    assert (document["cluster"], document["resource"], document["node"]) == ("test", "r0", "node1")
    assert (document["size_bytes"], document["al_slots"]) == (64 * MIB, 1237)
    assert [peer["name"] for peer in document["peers"]] == ["node2"]


def test_the_settings_of_the_other_node(main: Main, short_dir: Path) -> None:
    assert main("create-md", "--size", "1M", "--node", "node2")[0] == 0
    assert (short_dir / "r0-2.img").exists()
    assert (short_dir / "state/node2/r0-0.md").exists()
    assert not (short_dir / "r0.img").exists()


def test_an_existing_backing_is_used_as_it_is(main: Main, backing: Path, metadata: Path) -> None:
    backing.write_bytes(b"precious" * (MIB // 8))
    assert "1048576 bytes large, not 2097152: leave --size out" in refusal(main("create-md", "--size", "2M"))
    assert "1048576 bytes large, not 524288" in refusal(main("create-md", "--size", "512K"))
    assert not metadata.exists()
    assert main("create-md")[0] == 0
    assert main("create-md", "--size", "1M", "--force")[0] == 0
    assert backing.read_bytes() == b"precious" * (MIB // 8)
    assert dump(main)["size_bytes"] == MIB


def test_metadata_is_replaced_only_by_force(main: Main, metadata: Path) -> None:
    main("create-md", "--size", "1M")
    before, old = metadata.read_bytes(), dump(main)
    message = refusal(main("create-md"))
    assert f"r0 has metadata already ({metadata})" in message
    assert "the next connection copies everything" in message
    assert metadata.read_bytes() == before
    assert main("create-md", "--force")[0] == 0
    assert dump(main)["device_id"] != old["device_id"]


def test_a_backing_in_use_is_refused(main: Main, backing: Path, metadata: Path) -> None:
    backing.write_bytes(bytes(MIB))
    with backing.open("rb") as user:
        fcntl.flock(user, fcntl.LOCK_EX)
        assert "in use by another process" in refusal(main("create-md"))
    assert not metadata.exists()


def test_a_missing_backing(main: Main, backing: Path, make_config: Callable[..., Path]) -> None:
    assert f"the backing {backing} does not exist: make it, or give its --size" in refusal(main("create-md"))
    file = make_config()
    for place, part in (("/dev/no-such-device", "there is no device"), ("none/r0.img", "make it first")):
        file.write_text(file.read_text().replace('backing = "r0.img"', f'backing = "{place}"'))
        assert part in refusal(main("create-md", "--size", "1M"))
        make_config()


def test_a_backing_that_cannot_be_one(main: Main, backing: Path) -> None:
    backing.mkdir()
    assert "neither a regular file nor a block device" in refusal(main("create-md"))
    backing.rmdir()
    backing.write_bytes(b"tiny")
    assert "4 bytes large: at least 4096 are needed" in refusal(main("create-md"))


def test_a_failure_leaves_no_new_backing_behind(main: Main, backing: Path, short_dir: Path) -> None:
    (short_dir / "state").write_text("a file where the folder should be")
    refusal(main("create-md", "--size", "1M"))
    assert not backing.exists()


def test_a_size_the_filesystem_cannot_have(main: Main, backing: Path) -> None:
    assert re.search(r"cannot be 8192\.0 PiB large|cannot be .* large", refusal(main("create-md", "--size", "7000P")))
    assert not backing.exists()


def test_nothing_to_dump(main: Main, metadata: Path) -> None:
    assert str(metadata) in refusal(main("dump-md"))
    metadata.parent.mkdir(parents=True)
    metadata.write_bytes(os.urandom(100_000))
    assert str(metadata) in refusal(main("dump-md"))
