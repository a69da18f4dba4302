"""What a node tells of itself survives the wire, and nothing else is taken for it."""

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from replica.heartbeat.node_state import (
    Claim,
    GroupState,
    NodeState,
    Phase,
    Readiness,
    Ready,
    Status,
    state_from_wire,
    state_to_wire,
)

COUNTS = st.integers(0, (1 << 63) - 1)
GROUPS = st.builds(
    GroupState,
    st.builds(Claim, COUNTS, st.text(), st.booleans()),
    st.sampled_from(Status),
    st.builds(Ready, st.sampled_from(Readiness), st.text()),
    st.booleans(),
    st.text(),
    st.text(),
)
STATES = st.builds(
    NodeState, st.sampled_from(Phase), st.dictionaries(st.text(), GROUPS, max_size=3), COUNTS, COUNTS, st.text()
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=9) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)


@given(STATES)
def test_a_state_survives_the_wire(state: NodeState) -> None:
    assert state_from_wire(msgpack.unpackb(msgpack.packb(state_to_wire(state)))) == state


@given(JSON, JSON, JSON, JSON)
def test_nothing_else_is_a_state(phase: object, pings: object, settings: object, groups: object) -> None:
    for document in (groups, {"phase": phase, "pings": pings, "settings": settings, "groups": groups}):
        with pytest.raises(ValueError, match=r"is not|not a valid|to unpack"):
            state_from_wire(document)


def test_a_boolean_is_no_number() -> None:
    document = state_to_wire(NodeState(groups={"web": GroupState(Claim(1, "node1"))}))
    document["groups"]["web"][0] = True
    with pytest.raises(ValueError, match="is not a count"):
        state_from_wire(document)
