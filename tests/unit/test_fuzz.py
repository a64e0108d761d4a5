"""Bounded fuzzing of all code that reads untrusted data: mutations of valid input, the same in each run.

Any input gives a value or a Failure, quickly and in little memory.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import random
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import diskformats
import dumps
import pytest
from mutations import damaged
from support import recorded

from imageos import cluster, ganeti, network, remote, settings
from imageos.backups import legacy, stream
from imageos.disks import ends, ext, fstab, partitions
from imageos.errors import Failure
from imageos.guests import guest, hostname
from imageos.images import dumpfile, formats, qcow2
from imageos.images.imagefile import zstd_frame_size
from imageos.images.words import Cut

ROUNDS = int(os.environ.get("IMAGEOS_FUZZ", "150"))
MEMORY = 64 << 20  # bytes
EXPECTED = (Failure, ext.Doubtful)
FSTAB = (b"UUID=1-2 / ext4 defaults 0 1\nLABEL=boot /boot ext4 ro 0 2\n/dev/vda2 none swap sw 0 0\n"
         b"/dev/disk/by-uuid/a /var\\040log btrfs subvol=@,compress 0 0\n")  # fmt: skip
RELEASE = b'ID=debian\nID_LIKE="rhel fedora"\nPRETTY_NAME="Debian GNU/Linux 12"\n'
TABLE = {
    "partitiontable": {
        "label": "gpt", "id": "AA", "device": "/dev/loop0", "unit": "sectors", "firstlba": 2048, "lastlba": 204766,
        "sectorsize": 512, "partitions": [
            {"node": "/dev/loop0p1", "start": 2048, "size": 8192, "type": "X", "uuid": "U", "name": "n"},
            {"node": "/dev/loop0p2", "start": 10240, "size": 8192, "type": "Y", "bootable": True},
        ],
    }
}  # fmt: skip


def mutated(data: bytes, seed: int) -> Iterator[bytes]:
    chance = random.Random(seed)
    for _ in range(ROUNDS):
        yield damaged(data, chance)


def backup() -> bytes:
    manifest = stream.Manifest(
        1 << 20, "gpt", (stream.Volume(1, 512, 1024, "X", "ext4"),), 2, 1536, 1700000000, "a.b", 0, "x"
    )
    reader, writer = os.pipe()

    def read_into(offset: int, buffer: memoryview) -> None:
        buffer[:] = b"x" * len(buffer)

    for _ in stream.write(writer, manifest, [(0, 1024), (4096, 512)], read_into):
        pass
    os.close(writer)
    with open(reader, "rb") as file:
        return file.read()


def through_a_file(call: Callable[[stream.Source], object]) -> Callable[[bytes], object]:
    def run(data: bytes) -> object:
        descriptor = os.memfd_create("fuzz")
        try:
            os.write(descriptor, data)
            os.lseek(descriptor, 0, os.SEEK_SET)
            return call(stream.Source(descriptor))
        finally:
            os.close(descriptor)

    return run


def read_backup(source: stream.Source) -> object:
    return [len(data) for _, data in stream.read_runs(source, stream.read_manifest(source))]


def read_members(source: stream.Source) -> None:
    for member in legacy.members(source):
        left = member.size
        while left:  # as the real readers do
            left -= len(source.exactly(min(left, 1 << 20)))


def text(call: Callable[[str], object]) -> Callable[[bytes], object]:
    """Decode as Target.read does."""
    return lambda data: call(data.decode("utf-8", "surrogateescape"))


def mounted(content: str) -> None:
    parts = partitions.parse_table(json.dumps(TABLE), "/dev/loop0", 1 << 30).parts
    for entry in fstab.parse(content):
        fstab.resolve(entry.source, parts)
        assert entry.mount_point.startswith("/") and not {".", "..", ""} & set(entry.mount_point.split("/")[1:-1])
        assert "\0" not in "".join((entry.mount_point, *entry.options)), "no path for the kernel"


def ext_ranges(data: bytes) -> None:
    for count, _ in enumerate(
        ext.used(lambda offset, length: data[offset : offset + length].ljust(length, b"\0"), len(data))
    ):
        assert count < 1_000_000


def tar_header() -> bytes:
    import io
    import tarfile

    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        member = tarfile.TarInfo("./root.dump")
        member.size = 600
        archive.addfile(member, io.BytesIO(b"x" * 600))
    return output.getvalue()


def ext4() -> bytes:
    superblock = bytearray(1024)
    for offset, kind, value in (
        (0x4, "I", 8192), (0x14, "I", 1), (0x18, "I", 0), (0x20, "I", 8192), (0x28, "I", 2048), (0x38, "H", 0xEF53),
        (0x3A, "H", 1), (0x4C, "I", 1), (0x58, "H", 128), (0x60, "I", 2), (0x64, "I", 1),
    ):  # fmt: skip
        struct.pack_into("<" + kind, superblock, offset, value)
    descriptor = struct.pack("<IIIHHHH", 3, 4, 5, 8191, 0, 0, 0)
    return bytes(1024) + bytes(superblock) + descriptor.ljust(8 << 20, b"\0")


def qcow2_image() -> bytes:
    return qcow2.HEADER.pack(b"QFI\xfb", 3, 0, 0, 16, 1 << 30, 0, 2, 0x30000, 0x10000, 1, 0, 0).ljust(72, b"\0") + \
        qcow2.FEATURES.pack(0, 0, 0, 4, 104) + bytes(100)  # fmt: skip


DUMPED = [
    dumps.File(2, 0o40755),
    dumps.File(12, 0o40755, b"", [(2, b"etc")], attributes=[dumps.attributes((6, b"capability", bytes(20)))]),
]


def read_dump(data: bytes) -> None:
    dump = dumpfile.Dump("a.dump")
    dump.read(io.BytesIO(data))
    for number in (2, 12):
        list(dump.names(number))


def setting(data: bytes) -> None:
    name, _, value = data.decode("utf-8", "surrogateescape").partition("=")
    known, problems = settings.examine_settings({"OSP_" + name: value}, "/nonexistent")
    assert all(isinstance(problem, Failure) for problem in problems)
    for value in (known.image_name, known.overlay, known.arch):
        assert "/" not in value and not value.startswith(".") and "\0" not in value


LISTED = b"inst1.example.org|image+debian-12|node1.example.org|file|2|ADMIN_down|down|N|N\n"
ACTIVATED = b"node1.example.org:disk/0:/srv/ganeti/inst1/893f.file.disk0\nnode1.example.org:disk/1:/dev/vg/e8a9.disk1\n"
CALL = "\0".join(f"{name}={value}" for name, value in recorded("create-kvm-network").items()).encode()


def listed(content: str) -> None:
    known = cluster.parse_instance(content)
    for value in (known.name, known.node):
        assert not {"/", "\n", "\x1b", " "} & set(value) and value[0] not in "-."
    remote.ssh_command(known.node, ["true"], content, content, False)


def activated(content: str) -> None:
    for path in cluster.parse_disks(content, 2):
        assert path.startswith("/") and ".." not in path.split("/") and path.isprintable()


def called(content: str) -> None:
    """Parse an environment and plan its network: no value may end a line."""
    environ = dict(line.partition("=")[::2] for line in content.split("\0"))
    instance = ganeti.instance(environ)
    assert "/" not in instance.name and instance.name[0] not in "-."
    assert all(disk.path.startswith("/") for disk in instance.disks)
    for nic in network.plan(instance, settings.Settings()):
        for value in (nic.name, nic.mac, nic.address, nic.gateway, *nic.dns, nic.address6, nic.gateway6):
            assert value.isascii() and value.isprintable() and " " not in value


LARGEST_SEED = 70_000  # bytes: the headers and tables


def judged(data: bytes) -> None:
    def read(offset: int, length: int) -> bytes:
        return data[offset : offset + length]

    found = formats.recognise(read, len(data))
    if found and found.virtual_size and found.least_size:
        with suppress(Cut):
            found.virtual_size(read, len(data))
            found.least_size(read, len(data))


def disk_beginning() -> bytes:
    """A GPT, whose checksum only a few mutations leave right, and an msdos table."""
    entry = bytes(16) + b"\1" * 16 + struct.pack("<QQ", 2048, 4095) + bytes(80)
    header = b"EFI PART" + struct.pack("<II8xQQQQ16sQIII", 0x10000, 92, 1, 99, 34, 90, bytes(16), 2, 128, 128, 0)
    return bytes(446) + struct.pack("<B3xB3xII", 0, 0xEE, 1, 4096) + bytes(48) + b"\x55\xaa" + header.ljust(
        512, b"\0") + entry  # fmt: skip


READERS: dict[str, tuple[bytes, Callable[[bytes], object]]] = {
    "backup": (backup(), through_a_file(read_backup)),
    "manifest": (stream.manifest_document(stream.Manifest(9, "", (), 1, 9, 1)), stream.parse_manifest),
    "tar": (tar_header(), through_a_file(read_members)),
    "qcow2": (qcow2_image(), lambda data: qcow2.virtual_size(lambda at, count: data[at : at + count])),
    "formats": (qcow2_image(), lambda data: formats.recognise(lambda at, count: data[at : at + count], len(data))),
    **{make.__name__: (make()[:LARGEST_SEED], judged) for make in (diskformats.vmdk, diskformats.vdi, diskformats.vhd)},
    "qcow2 tables": (qcow2_image(), judged),
    "beginning of a disk": (disk_beginning(), ends.least_size),
    "table": (json.dumps(TABLE).encode(),
              lambda data: partitions.parse_table(data.decode("utf-8", "replace"), "/dev/loop0", 1 << 30)),
    "probe": (b"TYPE=ext4\nUUID=a\\ b\nLABEL=c\n", text(partitions.parse_probe)),
    "fstab": (FSTAB, text(mounted)),
    "other mounts": (FSTAB, text(lambda content: legacy.other_mounts(content, ["/"]))),
    "hosts": (b"127.0.0.1 localhost\n127.0.1.1 a.b a\n", text(lambda old: hostname.hosts(old, "new.example.org"))),
    "inittab": (b"id:2:initdefault:\n1:2345:respawn:/sbin/getty 38400 ttyS0\n",
                text(lambda content: guest.inittab(content, "ttyS0", 9600, "/sbin/getty"))),
    "hostname": (b"a.example.org\n127.0.1.1 a.example.org a # a\nhostname: a\n",
                 text(lambda content: [hostname.replace(content, pattern, "a.example.org", "b.example.org")
                                       for pattern in {**hostname.OWN, **hostname.REPEATED}.values()])),
    "ext": (ext4(), ext_ranges),
    "dump": (dumps.make([*DUMPED, dumps.File(13, 0o100644, b"content", [(12, b"file")])]), read_dump),
    "gnt-instance list": (LISTED, text(listed)),
    "names": (b"inst1.example.org\ninst2.example.org\n", text(cluster.parse_names)),
    "gnt-instance activate-disks": (ACTIVATED, text(activated)),
    "environment": (CALL, text(called)),
    "zstd": (b"\x28\xb5\x2f\xfd\xe4" + bytes(13), zstd_frame_size),
    **{f"setting {name}": (name.upper().encode() + b"=" + value, setting) for name, value in {
        "image_name": b"debian-12", "overlay": b"web", "image_url": b"https://u:p@host/x?y", "swap_size": b"512",
        "dns_servers": b"192.0.2.1 2001:db8::1", "kernel_args": b"quiet", "image_checksum": b"sha256:" + b"a" * 64,
        "user_data": b"#cloud-config\n", "arch": b"x86_64", "swap": b"yes", "no_such": b"1",
    }.items()},
}  # fmt: skip


def test_tar_header_of_a_directory_with_content(tmp_path: Path) -> None:
    header = bytearray(tar_header())
    header[156:157] = b"5"
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:512]))
    (tmp_path / "stream").write_bytes(bytes(header) + bytes(4096))
    with open(tmp_path / "stream", "rb") as file, pytest.raises(Failure, match="is no regular file"):
        read_members(stream.Source(file.fileno()))


BOMBS = ("[" * 200000, '{"partitiontable": ' + "[" * 100000, '{"a":' * 100000, "9" * 100000, "1e999", '"' + "x" * 10**6)


@pytest.mark.parametrize("bomb", BOMBS, ids=lambda bomb: bomb[:9])
def test_json_that_is_deep_or_has_no_end(bomb: str) -> None:
    table = json.dumps(TABLE).replace('"start": 2048,', f'"start": {bomb},', 1)
    for content in (bomb, table):
        with pytest.raises(Failure):
            partitions.parse_table(content, "/dev/loop0", 1 << 30)
        with pytest.raises(Failure):
            stream.parse_manifest(content.encode())


@pytest.mark.parametrize("name", READERS)
def test_a_value_or_a_failure(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    data, read = READERS[name]
    tracemalloc.start()
    try:
        for number, variant in enumerate(itertools.chain([data, b""], mutated(data, seed=len(name)))):
            try:
                read(variant)
            except EXPECTED:
                pass
            except Exception as error:
                raise AssertionError(f"variant {number}: {error!r}: {variant[:2000]!r}") from error
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()
    assert "Traceback" not in capfd.readouterr().err
