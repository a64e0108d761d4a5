"""The filters of system calls: for a guest's programs, and for those of the node that read what a stranger has made.

Pure: values to bytes, an array of struct sock_filter (linux/filter.h, linux/seccomp.h) for `linux.load_filter`.
What is not allowed is answered as by a kernel that has not got it. A filter sees registers, never memory.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Collection, Iterable, Mapping
from functools import cache

from imageos.node.linux import NAMESPACES
from imageos.node.syscalls import numbers

Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, operand
Block = list[Instruction]  # runs to a `return`, wherever it stands
# Machine (uname -m) -> the ABIs that its kernel knows, that of 64-bit programs first
MACHINES = {
    "x86_64": ("x86_64", "i386"),
    **dict.fromkeys(("i386", "i486", "i586", "i686"), ("x86_64", "i386")),
    "aarch64": ("aarch64", "arm"),
    **dict.fromkeys(("armv7l", "armv8l"), ("aarch64", "arm")),
}
AUDIT = {"x86_64": 0xC000003E, "i386": 0x40000003, "aarch64": 0xC00000B7, "arm": 0x40000028}  # audit.h
# bpf_common.h: load a word, compare it with the operand, jump, return
LOAD, EQUAL_OR_MORE, ANY_BIT, JUMP, RETURN = 0x20, 0x35, 0x45, 0x05, 0x06
NUMBER, ARCHITECTURE, FIRST, SECOND = 0, 4, 16, 24  # struct seccomp_data; of arguments the low half (little-endian)
LONGEST_JUMP = 255

# What requests an ioctl may have, whatever it is for: a filter does not see what is open. There are no terminals.
# fs.h, fiemap.h, ioctls.h, xfs_fs.h, btrfs.h; those of 32-bit programs beside the same of 64-bit ones
IOCTLS = {
    "FIONREAD": [0x541B],
    "FIONBIO": [0x5421],
    "FIONCLEX": [0x5450],
    "FIOCLEX": [0x5451],
    "FIGETBSZ": [2],
    "FS_IOC_GETFLAGS": [0x80086601, 0x80046601],
    "FS_IOC_SETFLAGS": [0x40086602, 0x40046602],
    "FS_IOC_GETVERSION": [0x80087601, 0x80047601],
    "FS_IOC_FSGETXATTR": [0x801C581F],
    "FS_IOC_FIEMAP": [0xC020660B],
    "FICLONE": [0x40049409],
    "FICLONERANGE": [0x4020940D],
    "BLKROGET": [0x125E],
    "BLKGETSIZE": [0x1260],
    "BLKFLSBUF": [0x1261],
    "BLKSSZGET": [0x1268],
    "BLKBSZGET": [0x80081270, 0x80041270],
    "BLKGETSIZE64": [0x80081272, 0x80041272],
    "BLKIOMIN": [0x1278],
    "BLKIOOPT": [0x1279],
    "BLKALIGNOFF": [0x127A],
    "BLKPBSZGET": [0x127B],
    "BLKDISCARDZEROES": [0x127C],
    "BLKROTATIONAL": [0x127E],
    "BLKGETDISKSEQ": [0x80081280],
    "HDIO_GETGEO": [0x0301],
    # where a btrfs root is: grub-probe
    "BTRFS_IOC_TREE_SEARCH": [0xD0009411],
    "BTRFS_IOC_INO_LOOKUP": [0xD0009412],
    "BTRFS_IOC_DEV_INFO": [0xD000941E],
    "BTRFS_IOC_FS_INFO": [0x8400941F],
}
# ... and those of the node's programs, which make, check and grow filesystems
DISK_IOCTLS = {
    "BLKSECTGET": [0x1267],
    "BLKBSZSET": [0x40081271, 0x40041271],
    "BLKDISCARD": [0x1277],
    "BLKZEROOUT": [0x127F],
    "BLKGETZONESZ": [0x80041284],
    "BLKGETNRZONES": [0x80041285],
    "XFS_IOC_DIOINFO": [0x800C581E],
    "XFS_IOC_FSGEOMETRY_V1": [0x80705864],
    "XFS_IOC_FSGEOMETRY_V4": [0x8070587C],
    "XFS_IOC_FSGEOMETRY": [0x8100587E],
    "XFS_IOC_FSGROWFSDATA": [0x4010586E],
    "BTRFS_IOC_RESIZE": [0x50009403],
}
# exec_domain: Linux, also as a 32-bit machine or version 2.6 shows itself; 0xFFFFFFFF asks
PERSONALITIES = (0, 0x8, 0x20000, 0x20008, 0xFFFFFFFF)
SYS_SOCKET, SYS_SOCKETPAIR = 1, 8  # net.h: their families are in memory


def guest(machine: str = "") -> bytes:
    """For a guest's programs: those of a 32-bit guest, too. Empty for a machine that we have no table of."""
    abis = MACHINES.get(machine or os.uname().machine, ())
    return _filter(abis, _values(IOCTLS), (socket.AF_UNIX,))


