"""Secrets appear in no log, error, process list, file name, or file that others may read."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import backups
import pytest
from credentials import public_key
from support import DEFAULTS, Node, mounted, partitions, run

from imageos.settings import TABLE

MakeDisk = Callable[..., Path]
MARK = "xyzzy4711"  # part of every secret
SECRETS = {
    "OSP_ROOT_PASSWORD_HASH": f"$6$salt${MARK:.<86}",
    "OSP_USER_DATA": f"#cloud-config\n# {MARK}\n",
    "OSP_SSH_AUTHORIZED_KEYS": f"{public_key(MARK)}\n",
    "OSP_SITE_SECRET": MARK,  # a private or secret parameter that only a site's hook knows
}


def strace(node: Node, command: str) -> str:
    """Trace the node's commands; return the directory for the traces of all programs that they start."""
    trace = node.work / "trace"
    real, node.os_dir = node.os_dir, node.work / "os"
    node.os_dir.mkdir()
    script = node.os_dir / command
    script.write_text(
        "#!/bin/sh\nexec strace --follow-forks -qq --seccomp-bpf --string-limit=100000 --trace=execve,openat,mkdir,"
        f"rename,renameat,symlinkat,linkat,mknodat,unlinkat --output={trace} {real}/{command}\n"
    )
    script.chmod(0o755)
    return str(trace)


@pytest.mark.parametrize("command", ["create", "rename", "import", "export"])
def test_nowhere(command: str, node: Node, sources: Path, disk: MakeDisk, tmp_path: Path) -> None:
    """Not in command lines, not in file names, and not in the log with IMAGE_DEBUG=yes."""
    assert {f"OSP_{name.upper()}" for name, entry in TABLE.items() if entry.secret} <= SECRETS.keys()
    assert all(MARK in secret for secret in SECRETS.values())
    node.hook("site", "#!/bin/sh\n/bin/true $(id -u)\n")
    trace = strace(node, command)
    target = disk()
    if command in ("rename", "export"):
        run("cp", "--sparse=always", sources / "guest.raw", target)
    more = {**SECRETS, "OSP_IMAGE_DEBUG": "yes", "OSP_IMAGE_NAME": "small"}
    if command == "export":
        result = backups.export(node, target, **more).result
    elif command == "import":
        result = backups.restore(node, sources / "stream", target, **more)
    else:
        values = node.environment(target, env=command, OLD_INSTANCE_NAME="image.example.net", **more)
        result = node.start(command, values).result()
    assert "debug: $ " in result.ok().log
    assert MARK not in result.log
    seen = Path(trace).read_text(errors="replace")
    assert seen.count("execve(") > 1
    # of an environment, strace shows only the number of variables
    assert MARK not in seen, [line for line in seen.splitlines() if MARK in line]


def test_files_of_the_guest(node: Node, small_tree: Path, disk: MakeDisk, tmp_path: Path) -> None:
    import shutil

    import trees

    tree = tmp_path / "tree"
    shutil.copytree(small_tree, tree, symlinks=True)
    (tree / "etc/cloud").mkdir()
    (tree / "usr/bin").mkdir()
    (tree / "usr/bin/cloud-init").write_text("#!/bin/sh\n")
    (tree / "usr/bin/cloud-init").chmod(0o755)
    trees.tarball(tree, node.images / f"cloud-{trees.ARCH}.tar", "tar")
    target = disk()
    public = {"OSP_SSH_AUTHORIZED_KEYS": public_key("public")}
    node.create(target, **{**SECRETS, **public, "OSP_IMAGE_NAME": "cloud"}).ok()
    with mounted(target, tmp_path / "root", partitions(target)[-1]) as root:
        holders = run("grep", "-rlaF", MARK, root, check=False).splitlines()
        assert holders, "the secrets have not arrived anywhere: then this test sees nothing"
        for path in holders:
            assert os.stat(path).st_mode & 0o007 == 0, path


WRONG = {
    "OSP_ROOT_PASSWORD_HASH": f"two\nlines {MARK}",
    "OSP_IMAGE_URL": f"ftp://user:{MARK}@host/",
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("command", ["create", "verify"])
def test_wrong_values(command: str, name: str, node: Node, disk: MakeDisk) -> None:
    result = node.call(command, node.environment(disk(), **{name: WRONG[name], "OSP_IMAGE_DEBUG": "yes"}))
    assert result.status == 1 and MARK not in result.log, result.log


@pytest.mark.parametrize(
    "text",
    [
        "ROOT_PASSWORD_HASH=$6$({mark}\n",
        "SSH_AUTHORIZED_KEYS=({mark} {mark})) {mark}\n",
        "USER_DATA='{mark}\n",
        'ROOT_PASSWORD_HASH="{mark}"; fi\n',
        "ROOT_PASSWORD_HASH={mark} )\n",
        "USER_DATA={mark}\nexit 3\n",
        "set -v\nUSER_DATA={mark}\nexit 3\n",
        "ROOT_PASSWORD_HASH={mark}\n{mark} | {mark}\nset -e; false\n",
    ],
)
def test_settings_file_that_fails(text: str, node: Node, disk: MakeDisk) -> None:
    """The shell quotes the line that it does not understand."""
    node.defaults(text.format(mark=MARK))
    result = node.create(disk(), OSP_IMAGE_DEBUG="yes").failed(str(DEFAULTS))
    assert MARK not in result.log
