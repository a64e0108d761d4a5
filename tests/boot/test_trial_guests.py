"""variants try: guests of one sector, which do what no image of a distribution does when asked to."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from qemu import DEADLINE
from support import DEFAULTS, MIB, Node, Result, run

LOADED = 0x7C00  # where BIOS puts the first sector
CODE = 440  # bytes of it before the partition table
# 8086 machine code; the registers of power management are where SeaBIOS puts them
POWERED = bytes.fromhex("ba0206 b80001 ef")  # enable the power button: 0x602 <- 0x100
PRINT = bytes.fromhex("31c0 8ed8 beffff ac 84c0 7406 baf803 ee ebf5")  # the text at ffff to COM1, until a NUL
POLL = bytes.fromhex("ba0006 ed f6c401 750e bafd03 ec a801 74ef baf803 ec")  # button: go on; no key: again
OFF = bytes.fromhex("ba0406 b80020 ef f4")  # 0x604 <- 0x2000
HANG = bytes.fromhex("f4 ebfd")
RESET = bytes.fromhex("b0fe e664 f4")  # by the keyboard controller


def back_to(start: int, end: int) -> bytes:
    return b"\xeb" + bytes([256 - (end + 2 - start)])


def sector(text: bytes, then: bytes, powers: bytes = b"") -> bytes:
    """Return a boot sector that prints `text`; `then` is what it does next."""
    code = powers + PRINT + then
    code = code.replace(b"\xff\xff", (LOADED + len(code)).to_bytes(2, "little")) + text + b"\0"
    assert len(code) <= CODE
    return code.ljust(510, b"\0") + b"\x55\xaa"


def getty(text: bytes, powers: bytes = POWERED) -> bytes:
    """Return one that prints `text` again at each key, and obeys the power button if `powers`."""
    return sector(text, POLL + back_to(0, len(PRINT) + len(POLL)) + OFF, powers)


PROMPT = b"\r\nweb1 login: "
PANIC = b"[    1.0] Kernel panic - not syncing: VFS\r\n"
GUESTS = {
    "good": getty(PROMPT),
    "deaf": getty(PROMPT, powers=b""),
    "fake": sector(b"login: \r\nweb1 login:\r\nwaits\r\n", HANG),
    "loop": sector(PANIC, RESET),
    "off": sector(b"[    1.0] Linux\r\n", OFF),
    "flood": sector(b"\x1b]0;title\x07\xff\0", back_to(0, len(PRINT))),
}


@pytest.fixture
def node(node: Node) -> Node:
    """Return a node with a variant for each guest, and two with images that have no boot loader for BIOS."""
    shipped = (node.root / DEFAULTS.relative_to("/")).read_text()
    node.write(DEFAULTS, f"{shipped}\nIMAGE_DIR={node.images}\nCACHE_DIR={node.images}\n")
    for name, content in {**GUESTS, "efi": b"", "linux": b""}.items():
        node.variant(name, f"IMAGE_NAME={name}\nIMAGE_TYPE=raw\nNOMOUNT=yes\n")
        disk = node.images / f"{name}-x86_64.raw"
        disk.write_bytes(content)
        with disk.open("r+b") as file:
            file.truncate(16 * MIB)
    for name, kind in (("efi", "uefi"), ("linux", "linux")):
        run("sfdisk", "--quiet", node.images / f"{name}-x86_64.raw", text=f"label: gpt\ntype={kind}\n")
    return node


def attempt(node: Node, *tries: Sequence[str]) -> list[Result]:
    calls = [node.start_tool("variants", "try", *words) for words in tries]
    for call in calls:
        call.process.wait(DEADLINE)
    return [call.result() for call in calls]


def test_a_prompt_counts_if_it_answers(node: Node) -> None:
    good, deaf = attempt(node, ["good", "--keep"], ["deaf", "--timeout", "20"])
    assert "login prompt     web1 login: (it was to be called try-good)" in good.ok().lines
    assert "powered off in   it did not when asked to, and was ended" in deaf.ok().lines
    kept = node.images / "try-good.raw"
    assert kept.stat().st_mode & 0o777 == 0o600
    before = kept.stat().st_ino
    again, fake = attempt(node, ["good", "--keep"], ["fake", "--timeout", "20"])
    again.ok()
    assert kept.stat().st_ino != before and [path.name for path in node.images.glob("try-*")] == ["try-good.raw"]
    fake.failed("no login prompt", "does not answer")


def test_guests_that_end_themselves(node: Node) -> None:
    loop, off = attempt(node, ["loop"], ["off"])
    loop.failed("its kernel panics: VFS, and it starts again and again")
    assert "| [    1.0] Kernel panic" in loop.log
    off.failed("it powers itself off")


def test_a_guest_that_never_stops_talking(node: Node) -> None:
    flood, efi = attempt(node, ["flood", "--timeout", "30"], ["efi"])
    flood.failed("no login prompt")
    assert "\x1b" not in flood.log and "may need more time" in flood.log
    assert flood.log.count("title") <= 2  # where the limit has cut off its beginning; the last line is shown twice
    efi.failed("no boot loader")  # and not after ten minutes
    assert "--uefi" in efi.log
    (linux,) = attempt(node, ["linux"])
    linux.failed("no boot loader")
    assert "hook grub" in linux.log and "--uefi" not in linux.log