def helper(network: bool = False, machine: str = "") -> bytes:
    """For a program of the node, which is of the ABI that we are."""
    native = 0 if struct.calcsize("P") == 8 else 1
    abis = MACHINES.get(machine or os.uname().machine, ())[native:][:1]
    families = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6) if network else (socket.AF_UNIX,)
    return _filter(abis, _values(IOCTLS) | _values(DISK_IOCTLS), families)


def _values(requests: Mapping[str, Iterable[int]]) -> frozenset[int]:
    return frozenset(number for both in requests.values() for number in both)


@cache
def _filter(abis: Collection[str], ioctls: frozenset[int], families: Collection[int]) -> bytes:
    if not abis:
        return b""
    calls = {AUDIT[abi]: _calls(numbers(abi), ioctls, families) for abi in abis}
    program = _switch(ARCHITECTURE, calls, _refused(errno.ENOSYS))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def _calls(known: Mapping[str, int], ioctls: Collection[int], families: Collection[int]) -> Block:
    """What becomes of a call in an ABI whose calls have the numbers `known`."""
    no_family, not_permitted = _refused(errno.EAFNOSUPPORT), _refused(errno.EPERM)
    no_sockets = dict.fromkeys(() if socket.AF_INET in families else (SYS_SOCKET, SYS_SOCKETPAIR), no_family)
    checked = {
        "ioctl": _switch(SECOND, dict.fromkeys(ioctls, ALLOWED), _refused(errno.ENOTTY)),
        "socket": _switch(FIRST, dict.fromkeys(families, ALLOWED), no_family),
        "socketpair": _switch(FIRST, {socket.AF_UNIX: ALLOWED}, no_family),
        "socketcall": _switch(FIRST, no_sockets, ALLOWED),
        "personality": _switch(FIRST, dict.fromkeys(PERSONALITIES, ALLOWED), not_permitted),
        "clone": [(LOAD, 0, 0, FIRST), (ANY_BIT, 0, len(not_permitted), NAMESPACES), *not_permitted, *ALLOWED],
    }
    return _switch(
        NUMBER, {number: checked.get(name, ALLOWED) for name, number in known.items()}, _refused(errno.ENOSYS)
    )


def _refused(code: int) -> Block:
    return [(RETURN, 0, 0, 0x00050000 | code)]  # SECCOMP_RET_ERRNO


ALLOWED: Block = [(RETURN, 0, 0, 0x7FFF0000)]  # SECCOMP_RET_ALLOW


def _switch(field: int, cases: Mapping[int, Block], otherwise: Block) -> Block:
    """Load `field` and go to the block of its value."""
    starts = [(0, otherwise)]  # each block from this value on
    for value, block in sorted(cases.items()):
        for start, its in ((value, block), (value + 1, otherwise)):
            if starts[-1][0] == start:
                starts.pop()
            if not starts or starts[-1][1] is not its:
                starts.append((start, its))
    return [(LOAD, 0, 0, field), *_search([(start, block) for start, block in starts if start <= 0xFFFFFFFF])]


def _search(starts: list[tuple[int, Block]]) -> Block:
    if len(starts) == 1:
        return starts[0][1]
    middle = len(starts) // 2
    below, above = _search(starts[:middle]), _search(starts[middle:])
    value, length = starts[middle][0], len(below)
    if length <= LONGEST_JUMP:
        return [(EQUAL_OR_MORE, length, 0, value), *below, *above]
    return [(EQUAL_OR_MORE, 0, 1, value), (JUMP, 0, 0, length), *below, *above]
