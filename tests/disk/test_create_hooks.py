"""The hooks of a site: selection, order, environment, and failures."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from credentials import public_key
from support import PATH, SITE, Node, digest, mounted, partitions, signatures

MakeDisk = Callable[..., Path]
SAY = "#!/bin/sh\necho hook-says ${0##*/}\n"


def said(log: str) -> list[str]:
    """Return the output of these tests' hooks, in order."""
    return re.findall(r"hook-says (\S+)", log)


def test_order_is_that_of_the_c_locale(node: Node, disk: MakeDisk) -> None:
    names = ["b", "a", "B", "_x", "-y", "10", "9", "a-b", "a_b", "aB"]
    for name in names:
        node.hook(name, SAY)
    result = node.create(disk(), LC_ALL="en_US.UTF-8", LANG="en_US.UTF-8").ok()
    assert said(result.log) == sorted(names)
    for name in names:
        ours = [line for line in result.lines if line.startswith("imageos:") and re.search(rf"\bhook\b.*{name}", line)]
        assert ours, f"{name} is not named in the log"


def test_names_and_modes_that_do_not_count(node: Node, disk: MakeDisk) -> None:
    for name in ("backup~", "old.bak", ".hidden", "with.dot", "sp ace", "pl+us", "#emacs#", "x.dpkg-dist", "\u00fc"):
        node.hook(name, SAY)
    node.hook("not-executable", SAY, mode=0o644)
    (SITE / "hooks/directory").mkdir()
    (SITE / "hooks/dangling").symlink_to("/nonexistent")
    node.hook("good", SAY)
    (SITE / "hooks/link").symlink_to("good")
    assert said(node.create(disk()).ok().log) == ["good", "link"]


@pytest.mark.parametrize("state", ["empty", "missing"])
def test_no_hooks(state: str, node: Node, disk: MakeDisk) -> None:
    if state == "missing":
        for path in (SITE / "hooks").glob("*"):
            path.unlink()
        (SITE / "hooks").rmdir()
    node.create(disk()).ok()


def test_bundled_hooks_are_disabled(node: Node, disk: MakeDisk) -> None:
    """They are installed without the execute bit, so none runs."""
    bundled = sorted(path.name for path in (SITE / "hooks").iterdir())
    assert "grub" in bundled
    log = node.create(disk()).ok().log
    assert not [name for name in bundled if re.search(rf"\bhook\b.*\b{re.escape(name)}\b", log)]


PRINT_ALL = r"""#!/usr/bin/env python3
import json, os
print("environment " + json.dumps(dict(os.environ)))
"""


def environment_of(log: str) -> dict[str, str]:
    import json

    return dict(json.loads(log.split("environment ", 1)[1].splitlines()[0]))


