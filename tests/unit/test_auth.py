"""What both ends of a link prove, and what they compare before that."""

from dataclasses import replace

import pytest

from replica import auth, wire

NODE1 = auth.Identity("web", "r0", "node1", "node2", "C", False)
NODE2 = auth.Identity("web", "r0", "node2", "node1", "C", False)
SECRET = b"0123456789abcdef"
ONE, TWO = auth.hello(NODE1, b"1" * 32), auth.hello(NODE2, b"2" * 32)


def test_two_that_fit_together_accept_each_other() -> None:
    assert auth.check_hello(NODE2, ONE)["node"] == "node1"
    assert auth.check_hello(NODE1, TWO)["nonce"] == b"2" * 32
    mine = auth.proof(SECRET, dialer=True, own_hello=ONE, peer_hello=TWO)
    theirs = auth.proof(SECRET, dialer=False, own_hello=TWO, peer_hello=ONE)
    assert auth.verify(SECRET, mine, dialer=False, own_hello=TWO, peer_hello=ONE)
    assert auth.verify(SECRET, theirs, dialer=True, own_hello=ONE, peer_hello=TWO)


@pytest.mark.parametrize(
    "other",
    [
        replace(NODE2, cluster="other"),
        replace(NODE2, resource="r1"),
        replace(NODE2, node="node3"),
        replace(NODE2, node="node1"),
        replace(NODE2, protocol="A"),
        replace(NODE2, integrity=True),
    ],
)
def test_what_differs_is_named(other: auth.Identity) -> None:
    (name,) = [
        field
        for field in ("cluster", "resource", "node", "protocol", "integrity")
        if getattr(other, field) != getattr(NODE2, field)
    ]
    with pytest.raises(wire.ProtocolError) as caught:
        auth.check_hello(NODE1, auth.hello(other, b"2" * 32))
    assert name in str(caught.value)
    assert repr(getattr(other, name)) in str(caught.value)


def changed(**fields: object) -> bytes:
    """node2's HELLO with other fields; None leaves one out."""
    message = {**wire.unpack_map(TWO), **fields}
    return wire.pack_map({name: value for name, value in message.items() if value is not None})


@pytest.mark.parametrize(("low", "high"), [(wire.VERSION_MAX + 1, wire.VERSION_MAX + 3), (0, wire.VERSION_MIN - 1)])
def test_versions_that_have_nothing_in_common(low: int, high: int) -> None:
    with pytest.raises(wire.ProtocolError, match=f"{low} to {high}: update the older node"):
        auth.check_hello(NODE1, changed(version_min=low, version_max=high))


def test_a_newer_program_that_still_speaks_our_version() -> None:
    auth.check_hello(NODE1, changed(version_max=wire.VERSION_MAX + 5, something_new="x"))


@pytest.mark.parametrize(
    "hello",
    [
        b"",
        b"junk",
        changed(program="drbd"),
        changed(program=None),
        changed(version_min="1"),
        changed(node=None),
        changed(node=7),
        changed(data_integrity=0),
        changed(nonce=b"short"),
        changed(nonce="2" * 32),
        changed(nonce=None),
    ],
)
def test_a_hello_that_makes_no_sense(hello: bytes) -> None:
    with pytest.raises(wire.ProtocolError):
        auth.check_hello(NODE1, hello)


def test_proofs_are_good_for_one_connection_one_role_and_one_secret() -> None:
    proof = auth.proof(SECRET, dialer=True, own_hello=ONE, peer_hello=TWO)

    def accepted(
        mac: bytes, secret: bytes = SECRET, dialer: bool = False, mine: bytes = TWO, theirs: bytes = ONE
    ) -> bool:
        return auth.verify(secret, mac, dialer=dialer, own_hello=mine, peer_hello=theirs)

    assert accepted(proof)
    assert not accepted(proof, secret=b"another secret..")
    # Sent back to the one who made it.
    assert not accepted(proof, dialer=True, mine=ONE, theirs=TWO)
    # Of an earlier connection: either nonce is a new one now.
    assert not accepted(proof, mine=auth.hello(NODE2, b"3" * 32))
    assert not accepted(proof, theirs=auth.hello(NODE1, b"3" * 32))
    # A HELLO that somebody in between has changed.
    assert not accepted(proof, mine=changed(version_max=9))
    for bad in (b"", proof[:-1], proof + b"x", bytes(32)):
        assert not accepted(bad)


def test_sessions_are_named_alike_at_both_ends_and_never_twice() -> None:
    one = auth.session_id(SECRET, dialer_hello=ONE, accepter_hello=TWO)
    assert 0 < one < 1 << 64
    assert one == auth.session_id(SECRET, dialer_hello=ONE, accepter_hello=TWO)
    assert one != auth.session_id(SECRET, dialer_hello=TWO, accepter_hello=ONE)
    assert one != auth.session_id(SECRET, dialer_hello=ONE, accepter_hello=auth.hello(NODE2, b"3" * 32))
