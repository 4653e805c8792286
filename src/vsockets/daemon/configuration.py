"""vsockd's configuration: the ``*.toml`` files of one folder, read into Settings.

``docs/configuration.md`` has the schema.  Files are read in the order of their names.  For the
host, the limits and the audit log, a later file overrides an earlier one; contexts and grants of
all files are combined.
"""

from __future__ import annotations

import grp
import os
import pwd
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

from ..fabric.settings import ContextSettings, Grant, Isolation, Limits, Profile, Settings
from ..limits import NAME_MAX_CHARACTERS
from ..model.address import FIRST_GUEST_CID, LAST_GUEST_CID
from ..model.home import home_folder
from ..model.locator import check_hybrid_path
from ..toml import ConfigurationError, Table, kind, read_toml, shown
from ..vmware import Vmx, VmxError, read_vmx

__all__ = [
    "LARGEST_ID",
    "ConfigurationError",
    "default_configuration_folder",
    "load",
    "read_hybrid",
    "read_isolation",
    "read_limits",
]

#: The largest user or group id; the next one, (uid_t)-1, means "no change" to chown(2).
LARGEST_ID = (1 << 32) - 2

_LIMITS = tuple(field.name for field in fields(Limits))
#: Unread datagrams use kernel memory, which a user of the host can also take by other sockets.
_HOST_LIMITS = tuple(name for name in _LIMITS if name != "datagram_bytes")
_PROFILES = tuple(profile.value for profile in Profile)
_LEGACY_ONLY = ("unrestricted", "domain")


def default_configuration_folder() -> Path:
    """Return the configuration folder that is used by default; it need not exist."""
    configured = os.environ.get("VSOCKETS_CONFIG")
    if configured:
        return Path(configured)
    if os.geteuid() == 0:
        return Path("/etc/vsock")
    return Path(os.environ.get("XDG_CONFIG_HOME") or home_folder() / ".config", "vsock")


def load(folder: Path) -> Settings:
    """Return the settings in the files of ``folder``; defaults if the folder is missing.

    Raises ConfigurationError for the first error.
    """
    roots = [read_toml(path) for path in _files(folder)]
    for root in roots:
        root.require_known("host", "limits", "audit", "context", "grant")
    settings = Settings()
    for root in roots:
        settings = _override(settings, root)
    contexts = [table for root in roots for table in root.tables("context")]
    grants = [table for root in roots for table in root.tables("grant")]
    return replace(
        settings,
        contexts=_contexts(contexts, settings.limits),
        grants=tuple(_grant(table) for table in grants),
    )


def _files(folder: Path) -> list[Path]:
    try:
        # Names with a leading dot are lock files and backups of editors.
        names = sorted(name for name in os.listdir(folder) if name.endswith(".toml"))
    except FileNotFoundError:
        return []
    except OSError as error:
        problem = (
            f"{error.strerror}, expected a folder that vsockd can read (VSOCKETS_CONFIG names it; "
            "else it is below XDG_CONFIG_HOME or HOME: these must be this user's)"
        )
        raise ConfigurationError(str(folder), None, "", problem) from error
    return [folder / name for name in names if not name.startswith(".")]


def _override(settings: Settings, root: Table) -> Settings:
    """Return ``settings`` with the host, limits and audit tables of one file applied."""
    host, audit = root.table("host"), root.table("audit")
    host.require_known("domains", "limits")
    audit.require_known("rate")
    domains = _domains(host)
    return replace(
        settings,
        limits=read_limits(root.table("limits"), settings.limits),
        host_limits=read_limits(host.table("limits"), settings.host_limits, _HOST_LIMITS),
        host_domains=settings.host_domains if domains is None else domains,
        audit_rate=audit.integer("rate", 1) or settings.audit_rate,
    )


def _contexts(tables: list[Table], limits: Limits) -> tuple[ContextSettings, ...]:
    contexts = []
    taken: dict[tuple[str, int | str | None], str] = {
        ("name", "host"): "the host",
        ("name", "hypervisor"): "the hypervisor",
    }
    for table in tables:
        context = _context(table, limits)
        contexts.append(context)
        for identity in (("cid", context.cid), ("name", context.name or None)):
            key, value = identity
            if value is None:
                continue
            source = _source(table, key)
            if identity in taken:
                problem = f"{key} {shown(value)} is used by {taken[identity]}, expected another"
                raise table.error(problem, source)
            taken[identity] = f"the context at {table.place(source)}"
    return tuple(contexts)


def _context(table: Table, limits: Limits) -> ContextSettings:
    known = ("cid", "vmx", "name", "owner", "profile", *_LEGACY_ONLY, "power", "limits", "hybrid")
    table.require_known(*known)
    cid = table.integer("cid", FIRST_GUEST_CID, LAST_GUEST_CID)
    name = table.text("name")
    isolation = read_isolation(table)
    if "vmx" in table.values:
        with _named_by(table):
            vmx = _vmx(table)
            cid = vmx.cid if cid is None else cid
            name = vmx.display_name or None if name is None else name
            isolation = _with_options(isolation, vmx, table)
    if cid is None and name is None:
        raise table.error("missing CID and name, expected at least one of cid, name")
    if name is not None:
        _require_name(table, "name", name)
    return ContextSettings(
        cid=cid,
        name=name or "",
        owner=_id(table, "owner", "user", lambda name: pwd.getpwnam(name).pw_uid),
        isolation=isolation,
        limits=read_limits(table.table("limits"), limits),
        powered=table.choice("power", ("on", "off")) != "off",
        hybrid=read_hybrid(table),
    )