def test_environment(node: Node, disk: MakeDisk) -> None:
    node.hook("show", PRINT_ALL)
    target = disk()
    given = node.environment(target, env="create-kvm-network")
    variables = environment_of(node.call("create", given).ok().log)
    different = {name for name, value in given.items() if variables.get(name) != value and name != "PATH"}
    assert not different, "every variable from Ganeti"
    settings = {
        "SWAP": "yes",
        "SWAP_SIZE": "8",
        "BOOT_SIZE": "24",
        "FILESYSTEM": "ext4",
        "PARTITION_TABLE": "msdos",
        "KERNEL_ARGS": "",
        "IMAGE_NAME": "tiny",
        "IMAGE_TYPE": "tarball",
        "IMAGE_DIR": str(node.images),
        "IMAGE_URL": "",
        "IMAGE_CHECKSUM": "",
        "IMAGE_KEYRING": "",
        "IMAGE_SIGNER": "",
        "IMAGE_SIGNED_NAME": "",
        "CDINSTALL": "no",
        "GROW": "yes",
        "NOMOUNT": "no",
        "OVERLAY": "",
        "CUSTOMIZE_DIR": str(SITE / "hooks"),
        "VARIANTS_DIR": str(SITE / "variants"),
        "NETWORKS_DIR": str(SITE / "networks"),
        "OVERLAYS_DIR": str(SITE / "overlays"),
        "IMPORT_HOOKS": "grub",
        "RENAME_HOOKS": "zz_ddns",
        "DNS_SERVERS": "",
        "DNS_SEARCH": "",
        "DNS_DOMAIN": "",
        "HOOK_TIMEOUT": "3600",
        "GUEST_TIMEOUT": "600",
        "IMAGE_DEBUG": "no",
    }
    assert {name: variables.get(name) for name in settings} == settings
    assert {
        "SSH_AUTHORIZED_KEYS",
        "ROOT_PASSWORD_HASH",
        "USER_DATA",
        "ARCH",
        "IMAGE_VERIFY",
        "IMAGE_CLEANUP",
        "CACHE_DIR",
        "EXPORT_DIR",
        "FDISK",
    } <= variables.keys()
    assert variables["BLOCKDEV"] == str(target), "Ganeti's device"
    assert variables["IMAGEOS_ACTION"] == "create"
    assert "IMPORT_SCRIPT" not in variables
    assert Path(variables["IMAGEOS"]).resolve().is_file()
    assert all(variables[name].startswith("/dev/") for name in ("DISK_DEV", "ROOT_DEV", "BOOT_DEV", "SWAP_DEV"))
    assert len({variables[name] for name in ("DISK_DEV", "ROOT_DEV", "BOOT_DEV", "SWAP_DEV")}) == 4


LOOK = r"""#!/bin/sh
set -e
echo "kinds $(blkid -p -o value -s TYPE $ROOT_DEV) ${BOOT_DEV:+$(blkid -p -o value -s TYPE $BOOT_DEV)} end"
echo "swap ${SWAP_DEV:+$(blkid -p -o value -s TYPE $SWAP_DEV)} end"
echo "disk $(blkid -p -o value -s PTTYPE $DISK_DEV) end"
echo "mounted $(stat -c %d $TARGET) $(stat -c %d $TARGET/boot) end"
echo "fstab $(grep -c UUID= $TARGET/etc/fstab) $(cat $TARGET/etc/hostname) end"
echo "umask $(umask) cwd $PWD user $(id -u) end"
echo "stdin $(cat | wc -c) end"
echo "version $($IMAGEOS --version | wc -l) end"
echo to-stderr >&2
echo "made by a hook" > $TARGET/etc/made
mkdir $TARGET/etc/made.d
"""


@pytest.mark.parametrize("kernel", [False, True], ids=["own-kernel", "kernel_path"])
def test_what_a_hook_can_do(kernel: bool, node: Node, disk: MakeDisk, tmp_path: Path) -> None:
    node.hook("look", LOOK)
    target = disk()
    log = (
        node.create(
            target, INSTANCE_HV_kernel_path="/boot/vmlinuz" if kernel else "", OSP_SWAP="no" if kernel else "yes"
        )
        .ok()
        .log
    )
    assert ("kinds ext4  end" if kernel else "kinds ext4 ext4 end") in log
    assert ("swap  end" if kernel else "swap swap end") in log
    assert "disk dos end" in log
    mounts = re.search(r"mounted (\d+) (\d+) end", log)
    assert mounts and (mounts[1] == mounts[2]) == kernel
    assert re.search(r"fstab [13] inst1\S* end", log), "the tree is complete when the hooks run"
    assert f"umask 0022 cwd {node.os_dir} user 0 end" in log
    assert "stdin 0 end" in log
    assert "version 1 end" in log
    assert "to-stderr" in log
    with mounted(target, tmp_path / "root", partitions(target)[-1]) as guest:
        assert (guest / "etc/made").stat().st_mode & 0o777 == 0o644
        assert (guest / "etc/made.d").stat().st_mode & 0o777 == 0o755


