"""Capture images from instances of a real cluster, and deploy them again."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from clusters import ADD, IMAGES, OS_DIR, Cluster, between, said, tiny_image

TINY = "-o image+default -O image_name=tiny,image_type=tarball,swap_size=16"
DISKS = "/srv/ganeti/file-storage"
SCRIPT = f"""
for tool in make-dump make-qemu-img ganeti-image; do ln -sf {OS_DIR}/imageos /usr/local/sbin/$tool; done
PATH=/usr/local/sbin:$PATH
left() {{
  loops || true
  grep -e /srv/ganeti/file /proc/self/mountinfo || true
  ls -d /run/imageos-disks-* /run/imageos/* 2>/dev/null || true
  gnt-instance list --no-headers --separator=' ' -o name,disks_active --filter 'admin_state == "down"' | grep Y || true
}}
# tree INSTANCE: every file of its guest but what makes it this instance, with its content
tree() {{
  disk=$(echo {DISKS}/$1/*.disk0)
  mkdir -p /srv/mnt
  for start in $(sfdisk --dump "$disk" | sed -n 's/.*start= *\\([0-9]*\\),.*type=83.*/\\1/p'); do
    mount -o ro,loop,offset=$((start * 512)) "$disk" /srv/mnt
    (cd /srv/mnt; find . -type f ! -name lost+found ! -path ./etc/fstab ! -path './etc/host*' -exec sha256sum {{}} +)
    umount /srv/mnt
  done | sort -k 2
}}
"""


@pytest.fixture
def prepared(tmp_path: Path) -> str:
    """Return a script with the functions above that makes an image, and inst1 from it, stopped, with inactive disks."""
    files = {
        "etc/machine-id": "0123456789abcdef0123456789abcdef\n",
        "boot/vmlinuz": "not a kernel\n",
        "bin/noise": bytes(range(256)) * 4096,
    }
    image = tiny_image(tmp_path, files)
    return f"""{SCRIPT}
        cp {image} {IMAGES}/
        {ADD} --disk 0:size=1G --disk 1:size=1G {TINY} inst1.example.org
        gnt-instance deactivate-disks inst1.example.org
    """


def test_captured_and_deployed(cluster: Cluster, prepared: str) -> None:
    """With each of the three commands; the instance is unchanged, and starts."""
    add = f"{ADD.replace('192.0.2.50', '192.0.2.$ip')} --disk 0:size=1G -o image+default"
    script = f"""{prepared}
        tree inst1.example.org >/srv/inst1
        sha256sum {DISKS}/inst1.example.org/* >/srv/sums
        say DUMP make-dump inst1
        mkdir /srv/images
        say DISK make-qemu-img inst1.example.org /srv/images -n copy
        say TAR ganeti-image -t tarball -i inst1.example.org -n sealed -a x86 -d {IMAGES} --seal
        say LEFT left
        sha256sum --check --quiet /srv/sums
        echo FILES; ls {IMAGES} /srv/images; echo FILES
        mv /srv/images/* {IMAGES}/
        cd {IMAGES}; sha256sum --check --quiet *.sha256; cd /
        gnt-instance startup inst1.example.org
        ip=52 && {add} -O image_name=inst1.example.org,image_type=dump,swap=no inst2.example.org
        ip=53 && {add} -O image_name=copy,image_type=qcow2 inst3.example.org
        ip=54 && {add} -O image_name=sealed,arch=x86,image_type=tarball inst4.example.org
        for number in 2 3 4; do
          tree inst$number.example.org >/srv/inst$number
          diff /srv/inst1 /srv/inst$number >&2 || echo "DIFFERENT $number"
        done
        echo COUNT; wc -l </srv/inst1; echo COUNT
    """
    log = cluster.run(script)
    for what in ("DUMP", "DISK", "TAR"):
        status, lines = said(log, what)
        assert status == 0, log
        assert "of the 2 disks of instance inst1.example.org, disk 0 is in the image" in lines
    assert said(log, "LEFT") == (0, [])
    names = ["inst1.example.org-x86_64-boot.dump", "inst1.example.org-x86_64-root.dump", "sealed-x86.tar.zst"]
    names += [f"{name}.sha256" for name in names] + [
        "copy-x86_64.qcow2",
        "copy-x86_64.qcow2.sha256",
        "tiny-x86_64.tar.gz",
    ]
    assert sorted(line for line in between(log, "FILES").split() if "-x86" in line) == sorted(names)
    assert "DIFFERENT" not in log, log
    assert int(between(log, "COUNT")) >= 4


# command -> its last line
BAD = {
    "make-dump nosuch": "there is no instance nosuch",
    "make-qemu-img inst9": "instance inst9.example.org has no disks (disk template diskless)",
    "make-qemu-img inst2": "instance inst2.example.org is running",
    "ganeti-image -t tarball -i inst3": "no root filesystem found on the disk, which has no partition table: nothing",
    "make-dump inst1 /nowhere": "IMAGE_DIR /nowhere: No such file or directory",
    "make-dump inst1 /srv/small": "/srv/small is full: no image was made: ",
    "make-dump inst1 -n ../x": "IMAGE_NAME='../x' with -n is not accepted: it must be a name without / that does not "
    "begin with a dot",
    "make-dump inst1 -n there": "there is an image /var/cache/ganeti-instance-image/there-x86_64-root.dump already",
    "setpriv --reuid=65534 --clear-groups make-dump inst1": "this needs root",
}


def test_bad_input(cluster: Cluster, prepared: str) -> None:
    """Each names the cause on its last line, and leaves nothing, not even active disks."""
    tries = "".join(f"say TRY{n} bash -c {shlex.quote(command)}\nsay LEFT{n} left\n" for n, command in enumerate(BAD))
    other = f"{ADD.replace('192.0.2.50', '192.0.2.60')} --disk 0:size=1G {TINY}"
    diskless = ADD.replace("-t file", "-t diskless").replace(".50", ".62")
    script = f"""{prepared}
        {other} inst2.example.org
        gnt-instance startup inst2.example.org
        {other.replace(".60", ".61")} --no-install inst3.example.org
        gnt-instance deactivate-disks inst3.example.org
        {diskless} -o image+default -O cdinstall=yes inst9.example.org
        mkdir /srv/small; mount -t tmpfs -o size=1M tmpfs /srv/small
        touch {IMAGES}/there-x86_64-root.dump
        sha256sum {DISKS}/*/* >/srv/sums
        {tries}
        sha256sum --check --quiet /srv/sums
        say NONE make-dump
        say TYPE ganeti-image -t raw -i inst1
        say HELP make-qemu-img --help
        echo FILES; ls -A {IMAGES} /srv/small; echo FILES
    """
    log = cluster.run(script)
    for n, (command, message) in enumerate(BAD.items()):
        status, lines = said(log, f"TRY{n}")
        assert status == 1 and lines[-1].startswith(message), f"{command}\n{log}"
        assert said(log, f"LEFT{n}") == (0, []), command
    assert said(log, "NONE")[0] == said(log, "TYPE")[0] == 2
    assert said(log, "HELP")[1][0].startswith("usage: make-qemu-img ")
    files = between(log, "FILES").split()
    assert sorted(file for file in files if file.startswith(("tiny", "there", "inst", "."))) == [
        "there-x86_64-root.dump",
        "tiny-x86_64.tar.gz",
    ]


def test_killed(cluster: Cluster, prepared: str) -> None:
    """While it writes the image. After SIGKILL the disks may stay active; this is harmless, and the instance starts."""
    script = f"""{prepared}
        mkdir /srv/fake
        printf '#!/bin/sh\\nsleep 1000.5\\n' >/srv/fake/tar
        chmod +x /srv/fake/tar
        for signal in TERM KILL; do
          PATH=/srv/fake:$PATH ganeti-image -t tarball -i inst1 -n made >/srv/log 2>&1 &
          wait_for pgrep --full --exact "sleep 1000.5"
          kill -$signal $!
          echo ENDED$signal; wait $! || echo $?; tail -1 /srv/log; echo ENDED$signal
          wait_for detached
          say LEFT$signal left
        done
        ls -A {IMAGES}
        gnt-instance startup inst1.example.org
    """
    log = cluster.run(script)
    assert between(log, "ENDEDTERM") == "143\nimageos: ended by SIGTERM\n", log
    assert "137" in between(log, "ENDEDKILL").splitlines(), log
    assert "made-x86_64" not in log
    assert said(log, "LEFTTERM")[1] == []
    assert set(said(log, "LEFTKILL")[1]) <= {"/run/imageos-disks-inst1.example.org", "inst1.example.org Y"}


SSH = """#!/bin/sh
for last; do :; done
echo "$last" >>/srv/ssh.log
exec unshare --uts sh -c 'hostname node1.example.org; eval "$1"' sh "$last"
"""


def test_disks_on_another_node(cluster: Cluster, prepared: str) -> None:
    """Called on a node that is neither the master nor has the disks. Only ssh is a stand-in."""
    script = f"""{prepared}
        mkdir /srv/fake; echo {shlex.quote(SSH)} >/srv/fake/ssh; chmod +x /srv/fake/ssh
        elsewhere() {{ PATH=/srv/fake:$PATH unshare --uts sh -c 'hostname node2.example.org; exec "$@"' sh "$@"; }}
        say MAKE elsewhere make-qemu-img inst1 -n made --seal
        say AGAIN elsewhere make-qemu-img inst1 -n made
        say LEFT left
        echo SSH; cat /srv/ssh.log; echo SSH
        echo FILES; ls {IMAGES}; echo FILES
    """
    log = cluster.run(script)
    status, lines = said(log, "MAKE")
    assert status == 0, log
    assert lines[-1] == "the image is on node node1.example.org"
    status, lines = said(log, "AGAIN")
    assert status == 1
    assert lines[-1] == f"on node node1.example.org: there is an image {IMAGES}/made-x86_64.qcow2 already"
    assert any("ganeti-image --disk" in line and "--seal" in line for line in between(log, "SSH").splitlines())
    assert {"made-x86_64.qcow2", "made-x86_64.qcow2.sha256"} <= set(between(log, "FILES").split())
    assert said(log, "LEFT") == (0, [])
