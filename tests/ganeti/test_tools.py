"""mount-disks and umount-disks on a real cluster.

One thing is not real, for want of a second machine: another node is this one under another name, reached by ssh.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from clusters import ADD, IMAGES, OS_DIR, Cluster, between, said

PLACE = "/tmp/inst1.example.org_root"
INSTANCE = (
    f"{ADD} --disk 0:size=1G --disk 1:size=1G -o image+default -O image_name=tiny,image_type=tarball,swap_size=16"
)
TOOLS = (
    f"""
for tool in mount-disks umount-disks; do ln -sf {OS_DIR}/imageos /usr/local/sbin/$tool; done
PATH=/usr/local/sbin:$PATH
"""
    + """
left() {
  loops || true
  grep -F org_root /proc/self/mountinfo || true
  ls -d /tmp/*.org_root /tmp/mount.* /run/imageos-disks-* /run/imageos/* 2>/dev/null || true
  gnt-instance list --no-headers --separator=' ' -o name,disks_active --filter 'admin_state == "down"' | grep Y || true
}
"""
)


@pytest.fixture
def prepared(tiny: Path) -> str:
    """Return a script with the functions above that makes the image, and inst1 with a filesystem on its second disk."""
    return f"""{TOOLS}
        cp {tiny} {IMAGES}/
        {INSTANCE} inst1.example.org
        mkfs.ext4 -q -F /srv/ganeti/file-storage/inst1.example.org/*.disk1
        gnt-instance deactivate-disks inst1.example.org
    """


def last(log: str, what: str, status: int = 1) -> str:
    found, lines = said(log, what)
    assert found == status, log
    return lines[-1]


def test_mounted_and_taken_away(cluster: Cluster, prepared: str) -> None:
    """With a short name; Ganeti itself refuses create meanwhile; a repeated command changes nothing."""
    script = f"""{prepared}
        say MOUNT mount-disks inst1
        echo MOUNTS; grep -F {PLACE} /proc/self/mountinfo; echo MOUNTS
        ls {PLACE}/etc/os-release {PLACE}/boot/lost+found -d; stat -c %a {PLACE}/..
        echo written >{PLACE}/boot/written
        say AGAIN mount-disks inst1.example.org
        say CREATE gnt-instance reinstall --force inst1.example.org
        sleep 1000 <{PLACE}/boot/written &
        say BUSY umount-disks inst1
        echo "process $! $(basename $(readlink /proc/$!/exe))"
        kill $!; wait || true
        say UMOUNT umount-disks inst1
        say LEFT left
        say NOTHING umount-disks inst1
        say RECREATE gnt-instance reinstall --force -O image_name=tiny,image_type=tarball,swap_size=16 inst1.example.org
        echo SECOND; blkid --probe -o value -s TYPE /srv/ganeti/file-storage/inst1.example.org/*.disk1; echo SECOND
    """
    log = cluster.run(script)
    assert said(log, "MOUNT") == (
        0,
        [
            "found / on partition 3 (ext4), /boot on partition 1 (ext4), swap on partition 2",
            f"instance inst1.example.org is mounted at {PLACE}; umount-disks inst1.example.org before you start it",
        ],
    )
    mounts = between(log, "MOUNTS").splitlines()
    assert [line.split()[4] for line in mounts] == [PLACE, f"{PLACE}/boot"]
    assert all("nosuid,nodev" in line.split()[5] for line in mounts)
    assert last(log, "AGAIN") == f"instance inst1.example.org is mounted at {PLACE} already"
    assert f"disk0 is in use: it is mounted at {PLACE}" in between(log, "CREATE"), log
    process = re.search(r"^process (\d+) ", log, re.MULTILINE)
    assert process
    assert last(log, "BUSY") == f"cannot unmount {PLACE}/boot: in use by sleep (process {process[1]})"
    assert last(log, "UMOUNT", 0) == f"nothing of instance inst1.example.org is mounted at {PLACE} any more"
    assert said(log, "LEFT") == (0, [])
    assert last(log, "NOTHING", 0) == "nothing of instance inst1.example.org is mounted"
    assert said(log, "RECREATE")[0] == 0
    assert between(log, "SECOND") == "ext4\n"


# command -> its last line; commands before it prepare that
BAD = {
    "mount-disks nosuch": "there is no instance nosuch",
    "mount-disks inst3.example.org": "there is no instance inst3.example.org",
    "umount-disks nosuch": "there is no instance nosuch",
    "mount-disks 'inst*'": "'inst*' cannot be the name of an instance",
    "mount-disks ../inst1": "'../inst1' cannot be the name of an instance",
    "mount-disks inst9": "instance inst9.example.org has no disks (disk template diskless)",
    f"ln -s /etc {PLACE}; mount-disks inst1": f"{PLACE} exists, and mount-disks has not made it",
    f"mkdir {PLACE}; mount-disks inst1": f"{PLACE} exists, and mount-disks has not made it",
    f"mkdir -m 700 {PLACE}; chown 1 {PLACE}; mount-disks inst1": f"{PLACE} exists, and mount-disks has not made it",
    f"mkdir -m 700 {PLACE}; touch {PLACE}/x; mount-disks inst1": f"{PLACE} exists, and mount-disks has not made it",
    "mount-disks --disk /nowhere inst1": "disk /nowhere: No such file or directory",
    "mount-disks inst2": "no root filesystem found on the disk, which has no partition table: nothing that is known",
    # PATH of cron
    "PATH=/usr/bin:/bin /usr/local/sbin/mount-disks nosuch": "there is no instance nosuch",
    "setpriv --reuid=65534 --clear-groups mount-disks inst1": "this needs root",
    "setpriv --reuid=65534 --clear-groups umount-disks inst1": "this needs root",
}
HINTS = {
    "mount-disks inst3.example.org": "did you mean inst1.example.org or inst2.example.org or inst9.example.org?",
    "mount-disks nosuch": "gnt-instance list shows all of them",
}


def test_bad_input(cluster: Cluster, prepared: str) -> None:
    """Each names the cause on its last line, and leaves nothing, not even active disks."""
    tries = "".join(
        f"say TRY{n} bash -c {shlex.quote(command)}\nrm -rf {PLACE}\nsay LEFT{n} left\n"
        for n, command in enumerate(BAD)
    )
    script = f"""{prepared}
        {INSTANCE} --no-install inst2.example.org
        {ADD.replace("-t file", "-t diskless")} -o image+default -O cdinstall=yes inst9.example.org
        gnt-instance deactivate-disks inst2.example.org
        {tries}
        say NONE mount-disks
        say OPTION mount-disks --frobnicate inst1
        say HELP mount-disks --help
        kill $(pgrep -f ^/usr/sbin/ganeti-luxid)
        say SILENT mount-disks inst1
        rm /var/lib/ganeti/ssconf_master_node
        say NOCLUSTER mount-disks inst1
    """
    log = cluster.run(script)
    for n, (command, message) in enumerate(BAD.items()):
        assert last(log, f"TRY{n}") == message, command
        assert said(log, f"LEFT{n}") == (0, []), command
        if command in HINTS:
            assert said(log, f"TRY{n}")[1][-2] == f"hint: {HINTS[command]}"
    assert said(log, "NONE")[0] == said(log, "OPTION")[0] == 2
    assert said(log, "HELP")[1][0].startswith("usage: mount-disks ")
    assert last(log, "SILENT") == "cannot ask Ganeti about instance inst1: the master daemon does not answer"
    assert last(log, "NOCLUSTER") == "this is not a node of a Ganeti cluster: gnt-cluster getmaster names no master"


def test_instance_that_is_not_stopped(cluster: Cluster, prepared: str) -> None:
    """Refused; read-only with a warning, while it continues to run. Also one that Ganeti will restart."""
    script = f"""{prepared}
        gnt-instance startup inst1.example.org
        say RUNNING mount-disks inst1
        say LEFT left
        say READ mount-disks --read-only inst1
        say WRITE touch {PLACE}/x
        say UMOUNT umount-disks inst1
        say LEFT2 left
        echo STATE; gnt-instance list --no-headers -o status,disks_active inst1; echo STATE
        rm /run/ganeti/fake-hypervisor/*
        say DOWN mount-disks inst1
        gnt-instance stop inst1.example.org
        gnt-instance activate-disks inst1.example.org
        mount-disks --read-only inst1
        say BEFORE umount-disks inst1
        echo ACTIVE; gnt-instance list --no-headers -o disks_active inst1; echo ACTIVE
    """
    log = cluster.run(script)
    assert last(log, "RUNNING") == "instance inst1.example.org is running"
    assert said(log, "LEFT") == said(log, "LEFT2") == (0, [])
    status, lines = said(log, "READ")
    assert status == 0
    assert lines[0].startswith("warning: instance inst1.example.org is not stopped (running)")
    assert "Read-only file system" in last(log, "WRITE")
    assert said(log, "UMOUNT")[0] == 0
    assert between(log, "STATE").split() == ["running", "Y"]
    assert last(log, "DOWN") == "instance inst1.example.org is not stopped: its status is ERROR_down"
    assert between(log, "ACTIVE").split() == ["Y"], "what an operator has activated stays active"


# it stops here: in a program for whose end it waits
PHASES = {"activation": "gnt-instance", "discovery": "blkid"}


KILLED = [
    ("TERM", "activation", ""),
    ("KILL", "activation", ""),
    ("TERM", "discovery", ""),
    ("KILL", "discovery", ""),
    ("KILL", "discovery", "--shell"),
]


def killed(n: int, signal: str, phase: str, shell: str) -> str:
    """Return a script with one killed call, a check of its leftovers, and a call that then works."""
    program = PHASES[phase]
    wait = '[ "$1" = list ] || ' if program == "gnt-instance" else ""
    return f"""
        mkdir /srv/fake
        touch /srv/fake/waiting  # by the test, beside it: blkid may write nowhere, and sees nothing else
        real=$(type -P {program})
        echo '#!/bin/sh
        {wait}while [ -e /srv/fake/waiting ]; do sleep 0.101; done
        exec '$real' "$@"' >/srv/fake/{program}
        chmod +x /srv/fake/{program}
        PATH=/srv/fake:$PATH mount-disks {shell} inst1 </dev/null >/srv/log 2>&1 &
        wait_for pgrep --full --exact "sleep 0.101"
        kill -{signal} $!
        if [ {phase}{signal} = activationTERM ]; then
          wait_for pgrep --full '^/bin/sh /srv/fake/gnt-instance deactivate-disks'
          rm /srv/fake/waiting
        fi
        echo ENDED{n}; wait $! || echo $?; echo ENDED{n}
        rm -r /srv/fake
        hash -r
        echo LOG{n}; cat /srv/log; echo LOG{n}
        wait_for detached
        say LEFT{n} left
        say UMOUNT{n} umount-disks inst1
        say CURED{n} left
        say AGAIN{n} mount-disks inst1
        umount-disks inst1
    """


def test_killed(cluster: Cluster, prepared: str) -> None:
    """SIGTERM leaves nothing, SIGKILL at most active disks; umount-disks cleans up, and the next call works."""
    log = cluster.run(prepared + "".join(killed(n, *case) for n, case in enumerate(KILLED)))
    for n, (signal, *_) in enumerate(KILLED):
        # bash may print a line about the kill before its status
        assert between(log, f"ENDED{n}").splitlines()[-1] == ("143" if signal == "TERM" else "137"), log
        left = said(log, f"LEFT{n}")[1]
        if signal == "TERM":
            assert between(log, f"LOG{n}").splitlines()[-1] == "imageos: ended by SIGTERM", log
            assert left == [], log
        else:
            assert set(left) <= {"/run/imageos-disks-inst1.example.org", "inst1.example.org Y"}, log
        assert said(log, f"UMOUNT{n}")[0] == 0, log
        assert said(log, f"CURED{n}") == (0, []), log
        assert said(log, f"AGAIN{n}")[0] == 0, log


def test_shell(cluster: Cluster, prepared: str) -> None:
    """Its files stay; its processes end; its status is returned; nobody else sees its mounts."""
    script = f"""{prepared}
        export SHELL=/bin/sh
        in_shell() {{ mount-disks "$@" <<<"$commands"; }}
        commands='pwd; cat etc/os-release; echo from the shell >boot/note; sleep 1000 & '
        commands+='until [ "$(cat /proc/$!/comm)" = sleep ]; do :; done; exit 3'
        say WRITE in_shell --shell inst1
        say LEFT left
        commands='cat boot/note; echo x >etc/x; exit 0'
        say READ in_shell --shell --read-only inst1
        say LEFT2 left
        mkfifo /srv/fifo
        mount-disks --shell inst1 </srv/fifo >/srv/log 2>&1 &
        exec 8>/srv/fifo
        echo 'echo unsaved >etc/unsaved; touch /srv/ready' >&8
        wait_for test -e /srv/ready
        say LEFT3 left
        say OTHER umount-disks inst1
        kill -TERM $!
        wait $! || echo "ended with $?"
        say LEFT4 left
        commands='cat etc/unsaved'
        say SAVED in_shell --shell inst1
        rm /srv/ready
        mount-disks --shell inst1 </srv/fifo >/srv/log 2>&1 &
        exec 8>/srv/fifo
        echo 'touch /srv/ready' >&8
        wait_for test -e /srv/ready
        kill -KILL $!
        wait $! || true
        wait_for detached
        say KILLED left
        umount-disks inst1
        say LEFT5 left
    """
    log = cluster.run(script)
    status, lines = said(log, "WRITE")
    assert status == 3, log
    assert "/run/imageos/root" in lines and "ID=tiny" in lines
    assert any(re.fullmatch(r"warning: the shell left sleep running \(process \d+\): ended", line) for line in lines)
    assert "from the shell" in said(log, "READ")[1], log
    assert any("Read-only file system" in line for line in said(log, "READ")[1]), log
    loops = [line for line in said(log, "LEFT3")[1] if line.startswith("/dev/loop")]
    assert not [line for line in said(log, "LEFT3")[1] if PLACE in line], "nobody else sees it"
    assert len(loops) == 1
    assert last(log, "OTHER") == "another tool is working on the disks of instance inst1.example.org"
    assert "ended with 143" in log
    assert "unsaved" in said(log, "SAVED")[1], "what was written before the signal is on the disk"
    for what in ("LEFT", "LEFT2", "LEFT4", "LEFT5"):
        assert said(log, what) == (0, []), what
    assert set(said(log, "KILLED")[1]) == {"/run/imageos-disks-inst1.example.org", "inst1.example.org Y"}


# A real sshd on this node, with Ganeti's host key, that logs the requested commands
SSHD = r"""
mkdir -p /run/sshd
usermod --password '*' root
ssh-keygen -q -t ed25519 -N '' -f /srv/key
echo 'IdentityFile /srv/key' >>/etc/ssh/ssh_config
printf '#!/bin/sh\necho "$SSH_ORIGINAL_COMMAND" >>/srv/ssh.log\neval "$SSH_ORIGINAL_COMMAND"\n' >/srv/note
chmod +x /srv/note
/usr/sbin/sshd -f /dev/null -oAuthorizedKeysFile=/srv/key.pub -oStrictModes=no -oPermitRootLogin=yes \
    -oHostKey=/etc/ssh/ssh_host_rsa_key -oForceCommand=/srv/note -oPidFile=/srv/sshd.pid
wait_for test -e /srv/sshd.pid  # it listens
elsewhere() { unshare --uts sh -c 'hostname node2.example.org; exec "$@"' sh "$@"; }
"""


def test_disks_on_another_node(cluster: Cluster, prepared: str) -> None:
    """Called under another node's name: neither the master nor the owner of the disks."""
    script = f"""{prepared}{SSHD}
        say MOUNT elsewhere mount-disks inst1
        echo MOUNTS; grep -F {PLACE} /proc/self/mountinfo || true; echo MOUNTS
        say UMOUNT elsewhere umount-disks inst1
        say LEFT left
        echo SSH; cat /srv/ssh.log; echo SSH
        say SHELL elsewhere mount-disks --shell --read-only inst1 <<<'cat etc/os-release; exit 4'
        mkdir {PLACE}
        say EXISTS elsewhere mount-disks inst1
        rmdir {PLACE}
        say LEFT2 left
        kill $(cat /srv/sshd.pid)
        wait_for test ! -e /srv/sshd.pid
        say UNREACHABLE elsewhere mount-disks inst1
    """
    log = cluster.run(script)
    assert said(log, "MOUNT")[0] == 0, log
    assert said(log, "MOUNT")[1][-1] == "that is on node node1.example.org"
    assert len(between(log, "MOUNTS").splitlines()) == 2
    assert said(log, "UMOUNT")[0] == 0, log
    commands = [shlex.split(line) for line in between(log, "SSH").splitlines()]
    program = f"{OS_DIR}/imageos"
    assert [command[:2] for command in commands] == [
        ["gnt-instance", "list"],
        ["gnt-instance", "activate-disks"],
        [program, "mount-disks"],
        ["gnt-instance", "list"],
        [program, "umount-disks"],
        ["gnt-instance", "deactivate-disks"],
    ]
    assert said(log, "SHELL")[0] == 4 and "ID=tiny" in said(log, "SHELL")[1], log
    assert last(log, "EXISTS") == f"on node node1.example.org: {PLACE} exists, and mount-disks has not made it"
    assert said(log, "LEFT") == said(log, "LEFT2") == (0, [])
    assert last(log, "UNREACHABLE").startswith(
        "cannot reach node node1.example.org over ssh, or lost it: ssh: connect to host"
    )
