"""Parse Ganeti's environment, as recorded on a real cluster."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import TESTS, recorded

from imageos import ganeti
from imageos.disks.layout import MIB
from imageos.errors import Failure
from imageos.ganeti import Backup, Disk, Instance, Nic

STORAGE = "/srv/ganeti/file-storage"
FIRST = ("6d6a0b44-6dd8-4c31-8b68-91832fb0a4ef", "b3ea422f-0f64-4068-bd59-18470451df8b")
IMPORTED = ("9cd9fc9c-9385-462c-a463-8a55e29f0eac", "abf047d2-3b28-4796-8765-ff1bc8e404d5")
NETWORKED = ("b56270df-8cc2-46e1-abc9-eb951fbdf367", "e5b3fa63-2fff-4b57-9703-ac55a8d80115")
NETWORK = {
    "NAME": "net1",
    "SUBNET": "198.51.100.0/24",
    "GATEWAY": "198.51.100.1",
    "SUBNET6": "2001:db8:1::/64",
    "GATEWAY6": "2001:db8:1::1",
    "TAGS": "dns:198.51.100.53",
    "UUID": "32117fe5-d127-4ed8-8542-dbb9e1285f3d",
}
NIC_50 = Nic(0, "aa:00:00:17:77:95", "192.0.2.50", "routed", "100", {})
NIC_51 = Nic(0, "aa:00:00:30:80:86", "192.0.2.51", "routed", "100", {})
NICS_OF_NETWORKED = (
    Nic(0, "aa:00:00:c5:90:29", "198.51.100.2", "routed", "100", NETWORK),
    Nic(1, "aa:00:00:9a:16:b4", "192.0.2.60", "routed", "100", {}),
)


def instance(
    name: str,
    disks: tuple[str, str],
    nics: tuple[Nic, ...],
    directory: str | None = None,
    hypervisor: str = "fake",
    reinstall: bool = False,
) -> Instance:
    return Instance(
        name=f"{name}.example.org",
        hypervisor=hypervisor,
        memory=256,
        disks=tuple(
            Disk(n, f"{STORAGE}/{directory or name}.example.org/{uuid}.file.disk{n}", 1024 * MIB)
            for n, uuid in enumerate(disks)
        ),
        nics=nics,
        kernel_path="",
        serial_console=hypervisor == "kvm",
        serial_speed=38400,
        reinstall=reinstall,
    )


EXPECTED = {
    "create": instance("inst1", FIRST, (NIC_50,)),
    "create-reinstall": instance("inst2", FIRST, (NIC_50,), reinstall=True),
    "create-kvm-network": instance("inst1", NETWORKED, NICS_OF_NETWORKED, hypervisor="kvm"),
    "create-kvm-network-reinstall": instance("inst1", NETWORKED, NICS_OF_NETWORKED, hypervisor="kvm", reinstall=True),
    "export-disk0": instance("inst2", FIRST, (NIC_50,)),
    "export-disk1": instance("inst2", FIRST, (NIC_50,)),
    "import-disk0": instance("inst1", IMPORTED, (NIC_51,)),
    "import-disk1": instance("inst1", IMPORTED, (NIC_51,)),
    "rename": instance("inst1", IMPORTED, (NIC_51,)),
}
RECORDINGS = sorted(path.stem for path in (TESTS / "env").glob("*.env"))


def changed(**variables: str | None) -> dict[str, str]:
    """Return the recorded environment of create with other values; None removes a variable."""
    merged = {**recorded("create"), **variables}
    return {name: value for name, value in merged.items() if value is not None}


@pytest.mark.parametrize("recording", RECORDINGS)
def test_recorded(recording: str) -> None:
    environment = recorded(recording)
    ganeti.check_api(environment)
    assert environment["OS_VARIANT"] == "default"
    if recording == "verify":  # Ganeti gives no instance here
        with pytest.raises(Failure, match="INSTANCE_NAME is not set"):
            ganeti.instance(environment)
    else:
        assert ganeti.instance(environment) == EXPECTED[recording]


def test_every_expectation_has_a_recording() -> None:
    assert set(EXPECTED) < set(RECORDINGS)


def test_variables_are_ganetis_only() -> None:
    for recording in RECORDINGS:
        environment = recorded(recording)
        kept = ganeti.variables({**environment, "HOME": "/root", "TERM": "dumb", "LD_PRELOAD": "/x.so"})
        left_out = {"PATH", "LC_ALL", "LC_CTYPE", "PWD", "OLDPWD", "SHLVL", "_"}
        assert kept == {name: value for name, value in environment.items() if name not in left_out}


def test_rename_tells_the_old_name() -> None:
    assert ganeti.variables(recorded("rename"))["OLD_INSTANCE_NAME"] == "inst2.example.org"


# Values


def test_short_name() -> None:
    assert ganeti.instance(changed()).short_name == "inst1"
    assert ganeti.instance(changed(INSTANCE_NAME="inst1")).short_name == "inst1"


@pytest.mark.parametrize(("text", "expected"), [("True", True), ("False", False), ("None", False), (None, False)])
def test_serial_console(text: str | None, expected: bool) -> None:
    assert ganeti.instance(changed(INSTANCE_HV_serial_console=text)).serial_console is expected


@pytest.mark.parametrize(("text", "expected"), [("115200", 115200), ("None", 38400), ("", 38400), (None, 38400)])
def test_serial_speed(text: str | None, expected: int) -> None:
    assert ganeti.instance(changed(INSTANCE_HV_serial_speed=text)).serial_speed == expected


@pytest.mark.parametrize(("text", "expected"), [("/boot/vmlinuz", "/boot/vmlinuz"), ("None", ""), ("", ""), (None, "")])
def test_kernel_path(text: str | None, expected: str) -> None:
    assert ganeti.instance(changed(INSTANCE_HV_kernel_path=text)).kernel_path == expected


def test_memory_of_old_ganeti() -> None:
    assert ganeti.instance(changed(INSTANCE_BE_maxmem=None, INSTANCE_BE_memory="512")).memory == 512
    assert ganeti.instance(changed(INSTANCE_BE_maxmem="128", INSTANCE_BE_memory="512")).memory == 128
    assert ganeti.instance(changed(INSTANCE_BE_maxmem=None)).memory == 0


def test_nic_without_an_address() -> None:
    (nic,) = ganeti.instance(changed(NIC_0_IP="None")).nics
    assert nic.ip == ""
    (nic,) = ganeti.instance(changed(NIC_0_IP=None)).nics
    assert nic.ip == ""


def test_more_than_nine() -> None:
    """NIC_1_ is not a prefix of NIC_10_."""
    many = {f"NIC_{n}_MAC": f"aa:00:00:00:00:{n:02d}" for n in range(12)}
    nics = ganeti.instance(changed(NIC_COUNT="12", NIC_11_NETWORK_NAME="net11", **many)).nics
    assert [nic.mac[-2:] for nic in nics] == [f"{n:02d}" for n in range(12)]
    assert nics[1].network == {}
    assert nics[11].network == {"NAME": "net11"}


def test_disk_without_a_size() -> None:
    assert ganeti.instance(changed(DISK_0_SIZE=None)).disks[0].size is None


def test_nothing_attached() -> None:
    alone = ganeti.instance(changed(DISK_COUNT="0", NIC_COUNT="0"))
    assert (alone.disks, alone.nics) == ((), ())
    assert ganeti.instance(changed(DISK_COUNT=None, NIC_COUNT=None)).disks == ()


# Versions of the interface


@pytest.mark.parametrize("version", ["10", "15", "20"])
def test_known_versions(version: str) -> None:
    assert ganeti.instance(changed(OS_API_VERSION=version)).name == "inst1.example.org"


@pytest.mark.parametrize("version", ["5", "25", "2", "0", "twenty", "20 ", "-20", "020"])
def test_other_versions(version: str) -> None:
    with pytest.raises(Failure) as raised:
        ganeti.instance(changed(OS_API_VERSION=version))
    assert str(raised.value) == f"OS_API_VERSION is {version}, imageos knows 10, 15, 20"


@pytest.mark.parametrize("version", ["", None])
def test_no_version(version: str | None) -> None:
    with pytest.raises(Failure, match="^OS_API_VERSION is not set$") as raised:
        ganeti.instance(changed(OS_API_VERSION=version))
    assert "Ganeti calls this script" in str(raised.value.hint)


# The disk of a backup


@pytest.mark.parametrize("action", ["EXPORT", "IMPORT"])
@pytest.mark.parametrize("index", [0, 1])
def test_backup(action: str, index: int) -> None:
    environment = recorded(f"{action.lower()}-disk{index}")
    expected = EXPECTED[f"{action.lower()}-disk{index}"]
    assert ganeti.backup(environment, action) == Backup(expected.name, index, expected.disks[index].path, 11)


def test_backup_of_a_snapshot() -> None:
    """The device may differ from the disk's path."""
    environment = {**recorded("export-disk0"), "EXPORT_DEVICE": "/dev/xenvg/snap0"}
    assert ganeti.backup(environment, "EXPORT").device == "/dev/xenvg/snap0"


