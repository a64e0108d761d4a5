"""Make the filters of system calls: for a guest's programs, and for the node's programs that read untrusted data.

Pure: values to bytes, an array of struct sock_filter (linux/filter.h, linux/seccomp.h) for `linux.load_filter`.
A forbidden call fails as in a kernel that does not have it. A filter sees registers, never memory.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Collection, Mapping
from functools import cache

from imageos.node.linux import NAMESPACES
from imageos.node.syscalls import numbers

Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, operand
Block = list[Instruction]  # relocatable; every path through it ends in RETURN
# Machine (uname -m) -> ABIs of its kernel, first that of 64-bit programs
MACHINES = {
    "x86_64": ("x86_64", "i386"),
    **dict.fromkeys(("i386", "i486", "i586", "i686"), ("x86_64", "i386")),
    "aarch64": ("aarch64", "arm"),
    **dict.fromkeys(("armv7l", "armv8l"), ("aarch64", "arm")),
}
AUDIT = {"x86_64": 0xC000003E, "i386": 0x40000003, "aarch64": 0xC00000B7, "arm": 0x40000028}  # audit.h
# bpf_common.h: load a word, keep the bits of the operand, compare it with the operand, jump, return
LOAD, AND, EQUAL, EQUAL_OR_MORE, ANY_BIT, JUMP, RETURN = 0x20, 0x54, 0x15, 0x35, 0x45, 0x05, 0x06
NUMBER, ARCHITECTURE, FIRST, SECOND = 0, 4, 16, 24  # struct seccomp_data; low halves of arguments (little-endian)
LONGEST_JUMP = 255

# Allowed requests of ioctl, for any file, as a filter does not see what is open: NAME and its number, then that of
# 32-bit programs if they have another. From fs.h, fiemap.h, ioctls.h, xfs_fs.h, btrfs.h. None is for terminals. Those
# of btrfs are for grub-probe, which finds the root by them.
IOCTLS = """
FIONREAD 541B, FIONBIO 5421, FIONCLEX 5450, FIOCLEX 5451, FIGETBSZ 2, FS_IOC_GETFLAGS 80086601 80046601,
FS_IOC_SETFLAGS 40086602 40046602, FS_IOC_GETVERSION 80087601 80047601, FS_IOC_FSGETXATTR 801C581F,
FS_IOC_FIEMAP C020660B, FICLONE 40049409, FICLONERANGE 4020940D, BLKROGET 125E, BLKGETSIZE 1260, BLKFLSBUF 1261,
BLKSSZGET 1268, BLKBSZGET 80081270 80041270, BLKGETSIZE64 80081272 80041272, BLKIOMIN 1278, BLKIOOPT 1279,
BLKALIGNOFF 127A, BLKPBSZGET 127B, BLKDISCARDZEROES 127C, BLKROTATIONAL 127E, BLKGETDISKSEQ 80081280, HDIO_GETGEO 301,
BTRFS_IOC_TREE_SEARCH D0009411, BTRFS_IOC_INO_LOOKUP D0009412, BTRFS_IOC_DEV_INFO D000941E, BTRFS_IOC_FS_INFO 8400941F
"""
# More requests for the node's programs, which make, check and grow filesystems
DISK_IOCTLS = """
BLKSECTGET 1267, BLKBSZSET 40081271 40041271, BLKDISCARD 1277, BLKZEROOUT 127F, BLKGETZONESZ 80041284,
BLKGETNRZONES 80041285, XFS_IOC_DIOINFO 800C581E, XFS_IOC_FSGEOMETRY_V1 80705864, XFS_IOC_FSGEOMETRY_V4 8070587C,
XFS_IOC_FSGEOMETRY 8100587E, XFS_IOC_FSGROWFSDATA 4010586E, BTRFS_IOC_RESIZE 50009403
"""
# Calls that a guest's programs do without: of these watches, root has a number for the whole node
NOT_OF_GUESTS = ("epoll_create", "epoll_create1")
KVM_TYPE = 0xAE  # KVMIO of kvm.h: the second byte of a request is its type (ioctl.h)
# exec_domain: Linux, also posing as a 32-bit machine or as version 2.6; 0xFFFFFFFF only reads it
PERSONALITIES = (0, 0x8, 0x20000, 0x20008, 0xFFFFFFFF)
SYS_SOCKET, SYS_SOCKETPAIR = 1, 8  # net.h, for socketcall, whose family is in memory


def guest(machine: str = "") -> bytes:
    """Return the filter for a guest's programs, also of a 32-bit guest. Empty if MACHINES lacks the machine."""
    abis = MACHINES.get(machine or os.uname().machine, ())
    return _filter(abis, _values(IOCTLS), (socket.AF_UNIX,), without=NOT_OF_GUESTS)


