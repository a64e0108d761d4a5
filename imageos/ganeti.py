"""Parse the environment that Ganeti gives a script into values.

Format: ganeti-os-interface(7). Booleans and None come as Python text, sizes in MiB.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from imageos.errors import Failure

# Ganeti calls these, without arguments except `verify parameters`.
SCRIPTS = ("create", "import", "export", "rename", "verify")
API_VERSIONS = (20, 15, 10)  # as in the file ganeti_api_version
# Variables that a settings file may compute with, for verify and doctor, which have no instance.
EXAMPLE = {"INSTANCE_NAME": "example.example.org", "INSTANCE_BE_maxmem": "1024", "DISK_COUNT": "1", "NIC_COUNT": "0"}
MOST_NICS = 256  # Ganeti's own limit is 8
NOT_GANETI = "Ganeti calls this script; see gnt-instance(8), or imageos --help for the other commands"


class Disk(NamedTuple):
    number: int
    path: str
    size: int | None  # bytes, from Ganeti; the device may be larger


class Nic(NamedTuple):
    number: int
    mac: str
    ip: str
    mode: str
    link: str
    network: Mapping[str, str]  # NAME, SUBNET, GATEWAY, SUBNET6, GATEWAY6, TAGS


class Instance(NamedTuple):
    name: str
    hypervisor: str
    memory: int  # MiB
    disks: tuple[Disk, ...]
    nics: tuple[Nic, ...]
    kernel_path: str
    serial_console: bool
    serial_speed: int
    reinstall: bool

    @property
    def short_name(self) -> str:
        return self.name.split(".")[0]


class Backup(NamedTuple):
    """The disk of one call of export or import."""

    instance: str
    number: int  # of the disk
    device: str
    size_descriptor: int | None  # export writes the number of bytes in its stream there


def variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that Ganeti set; settings files and hooks may see these."""
    prefixes = ("INSTANCE_", "DISK_", "NIC_", "OSP_", "OS_", "EXPORT_", "IMPORT_")
    names = ("HYPERVISOR", "DEBUG_LEVEL", "OLD_INSTANCE_NAME", "EXP_SIZE_FD")
    return {name: value for name, value in environ.items() if name.startswith((*prefixes, *names))}


def check_api(environ: Mapping[str, str]) -> None:
    """Fail unless Ganeti uses an API version that we know."""
    version = environ.get("OS_API_VERSION", "")
    if not version:
        raise Failure("OS_API_VERSION is not set", hint=NOT_GANETI)
    if version not in map(str, API_VERSIONS):
        versions = ", ".join(map(str, sorted(API_VERSIONS)))
        raise Failure(f"OS_API_VERSION is {version}, imageos knows {versions}")


def instance(environ: Mapping[str, str]) -> Instance:
    """Return the instance that `environ` describes; Failure names a variable that is missing or wrong."""
    check_api(environ)
    kernel_path = environ.get("INSTANCE_HV_kernel_path", "")
    return Instance(
        name=instance_name(environ),
        hypervisor=environ.get("HYPERVISOR", ""),
        # Ganeti before 2.6 had INSTANCE_BE_memory
        memory=_number(environ, "INSTANCE_BE_maxmem", "INSTANCE_BE_memory"),
        disks=tuple(_disks(environ)),
        nics=tuple(_nics(environ)),
        kernel_path="" if kernel_path == "None" else kernel_path,
        serial_console=environ.get("INSTANCE_HV_serial_console") == "True",
        serial_speed=_number(environ, "INSTANCE_HV_serial_speed") or 38400,
        reinstall=environ.get("INSTANCE_REINSTALL") == "1",
    )


def backup(environ: Mapping[str, str], action: str) -> Backup:
    """Return the backup of `action` EXPORT or IMPORT; Failure names a variable that is missing or wrong."""
    check_api(environ)
    device = environ.get(f"{action}_DEVICE", "")
    if not device:
        if environ.get(f"{action}_DISK_URI"):
            raise _userspace_only(f"{action}_DISK_URI", "the disk")
        raise Failure(f"{action}_DEVICE is not set", hint=NOT_GANETI)
    _check_path(f"{action}_DEVICE", device)
    descriptor = _number(environ, "EXP_SIZE_FD")
    return Backup(instance_name(environ), _number(environ, f"{action}_INDEX"), device, descriptor or None)


def _userspace_only(variable: str, what: str) -> Failure:
    return Failure(
        f"{what} has no device on the node, only {variable}",
        hint="set the instance's disk access to kernelspace: gnt-cluster modify --disk-parameters ...",
    )


def _check_path(variable: str, path: str) -> None:
    if not path.startswith("/") or ".." in path.split("/"):
        raise Failure(f"{variable}={path!r} is not the path of a disk")


def instance_name(environ: Mapping[str, str], variable: str = "INSTANCE_NAME") -> str:
    """Return the name of an instance; OLD_INSTANCE_NAME is that before a rename, or of the instance in a backup."""
    name = environ.get(variable, "")
    if not name:
        raise Failure(f"{variable} is not set", hint=NOT_GANETI)
    if not all(c.isascii() and (c.isalnum() or c in "-._") for c in name) or name.startswith((".", "-")):
        raise Failure(f"{variable}={name!r} is not a host name")
    return name


def _disks(environ: Mapping[str, str]) -> list[Disk]:
    disks = []
    for index in range(_number(environ, "DISK_COUNT")):
        path = environ.get(f"DISK_{index}_PATH", "")
        if not path:
            if environ.get(f"DISK_{index}_URI"):
                raise _userspace_only(f"DISK_{index}_URI", f"disk {index}")
            raise Failure(f"DISK_{index}_PATH is not set, though DISK_COUNT is {environ['DISK_COUNT']}")
        _check_path(f"DISK_{index}_PATH", path)
        size = _number(environ, f"DISK_{index}_SIZE")
        disks.append(Disk(index, path, size << 20 or None))  # Ganeti gives MiB
    return disks


def _nics(environ: Mapping[str, str]) -> list[Nic]:
    nics = []
    count = _number(environ, "NIC_COUNT")
    if count > MOST_NICS:
        raise Failure(f"NIC_COUNT={count}: no instance has more than {MOST_NICS}")
    for index in range(count):
        prefix = f"NIC_{index}_"
        nics.append(
            Nic(
                number=index,
                mac=environ.get(prefix + "MAC", ""),
                ip=_text(environ, prefix + "IP"),
                mode=environ.get(prefix + "MODE", ""),
                link=environ.get(prefix + "LINK", ""),
                network={
                    name[len(prefix + "NETWORK_") :]: value
                    for name, value in environ.items()
                    if name.startswith(prefix + "NETWORK_")
                },
            )
        )
    return nics


def _text(environ: Mapping[str, str], name: str) -> str:
    value = environ.get(name, "")
    return "" if value == "None" else value


def _number(environ: Mapping[str, str], *names: str) -> int:
    """Return the first of the variables `names` that is set as a whole number; 0 if none is."""
    for name in names:
        value = _text(environ, name)
        if value:
            if not re.fullmatch("[0-9]{1,18}", value):
                raise Failure(f"{name}={value!r} is not a number")
            return int(value)
    return 0
