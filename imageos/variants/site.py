"""Enable and disable variants: their files, and their lines in variants.list."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

from imageos import cluster, ganeti, log
from imageos.checks.variants import LISTING, listed
from imageos.errors import Failure, explained
from imageos.node import linux
from imageos.node.programs import available
from imageos.settings import SITE_DIR, VARIANT, Settings, examine_settings
from imageos.variants.catalog import Entry, choose, is_as_written


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
        planned = {name: _plan(name, entries, settings.variants_dir) for name in names}
        for name, text in planned.items():
            path = f"{settings.variants_dir}/{name}.conf"
            is_new = name not in listed()
            if text is not None and _content(path) != text.encode():
                write(path, text.encode())
                is_new = True
            _write_line(name)
            log.info(f"variant {name} is enabled" if is_new else f"variant {name} was enabled already")
            if text is not None:
                _tell_of_key(entries[name], text)


def _plan(name: str, entries: Mapping[str, Entry], variants_dir: str) -> str | None:
    """Return what the variant's file is to hold; None if the site has its own, which stays as it is."""
    path = f"{variants_dir}/{name}.conf"
    known = _content(path) if re.fullmatch(VARIANT, name) else None  # nor does the catalog have another name
    if known is not None and not is_as_written(known):
        log.info(f"{path} is the site's own, and stays as it is")
        return None
    entry = choose(entries, name)
    is_demanded = b"\nIMAGE_KEYRING=" in (known or b"")  # a key that is lost makes the demand no smaller
    return entry.variant_file(architecture(), is_demanded or os.path.exists(entry.keyring_path))


def _tell_of_key(entry: Entry, text: str) -> None:
    if entry.keyring and not os.path.exists(entry.keyring_path):
        so = "there is no download without it" if "IMAGE_KEYRING=" in text else "only its checksum counts"
        log.info(f"variant {entry.name}: its publisher signs, but {entry.keyring_path} is not there: {so}")
        log.info(f"hint: {entry.get_key}; then imageos variants enable {entry.name}")


def disable(names: Sequence[str], os_dir: str) -> None:
    """Take back what `enable` has done, unless instances use one of the variants."""
    settings = defaults()
    with alone():
        enabled = listed()
        for name in names:
            if name not in enabled:
                log.info(f"variant {name} is not enabled")
        gone = [name for name in dict.fromkeys(names) if name in enabled]
        if gone and not set(enabled) - set(gone):
            raise Failure(
                f"{', '.join(gone)} would leave Ganeti without a variant: it would take the OS for invalid",
                hint="enable another one before",
            )
        _check_unused(gone, os.path.basename(os.path.normpath(os_dir)))
        for name in gone:
            _write_listing(without={name})
            path = f"{settings.variants_dir}/{name}.conf"
            known = _content(path)
            if known is not None and is_as_written(known):
                with explained(f"cannot remove {path}"):
                    os.unlink(path)
                    _sync(settings.variants_dir)
            elif known is not None:
                log.info(f"{path} is the site's own, and kept")
            log.info(f"variant {name} is disabled")


def _check_unused(names: Sequence[str], os_name: str) -> None:
    """Fail if the cluster has instances of these variants. Without Ganeti there are none."""
    if not names or not available("gnt-cluster"):
        return
    for name in names:
        try:
            users = [user for user, used in cluster.instances() if used == f"{os_name}+{name}"]
        except Failure as failure:
            log.warning(f"{failure}: whether instances use variant {name} is not known")
            continue
        if users:
            raise Failure(
                f"variant {name} is used by {log.few(users)}: they could not be reinstalled any more",
                hint="give them another one: gnt-instance modify --os-type",
            )


# --- files ------------------------------------------------------------------------------------------------


@contextmanager
def alone() -> Iterator[None]:
    """Wait for another process that enables or disables; others wait for us."""
    with explained(SITE_DIR, hint="imageos install"), linux.closing(os.open(SITE_DIR, os.O_RDONLY)) as directory:
        fcntl.flock(directory, fcntl.LOCK_EX)
        yield


def _write_line(name: str) -> None:
    if name not in listed():
        _write_listing(more=[name])


def _write_listing(more: Sequence[str] = (), without: Collection[str] = ()) -> None:
    """Change variants.list; what else is in it, comments too, stays as it is."""
    lines = (_content(LISTING) or b"").decode("utf-8", "surrogateescape").splitlines()
    kept = [line for line in lines if line.strip() not in without]
    text = "".join(f"{line}\n" for line in [*kept, *more])
    write(LISTING, text.encode("utf-8", "surrogateescape"))


def _content(path: str) -> bytes | None:
    """Return what is in a file; None if there is none."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return None


def write(path: str, content: bytes) -> None:
    """Put a file in place whole, in that of another one or of the one that a link leads to."""
    path = os.path.realpath(path)
    temporary = f"{path}.{secrets.token_hex(4)}.tmp"
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            os.fchmod(file.fileno(), 0o644)
            os.fsync(file.fileno())
        os.rename(temporary, path)
        _sync(os.path.dirname(path))
    except OSError as error:
        if os.path.lexists(temporary):
            os.unlink(temporary)
        hint = "run it with sudo" if isinstance(error, PermissionError) and os.geteuid() else None
        raise Failure(f"cannot write {path}: {error.strerror}", hint=hint) from None


def _sync(directory: str) -> None:
    with linux.closing(os.open(directory, os.O_RDONLY | os.O_DIRECTORY)) as descriptor:
        os.fsync(descriptor)
