"""imageos on a real Ganeti cluster of one node (see one-node-cluster), a new one for each test."""

from __future__ import annotations

import json
import re
from pathlib import Path

from clusters import ADD, IMAGES, OS_DIR, SITE, Cluster, between, said
from credentials import public_key
from debian import debian
from qemu import Console


def test_the_os_definition_is_valid(cluster: Cluster) -> None:
    script = f"""
        echo DIAGNOSE; gnt-os diagnose; echo DIAGNOSE
        echo LIST; gnt-os list --no-headers; echo LIST
        echo INFO; gnt-os info image; echo INFO
        echo FILE; cat {OS_DIR}/parameters.list; echo FILE
        echo VERIFY; gnt-cluster verify --error-codes || true; echo VERIFY
    """
    log = cluster.run(script)
    assert "OS: image [global status: valid]" in between(log, "DIAGNOSE"), log
    assert "invalid" not in between(log, "DIAGNOSE")
    assert between(log, "LIST").split() == ["image+default"]
    info = between(log, "INFO")
    assert re.search(r"valid: True", info), info
    for version in ("10", "15", "20"):
        assert re.search(rf"^ *- {version}$", info, re.MULTILINE), info
    known = [line.split()[0] for line in between(log, "FILE").splitlines()]
    assert {"image_name", "filesystem", "swap_size", "kernel_args"} <= set(known)
    for name in known:
        assert re.search(rf"^ *- {name}: \S", info, re.MULTILINE), f"{name} is not in\n{info}"
    verified = between(log, "VERIFY")
    assert "Verifying node status" in verified
    assert "ENODEOS" not in verified, verified


