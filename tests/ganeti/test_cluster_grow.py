"""imageos grow after gnt-instance grow-disk, and a template made of an instance, on a real cluster."""

from __future__ import annotations

import re
from pathlib import Path

import readme
from clusters import ADD, IMAGES, SITE, Cluster, between, said
from test_tools import SSHD, TOOLS

TINY = "-o image+default -O image_name=tiny,image_type=tarball,swap_size=16"
LOOK = """
sizes() {
  mount-disks --read-only inst1 >/dev/null 2>&1
  df --output=size -BM /tmp/inst1.example.org_root | tail -1; sha256sum </tmp/inst1.example.org_root/etc/noise
  umount-disks inst1 >/dev/null 2>&1
}
"""


def test_after_grow_disk(cluster: Cluster, tiny: Path) -> None:
    """All disks, one of them, nothing to do; refused while it runs, or is mounted; from another node, too."""
    script = f"""{TOOLS}{SSHD}{LOOK}
        cp {tiny} {IMAGES}/
        {ADD} --disk 0:size=1G --disk 1:size=1G --disk 2:size=1G {TINY} inst1.example.org
        disk1=$(echo /srv/ganeti/file-storage/inst1.example.org/*.disk1)
        mkfs.ext4 -q -F $disk1
        gnt-instance deactivate-disks inst1.example.org
        say NOTHING imageos grow inst1
        say LEFT left
        gnt-instance grow-disk inst1.example.org 0 1g
        gnt-instance grow-disk inst1.example.org 1 2g
        say BEFORE sizes
        mount-disks inst1
        say MOUNTED imageos grow inst1
        umount-disks inst1
        gnt-instance startup inst1.example.org
        say RUNNING imageos grow inst1
        gnt-instance stop inst1.example.org
        say ONE imageos grow inst1 --disk 1
        say DISK1 dumpe2fs -h $disk1
        say AFTER1 sizes
        say ALL imageos grow inst1.example.org
        say AFTER sizes
        say WRONG imageos grow inst1 --disk 3
        say NOSUCH imageos grow nosuch
        say LEFT2 left
        gnt-instance grow-disk inst1.example.org 0 1g
        say ELSEWHERE elsewhere imageos grow inst1
        say AGAIN elsewhere imageos grow --disk=0 inst1
        say LEFT3 left
        gnt-instance startup inst1.example.org
        say BLOCK sh -ec '{readme.block("gnt-instance stop web1").replace("web1", "inst1")}'
    """
    log = cluster.run(script.replace("imageos grow", "/usr/local/sbin/imageos grow"))
    nothing = "disk {}: the ext4 on {} has all of the disk that it can have, {}: there is nothing to do"
    lines = said(log, "NOTHING")[1]
    assert said(log, "NOTHING")[0] == 0 and len(lines) == 3, log
    path = re.escape("/srv/ganeti/file-storage/inst1.example.org/")
    assert re.fullmatch(nothing.format(rf"{path}\S+disk0", "partition 3", r"\S+ MiB"), lines[0]), log
    assert re.fullmatch(nothing.format(rf"{path}\S+disk1", "the disk", "1 GiB"), lines[1]), log
    assert "disk2: it holds nothing that imageos can grow" in lines[2], log
    size, noise = said(log, "BEFORE")[1]
    assert said(log, "AFTER1")[1] == [size, noise], "only disk 1 has grown"
    grown, still = said(log, "AFTER")[1]
    assert still == noise and int(grown.strip(" M")) > int(size.strip(" M")) + 900, log
    assert said(log, "MOUNTED")[0] == 1 and "are mounted, or" in said(log, "MOUNTED")[1][-1], log
    assert said(log, "RUNNING") == (
        1, ["hint: gnt-instance stop inst1.example.org", "instance inst1.example.org is running"],
    )  # fmt: skip
    assert said(log, "ONE")[0] == 0
    assert said(log, "BLOCK")[0] == 0, log
    assert re.fullmatch(r".*disk1: the ext4 on the disk has grown from 1 GiB to 3 GiB", said(log, "ONE")[1][-1]), log
    assert re.search(r"Block count: +786432", between(log, "DISK1")), log
    assert said(log, "WRONG")[1] == ["instance inst1.example.org has no disk 3: it has 0 to 2"]
    assert said(log, "NOSUCH")[1][-1] == "there is no instance nosuch"
    status, lines = said(log, "ELSEWHERE")
    assert status == 0 and "has grown from" in "".join(lines), log
    assert "there is nothing to do" in said(log, "AGAIN")[1][-1], log
    for what in ("LEFT", "LEFT2", "LEFT3"):
        assert said(log, what) == (0, []), log


def test_template(cluster: Cluster, tiny: Path) -> None:
    """An instance is set up, made a template of, and deployed as another: with a larger disk, and its own identity."""
    variant = f"{SITE}/variants/web.conf"
    script = f"""{TOOLS}
        cp {tiny} {IMAGES}/
        {ADD} --disk 0:size=1G {TINY} inst1.example.org
        mount-disks inst1
        root=/tmp/inst1.example.org_root
        echo "set up" >$root/etc/set-up; mkdir -p $root/etc/ssh $root/root
        echo 0123456789abcdef0123456789abcdef >$root/etc/machine-id
        echo secret >$root/root/.bash_history; echo key >$root/etc/ssh/ssh_host_rsa_key
        umount-disks inst1
        say MAKE /usr/local/sbin/imageos make-qemu-img --seal -n web inst1
        gnt-cluster copyfile {IMAGES}/web-x86_64.qcow2
        printf 'IMAGE_NAME=web\\nIMAGE_TYPE=qcow2\\n' >{variant}
        echo web >>{SITE}/variants.list
        gnt-cluster copyfile {variant}
        gnt-cluster copyfile {SITE}/variants.list
        {ADD} --disk 0:size=2G -o image+web inst2.example.org
        mount-disks inst2
        root=/tmp/inst2.example.org_root
        echo RESULT
        cat $root/etc/set-up $root/etc/hostname; wc -c <$root/etc/machine-id
        ls $root/root/.bash_history $root/etc/ssh/ssh_host_rsa_key 2>&1 | grep -c 'No such' || true
        df --output=size -BM $root | tail -1
        echo RESULT
        umount-disks inst2
        say DOCTOR /usr/local/sbin/imageos doctor
    """
    log = cluster.run(script)
    assert said(log, "MAKE")[0] == 0, log
    setup, name, machine_id, gone, size = between(log, "RESULT").splitlines()
    assert (setup, name, machine_id) == ("set up", "inst2", "0"), log
    assert gone in ("1", "2"), log
    assert int(size.strip(" M")) > 1700, log
    assert f"variant web: {IMAGES}/web-x86_64.qcow2" in between(log, "DOCTOR"), log
