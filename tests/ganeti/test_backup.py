"""Backups, renames and many instances at once, driven by Ganeti."""

from __future__ import annotations

from pathlib import Path

import pytest
from clusters import ADD, IMAGES, SITE, Cluster, between, tiny_image
from debian import debian
from qemu import Console

EXPORTS = "/var/lib/ganeti/export"
TINY = "-o image+default -O image_name=tiny,image_type=tarball,swap_size=16"
IMPORT = (
    f"gnt-backup import -t file -n node1.example.org --src-node=node1.example.org --src-dir={EXPORTS}/inst1.example.org"
    " --no-name-check --no-ip-check --net 0:mode=routed,link=100,ip=192.0.2.51"
)
# disk INSTANCE NUMBER: the file of a disk
DISK = """
disk() { gnt-instance activate-disks "$1" | sed -n "s,.*:disk/$2:,,p"; gnt-instance deactivate-disks "$1" >&2; }
leftovers() {
  losetup --list --noheadings --output BACK-FILE | grep /srv/ganeti || true
  pgrep -af '^python3.*image/(import|export)$' || true
}
"""


@pytest.fixture
def prepared(tmp_path: Path) -> str:
    """Return a script that makes an image, and inst1 with a second disk with a filesystem."""
    image = tiny_image(tmp_path)
    return f"""{DISK}
        cp {image} {IMAGES}/
        {ADD} --disk 0:size=1G --disk 1:size=1G {TINY} inst1.example.org
        mkfs.xfs -q "$(disk inst1.example.org 1)"
    """


def test_two_disks_come_back_under_another_name(cluster: Cluster, prepared: str) -> None:
    """disk 0 is larger than before; Ganeti keeps the stream unchanged."""
    script = f"""{prepared}
        gnt-backup export -n node1.example.org inst1.example.org
        echo LIST
        for file in {EXPORTS}/inst1.example.org/*-*-*; do tar -xOf $file manifest.json | grep -w index; done
        echo LIST
        {IMPORT} --disk 0:size=2G --disk 1:size=1G inst2.example.org
        cmp "$(disk inst1.example.org 1)" "$(disk inst2.example.org 1)" && echo IDENTICAL
        echo TABLE; sfdisk --list "$(disk inst2.example.org 0)" | tail -1; echo TABLE
        echo LOG; cat /var/log/ganeti/os/{{import,rename}}*; echo LOG
        echo LEFT; leftovers; echo LEFT
        gnt-instance startup inst2.example.org
    """
    log = cluster.run(script)
    assert sorted(between(log, "LIST").split()) == ['"index":', '"index":', "0,", "1,"], log
    assert "IDENTICAL" in log, log
    said = between(log, "LOG")
    assert "grew the root filesystem" in said and "restored disk 1" in said, said
    assert "renamed the guest from inst1.example.org to inst2.example.org: /etc/hostname, /etc/hosts" in said, said
    sectors = max(int(word) for word in between(log, "TABLE").split() if word.isdigit())
    assert sectors * 512 > 1.9 * (1 << 30), log
    assert between(log, "LEFT") == ""


def test_damaged_backup(cluster: Cluster, prepared: str) -> None:
    """Ganeti shows the cause; the disk cannot boot; the instance stays and can be reinstalled."""
    script = f"""{prepared}
        gnt-backup export -n node1.example.org inst1.example.org
        for file in {EXPORTS}/inst1.example.org/*-*-*; do
          printf x | dd of=$file bs=1 seek=60000 conv=notrunc status=none
        done
        echo IMPORT; {IMPORT} --disk 0:size=1G --disk 1:size=1G inst2.example.org || true; echo IMPORT
        echo SIGNATURES; wipefs "$(disk inst2.example.org 0)"; echo SIGNATURES
        gnt-instance reinstall --force inst2.example.org
        gnt-instance startup inst2.example.org
        echo LIST; gnt-instance list --no-headers -o status inst2.example.org; echo LIST
    """
    log = cluster.run(script)
    assert "backup stream is damaged at byte" in between(log, "IMPORT"), log
    assert between(log, "SIGNATURES") == "", log
    assert between(log, "LIST").split() == ["running"]