def test_an_instance_is_added_and_reinstalled(cluster: Cluster, tiny: Path) -> None:
    """With a variant of the site and OS parameters, on a file as disk; then the same instance again."""
    script = f"""
        cp {tiny} {IMAGES}/
        echo small >>{SITE}/variants.list
        printf 'IMAGE_NAME=tiny\\nIMAGE_TYPE=tarball\\nFILESYSTEM=ext2\\nBOOT_SIZE=40\\n' >{SITE}/variants/small.conf
        gnt-os list
        {ADD} --disk 0:size=1G -o image+small -O filesystem=ext4,swap_size=16 inst1.example.org
        disk=$(echo /srv/ganeti/file-storage/inst1.example.org/*)
        echo TABLE; sfdisk --json "$disk"; echo TABLE
        echo TYPES
        for offset in $(sfdisk --dump "$disk" | sed -n 's/.*start= *\\([0-9]*\\).*/\\1/p'); do
          blkid --probe --offset $((offset * 512)) --output value --match-tag TYPE "$disk"
        done
        echo TYPES
        gnt-instance reinstall --force inst1.example.org
        gnt-instance startup inst1.example.org
        echo LIST; gnt-instance list --no-headers -o name,os,status; echo LIST
        echo LOOPS; losetup --list --noheadings --output BACK-FILE | grep -F "$disk" || true; echo LOOPS
        echo LOG; cat /var/log/ganeti/os/*; echo LOG
    """
    log = cluster.run(script)
    table = json.loads(between(log, "TABLE"))["partitiontable"]
    assert [entry["size"] // 2048 for entry in table["partitions"]][:2] == [40, 16]
    assert between(log, "TYPES").split() == ["ext4", "swap", "ext4"]
    assert between(log, "LIST").split() == ["inst1.example.org", "image+small", "running"]
    assert between(log, "LOOPS") == ""
    said = between(log, "LOG")
    assert said.count("instance inst1.example.org is ready") == 2, said
    assert said.isascii()


def test_private_and_secret_parameters(cluster: Cluster, tiny: Path) -> None:
    """Both reach a hook, on a reinstall the private one again; neither is in the log."""
    key, secret = public_key("PrivateWord"), "SecretWords".ljust(86, ".")
    script = f"""
        cp {tiny} {IMAGES}/
        tell={SITE}/hooks/tell
        printf '#!/bin/sh\\necho "keys: ${{#SSH_AUTHORIZED_KEYS}}, hash: ${{#ROOT_PASSWORD_HASH}}"\\n' >$tell
        chmod +x $tell
        {ADD} --disk 0:size=1G -o image+default -O image_name=tiny,image_type=tarball,image_debug=yes \\
            --os-parameters-private 'ssh_authorized_keys={key}' \\
            --os-parameters-secret 'root_password_hash=$6$salt${secret}' inst1.example.org
        gnt-instance reinstall --force inst1.example.org
        echo LOG; cat /var/log/ganeti/os/*; echo LOG
    """
    said = between(cluster.run(script), "LOG")
    assert re.findall(r"tell: (keys: \d+, hash: \d+)$", said, re.MULTILINE) == [
        f"keys: {len(key)}, hash: 94",
        f"keys: {len(key)}, hash: 0",
    ]
    assert "PrivateWord" not in said
    assert "SecretWords" not in said


def test_a_wrong_parameter_is_refused_before_anything_is_made(cluster: Cluster) -> None:
    script = f"""
        if {ADD} --disk 0:size=1G -o image+default -O filesystem=ext5 inst1.example.org; then exit 3; fi
        if gnt-os modify -O swap=perhaps image+default; then exit 4; fi
        gnt-os modify -O swap=no,filesystem=xfs image+default
        echo LIST; gnt-instance list --no-headers; echo LIST
    """
    log = cluster.run(script)
    assert "FILESYSTEM" in log and "ext5" in log, log
    assert "SWAP" in log and "perhaps" in log, log
    assert between(log, "LIST") == ""


def test_what_ganeti_itself_writes(cluster: Cluster, tiny: Path) -> None:
    """With its parameter os-image, Ganeti writes the disk, also on a reinstall. As the OS's default it has no effect.

    Each reinstall gets the OS parameters again, because Ganeti forgets them at the first.
    """
    script = f"""
        cp {tiny} {IMAGES}/
        head -c 3M /dev/urandom >/srv/x.img
        written() {{ cmp --bytes 3M /srv/x.img /srv/ganeti/file-storage/inst1.example.org/*; }}
        {ADD} --disk 0:size=1G -o image+default -O os-image=/srv/x.img inst1.example.org
        written; echo ADDED; ls /var/log/ganeti/os; echo ADDED
        gnt-instance reinstall --force inst1.example.org
        written; echo REINSTALLED; cat /var/log/ganeti/os/*; echo REINSTALLED
        say RELATIVE gnt-instance modify --os-parameters os-image=x.img inst1.example.org
        gnt-instance modify --os-parameters os-image=/srv/x.img inst1.example.org
        gnt-instance modify --os-parameters os-image=default inst1.example.org
        gnt-instance reinstall --force -O image_name=tiny,image_type=tarball inst1.example.org
        echo OURS; cat $(ls -t /var/log/ganeti/os/* | head -1); echo OURS
        gnt-os modify -O os-image=/srv/x.img image+default
        say DEFAULT {ADD.replace("192.0.2.50", "192.0.2.51")} --disk 0:size=1G -o image+default \
            -O image_name=tiny,image_type=tarball inst2.example.org
        gnt-os modify -O os-image=default image+default
        gnt-instance reinstall --force inst2.example.org
        echo VERIFY; gnt-cluster verify --error-codes || true; echo VERIFY
    """
    log = cluster.run(script)
    assert between(log, "ADDED") == "", log
    assert "os-image='/srv/x.img': Ganeti has written that to the first disk itself" in between(log, "REINSTALLED")
    status, lines = said(log, "RELATIVE")
    assert status == 1 and "os-image='x.img'" in "\n".join(lines), log
    assert "instance inst1.example.org is ready to boot" in between(log, "OURS")
    status, lines = said(log, "DEFAULT")
    assert status == 1 and "os-image='/srv/x.img': Ganeti ignores" in "\n".join(lines), log
    assert "ENODEOS" not in between(log, "VERIFY"), log


def test_the_job_shows_why_a_creation_failed(cluster: Cluster, tiny: Path) -> None:
    """The instance stays, so that it can be reinstalled when the cause is gone. Verify does not see damage within."""
    script = f"""
        cp {tiny} {IMAGES}/
        printf damaged | dd of={IMAGES}/{tiny.name} bs=1 seek=50000 conv=notrunc status=none
        echo ADD
        if {ADD} --disk 0:size=1G -o image+default -O image_name=tiny,image_type=tarball inst1.example.org
        then exit 3; fi
        echo ADD
        cp {tiny} {IMAGES}/
        gnt-instance reinstall --force inst1.example.org
        gnt-instance startup inst1.example.org
        echo LIST; gnt-instance list --no-headers -o name,status; echo LIST
    """
    log = cluster.run(script)
    shown = between(log, "ADD")
    *_, cause = (line for line in shown.splitlines() if line.startswith("imageos: "))
    assert f"image {IMAGES}/{tiny.name} is damaged or truncated" in cause, shown
    assert between(log, "LIST").split() == ["inst1.example.org", "running"]


def test_an_added_debian_boots_under_kvm(cluster: Cluster) -> None:
    """From `gnt-instance add` to the login prompt on the serial socket that Ganeti offers.

    On a busy machine the emulated timer is late, and Linux panics where it checks that.
    """
    image = debian("bookworm")
    socket = "/run/ganeti/kvm-hypervisor/ctrl/inst1.example.org.serial"
    script = f"""
        cp {image.tarball} {IMAGES}/debian-12-x86_64.tar.zst
        chmod +x {SITE}/hooks/grub
        {ADD} --disk 0:size=2G -o image+default -O image_name=debian-12,image_type=tarball,kernel_args=no_timer_check \\
            inst1.example.org
        gnt-instance startup inst1.example.org
        socat -u UNIX-CONNECT:{socket} STDOUT
    """
    with cluster.running(script, kvm=True) as (process, log):
        console = Console(process, log)
        console.wait_for(r"^Debian GNU/Linux 12 inst1 ttyS0$", r"^inst1 login: ")
        facts = console.facts()
    assert facts.failed == []
    assert facts["state"] == "running"
    assert facts["fqdn"] == "inst1.example.org"
    assert facts.mounts["/"].source == "/dev/vda3"
    assert facts.swaps == ["/dev/vda2"]
    assert not facts.host_keys & image.host_keys