def test_python_hook(node: Node, disk: MakeDisk, tmp_path: Path) -> None:
    node.hook(
        "python",
        "#!/usr/bin/env python3\n"
        "from imageos.hook import Hook\n\n\n"
        "def main(hook):\n"
        "    hook.target.write('/etc/by-python', 'yes\\n')\n\n\n"
        "Hook.run(main)\n",
    )
    target = disk()
    node.create(target).ok()
    with mounted(target, tmp_path / "root", partitions(target)[-1]) as guest:
        assert (guest / "etc/by-python").read_text() == "yes\n"
        assert (guest / "etc/by-python").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("end, status", [("exit 3", "3"), ("exit 255", "255"), ("kill -9 $$", "SIGKILL")])
def test_first_that_fails_ends_it(end: str, status: str, node: Node, disk: MakeDisk) -> None:
    node.hook("10-good", SAY)
    node.hook("20-bad", f"#!/bin/sh\necho hook-says 20-bad\necho the reason >&2\n{end}\n")
    node.hook("30-late", SAY)
    target = disk()
    result = node.create(target).failed("20-bad")
    assert re.search(rf"\b{status}\b|\b{ {'SIGKILL': '9'}.get(status, status) }\b", result.last), result.log
    assert said(result.log) == ["10-good", "20-bad"]
    assert "the reason" in result.log
    assert signatures(target) == [], "not disarmed"
    (SITE / "hooks/20-bad").unlink()
    assert said(node.create(target).ok().log) == ["10-good", "30-late"]


@pytest.mark.parametrize("text", ["no shebang at all\n", "#!/nonexistent/interpreter\n", "", "#!/bin/sh\r\ntrue\r\n"])
def test_hook_that_cannot_be_started(text: str, node: Node, disk: MakeDisk) -> None:
    """It is refused before the first write."""
    node.hook("broken", "").write_bytes(text.encode())
    target = disk()
    before = digest(target)
    node.create(target).failed("broken cannot be run: it")
    assert digest(target) == before


@pytest.mark.parametrize(
    "daemon",
    [
        "sleep 600 &",
        "sleep 600 >/dev/null 2>&1 </dev/null &",
        "setsid sh -c 'trap \"\" TERM HUP INT; cd $TARGET; sleep 600' &",
        "(setsid sleep 600 3>$TARGET/open &) ",
    ],
    ids=["holds-the-log", "quiet", "stubborn-in-the-target", "open-file-in-the-target"],
)
def test_hook_that_leaves_a_process(daemon: str, node: Node, disk: MakeDisk) -> None:
    node.hook("daemon", f"#!/bin/sh\n{daemon}\nsleep 0.2\nexit 0\n")
    result = node.create(disk()).ok()
    assert [
        line
        for line in result.lines
        if line.startswith("imageos:") and "sleep" in line or "daemon" in line and re.search(r"left|end", line)
    ], f"not reported\n{result.log}"


def test_hook_that_takes_too_long(node: Node, disk: MakeDisk) -> None:
    """The hook and its children end, and its output is in the log."""
    node.defaults("HOOK_TIMEOUT=2\n")
    node.hook("slow", "#!/bin/sh\necho waiting for the lights\nsleep 1000 &\nsleep 1000\n")
    result = node.create(disk())
    result.failed("hook slow", "longer than 2 s")
    assert "slow: waiting for the lights" in result.log
    assert "hint: HOOK_TIMEOUT in" in result.log
    assert "hook slow left sleep running" in result.log


def test_what_is_made_meanwhile_is_no_leftover(node: Node, disk: MakeDisk, tmp_path: Path) -> None:
    """ssh-keygen(1) runs until the second hook has seen it. (grep -q: any other process may end meanwhile.)

    It waits without a child, which would count as a leftover if it were older than the hook.
    """
    # beside the hook, as a confined program sees nothing else
    fake, seen, gate = tmp_path / "bin/ssh-keygen", tmp_path / "seen", tmp_path / "bin/gate"
    fake.parent.mkdir()
    os.mkfifo(gate)
    fake.write_text(f'#!/bin/sh\nread -r _ <{gate}\nexec /usr/bin/ssh-keygen "$@"\n')
    fake.chmod(0o755)
    node.hook("a", "#!/bin/sh\n:\n")
    # wait until ssh-keygen has opened it and read the line
    node.hook("b", f"#!/bin/sh\ngrep -qs '{fake}' /proc/[0-9]*/cmdline && : > {seen}\necho >{gate}\n")
    result = node.create(disk(), PATH=f"{fake.parent}:{PATH}").ok()
    assert seen.exists()
    assert "running" not in result.log


