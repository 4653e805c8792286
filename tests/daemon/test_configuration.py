"""The configuration folder: its valid contents, and the messages about errors."""

from __future__ import annotations

import grp
import os
import pwd
import tomllib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vsockets.daemon.configuration import (
    ConfigurationError,
    default_configuration_folder,
    load,
)
from vsockets.fabric.settings import (
    ContextSettings,
    Grant,
    Isolation,
    Limits,
    Profile,
    Settings,
)
from vsockets.limits import CONFIGURATION_FILE_MAX_BYTES
from vsockets.testing import PrivateFabric
from vsockets.toml import read_toml

VMX = """\
.encoding = "UTF-8"
displayName = "legacy web"
virtualHW.version = "7"
vmci0.present = "TRUE"
vmci0.id = "-1791447150"
vmci0.unrestricted = "TRUE"
vmci0.domain = "lab"
"""
VMX_CID = 2**32 - 1791447150

PLAIN = ContextSettings(
    cid=3, name="", owner=None, isolation=Isolation(), limits=Limits(), powered=True
)


def loaded(folder: Path, text: str) -> Settings:
    (folder / "web.toml").write_text(text)
    return load(folder)


def mistake(folder: Path, text: str) -> str:
    """Return the message about an error in a file, without the folder's name."""
    with pytest.raises(ConfigurationError) as error:
        loaded(folder, text)
    said = str(error.value)
    assert said.isprintable()
    assert said.startswith(f"{folder}/")
    return said.replace(f"{folder}/", "")


# Valid contents


def test_every_key(tmp_path: Path) -> None:
    user, group = pwd.getpwall()[0], grp.getgrall()[0]
    (tmp_path / "web.vmx").write_text(VMX)
    assert loaded(
        tmp_path,
        f"""
        [host]
        domains = ["", "lab"]
        limits = {{ sockets = 6, pending_connects = 7, request_rate = 8 }}
        [limits]
        sockets = 1
        pending_connects = 2
        request_rate = 3
        datagram_bytes = 4
        [audit]
        rate = 5

        [[context]]
        cid = 3
        name = "web"
        owner = "{user.pw_name}"
        profile = "restricted"
        power = "off"
        limits = {{ sockets = 100, datagram_bytes = 10 }}

        [[context]]
        vmx = "web.vmx"
        owner = 1234
        profile = "legacy"
        [context.limits]
        request_rate = 7

        [[context]]
        name = "db"
        profile = "legacy"
        unrestricted = true
        domain = "lab"

        [[grant]]
        user = "{user.pw_name}"
        group = "{group.gr_name}"
        executable = "/opt/backup/backupd"
        stream_vsocket_trusted = true
        dgram_vsocket_trusted = true
        domains = ["lab"]

        [[grant]]
        user = 0
        stream_vsocket_trusted = true
        capture = true
        """,
    ) == Settings(
        contexts=(
            ContextSettings(
                cid=3,
                name="web",
                owner=user.pw_uid,
                isolation=Isolation(Profile.RESTRICTED),
                limits=Limits(100, 2, 3, 10),
                powered=False,
            ),
            ContextSettings(
                cid=VMX_CID,
                name="legacy web",
                owner=1234,
                isolation=Isolation(Profile.LEGACY, True, "lab"),
                limits=Limits(1, 2, 7, 4),
                powered=True,
            ),
            ContextSettings(
                cid=None,
                name="db",
                owner=None,
                isolation=Isolation(Profile.LEGACY, True, "lab"),
                limits=Limits(1, 2, 3, 4),
                powered=True,
            ),
        ),
        grants=(
            Grant(
                user.pw_uid,
                group.gr_gid,
                "/opt/backup/backupd",
                stream=True,
                datagram=True,
                domains=frozenset({"lab"}),
            ),
            Grant(0, None, None, stream=True, datagram=False, domains=None, capture=True),
        ),
        host_domains=frozenset({"", "lab"}),
        limits=Limits(1, 2, 3, 4),
        host_limits=Limits(6, 7, 8),
        audit_rate=5,
    )


