"""The programs of the node: where they are looked for, what they are told, and which package has them."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Sequence

from imageos.errors import Failure

DEFAULT_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
GANETI_PATH = "/sbin:/bin:/usr/sbin:/usr/bin"  # of the scripts that Ganeti calls

# Program -> Debian package, where the names differ from each other or the program may be missing.
PACKAGES = {
    **{name: name for name in ("bzip2", "curl", "dump", "gpgv", "gzip", "lz4", "tar", "zstd")},
    **dict.fromkeys(("btrfs", "mkfs.btrfs"), "btrfs-progs"),
    "dd": "coreutils",
    **dict.fromkeys(("e2fsck", "resize2fs", "mkfs.ext2", "mkfs.ext3", "mkfs.ext4"), "e2fsprogs"),
    **dict.fromkeys(("gnt-cluster", "gnt-instance"), "ganeti"),
    **dict.fromkeys(("blkid", "mkswap"), "util-linux"),
    **dict.fromkeys(("xfs_growfs", "mkfs.xfs"), "xfsprogs"),
    "lvm": "lvm2",
    "mcopy": "mtools",
    "mkfs.vfat": "dosfstools",
    "qemu-img": "qemu-utils",
    "qemu-system-x86_64": "qemu-system-x86",
    "restore": "dump",
    "sfdisk": "fdisk",
    "ssh": "openssh-client",
    "xz": "xz-utils",
}


def environment() -> dict[str, str]:
    """Return the environment of the node's programs: of the caller's, only PATH and TMPDIR."""
    env = {"PATH": os.environ.get("PATH", DEFAULT_PATH), "LC_ALL": "C", "HOME": "/root"}
    if "TMPDIR" in os.environ:
        env["TMPDIR"] = os.environ["TMPDIR"]
    return env


def complete_path() -> None:
    """Let the PATH of cron, or of a user, have the sbin directories beside those of bin, as Ganeti's has."""
    path = os.environ.get("PATH", DEFAULT_PATH).split(":")
    beside = {"/usr/bin": "/usr/sbin", "/bin": "/sbin"}
    os.environ["PATH"] = ":".join(dict.fromkeys([*path, *(beside[name] for name in path if name in beside)]))


def require(*programs: str) -> None:
    """Fail, naming all of them, if one of `programs` is not there."""
    missing = [program for program in programs if not available(program)]
    if missing:
        packages = sorted({PACKAGES.get(program, program) for program in missing})
        raise Failure(
            f"missing on this node: {' '.join(missing)}",
            hint=f"install {' '.join(packages)} (doing so on every node is best)",
        )


def available(program: str, path: str | None = None) -> bool:
    return shutil.which(program, path=path or os.environ.get("PATH", DEFAULT_PATH)) is not None


def cannot_start(program: str, error: OSError) -> Failure:
    """Return the failure of a program that the kernel does not start."""
    if "/" in program:  # a hook, a shell
        what, hint = script_fault(program) if error.errno in (errno.ENOENT, errno.ENOEXEC) else ("", None)
        return Failure(f"{program} cannot be run: {what or error.strerror}", hint=hint)
    if isinstance(error, FileNotFoundError):
        return Failure(f"{program}: not found", hint=f"install {PACKAGES.get(program, program)} on this node")
    return Failure(f"{program}: {error.strerror or error}")


def script_fault(path: str) -> tuple[str, str | None]:
    """Return why the kernel would not run a script, and what to do about it; nothing if it would, or it is none."""
    try:
        with open(path, "rb") as file:
            first = file.read(256).partition(b"\n")[0]
    except OSError:
        return "", None
    words = first[2:].decode("utf-8", "replace").split() if first.startswith(b"#!") else []
    if first.startswith(b"#!") and first.endswith(b"\r"):
        return "its lines end in CRLF, as those of Windows do", f"sed -i 's/\\r$//' {path}"
    if first.startswith(b"\xef\xbb\xbf"):
        return "it begins with a byte order mark", f"sed -i '1s/^\\xef\\xbb\\xbf//' {path}"
    if not words:
        is_binary = first.strip(b"\t\r") and not first.decode("latin-1").isprintable()
        return ("", None) if is_binary else ("it names no interpreter", "its first line has to do so: #!/bin/sh")
    interpreter = _called_by_env(words) if os.path.basename(words[0]) == "env" else words[0]
    if os.path.exists(interpreter) if "/" in interpreter else available(interpreter):
        return "", None
    return f"its interpreter {interpreter} is not on this node", "install that, or correct the first line"


def _called_by_env(words: Sequence[str]) -> str:
    """Return the program that env(1) calls; env itself where that is not plain to see."""
    for word in words[1:]:
        if not re.fullmatch(r"-[iSv]*|\w+=[\w./:-]*", word):
            return word if re.fullmatch(r"[\w./+][\w./+-]*", word) else words[0]
    return words[0]
