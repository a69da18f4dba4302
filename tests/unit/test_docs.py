"""The documents against the code: what can be compared is compared."""

import dataclasses
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from nbdserver import constants
from replica import config, wire
from replica.cli import VERBS
from replica.heartbeat.agents.kinds import MODULES
from replica.heartbeat.fencing_sections import FENCING_KEYS
from replica.heartbeat.group_sections import GROUP_LIMITS, RESOURCE_TIMES
from replica.heartbeat.ha_cf import DIRECTIVES
from replica.heartbeat.sections import HEARTBEAT_KEYS
from replica.heartbeat.settings import FenceDevice, GroupSettings, ResourceSettings
from replica.heartbeat.tools import SUB_COMMANDS
from replica.hooks import DEFAULT_TIMEOUT_S, Event, environment
from replica.states import tables_as_markdown
from tests.sim.canaries import CANARIES
from tests.sim.failover.canaries import CANARIES as FAILOVER_CANARIES

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
DOCUMENTS = sorted([*DOCS.glob("*.md"), ROOT / "README.md", ROOT / "CHANGELOG.md"])


def test_states_are_those_of_the_program() -> None:
    _, marker, generated = (DOCS / "states.md").read_text().partition("do not edit below -->\n\n")
    assert marker
    assert generated == tables_as_markdown(), "run python -m replica.states and put its output below the marker"


def _configuration_rows(title: str = "[resource.NAME]") -> dict[str, str]:
    section = (DOCS / "configuration.md").read_text().partition(f"## `{title}`")[2].partition("\n## ")[0]
    return dict(re.findall(r"^\| `([a-z-]+)` \| ([^|]+?) \|", section, re.MULTILINE))


def test_configuration_names_every_key_of_a_resource() -> None:
    assert _configuration_rows().keys() == config._RESOURCE_KEYS.keys()


@pytest.mark.parametrize("key", config._RESOURCE_KEYS)
def test_configuration_has_the_default_of(key: str) -> None:
    setting, text = config._RESOURCE_KEYS[key], _configuration_rows()[key]
    if setting.default is config._REQUIRED:
        assert text == "required"
    elif setting.default is None:
        assert text == "as clients allow"
    else:
        assert setting.parse(tomllib.loads(f"value = {text.strip('`')}")["value"]) == setting.default


def _heartbeat_rows(section: str, table: int = 0) -> dict[str, str]:
    """First and second cells of one of the section's tables that are compared."""
    text = (DOCS / "heartbeat.md").read_text().partition(f"\n{section}\n")[2].partition("\n## ")[0]
    block = re.split(r"<!-- The test .* -->\n\n", text)[table + 1].partition("\n\n")[0]
    return {cells[0]: cells[1] for line in block.splitlines()[2:] if (cells := _cells(line))}


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_heartbeat_has_every_key_with_its_default() -> None:
    rows = _heartbeat_rows("## `[heartbeat]`")
    assert [key.strip("`") for key in rows] == list(HEARTBEAT_KEYS)
    for key, setting in HEARTBEAT_KEYS.items():
        if setting.default is not None:
            text = rows[f"`{key}`"].strip("`")
            assert setting.parse(tomllib.loads(f"value = {text}")["value"]) == setting.default, key


def test_heartbeat_says_which_keys_a_node_may_have_of_its_own() -> None:
    text = (DOCS / "heartbeat.md").read_text()
    own = re.findall(r"^\| `([\w-]+)` \| [^|]+ \| \*own\*;", text, re.MULTILINE)
    assert own == [key for key, setting in HEARTBEAT_KEYS.items() if setting.per_node]


@pytest.mark.parametrize(
    ("section", "table", "keys", "defaults"),
    [
        ("## `[[group]]`", 0, GROUP_LIMITS, GroupSettings),
        ("## `[[group]]`", 1, RESOURCE_TIMES, ResourceSettings),
        ("## Fencing", 0, FENCING_KEYS, FenceDevice),
    ],
)
def test_heartbeat_has_the_other_keys(section: str, table: int, keys: dict[str, Any], defaults: type) -> None:
    rows = {key.strip("`"): default for key, default in _heartbeat_rows(section, table).items()}
    rows = {key: default for key, default in rows.items() if key not in ("name", "preferred", "resources")}
    assert rows.keys() == keys.keys()
    fields = {field.name: field.default for field in dataclasses.fields(defaults)}
    for key, (field, _) in keys.items():
        if fields[field] is dataclasses.MISSING:
            assert rows[key] == "required"
        else:
            assert tomllib.loads(f"value = {rows[key].strip('`')}")["value"] == fields[field]


def test_heartbeat_has_every_kind_of_resource() -> None:
    section = (DOCS / "heartbeat.md").read_text().partition("| Kind |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `([^`]+)`", section, re.MULTILINE) == list(MODULES)