def test_backup_without_a_size_descriptor() -> None:
    environment = {name: value for name, value in recorded("import-disk0").items() if name != "EXP_SIZE_FD"}
    assert ganeti.backup(environment, "IMPORT").size_descriptor is None


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"EXPORT_DEVICE": ""}, "EXPORT_DEVICE is not set"),
        ({"EXPORT_DEVICE": "", "EXPORT_DISK_URI": "rbd:x"}, "the disk has no device on the node, only EXPORT_DISK_URI"),
        ({"EXPORT_INDEX": "one"}, "EXPORT_INDEX='one' is not a number"),
        ({"EXP_SIZE_FD": "-1"}, "EXP_SIZE_FD='-1' is not a number"),
        ({"INSTANCE_NAME": "../x"}, "INSTANCE_NAME='../x' is not a host name"),
        ({"OS_API_VERSION": "5"}, "OS_API_VERSION is 5, imageos knows 10, 15, 20"),
    ],
)
def test_backup_with_wrong_values(variables: dict[str, str], message: str) -> None:
    with pytest.raises(Failure) as raised:
        ganeti.backup({**recorded("export-disk0"), **variables}, "EXPORT")
    assert str(raised.value) == message


def test_old_name() -> None:
    assert ganeti.instance_name(recorded("rename"), "OLD_INSTANCE_NAME") == "inst2.example.org"
    with pytest.raises(Failure, match="^OLD_INSTANCE_NAME is not set$"):
        ganeti.instance_name(recorded("create"), "OLD_INSTANCE_NAME")
    with pytest.raises(Failure, match="^OLD_INSTANCE_NAME='a/b' is not a host name$"):
        ganeti.instance_name({"OLD_INSTANCE_NAME": "a/b"}, "OLD_INSTANCE_NAME")


