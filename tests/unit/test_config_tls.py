"""TLS in the configuration: whose files are taken, and what is said of wrong ones."""

from collections.abc import Callable
from pathlib import Path

import pytest

from nbdserver.handshake import TlsMode
from replica.config import ConfigError, load_config
from tests.certificates import Authority

TABLE = '{ cert = "%n.crt", key = "%n.key", ca = "ca.crt" }'
NBD = '{ mode = "require", cert = "%n.crt", key = "%n.key", ca = "ca.crt" }'

Load = Callable[..., object]


@pytest.fixture
def authority(short_dir: Path) -> Authority:
    authority = Authority(short_dir)
    for node in ("node1", "node2"):
        authority.files(node, node)
    return authority


@pytest.fixture
def file(make_config: Callable[..., Path]) -> Callable[..., Path]:
    """The configuration with lines added to sections: file(cluster="tls = …", node1=…, r0=…, r0_on_node2=…)."""

    def make(**lines: str) -> Path:
        path = make_config()
        text = path.read_text()
        heads = {
            "cluster": "[cluster]",
            "node1": "[node.node1]",
            "node2": "[node.node2]",
            "r0": "[resource.r0]",
            "r0_on_node2": "[resource.r0.on.node2]",
        }
        for where, line in lines.items():
            text = text.replace(heads[where] + "\n", f"{heads[where]}\n{line}\n")
        path.write_text(text)
        return path

    return make


def error_of(path: Path, node: str = "node1", *, need_secret: bool = True) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, node, need_secret=need_secret)
    message = str(caught.value)
    assert "\n" not in message
    return message.removeprefix(f"{path}")


def test_off_unless_asked_for(file: Callable[..., Path]) -> None:
    config = load_config(file(r0='nbd-tls = { mode = "off" }'), "node1")
    assert config.tls is None
    assert config.resource().tls is None


def test_one_line_for_both_nodes(file: Callable[..., Path], authority: Authority, short_dir: Path) -> None:
    path = file(cluster=f"tls = {TABLE}", r0=f"nbd-tls = {NBD}")
    for node in ("node1", "node2"):
        config = load_config(path, node)
        assert config.tls is not None
        assert config.tls.files.cert == short_dir / f"{node}.crt"
        assert config.tls.files.key == short_dir / f"{node}.key"
        assert config.tls.files.ca == short_dir / "ca.crt"
        tls = config.resource().tls
        assert tls is not None
        assert (tls.files, tls.mode) == (config.tls.files, TlsMode.REQUIRE)
        assert tls.not_after == config.tls.not_after is not None


def test_each_node_may_have_its_own(file: Callable[..., Path], authority: Authority, short_dir: Path) -> None:
    authority.files("special", "node2")
    special = '{ cert = "special.crt", key = "special.key", ca = "ca.crt" }'
    path = file(
        cluster=f"tls = {TABLE}",
        node2=f"tls = {special}",
        r0=f"nbd-tls = {NBD}",
        r0_on_node2='nbd-tls = { mode = "off" }',
    )
    first, second = load_config(path, "node1"), load_config(path, "node2")
    assert first.tls is not None
    assert first.resource().tls is not None
    assert first.tls.files.cert == short_dir / "node1.crt"
    assert second.tls is not None
    assert second.tls.files.cert == short_dir / "special.crt"
    assert second.resource().tls is None


@pytest.mark.parametrize("node", ["node1", "node2"])
def test_not_for_one_node_alone(file: Callable[..., Path], authority: Authority, node: str) -> None:
    path = file(node2=f"tls = {TABLE}")
    assert error_of(path, node) == (
        ":9: node.node2.tls: TLS of the peer link is for both nodes: set it for node1 as well, or in [cluster]"
    )