def test_heartbeat_has_every_directive_and_what_becomes_of_it() -> None:
    rows = _heartbeat_rows("### `ha.cf`")
    documented = {name: what for names, what in rows.items() for name in re.findall(r"`([\w]+)`", names)}
    assert documented.keys() == DIRECTIVES.keys()
    for name, directive in DIRECTIVES.items():
        assert documented[name].startswith("no effect, with a warning") is bool(directive.ignored), name
        assert documented[name].startswith("refused") is bool(directive.refused), name


def test_heartbeat_has_every_sub_command_of_cl_status() -> None:
    text = (DOCS / "heartbeat.md").read_text()
    assert [name for name in SUB_COMMANDS if not re.search(rf"`{name}[` ]", text)] == []


def test_configuration_names_every_hook() -> None:
    rows = _configuration_rows("[hooks]")
    assert rows == {"timeout": f"`{DEFAULT_TIMEOUT_S:g}`", **dict.fromkeys(map(str, Event), "none")}


def test_operations_has_every_variable_and_event_of_hooks() -> None:
    section = (DOCS / "operations.md").read_text().partition("\n## Hooks\n")[2].partition("\n## ")[0]
    status = {
        **dict.fromkeys(("name", "node", "role", "connection", "replication"), ""),
        "peer": dict.fromkeys(("name", "address", "role"), ""),
        "volumes": [dict.fromkeys(("disk", "peer_disk", "size_bytes", "backing"), "")],
    }
    variables = environment(Event.PROMOTED, "", status, cluster="", config_path="")
    first_cells = re.findall(r"^\| (`[^|]+`) \|", section, re.MULTILINE)
    documented = [name for cell in first_cells for name in re.findall(r"`([\w-]+)`", cell)]
    assert sorted(documented) == sorted([*variables, *Event])


def test_operations_has_every_command() -> None:
    text = (DOCS / "operations.md").read_text()
    assert [verb for verb in VERBS if not re.search(rf"^\| (`[^|]*, )?`{verb}[ `]", text, re.MULTILINE)] == []


def test_wire_has_every_kind_of_frame_with_its_number() -> None:
    rows = re.findall(r"^\| (0x\w\w(?:, 0x\w\w)*) \| ([A-Z_, ]+) \|", (DOCS / "wire.md").read_text(), re.MULTILINE)
    documented: dict[int, str] = {}
    for numbers, names in rows:
        pairs = zip(numbers.split(", "), names.split(", "), strict=True)
        documented |= {int(number, 16): name for number, name in pairs}
    assert documented == wire.KIND_NAMES


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", document.read_text()):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        file = (document.parent / name) if name else document
        assert file.exists(), f"{document.name} links to {target}"
        if anchor:
            heads = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
            assert anchor in anchors, f"{document.name} links to {target}"


def test_promises_name_tests_that_exist() -> None:
    text = (DOCS / "promises.md").read_text()
    for name in re.findall(r"`((?:tests|replica)/[\w/]+(?:\.py(?:::\w+)?|/))`", text):
        path, _, function = name.partition("::")
        assert (ROOT / path).exists(), name
        assert not function or f"def {function}(" in (ROOT / path).read_text(), name


def test_nbd_support_names_tests_that_exist() -> None:
    text = (DOCS / "nbd-support.md").read_text()
    named = re.findall(r"`((?:[\w/]+/)?test_\w+\.py)(?:::(\w+))?`", text)
    assert len(named) > 50
    for path, function in named:
        file = ROOT / (path if "/" in path else f"tests/unit/{path}")
        assert file.exists(), path
        assert not function or f"def {function}(" in file.read_text(), f"{path}::{function}"


def test_nbd_support_has_every_number_of_the_protocol_that_the_program_knows() -> None:
    text = (DOCS / "nbd-support.md").read_text()
    prefixes = ("OPT_", "REP_", "INFO_", "EXPORT_", "REPLY_FLAG_", "REPLY_", "CMD_FLAG_", "CMD_", "STATE_", "FLAG_")
    known = [name for name in vars(constants) if name.startswith((*prefixes, "E")) and name.isupper()]
    short = {name: next((name[len(one) :] for one in prefixes if name.startswith(one)), name) for name in known}
    assert [name for name, word in short.items() if f"`{word}`" not in text] == []


def test_promises_name_planted_bugs_that_exist() -> None:
    lists = re.findall(r"planted: ((?:`[\w-]+`(?:, )?)+)", (DOCS / "promises.md").read_text())
    named = {name for one in lists for name in re.findall(r"`([\w-]+)`", one)}
    assert len(named) > 20
    assert named <= {canary.name for canary in (*CANARIES, *FAILOVER_CANARIES)}


@pytest.mark.parametrize("package", ["replica", "nbdserver"])
def test_architecture_names_every_module(package: str) -> None:
    text = (DOCS / "architecture.md").read_text()
    modules = [path.stem for path in (ROOT / package).glob("*.py") if path.stem != "__init__"]
    assert [module for module in modules if f"`{module}`" not in text] == []