# Wrong values


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"INSTANCE_NAME": None}, "INSTANCE_NAME is not set"),
        ({"INSTANCE_NAME": ""}, "INSTANCE_NAME is not set"),
        ({"INSTANCE_NAME": "../../etc"}, "INSTANCE_NAME='../../etc' is not a host name"),
        ({"INSTANCE_NAME": ".."}, "INSTANCE_NAME='..' is not a host name"),
        ({"INSTANCE_NAME": "-rf"}, "INSTANCE_NAME='-rf' is not a host name"),
        ({"INSTANCE_NAME": "a\nb"}, r"INSTANCE_NAME='a\nb' is not a host name"),
        ({"INSTANCE_NAME": "a b"}, "INSTANCE_NAME='a b' is not a host name"),
        ({"INSTANCE_NAME": "stra\u00dfe"}, "INSTANCE_NAME='stra\u00dfe' is not a host name"),
        ({"DISK_COUNT": "two"}, "DISK_COUNT='two' is not a number"),
        ({"DISK_COUNT": "-1"}, "DISK_COUNT='-1' is not a number"),
        ({"DISK_COUNT": "\u00b2"}, "DISK_COUNT='\u00b2' is not a number"),
        ({"DISK_COUNT": "3"}, "DISK_2_PATH is not set, though DISK_COUNT is 3"),
        ({"DISK_0_PATH": ""}, "DISK_0_PATH is not set, though DISK_COUNT is 2"),
        ({"DISK_1_SIZE": "1024m"}, "DISK_1_SIZE='1024m' is not a number"),
        ({"NIC_COUNT": "1.5"}, "NIC_COUNT='1.5' is not a number"),
        ({"INSTANCE_BE_maxmem": "256MB"}, "INSTANCE_BE_maxmem='256MB' is not a number"),
        ({"INSTANCE_HV_serial_speed": "fast"}, "INSTANCE_HV_serial_speed='fast' is not a number"),
    ],
)
def test_wrong_values_are_named(variables: dict[str, str | None], message: str) -> None:
    with pytest.raises(Failure) as raised:
        ganeti.instance(changed(**variables))
    assert str(raised.value) == message


def test_disk_that_only_the_hypervisor_reaches() -> None:
    with pytest.raises(Failure) as raised:
        ganeti.instance(changed(DISK_1_PATH=None, DISK_1_URI="rbd:rbd/volume"))
    assert "disk 1" in str(raised.value)
    assert "DISK_1_URI" in str(raised.value)
    assert "kernelspace" in str(raised.value.hint)


READ = sorted(
    name
    for name in recorded("create-kvm-network")
    if name.startswith(("DISK_", "NIC_", "INSTANCE_NAME", "INSTANCE_BE_maxmem", "INSTANCE_HV_serial", "OS_API"))
)


RECORDED = recorded("create-kvm-network")


@given(st.dictionaries(st.sampled_from(READ), st.text(max_size=20), max_size=5))
def test_whatever_is_wrong_is_a_failure(values: dict[str, str]) -> None:
    try:
        parsed = ganeti.instance({**RECORDED, **values})
    except Failure:
        return
    assert "/" not in parsed.name
    assert not parsed.name.startswith(".")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DISK_COUNT", "9" * 5000),
        ("NIC_COUNT", "9" * 5000),
        ("NIC_COUNT", "999999999"),
        ("INSTANCE_BE_maxmem", "\u00b2"),
        ("DISK_0_PATH", "--help"),
        ("DISK_0_PATH", "/dev/../etc/shadow"),
    ],
)
def test_what_makes_no_sense(name: str, value: str) -> None:
    with pytest.raises(Failure, match=f"^{name}="):
        ganeti.instance({**recorded("create"), name: value})