def test_export_is_killed(cluster: Cluster, prepared: str) -> None:
    """Ganeti does not hang, nothing is left on the node, and the next export works."""
    script = f"""{prepared}
        head -c 900M /dev/urandom | dd of="$(disk inst1.example.org 1)" bs=1M conv=notrunc iflag=fullblock status=none
        kill_sending() {{ find {EXPORTS} -size +10M | grep . && pkill -$signal -f '^python3.*image/export$'; }}
        for signal in TERM KILL; do
          gnt-backup export -n node1.example.org inst1.example.org >/srv/export.log 2>&1 &
          wait_for kill_sending
          echo WAIT$signal; timeout 600 tail --pid=$! -f /dev/null && echo ENDED; echo WAIT$signal
          cat /srv/export.log
          wait_for detached
          echo LEFT$signal; leftovers; echo LEFT$signal
          rm -rf {EXPORTS}/*
        done
        gnt-backup export -n node1.example.org inst1.example.org
        for file in {EXPORTS}/inst1.example.org/*-*-*; do tar -tf $file >/dev/null; done
    """
    log = cluster.run(script)
    for signal in ("TERM", "KILL"):
        assert "ENDED" in between(log, f"WAIT{signal}"), log
        assert between(log, f"LEFT{signal}") == "", log


def test_rename(cluster: Cluster, prepared: str) -> None:
    script = f"""{prepared}
        gnt-instance rename inst1.example.org inst3.example.org
        echo LOG; cat /var/log/ganeti/os/rename*; echo LOG
        gnt-instance startup inst3.example.org
    """
    said = between(cluster.run(script), "LOG")
    assert "renamed the guest from inst1.example.org to inst3.example.org: /etc/hostname, /etc/hosts" in said, said


def test_eight_at_once(cluster: Cluster, prepared: str) -> None:
    script = f"""{prepared}
        {{
          echo '['
          for number in 11 12 13 14 15 16 17 18; do
            echo '{{"mode": "create", "instance_name": "inst'$number'.example.org", "disk_template": "file",'
            echo ' "disks": [{{"size": 1024}}], "os_type": "image+default", "pnode": "node1.example.org",'
            echo ' "osparams": {{"image_name": "tiny", "image_type": "tarball", "swap_size": "16"}},'
            echo ' "nics": [{{"mode": "routed", "link": "100", "ip": "192.0.2.'$number'"}}],'
            echo ' "beparams": {{"maxmem": 128, "minmem": 128}},'
            echo ' "start": false, "name_check": false, "ip_check": false}}'
            [ $number = 18 ] || echo ,
          done
          echo ']'
        }} >/srv/batch.json
        gnt-instance batch-create /srv/batch.json
        echo LIST; gnt-instance list --no-headers -o name,status; echo LIST
        echo LOG; cat /var/log/ganeti/os/add*inst1[1-8]*; echo LOG
        echo LEFT; leftovers; echo LEFT
    """
    log = cluster.run(script)
    assert between(log, "LIST").count("ADMIN_down") == 9, log
    assert between(log, "LOG").count("is ready to boot") == 8, log
    assert between(log, "LEFT") == "", log


def test_imported_debian_boots_under_kvm(cluster: Cluster) -> None:
    """With its second disk, on a larger first disk, under another name."""
    image = debian("bookworm")
    socket = "/run/ganeti/kvm-hypervisor/ctrl/inst2.example.org.serial"
    script = f"""{DISK}
        cp {image.tarball} {IMAGES}/debian-12-x86_64.tar.zst
        chmod +x {SITE}/hooks/grub
        {ADD} --disk 0:size=2G --disk 1:size=1G -o image+default \
            -O image_name=debian-12,image_type=tarball,swap_size=64 inst1.example.org
        mkfs.btrfs -q "$(disk inst1.example.org 1)"
        gnt-backup export -n node1.example.org inst1.example.org
        {IMPORT} --disk 0:size=3G --disk 1:size=1G -B memory=256 inst2.example.org
        cmp "$(disk inst1.example.org 1)" "$(disk inst2.example.org 1)"
        gnt-instance startup inst2.example.org
        socat -u UNIX-CONNECT:{socket} STDOUT
    """
    with cluster.running(script, kvm=True) as (process, log):
        console = Console(process, log)
        console.wait_for(r"^inst2 login: ")
        facts = console.facts()
    assert facts.failed == []
    assert facts["fqdn"] == "inst2.example.org"
    assert facts.mounts["/"].size > 2.5 * (1 << 30)
