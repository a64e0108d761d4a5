"""Common parts of hostile images of all kinds: names, and targets of links."""

from __future__ import annotations

from throwaway import CANARIES, IMAGES, LINK, OTHER_DISK

UP = b"../" * 12
PLACES = [place.encode() for place in CANARIES]
# Targets of links: the node's own files, if a link gets there
TARGETS = (
    *PLACES, *(place + b"/victim" for place in PLACES), *(place + b"/sub" for place in PLACES),
    *(UP + place[1:] for place in PLACES), *(b"/proc/self/root" + place for place in PLACES),
    b"/proc/1/root/tmp/canary", b"/proc/self/cwd", b"/proc/self/cwd/..", b"/", b"/tmp", b"/etc", b"/dev", b"..",
    b"../..", b".", b"a", b"lnk", b"", OTHER_DISK.encode(), LINK.encode(), IMAGES.encode(), b"/run/imageos",
    b"/run/imageos/tmp",
)  # fmt: skip
SIMPLE = (
    b"a",
    b"b",
    b"lnk",
    b"Q",
    b"a/b",
    b"a/lnk",
    b"Q/Q",
    b"Q/lnk",
    b"lnk/victim",
    b"lnk/evil",
    b"a/lnk/victim",
    b"lnk/canary",
)
# Paths in a guest that create and import write to or remove
OURS = (b"etc/hostname", b"etc/hosts", b"etc/fstab", b"etc/machine-id", b"etc/ssh", b"var/lib/dbus", b"var/lib/cloud")
# Simple names are more frequent, because trouble begins where several members meet under one name
NAMES = (
    *SIMPLE * 4, *OURS, b"etc/passwd", b"dev/canary", b"restoresymtable", b".", b"./", b"", b"/", b"..", b"../evil",
    b"a/../../evil", b"a/./b", b"-rf", b"--checkpoint-action=exec=id", b"new\nline",
    b"a\nimageos: instance is ready to boot", b"\xff\xfe", b"\x1b[2J\x07",
    b"x" * 255, b"y" * 256, b"z" * 155 + b"/" + b"z" * 100, b"deep/" * 60 + b"end", b"d/" * 2100,
    *(place + b"/victim" for place in PLACES), *(place + b"/evil" for place in PLACES),
    *(UP + place[1:] + b"/victim" for place in PLACES), *(b"/" + place for place in PLACES),
)  # fmt: skip
# Device numbers: first that of the node's other disk, if it exists; none of the machine's own disks
DEVICES = [(240, 0), (1, 3), (1, 5), (240, 1), (511, 1048575)]
XATTRS = (b"user.x", b"trusted.x", b"trusted.overlay.opaque", b"security.capability", b"security.selinux",
          b"security.ima", b"system.posix_acl_access", b"system.data", b"nonsense", b"",
          b"user." + b"n" * 300)  # fmt: skip