def test_commands_do_not_look_at_the_files(file: Callable[..., Path]) -> None:
    path = file(cluster=f"tls = {TABLE}", r0=f"nbd-tls = {NBD}")
    config = load_config(path, "node1", need_secret=False)
    assert config.tls is not None
    assert config.tls.not_after is None
    assert error_of(path).endswith(f"nbd-tls.cert: {path.parent}/node1.crt does not exist")


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ('"yes"', "must be a table such as"),
        ('{ cert = "a", key = "b" }', "needs ca, too: by it each node knows the other"),
        ('{ cert = "a", ca = "b" }', "needs key, the path of a file in PEM"),
        ('{ key = "a", ca = "b" }', "needs cert, the path of a file in PEM"),
        ('{ cert = "a", key = "b", ca = "c", mode = "allow" }', "has no key 'mode': its keys are cert, key, ca"),
        ('{ cert = "", key = "b", ca = "c" }', "cert must be the path of a file, not ''"),
        ('{ cert = 1, key = "b", ca = "c" }', "cert must be the path of a file, not 1"),
        ('{ cert = "a\\u0000", key = "b", ca = "c" }', "cert must be the path of a file"),
    ],
)
def test_wrong_tables_of_the_link(file: Callable[..., Path], value: str, sentence: str) -> None:
    assert f":2: cluster.tls: {sentence}" in error_of(file(cluster=f"tls = {value}"), need_secret=False)


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("true", "must be a table with mode = off, allow or require, and the files, not True"),
        ('{ cert = "a", key = "b" }', "must be a table with mode = off, allow or require"),
        ('{ mode = "always" }', "must be a table with mode = off, allow or require"),
        ("{ mode = [1] }", "must be a table with mode = off, allow or require"),
        ('{ mode = "allow" }', "needs cert, the path of a file in PEM"),
        ('{ mode = "off", cert = "a" }', "needs key, the path of a file in PEM"),
        ('{ mode = "require", cert = "a", key = "b", CA = "c" }', "has no key 'CA': its keys are mode, cert, key, ca"),
    ],
)
def test_wrong_tables_of_clients(file: Callable[..., Path], value: str, sentence: str) -> None:
    assert f": resource.r0.nbd-tls: {sentence}" in error_of(file(r0=f"nbd-tls = {value}"), need_secret=False)


def test_a_certificate_of_the_other_node(file: Callable[..., Path], authority: Authority, short_dir: Path) -> None:
    path = file(cluster='tls = { cert = "node2.crt", key = "node2.key", ca = "ca.crt" }')
    assert error_of(path) == (
        f":2: cluster.tls.cert: {short_dir}/node2.crt is not for node1 (it has no such DNS name): "
        "its peer would refuse it"
    )


def test_a_certificate_of_another_authority(file: Callable[..., Path], authority: Authority, short_dir: Path) -> None:
    Authority(short_dir / "other")
    path = file(cluster='tls = { cert = "%n.crt", key = "%n.key", ca = "other/ca.crt" }')
    assert error_of(path) == f":2: cluster.tls.cert: {short_dir}/node1.crt is not signed by {short_dir}/other/ca.crt"


def test_the_line_of_the_override_is_named(file: Callable[..., Path], authority: Authority, short_dir: Path) -> None:
    path = file(
        cluster=f"tls = {TABLE}",
        node1='tls = { cert = "no.crt", key = "%n.key", ca = "ca.crt" }',
        r0=f"nbd-tls = {NBD}",
        r0_on_node2='nbd-tls = { mode = "allow", cert = "node2.crt", key = "no.key" }',
    )
    lines = path.read_text().splitlines()
    link = 1 + lines.index('tls = { cert = "no.crt", key = "%n.key", ca = "ca.crt" }')
    assert error_of(path) == f":{link}: node.node1.tls.cert: {short_dir}/no.crt does not exist"
    nbd = 1 + lines.index('nbd-tls = { mode = "allow", cert = "node2.crt", key = "no.key" }')
    assert error_of(path, "node2") == f":{nbd}: resource.r0.on.node2.nbd-tls.key: {short_dir}/no.key does not exist"


def test_an_expired_certificate(file: Callable[..., Path], authority: Authority, short_dir: Path) -> None:
    authority.files("node1", "node1", expired=True)
    path = file(r0=f"nbd-tls = {NBD}")
    assert f"resource.r0.nbd-tls.cert: {short_dir}/node1.crt has expired, on " in error_of(path)
