"""Block devices as the kernel shows them in /sys (Documentation/ABI/stable/sysfs-block)."""

from __future__ import annotations

import os

BLOCK = "/sys/block"
SECTOR = 512  # bytes, in all of these files


def attribute(path: str) -> str:
    """Return the content of a file; empty if it cannot be read."""
    try:
        return _read(path)
    except OSError:
        return ""


def device_directory(number: int) -> str:
    """Return the directory that is named as the device; that of a partition is in that of its disk."""
    return os.path.realpath(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")


def statistics(number: int) -> tuple[int, int]:
    """Return how many bytes were read from a device and written to it (Documentation/block/stat.rst)."""
    fields = _read(f"{device_directory(number)}/stat").split()
    return int(fields[2]) * SECTOR, int(fields[6]) * SECTOR


def partitions(name: str) -> dict[int, tuple[int, int]]:
    """Return number -> (start, size in bytes) of the partitions that the kernel has of a disk."""
    found = {}
    for entry in os.listdir(f"{BLOCK}/{name}"):
        if entry.startswith(f"{name}p"):
            files = [f"{BLOCK}/{name}/{entry}/{file}" for file in ("partition", "start", "size")]
            number, start, size = (int(_read(file)) for file in files)
            found[number] = start * SECTOR, size * SECTOR
    return found


def backing_files(block: str = BLOCK) -> dict[str, str]:
    """Return name -> path of its file for each attached loop device."""
    files = {name: attribute(f"{block}/{name}/loop/backing_file") for name in sorted(os.listdir(block))}
    return {name: path for name, path in files.items() if path}


def _read(path: str) -> str:
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        return file.read().rstrip("\n")
