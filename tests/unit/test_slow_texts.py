"""No text of a stranger takes long to read: each of these took minutes, hours, or for ever."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from diskformats import DESCRIPTOR, vmdk
from escapes import alarm

from imageos import causes
from imageos.disks import fstab
from imageos.guests import accounts, bootconfig, bootloaders, guest
from imageos.guests.bootconfig import Change
from imageos.guests.target import READ_LIMIT, Target, holding
from imageos.images import checksums, containers, pages
from imageos.run import OUTPUT_LIMIT

BLANKS = " " * READ_LIMIT
INDEX = [f"{name}{number}" for name in ("sum", "x") for number in range(40_000)]
ADDED = Change(("quiet",))
FSTAB = "".join(f"UUID={number * 2477:08} /{number} ext4\n" for number in range(40_000))


def descriptor() -> None:
    data = vmdk()[: containers.VMDK_DESCRIPTOR] + f"{DESCRIPTOR}a=x{BLANKS[:-1000]}y\n".encode()
    containers.vmdk_size(lambda offset, length: data[offset : offset + length], len(data))


TEXTS: dict[str, Callable[[], object]] = {
    "comments of a web page": lambda: pages.is_page(b"<!---->" * 146),
    "descriptor of a VMDK": descriptor,
    "inittab": lambda: guest.inittab(f"#{BLANKS}", "ttyS0", 9600, "/sbin/getty"),
    "menu of GRUB": lambda: bootconfig.grub_menu(f"linux x{BLANKS}", ADDED),
    "index of a server": lambda: checksums.checksum_files(INDEX, INDEX[-1]),
    "blank lines of a program": lambda: causes.cause("x", "\n" * OUTPUT_LIMIT),
}


def test_an_fstab_of_many_disks(target: Target) -> None:
    """Each of its names is looked for in all files of /etc."""
    for number in range(4):
        target.write(f"/etc/{number}", "# 00002477\n" + "0 " * 30_000)
    begin = time.process_time()
    with alarm():
        assert holding(target, "/etc", fstab.ids(fstab.parse(FSTAB))) == []
    assert time.process_time() - begin < 5


@pytest.mark.parametrize("what", TEXTS)
def test_a_text_that_takes_hours(what: str) -> None:
    begin = time.process_time()
    with alarm():
        TEXTS[what]()
    assert time.process_time() - begin < 5


@pytest.mark.parametrize("said", ["a b\n", "\n"])
def test_a_program_that_says_much(said: str, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """sshd -T and GRUB Legacy of the guest; of what they say, so much is kept."""
    monkeypatch.setattr(Target, "run", lambda *_: said * (2 * OUTPUT_LIMIT // len(said)))
    begin = time.process_time()
    with alarm():
        accounts.sshd_configuration(target, "sshd")
        bootloaders.ERROR.search(target.run([]))
    assert time.process_time() - begin < 5