def test_hook_that_mounts(node: Node, disk: MakeDisk) -> None:
    """It mounts in the mount namespace of the command, so its forgotten mounts vanish with the command."""
    node.hook("mounts", "#!/bin/sh\nmount -t tmpfs none $TARGET/mnt && touch $TARGET/mnt/x\n")
    target = disk()
    result = node.create(target)
    assert result.status in (0, 1), result.log
    if result.status:
        assert signatures(target) == []


def test_much_output_and_bytes_that_are_not_ascii(node: Node, disk: MakeDisk) -> None:
    node.hook(
        "loud",
        "#!/usr/bin/env python3\n"
        "import sys\n"
        "sys.stdout.buffer.write(b'caf\\xc3\\xa9 \\xff\\xfe \\x1b[31mred\\n')\n"
        "sys.stdout.buffer.write(b'no newline at the end ' * 100000)\n",
    )
    log = node.create(disk()).ok().log  # Call.log() fails unless it is ASCII
    assert "caf" in log
    assert "\x1b" not in log


SECRETS = {
    "OSP_ROOT_PASSWORD_HASH": "$6$salt$" + "ThisIsTheSecretHash".ljust(86, "."),
    "OSP_USER_DATA": "#cloud-config\npassword: TopSecret",
    "OSP_SSH_AUTHORIZED_KEYS": public_key("VeryPrivateComment"),
}


@pytest.mark.parametrize("ending", ["exit 0", "exit 1"])
def test_secrets_are_in_no_log(ending: str, node: Node, disk: MakeDisk) -> None:
    node.hook("ps", f"#!/bin/sh\nps -e -o args\n{ending}\n")
    result = node.create(disk(), OSP_IMAGE_DEBUG="1", **SECRETS)
    assert result.status == (0 if ending == "exit 0" else 1), result.log
    for part in ("ThisIsTheSecretHash", "TopSecret", "VeryPrivateComment", "AAAAC3"):
        assert part not in result.log


def test_wrong_secret_is_not_shown(node: Node, disk: MakeDisk) -> None:
    result = node.create(disk(), OSP_ROOT_PASSWORD_HASH="first\nTopSecret").failed("ROOT_PASSWORD_HASH")
    assert "TopSecret" not in result.log


def test_debug_shows_commands(node: Node, disk: MakeDisk) -> None:
    quiet = node.create(disk()).ok().log
    loud = node.create(disk(), OSP_IMAGE_DEBUG="yes").ok().log
    assert "sfdisk" in loud and "mkfs.ext4" in loud and "tar" in loud
    assert len(loud) > 2 * len(quiet)


def test_hooks_do_not_see_another_create(node: Node, disk: MakeDisk, tmp_path: Path) -> None:
    """Only this run sees the mount at TARGET; the node and its other processes do not."""
    gate = tmp_path / "gate"
    node.hook("wait", f"#!/bin/sh\ntouch {gate}; echo target $TARGET\nwhile [ -e {gate} ]; do sleep 0.05; done\n")
    call = node.start("create", node.environment(disk()))
    call.wait_for(lambda: re.search(r"target \S+\n", call.log()), "the hook has said where")
    (target,) = re.findall(r"target (\S+)\n", call.log())
    assert target not in Path("/proc/self/mounts").read_text()
    gate.unlink()
    call.result().ok()


def test_disk_of_failed_hook_is_written_again(node: Node, disk: MakeDisk) -> None:
    node.hook("bad", "#!/bin/sh\nexit 1\n")
    target = disk()
    node.create(target).failed("bad")
    empty = digest(target)
    (SITE / "hooks/bad").unlink()
    node.create(target).ok()
    assert digest(target) != empty
    assert len(partitions(target)) == 3