def test_defaults(tmp_path: Path) -> None:
    assert load(tmp_path / "none") == Settings()
    assert load(tmp_path) == Settings()
    assert loaded(tmp_path, "# nothing\n[host]\n[limits]\n[audit]\n") == Settings()


def test_other_files_are_ignored(tmp_path: Path) -> None:
    for name in (".#web.toml", ".web.toml", "web.toml~", "web.toml.orig", "README"):
        (tmp_path / name).write_text("not toml")
    assert load(tmp_path) == Settings()


def test_files_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    (tmp_path / "2.toml").write_text(
        '[limits]\nsockets = 2\n[audit]\nrate = 2\n[host]\ndomains = []\n[[context]]\nname = "b"'
    )
    (tmp_path / "1.toml").write_text(
        '[limits]\nsockets = 1\nrequest_rate = 1\n[host]\ndomains = ["x"]\n[[context]]\nname = "a"'
    )
    found = load(tmp_path)
    assert [context.name for context in found.contexts] == ["a", "b"]
    assert found.limits == Limits(sockets=2, request_rate=1)
    assert {context.limits for context in found.contexts} == {found.limits}
    assert found.host_domains == frozenset()
    assert found.audit_rate == 2


def test_a_cid_is_all_a_context_needs(tmp_path: Path) -> None:
    assert loaded(tmp_path, "[[context]]\ncid = 0x3").contexts == (PLAIN,)


def test_the_default_domain_may_be_written_out(tmp_path: Path) -> None:
    text = '[[context]]\ncid = 3\nprofile = "legacy"\ndomain = ""\nunrestricted = false'
    assert loaded(tmp_path, text).contexts[0].isolation == Isolation(Profile.LEGACY)


def test_keys_beside_a_vmx_file_override_it(tmp_path: Path) -> None:
    (tmp_path / "web.vmx").write_text(VMX)
    text = '[[context]]\nvmx = "web.vmx"\ncid = 5\nname = "x"\nprofile = "legacy"\n'
    (context,) = loaded(tmp_path, text + 'unrestricted = false\ndomain = ""').contexts
    assert (context.cid, context.name, context.isolation) == (5, "x", Isolation(Profile.LEGACY))


@pytest.mark.parametrize("profile", ["default", "restricted"])
def test_later_profiles_ignore_the_isolation_options_of_a_vmx_file(
    tmp_path: Path, profile: str
) -> None:
    (tmp_path / "web.vmx").write_text(VMX.replace('"TRUE"\nvmci0.domain', '"maybe"\nvmci0.domain'))
    (context,) = loaded(tmp_path, f'[[context]]\nvmx="web.vmx"\nprofile="{profile}"').contexts
    assert context.isolation == Isolation(Profile(profile))


def test_a_vmx_file_elsewhere_and_without_a_cid(tmp_path: Path) -> None:
    (tmp_path / "vms").mkdir()
    (tmp_path / "etc").mkdir()
    (tmp_path / "vms" / "web.vmx").write_text('virtualHW.version = "10"\ndisplayName = "web"')
    for path in ("../vms/web.vmx", tmp_path / "vms" / "web.vmx"):
        (context,) = loaded(tmp_path / "etc", f'[[context]]\nvmx = "{path}"').contexts
        assert (context.cid, context.name) == (None, "web")


def test_an_overridden_error_in_a_vmx_file_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "a.vmx").write_text('virtualHW.version = "10"\nvmci0.id = "2"')
    assert loaded(tmp_path, '[[context]]\nvmx = "a.vmx"\ncid = 3').contexts == (PLAIN,)


# Errors