def helper(network: bool = False, kvm: bool = False, machine: str = "") -> bytes:
    """Return the filter for a program of the node, which has the same ABI as this Python.

    With `kvm`, for one that makes virtual machines: KVM has some hundred requests, all of its own type.
    """
    native = 0 if struct.calcsize("P") == 8 else 1
    abis = MACHINES.get(machine or os.uname().machine, ())[native:][:1]
    # Never both: the network namespace contains abstract sockets of AF_UNIX, some of them of the node's daemons.
    families = (socket.AF_INET, socket.AF_INET6) if network else (socket.AF_UNIX,)
    return _filter(abis, _values(IOCTLS) | _values(DISK_IOCTLS), families, KVM_TYPE if kvm else None)


def _values(requests: str) -> frozenset[int]:
    return frozenset(int(code, 16) for entry in requests.split(",") for code in entry.split()[1:])


@cache
def _filter(
    abis: Collection[str],
    ioctls: frozenset[int],
    families: Collection[int],
    ioctl_type: int | None = None,
    without: Collection[str] = (),
) -> bytes:
    if not abis:
        return b""
    names = {abi: {name: number for name, number in numbers(abi).items() if name not in without} for abi in abis}
    calls = {AUDIT[abi]: _calls(names[abi], ioctls, families, ioctl_type) for abi in abis}
    program = _switch(ARCHITECTURE, calls, _refuse(errno.ENOSYS))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def _calls(
    by_name: Mapping[str, int], ioctls: Collection[int], families: Collection[int], ioctl_type: int | None
) -> Block:
    """Return the rules for the calls of an ABI; `by_name`: name -> number of each allowed call."""
    requests = _switch(SECOND, dict.fromkeys(ioctls, ALLOWED), _refuse(errno.ENOTTY))
    if ioctl_type is not None:
        requests = [(LOAD, 0, 0, SECOND), (AND, 0, 0, 0xFF00), (EQUAL, 0, 1, ioctl_type << 8), *ALLOWED, *requests]
    no_family, not_permitted = _refuse(errno.EAFNOSUPPORT), _refuse(errno.EPERM)
    no_sockets = dict.fromkeys(() if socket.AF_INET in families else (SYS_SOCKET, SYS_SOCKETPAIR), no_family)
    checked = {
        "ioctl": requests,
        "socket": _switch(FIRST, dict.fromkeys(families, ALLOWED), no_family),
        "socketpair": _switch(FIRST, {socket.AF_UNIX: ALLOWED}, no_family),
        "socketcall": _switch(FIRST, no_sockets, ALLOWED),
        "personality": _switch(FIRST, dict.fromkeys(PERSONALITIES, ALLOWED), not_permitted),
        "clone": [(LOAD, 0, 0, FIRST), (ANY_BIT, 0, len(not_permitted), NAMESPACES), *not_permitted, *ALLOWED],
    }
    rules = {number: checked.get(name, ALLOWED) for name, number in by_name.items()}
    return _switch(NUMBER, rules, _refuse(errno.ENOSYS))


def _refuse(code: int) -> Block:
    return [(RETURN, 0, 0, 0x00050000 | code)]  # SECCOMP_RET_ERRNO


ALLOWED: Block = [(RETURN, 0, 0, 0x7FFF0000)]  # SECCOMP_RET_ALLOW


def _switch(field: int, cases: Mapping[int, Block], otherwise: Block) -> Block:
    """Return a block that loads `field` and continues with the block for its value."""
    starts = [(0, otherwise)]  # (first value, its block); a block applies up to the next start
    for value, block in sorted(cases.items()):
        for start, target in ((value, block), (value + 1, otherwise)):
            if starts[-1][0] == start:
                starts.pop()
            if not starts or starts[-1][1] is not target:
                starts.append((start, target))
    return [(LOAD, 0, 0, field), *_search([(start, block) for start, block in starts if start <= 0xFFFFFFFF])]


def _search(starts: list[tuple[int, Block]]) -> Block:
    """Return a binary search for the block of the loaded value."""
    if len(starts) == 1:
        return starts[0][1]
    middle = len(starts) // 2
    below, above = _search(starts[:middle]), _search(starts[middle:])
    value, length = starts[middle][0], len(below)
    if length <= LONGEST_JUMP:
        return [(EQUAL_OR_MORE, length, 0, value), *below, *above]
    return [(EQUAL_OR_MORE, 0, 1, value), (JUMP, 0, 0, length), *below, *above]