# Keys of a context, in files and in requests on the control socket


def read_limits(table: Table, base: Limits, known: tuple[str, ...] = _LIMITS) -> Limits:
    """Return ``base`` with the limits that the table ``limits`` sets."""
    table.require_known(*known)
    given = {key: table.integer(key, 1) for key in known}
    return replace(base, **{key: value for key, value in given.items() if value is not None})


def read_hybrid(table: Table) -> str:
    """Return the path of a context's hybrid socket; "" without one."""
    path = table.text("hybrid")
    if path is None:
        return ""
    if problem := check_hybrid_path(path):
        raise table.error(problem, "hybrid")
    return path


def read_isolation(table: Table) -> Isolation:
    """Return the isolation of a context."""
    profile = Profile(table.choice("profile", _PROFILES) or Profile.DEFAULT)
    unrestricted, domain = table.boolean("unrestricted"), table.text("domain")
    for key in _LEGACY_ONLY:
        if key in table.values and profile is not Profile.LEGACY:
            problem = f'not used by the profile {profile.value}, expected profile = "legacy"'
            raise table.error(problem, key)
    if domain:
        _require_name(table, "domain", domain)
    return Isolation(profile, bool(unrestricted), domain or "")


# Values of files only


def _vmx(table: Table) -> Vmx:
    """Return the virtual machine that a context refers to, which must have a VMCI device."""
    text = table.text("vmx")
    if not text or "\0" in text:
        raise table.error(f"{shown(text or '')}, expected the path of a .vmx file", "vmx")
    assert table.file is not None
    vmx = read_vmx(table.file.parent / text)
    vmx.require_vmci()
    return vmx


@contextmanager
def _named_by(table: Table) -> Iterator[None]:
    """Report an error of a .vmx file at the context that refers to it."""
    try:
        yield
    except VmxError as error:
        raise table.error(str(error), "vmx") from error


def _with_options(isolation: Isolation, vmx: Vmx, table: Table) -> Isolation:
    """Return ``isolation`` with the options of the .vmx file that the table does not set.

    ESXi 5.1 and later ignore both options (guide page 24), as do all profiles but legacy.
    """
    if isolation.profile is not Profile.LEGACY:
        return isolation
    if "unrestricted" not in table.values:
        isolation = replace(isolation, unrestricted=vmx.unrestricted)
    if "domain" not in table.values:
        isolation = replace(isolation, domain=vmx.domain)
        if vmx.domain:
            _require_name(table, "domain", vmx.domain)
    return isolation


def _source(table: Table, key: str) -> str:
    """Return the key in the table that a context's ``key`` comes from: itself, or ``vmx``."""
    return key if key in table.values else "vmx"


def _require_name(table: Table, key: str, name: str, *inner: int) -> None:
    if not 1 <= len(name) <= NAME_MAX_CHARACTERS or not name.isprintable():
        source = _source(table, key)
        what = "" if source == key else f"{key} "
        problem = f"{what}{shown(name)}, expected 1 to {NAME_MAX_CHARACTERS} printable characters"
        raise table.error(problem, source, *inner)


def _domains(table: Table) -> frozenset[str] | None:
    domains = table.texts("domains")
    for index, domain in enumerate(domains or ()):
        if domain:  # "" is the default domain
            _require_name(table, "domains", domain, index)
    return None if domains is None else frozenset(domains)


def _grant(table: Table) -> Grant:
    who = ("user", "group")
    what = ("stream_vsocket_trusted", "dgram_vsocket_trusted", "domains", "capture")
    table.require_known(*who, "executable", *what)
    if not any(key in table.values for key in what):
        raise table.error(f"grants nothing, expected at least one of {', '.join(what)}")
    if not any(key in table.values for key in who):
        if "executable" not in table.values:
            raise table.error("matches every program, expected user, group or both")
        # A user can run any program that the user may execute, with any connection.
        problem = "any user can execute it, expected user, group or both too (user = 'NAME')"
        raise table.error(problem, "executable")
    return Grant(
        user=_id(table, "user", "user", lambda name: pwd.getpwnam(name).pw_uid),
        group=_id(table, "group", "group", lambda name: grp.getgrnam(name).gr_gid),
        executable=_executable(table),
        stream=bool(table.boolean("stream_vsocket_trusted")),
        datagram=bool(table.boolean("dgram_vsocket_trusted")),
        domains=_domains(table),
        capture=bool(table.boolean("capture")),
    )


def _id(table: Table, key: str, what: str, look_up: Callable[[str], int]) -> int | None:
    """Return a user or group id, given by name or number; a number is not looked up."""
    value = table.values.get(key)
    if value is None:
        return None
    if type(value) is int:
        return table.integer(key, 0, LARGEST_ID)
    if not isinstance(value, str):
        raise table.error(f"{kind(value)}, expected the name or number of a {what}", key)
    try:
        return look_up(value)
    except (KeyError, ValueError) as error:  # ValueError: not a valid name (a NUL)
        problem = f"no {what} {shown(value)}, expected the name or number of one"
        raise table.error(problem, key) from error


def _executable(table: Table) -> str | None:
    """Return a program's path, without symbolic links, as the kernel reports it."""
    path = table.text("executable")
    if path is None:
        return None
    if not path.startswith("/") or "\0" in path:
        raise table.error(f"{shown(path)}, expected an absolute path", "executable")
    real = os.path.realpath(path)
    if real != path:
        problem = f"{shown(path)} is not the program's real path, expected {shown(real)}"
        raise table.error(problem, "executable")
    return path