TOML = [
    ("a", 1, "", "not TOML: Expected '=' after a key in a key/value pair"),
    ("\n\na = ", 3, "", "not TOML: Invalid value (end of document)"),
    ("[host]\n\n[host]", 3, "", "not TOML: Cannot declare ('host',) twice"),
    ("\n[[contexts]]\n", 2, "contexts", "unknown key, did you mean context?"),
    ("wibble = 1", 1, "wibble", "unknown key, expected host, limits, audit, context or grant"),
    ('"a\\nb" = 1', 1, "'a\\nb'", "unknown key"),
    ("[host]\ndomain = ['']", 2, "host.domain", "unknown key, did you mean domains?"),
    (
        "[host.limits]\ndatagram_bytes = 1",
        2,
        "host.limits.datagram_bytes",
        "unknown key, expected sockets, pending_connects or request_rate",
    ),
    ("[limits]\nsocket = 1", 2, "limits.socket", "unknown key, did you mean sockets?"),
    ("[audit]\nx = 1", 2, "audit.x", "unknown key, expected rate"),
    ("[[context]]\ncid=3\nownr=1", 3, "context.ownr", "unknown key, did you mean owner?"),
    ("[[grant]]\nuser=0\ntrusted=1", 3, "grant.trusted", "unknown key, "),
    (
        "[[context]]\ncid = 3\nlimits = { sockts = 1 }",
        3,
        "context.limits.sockts",
        "unknown key, did you mean sockets?",
    ),
]
TYPES = [
    ("host = 1", 1, "host", "1 is an integer, expected a table"),
    ("[[host]]", 1, "host", "an array, expected a table"),
    ("[host]\ndomains = 'lab'", 2, "host.domains", "'lab' is a string, expected an array"),
    ("[host]\ndomains = [\n'lab',\n1]", 4, "host.domains", "1 is an integer, expected a string"),
    ("[limits]\nsockets = true", 2, "limits.sockets", "true is a boolean, expected an integer"),
    ("[limits]\nsockets = 1.0", 2, "limits.sockets", "1.0 is a float, expected an integer"),
    ("[audit]\nrate = 07:32:00", 2, "audit.rate", "a date or time, expected an integer"),
    ("\n[context]\ncid = 3", 2, "context", "a table, expected tables, each headed [[context]]"),
    ("context = [{}, 1]", 1, "context", "an array, expected tables, each headed [[context]]"),
    ("[[context]]\ncid = '3'", 2, "context.cid", "'3' is a string, expected an integer"),
    ("[[context]]\nname = 3", 2, "context.name", "3 is an integer, expected a string"),
    ("[[context]]\ncid=3\nprofile=3", 3, "context.profile", "3 is an integer, expected a string"),
    ("[[context]]\ncid=3\nlimits=3", 3, "context.limits", "3 is an integer, expected a table"),
    ("[[context]]\ncid=3\nowner=[]", 3, "context.owner", "an array, expected the name or number"),
    ("[[context]]\ncid=3\nowner=true", 3, "context.owner", "true is a boolean, expected the name"),
    ("[[context]]\nvmx=3", 2, "context.vmx", "3 is an integer, expected a string"),
    (
        "[[context]]\ncid=3\nprofile='legacy'\nunrestricted='no'",
        4,
        "context.unrestricted",
        "'no' is a string, expected a boolean",
    ),
    ("[[grant]]\ndomains=[]\nuser={}", 3, "grant.user", "a table, expected the name or number"),
    (
        "[[grant]]\nuser=0\nstream_vsocket_trusted=1",
        3,
        "grant.stream_vsocket_trusted",
        "1 is an integer, expected a boolean",
    ),
]
VALUES = [
    ("[limits]\nsockets = 0", 2, "limits.sockets", "0 is out of range, expected from 1"),
    (
        "[limits]\nsockets = 9223372036854775808",
        2,
        "limits.sockets",
        "a number of more than 64 bits is out of range, expected from 1",
    ),
    (
        f"[audit]\nrate = 0x{'f' * 9000}",
        2,
        "audit.rate",
        "a number of more than 64 bits is out of range, expected from 1",
    ),
    *(
        (
            f"[[context]]\n\ncid = {cid}",
            3,
            "context.cid",
            f"{cid} is out of range, expected 3 to 4294967294",
        )
        for cid in (-1, 0, 1, 2, 4294967295)
    ),
    ("[[context]]\ncid=3\nowner=-1", 3, "context.owner", "-1 is out of range, expected 0 to"),
    ("[[grant]]\ndomains=[]\ngroup=4294967295", 3, "grant.group", "4294967295 is out of range"),
    ("[[context]]\ncid=3\nowner='alise '", 3, "context.owner", "no user 'alise '"),
    ('[[context]]\ncid=3\nowner="a\\u0000"', 3, "context.owner", "no user 'a\\x00'"),
    ("[[grant]]\ndomains=[]\nuser='no one'", 3, "grant.user", "no user 'no one'"),
    ("[[grant]]\ndomains=[]\ngroup='no one'", 3, "grant.group", "no group 'no one'"),
    (
        "[[context]]\ncid=3\nprofile='esx'",
        3,
        "context.profile",
        "'esx' is unknown, expected default, restricted or legacy",
    ),
    ("[[context]]\ncid=3\npower=''", 3, "context.power", "'' is unknown, expected on or off"),
    ("[[context]]\nname=''", 2, "context.name", "'', expected 1 to 80 printable characters"),
    ("[[context]]\nname='''a\nb'''", 2, "context.name", "'a\\nb', expected 1 to 80 printable"),
    (f"[[context]]\nname='{'a' * 81}'", 2, "context.name", "'aaa"),
    (
        '[[context]]\ncid=3\nprofile="legacy"\ndomain="\\t"',
        4,
        "context.domain",
        "'\\t', expected 1 to 80 printable characters",
    ),
    ('[host]\ndomains=["",\n"\\n"]', 3, "host.domains", "'\\n', expected 1 to 80 printable"),
    (
        "[[grant]]\nexecutable='backupd'\nuser=0\ndomains=[]",
        2,
        "grant.executable",
        "'backupd', expected",
    ),
    (
        '[[grant]]\nexecutable="/a\\u0000"\nuser=0\ndomains=[]',
        2,
        "grant.executable",
        "'/a\\x00', expected an absolute path",
    ),
    (
        "[[grant]]\nexecutable='/opt//x/../a'\nuser=0\ndomains=[]",
        2,
        "grant.executable",
        "'/opt//x/../a' is not the program's real path, expected '/opt/a'",
    ),
    ("[[context]]\nvmx=''", 2, "context.vmx", "'', expected the path of a .vmx file"),
    ('[[context]]\nvmx="\\u0000"', 2, "context.vmx", "'\\x00', expected the path of a .vmx file"),
]
COMBINATIONS = [
    ("[[context]]\npower='on'", 1, "context", "missing CID and name, expected at least one of"),
    *(
        (
            f"[[context]]\ncid=3\n{profile}\n{key}={value}",
            4,
            f"context.{key}",
            f'not used by the profile {name}, expected profile = "legacy"',
        )
        for profile, name in (("profile='restricted'", "restricted"), ("", "default"))
        for key, value in (("unrestricted", "false"), ("domain", "'lab'"))
    ),
    (
        "[[grant]]\nstream_vsocket_trusted=true",
        1,
        "grant",
        "matches every program, expected user, group or both",
    ),
    *(
        (
            f"[[grant]]\n{what}\n\nexecutable='/opt/backupd'",
            4,
            "grant.executable",
            "any user can execute it, expected user, group or both too (user = 'NAME')",
        )
        for what in ("stream_vsocket_trusted=true", "domains=['lab']", "capture=true")
    ),
    ("[[grant]]\nuser=0", 1, "grant", "grants nothing, expected at least one of stream_vsocket"),
    ("[[context]]\nname='host'", 2, "context.name", "name 'host' is used by the host, expected"),
    (
        "[[context]]\ncid=3\n[[context]]\nname='a'\n\ncid=3",
        6,
        "context.cid",
        "cid 3 is used by the context at web.toml:2, expected another",
    ),
    (
        "[[context]]\nname='a'\n[[context]]\nname='a'",
        4,
        "context.name",
        "name 'a' is used by the context at web.toml:2, expected another",
    ),
]


