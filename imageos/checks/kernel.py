"""Check the node's kernel: what every deployment needs, and the filesystems."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress

from imageos.checks.report import Finding, error, note, ok, unknown, version
from imageos.checks.variants import Variant, name_variants
from imageos.disks import filesystem
from imageos.errors import Failure
from imageos.node import cgroup, isolation, linux, seccomp, sysfs

ACTIONS = "/proc/sys/kernel/seccomp/actions_avail"  # exists since Linux 4.14, with CONFIG_SECCOMP_FILTER


def check_kernel() -> Iterator[Finding]:
    yield version("Linux", os.uname().release, (5, 8), "imageos needs Linux 5.8 or newer")
    for path, kind in (("/proc/self", "proc"), (sysfs.BLOCK, "sysfs")):
        if not os.path.isdir(path):
            top = f"/{path.split('/')[1]}"
            yield error(f"there is no {path}: {top} is not mounted", f"mount -t {kind} {kind} {top}")
    if os.geteuid() != 0:
        yield unknown("namespaces and loop devices were not tried", "run it as root")
        return
    try:
        isolation.call_apart(lambda: linux.unshare(linux.CLONE_NEWNET | linux.CLONE_NEWIPC | linux.CLONE_NEWUTS))
        yield ok("namespaces: mount, pid, net, ipc, uts")
    except Failure as failure:
        yield error(f"namespaces cannot be made: {failure}", "in a container, it must be allowed to make them")
    try:
        os.close(os.open("/dev/loop-control", os.O_RDWR))
        yield ok("loop devices")
    except OSError as problem:
        yield error(f"/dev/loop-control: {problem.strerror}", "modprobe loop")
    if not seccomp.guest():
        machine = os.uname().machine
        yield note(f"the system calls of a guest's programs are not filtered: no table of them for {machine}")
    elif os.path.exists(ACTIONS):
        yield ok("filters of system calls")
    else:
        yield error("this kernel has no filters of system calls", "a kernel with CONFIG_SECCOMP_FILTER")
    complaints = cgroup.missing_limits()
    for complaint in complaints:
        yield note(complaint, "in a container, /sys/fs/cgroup must be writable")
    if not complaints:
        yield ok("control groups")


def check_filesystems(variants: Iterable[Variant]) -> Iterator[Finding]:
    needed: dict[str, list[str]] = {}
    for variant in variants:
        if variant.layout:
            for volume in filesystem.plan_volumes(variant.layout, variant.settings.filesystem, str):
                if volume.mount_point:
                    needed.setdefault(volume.kind, []).append(variant.name)
    for kind in filesystem.FILESYSTEMS:
        if kernel_has(kind):
            yield ok(kind)
        elif kind in needed:
            yield error(f"this kernel has no {kind}: needed by {name_variants(needed[kind])}", f"modprobe {kind}")
        else:
            yield note(f"this kernel has no {kind}: images with it cannot be deployed")


def kernel_has(kind: str) -> bool:
    """Return True if the kernel has this filesystem, or has a module that a mount loads."""
    with open("/proc/filesystems", encoding="ascii") as file:
        if kind in file.read().split():
            return True
    modules = f"/lib/modules/{os.uname().release}"
    for name, entry in (("modules.alias", f"alias fs-{kind} "), ("modules.dep", f"/{kind}.ko")):
        with suppress(OSError), open(f"{modules}/{name}", encoding="utf-8") as file:
            if any(entry in line.partition(": ")[0] for line in file):
                return True
    return False
