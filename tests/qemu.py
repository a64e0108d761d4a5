"""Boot a disk in qemu, and read the guest's messages on the serial console.

Use software emulation, which works on every machine. qemu uses a snapshot, so that the disk stays unchanged, and ends
with the context, or with this process if that is killed.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

# Not `max` alone: qemu 7.2 (Debian 12) sometimes emulates the flags of cmpxchg16b wrongly, and every second
# boot of Linux 6.12 panics. Without the feature Linux does not use the instruction.
CPU = "max,-cx16"
OVMF = "/usr/share/OVMF"
DEADLINE = 1200  # seconds from power on; a Debian guest takes 25 to 60 on an idle core, 90 with cloud-init
PATIENCE = 120  # seconds between the report and the prompt
# The console of a guest that will not come up shows one of these.
HOPELESS = re.compile(
    r"Kernel panic|\(initramfs\)|grub rescue>|^grub> |No bootable device|Boot failed: not a bootable"
    r"|emergency mode|Give root password|Press Enter for maintenance|error: no such device",
    re.MULTILINE,
)
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[()c78=>].?|\r")


class Console:
    """The serial console of a running virtual machine."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process, self.log = process, log
        self.started = time.monotonic()

    def text(self) -> str:
        return ESCAPES.sub("", self.log.read_text(errors="replace"))

    def wait_for(self, *patterns: str) -> str:
        """Wait until every pattern has appeared; return the console's text so far."""
        reported = float("inf")  # time of the guest's report; after it, a prompt must appear
        while True:
            ended = self.process.poll() is not None  # before reading, so that no output is missed
            now = time.monotonic()
            text = self.text()
            missing = [pattern for pattern in patterns if not re.search(pattern, text, re.MULTILINE)]
            if not missing:
                return text
            hopeless = HOPELESS.search(text)
            if "FACTS-END" in text:
                reported = min(reported, now)
            why = (
                "qemu has ended" if ended
                else f"the guest says {hopeless.group()!r}" if hopeless
                else "the guest is up" if now > reported + PATIENCE
                else f"{DEADLINE} s have passed" if now > self.started + DEADLINE
                else ""
            )  # fmt: skip
            if why:
                raise AssertionError(f"{why}, but there is no {missing}; the console's end:\n{text[-6000:]}")
            time.sleep(0.2)

    def facts(self) -> Facts:
        """Return the guest's report about itself (see REPORT in debian.py)."""
        text = self.wait_for(r"^FACTS-BEGIN$", r"^FACTS-END$")
        return Facts.parse(text[text.index("FACTS-BEGIN") : text.index("FACTS-END")])


@contextmanager
def booting(
    disk: Path, log: Path, firmware: str = "bios", macs: Sequence[str] = (), more: Sequence[str] = ()
) -> Iterator[Console]:
    """Start a virtual machine, which prints ttyS0 to `log`.

    It has a NIC for each of `macs`, each on its own network with a DHCP server: qemu's user network 10.0.INDEX.0/24,
    router .2, DNS server .3. UEFI starts with empty variables, so that it only finds the removable path.
    `more` are arguments for qemu, as for a kernel that is on no disk.
    """
    argv = ["setpriv", "--pdeathsig", "KILL", "qemu-system-x86_64"]
    argv += ["-accel", "tcg", "-cpu", CPU, "-m", "512", "-smp", "1", "-display", "none", "-monitor", "none"]
    argv += ["-drive", f"file={disk},format=raw,if=virtio,cache=unsafe,snapshot=on"]
    if firmware == "uefi":
        variables = log.with_suffix(".vars")
        shutil.copyfile(f"{OVMF}/OVMF_VARS_4M.fd", variables)
        argv += ["-machine", "q35", "-drive", f"if=pflash,format=raw,readonly=on,file={OVMF}/OVMF_CODE_4M.fd"]
        argv += ["-drive", f"if=pflash,format=raw,file={variables}"]
    for index, mac in enumerate(macs):
        argv += [
            "-netdev",
            f"user,id=net{index},net=10.0.{index}.0/24",
            "-device",
            f"virtio-net-pci,netdev=net{index},mac={mac}",
        ]
    argv += [] if macs else ["-nic", "none"]
    argv += ["-serial", "stdio", "-no-reboot", *more]
    with log.open("wb") as output:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    with process:
        try:
            yield Console(process, log)
        finally:
            process.kill()


@dataclass(frozen=True)
class Mount:
    target: str
    source: str
    fstype: str
    uuid: str
    size: int


@dataclass(frozen=True)
class Facts:
    """A guest's report from inside."""

    one: dict[str, str]
    mounts: dict[str, Mount] = field(default_factory=dict)  # by mount point
    sizes: dict[str, int] = field(default_factory=dict)  # of block devices, in bytes
    swaps: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    host_keys: set[str] = field(default_factory=set)
    links: dict[str, str] = field(default_factory=dict)  # name -> MAC
    addresses: dict[str, list[str]] = field(default_factory=dict)  # of an interface, with their prefixes
    routes: list[str] = field(default_factory=list)  # as `ip route` prints them
    dns: set[str] = field(default_factory=set)

    @classmethod
    def parse(cls, report: str) -> Facts:
        facts = cls({})
        for line in re.findall(r"^FACT (.*)$", report, re.MULTILINE):
            name, _, value = line.partition(" ")
            words = value.split()
            if name == "mount":
                facts.mounts[words[0]] = Mount(*words[:4], size=int(words[4]))
            elif name == "block":
                facts.sizes[words[0]] = int(words[1])
            elif name == "swap":
                facts.swaps.append(words[0])
            elif name == "failed":
                facts.failed.append(value)
            elif name == "host-key":
                facts.host_keys.add(words[1])
            elif name == "link":
                facts.links[words[1].rstrip(":")] = words[words.index("link/ether") + 1]
            elif name == "address":
                facts.addresses.setdefault(words[0], []).append(words[1])
            elif name == "route":
                facts.routes.append(value)
            elif name == "dns":
                facts.dns.add(value)
            else:
                facts.one[name] = value
        return facts

    def __getitem__(self, name: str) -> str:
        return self.one[name]