@pytest.mark.parametrize(("text", "line", "key", "problem"), TOML + TYPES + VALUES + COMBINATIONS)
def test_errors(tmp_path: Path, text: str, line: int, key: str, problem: str) -> None:
    where = f"web.toml:{line}: {key}: " if key else f"web.toml:{line}: "
    assert mistake(tmp_path, text).startswith(where + problem)


def test_one_cid_in_two_files(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("\n[[context]]\ncid = 3")
    assert mistake(tmp_path, "[[context]]\ncid = 3") == (
        "web.toml:2: context.cid: cid 3 is used by the context at a.toml:3, expected another"
    )


def test_one_virtual_machine_twice(tmp_path: Path) -> None:
    (tmp_path / "web.vmx").write_text(VMX)
    (tmp_path / "a.toml").write_text("[[context]]\nvmx = 'web.vmx'")
    assert mistake(tmp_path, "[[context]]\nname='b'\nvmx = 'web.vmx'") == (
        f"web.toml:3: context.vmx: cid {VMX_CID} is used by the context at a.toml:2, "
        "expected another"
    )
    assert mistake(tmp_path, "[[context]]\ncid=7\nvmx = 'web.vmx'") == (
        "web.toml:3: context.vmx: name 'legacy web' is used by the context at a.toml:2, "
        "expected another"
    )


@pytest.mark.parametrize(
    ("vmx", "said"),
    [
        ("?", "web.vmx:1: '?', expected a line of the form: key = \"value\""),
        ('virtualHW.version = "6"', "web.vmx:1: virtualHW.version: '6', expected 7 or later: "),
        (VMX + 'vmci0.ID = "3"', "web.vmx:8: vmci0.ID: given on line 5 already, expected once"),
        (VMX.replace("-1791447150", "2"), "web.vmx:5: vmci0.id: '2', not a guest's CID"),
        (VMX.replace("TRUE", "1"), "web.vmx:4: vmci0.present: '1', expected TRUE or FALSE"),
        (VMX.replace("y web", "y|0Aweb"), "name 'legacy\\nweb', expected 1 to 80 printable"),
        (VMX.replace("lab", "l|09b"), "domain 'l\\tb', expected 1 to 80 printable"),
        ('virtualHW.version = "7"\nvmci0.unrestricted = "2"', "web.vmx:2: vmci0.unrestricted: '2'"),
    ],
)
def test_errors_in_a_vmx_file(tmp_path: Path, vmx: str, said: str) -> None:
    (tmp_path / "web.vmx").write_text(vmx)
    text = "[[context]]\nprofile = 'legacy'\nvmx = 'web.vmx'"
    assert mistake(tmp_path, text).startswith(f"web.toml:3: context.vmx: {said}")


def test_a_vmx_file_without_cid_and_name(tmp_path: Path) -> None:
    (tmp_path / "web.vmx").write_text('virtualHW.version = "7"')
    assert mistake(tmp_path, "\n[[context]]\nvmx = 'web.vmx'").startswith(
        "web.toml:2: context: missing CID and name"
    )
    assert mistake(tmp_path, "[[context]]\nvmx = 'no.vmx'").startswith(
        "web.toml:2: context.vmx: no.vmx: No such file or directory"
    )


def test_an_executable_must_not_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "program").touch()
    (tmp_path / "link").symlink_to("program")
    folder = os.path.realpath(tmp_path)
    text = "[[grant]]\ndomains = []\nexecutable = "
    found = loaded(tmp_path, f"{text}'{folder}/program'\nuser = 0")
    assert found.grants[0].executable == f"{folder}/program"
    assert mistake(tmp_path, f"{text}'{folder}/link'\nuser = 0").startswith(
        "web.toml:3: grant.executable: "
    )


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "web.toml").mkdir()
    with pytest.raises(ConfigurationError, match=f"^{tmp_path}/web.toml: not a regular file"):
        load(tmp_path)
    (tmp_path / "web.toml").rmdir()
    os.mkfifo(tmp_path / "web.toml")
    with pytest.raises(ConfigurationError, match=f"^{tmp_path}/web.toml: not a regular file"):
        load(tmp_path)
    with pytest.raises(ConfigurationError, match=f"^{tmp_path}/web.toml: Not a directory"):
        load(tmp_path / "web.toml")
    (tmp_path / "web.toml").unlink()
    with pytest.raises(ConfigurationError, match=f"^{tmp_path}/web.toml: No such file"):
        read_toml(tmp_path / "web.toml")


