"""Enable and disable variants: their files, and their lines in variants.list."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import stat
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

from imageos import cluster, ganeti, log
from imageos.checks.variants import LISTING, listed, name_variants
from imageos.errors import Failure, explained
from imageos.node import linux
from imageos.node.programs import available
from imageos.settings import SITE_DIR, VARIANT, Settings, examine_settings
from imageos.variants.catalog import Entry, choose, is_as_written, nearest


def architecture() -> str:
    """Return the node's, as the catalog names it; ARCH is part of the names of a site's own files."""
    machine = os.uname().machine
    return "x86" if re.fullmatch("i[3-6]86", machine) else machine


def defaults() -> Settings:
    """Return the settings of a variant without a file of its own."""
    settings, _ = examine_settings(ganeti.EXAMPLE, warn=lambda _: None)
    return settings


def enable(names: Sequence[str], entries: Mapping[str, Entry]) -> None:
    """Have Ganeti offer the variants `names`: all of them, or none if one cannot be."""
    settings = defaults()
    with alone():
        enabled = listed()
        planned = {name: _plan(name, entries, settings.variants_dir) for name in names}
        new = {name for name in planned if name not in enabled}
        with ExitStack() as undo:
            for name, text in planned.items():
                path = f"{settings.variants_dir}/{name}.conf"
                before = _content(path)
                if text is not None and before != text.encode():
                    write(path, text.encode())
                    undo.callback(_restore, path, before)
                    new.add(name)
            _write_listing(more=[name for name in planned if name not in enabled])
            undo.pop_all()
        for name, text in planned.items():
            log.info(f"variant {name} is enabled" if name in new else f"variant {name} was enabled already")
            if text is not None:
                _tell_of_key(entries[name], text)


def _plan(name: str, entries: Mapping[str, Entry], variants_dir: str) -> str | None:
    """Return what the variant's file is to hold; None if the site has its own, which stays as it is."""
    path = f"{variants_dir}/{name}.conf"
    known = _content(path) if re.fullmatch(VARIANT, name) else None  # nor does the catalog have another name
    if known is not None and not _is_ours(path):
        log.info(f"{path} is the site's own, and stays as it is")
        return None
    try:
        entry = choose(entries, name)
    except Failure as failure:
        raise Failure(f"{failure}, and there is no {path}", hint=failure.hint) from None
    is_demanded = b"\nIMAGE_KEYRING=" in (known or b"")  # a key that is lost makes the demand no smaller
    return entry.variant_file(architecture(), is_demanded or os.path.exists(entry.keyring_path))


def _tell_of_key(entry: Entry, text: str) -> None:
    if entry.keyring and not os.path.exists(entry.keyring_path):
        so = "there is no download without it" if "IMAGE_KEYRING=" in text else "only its checksum counts"
        log.info(f"variant {entry.name}: its publisher signs, but {entry.keyring_path} is not there: {so}")
        log.info(f"hint: {entry.get_key}; then imageos variants enable {entry.name}")


def disable(names: Sequence[str], os_dir: str) -> None:
    """Take back what `enable` has done, unless instances use one of the variants."""
    variants_dir = defaults().variants_dir
    with alone():
        enabled = listed()
        ours = [name for name in names if re.fullmatch(VARIANT, name) and _is_ours(f"{variants_dir}/{name}.conf")]
        gone = [name for name in dict.fromkeys(names) if name in enabled or name in ours]
        for name in names:
            if name not in gone:
                near = nearest(name, enabled)
                log.info(f"variant {name} is not enabled{f' (did you mean {near}?)' if near else ''}")
        if set(enabled) & set(gone) and not set(enabled) - set(gone):
            raise Failure(
                f"{', '.join(gone)} would leave Ganeti without a variant: it would take the OS for invalid",
                hint="enable another one before",
            )
        _check_unused(gone, os.path.basename(os.path.normpath(os_dir)))
        _write_listing(without=gone)
        for name in gone:
            path = f"{variants_dir}/{name}.conf"
            if name in ours:
                with explained(f"cannot remove {path}"):
                    os.unlink(path)
                    _sync(variants_dir)
            elif os.path.lexists(path):
                log.info(f"{path} is the site's own, and kept")
            log.info(f"variant {name} is disabled")