def test_bytes_that_are_not_utf_8(tmp_path: Path) -> None:
    (tmp_path / "web.toml").write_bytes(b"[host]\n\n# B\xfcro")
    with pytest.raises(ConfigurationError, match=r"web.toml:3: byte 0xfc is not text, expected U"):
        load(tmp_path)


def test_large_and_deep_files(tmp_path: Path) -> None:
    assert loaded(tmp_path, "#" * CONFIGURATION_FILE_MAX_BYTES) == Settings()
    assert mistake(tmp_path, "#" * CONFIGURATION_FILE_MAX_BYTES + "#").startswith(
        "web.toml: more than "
    )
    assert mistake(tmp_path, "a = " + "[" * 5000).startswith("web.toml: not TOML: ")
    assert mistake(tmp_path, f"a = {'9' * 5000}").startswith("web.toml: not TOML: Exceeds")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.sampled_from(
            ["[[context]]", "[context]", "[limits]", "[[grant]]", "[host]", "[context.limits]"]
            + ["cid=3", "cid=4", "name='a'", "name=[]", "owner=0", "owner='nobody '", "rate={}"]
            + ["sockets=1", "sockets=-1", "user=0", "domains=['']", "domains=[{}]", "domain=''"]
            + ["profile='legacy'", "unrestricted=true", "power='off'", "limits={sockets=1}", "="]
            + ["vmx='/'", "executable='/a'", "stream_vsocket_trusted=true", "x=" + "[" * 600]
        )
    ).map("\n".join)
    | st.text()
)
def test_any_file_gives_settings_or_an_error_with_its_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "web.toml").write_bytes(text.encode("utf-8", "surrogatepass"))
    said, found = "", None
    try:
        found = load(tmp_path)
    except ConfigurationError as error:
        said = str(error)
    assert said.startswith(f"{tmp_path}/web.toml:") or isinstance(found, Settings)
    assert said.isprintable()