def _check_unused(names: Sequence[str], os_name: str) -> None:
    """Fail if the cluster has instances of these variants. Without Ganeti there are none."""
    if not names or not available("gnt-cluster"):
        return
    try:
        instances = cluster.instances()
    except Failure as failure:
        log.warning(f"{failure}: whether instances use {name_variants(names)} is not known")
        return
    for name in names:
        if used := [user for user, os_ in instances if os_ == f"{os_name}+{name}"]:
            raise Failure(
                f"variant {name} is used by {log.few(used)}: they could not be reinstalled any more",
                hint="give them another one: gnt-instance modify --os-type",
            )


# --- files ------------------------------------------------------------------------------------------------


@contextmanager
def alone() -> Iterator[None]:
    """Wait for another process that enables or disables; others wait for us."""
    with explained(SITE_DIR, hint="imageos install"):
        directory = os.open(SITE_DIR, os.O_RDONLY)
    with linux.closing(directory):
        fcntl.flock(directory, fcntl.LOCK_EX)
        yield


def _write_listing(more: Sequence[str] = (), without: Collection[str] = ()) -> None:
    """Change variants.list; what else is in it, comments and ends of lines too, stays as it is."""
    before = _content(LISTING) or b""
    names = {name.encode() for name in without}
    lines = [line for line in before.splitlines(keepends=True) if line.strip() not in names]
    if more and lines and not lines[-1].endswith((b"\n", b"\r")):
        lines.append(b"\n")
    content = b"".join([*lines, *(f"{name}\n".encode() for name in more)])
    if content != before:
        write(LISTING, content)


def _content(path: str) -> bytes | None:
    """Return what is in a file; None if there is nothing of that name."""
    if not os.path.lexists(path):
        return None
    if not os.path.isfile(path):
        raise Failure(f"{path} is no file, nor a link to one", hint="move it away")
    with explained(f"cannot read {path}"), open(path, "rb") as file:
        return file.read()


def _is_ours(path: str) -> bool:
    """Return True if `enable` has made the file, and nobody has changed it; it makes no links."""
    return os.path.isfile(path) and not os.path.islink(path) and is_as_written(_content(path) or b"")


def _restore(path: str, before: bytes | None) -> None:
    if before is None:
        os.unlink(path)
    else:
        write(path, before)


def write(path: str, content: bytes) -> None:
    """Put a file in place whole, in that of another one or of the one that a link leads to, whose owner it keeps."""
    path = os.path.realpath(path)
    temporary = f"{path}.{secrets.token_hex(4)}.tmp"
    try:
        known = os.stat(path) if os.path.exists(path) else None
        with open(temporary, "xb") as file:
            file.write(content)
            if known:
                os.fchown(file.fileno(), known.st_uid, known.st_gid)
            os.fchmod(file.fileno(), stat.S_IMODE(known.st_mode) if known else 0o644)
            os.fsync(file.fileno())
        os.rename(temporary, path)
        _sync(os.path.dirname(path))
    except OSError as error:
        if os.path.lexists(temporary):
            os.unlink(temporary)
        hint = "run it with sudo" if isinstance(error, PermissionError) and os.geteuid() else None
        if isinstance(error, FileNotFoundError):
            hint = f"mkdir -p {os.path.dirname(path)}"
        raise Failure(f"cannot write {path}: {error.strerror}", hint=hint) from None


def _sync(directory: str) -> None:
    with linux.closing(os.open(directory, os.O_RDONLY | os.O_DIRECTORY)) as descriptor:
        os.fsync(descriptor)