# The folder


def test_the_default_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("VSOCKETS_CONFIG", raising=False)
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert default_configuration_folder() == Path("/etc/vsock")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert default_configuration_folder() == tmp_path / ".config" / "vsock"
    monkeypatch.setenv("XDG_CONFIG_HOME", "/x")
    assert default_configuration_folder() == Path("/x/vsock")
    monkeypatch.setenv("VSOCKETS_CONFIG", "/y/z")
    assert default_configuration_folder() == Path("/y/z")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert default_configuration_folder() == Path("/y/z")


def test_a_folder_that_cannot_be_read(tmp_path: Path) -> None:
    """As root's home is for another user, whose HOME names it."""
    if os.geteuid() == 0:
        (tmp_path / "vsock").write_text("")  # root reads every folder
    else:
        (tmp_path / "vsock").mkdir(mode=0o300)
    with pytest.raises(ConfigurationError, match=r"VSOCKETS_CONFIG .* HOME: these must be this"):
        load(tmp_path / "vsock")


def test_the_documented_example() -> None:
    """A vsockd of any user starts with it."""
    page = Path(__file__).parents[2] / "docs" / "configuration.md"
    example = page.read_text().partition("```toml\n")[2].partition("```")[0]
    assert set(tomllib.loads(example)) == {"host", "limits", "audit", "context", "grant"}
    fabric = PrivateFabric()
    (fabric.configuration / "sample.toml").write_text(example)
    with fabric:
        contexts = {row["name"]: row["state"] for row in fabric.control.contexts()}
    assert contexts == {"host": "running", "web": "off", "db": "running", "scratch": "running"}
