"""The files of `install`, Ganeti's demands on them, and `verify`."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

import pytest
import trees
from support import DEFAULTS, SITE, Node, Result, recorded, run

SCRIPTS = ["create", "import", "export", "rename", "verify"]
TOOLS = ["mount-disks", "umount-disks", "make-dump", "make-qemu-img", "ganeti-image"]
PARAMETERS = [
    "CDINSTALL",
    "SWAP",
    "SWAP_SIZE",
    "BOOT_SIZE",
    "FILESYSTEM",
    "PARTITION_TABLE",
    "KERNEL_ARGS",
    "IMAGE_NAME",
    "ARCH",
    "IMAGE_TYPE",
    "IMAGE_URL",
    "IMAGE_CHECKSUM",
    "GROW",
    "NOMOUNT",
    "OVERLAY",
    "DNS_SERVERS",
    "DNS_SEARCH",
    "DNS_DOMAIN",
    "SSH_AUTHORIZED_KEYS",
    "ROOT_PASSWORD_HASH",
    "USER_DATA",
    "IMAGE_DEBUG",
    "os-image",  # Ganeti's own
    "os-install-package",
    "os-package",
]


def contents(top: Path) -> dict[str, tuple]:
    """Return path -> attributes that a change alters, inode and times included."""
    found = {}
    for path in sorted(top.rglob("*")):
        entry = path.lstat()
        if stat.S_ISDIR(entry.st_mode):
            found[str(path.relative_to(top))] = (entry.st_mode,)
        else:
            found[str(path.relative_to(top))] = (entry.st_mode, entry.st_ino, entry.st_mtime_ns, entry.st_size)
    return found


@pytest.fixture(scope="module")
def root(imageos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("installed") / "somewhere"
    run(imageos, "install", "--root", made)
    return made


def test_paths_of_the_contract(root: Path) -> None:
    os_dir = root / "usr/share/ganeti/os/image"
    for script in SCRIPTS:
        assert (os_dir / script).is_symlink()
        target = (os_dir / script).resolve()
        assert target.is_file() and target.stat().st_mode & 0o100, f"Ganeti wants the owner's x bit on {target}"
        assert root in target.parents, f"{script} leads out of --root: {target}"
    assert not (os_dir / "create_untrusted").exists()
    assert (os_dir / "ganeti_api_version").is_file() and (os_dir / "parameters.list").is_file()
    assert os.readlink(os_dir / "variants.list") == "/etc/ganeti/instance-image/variants.list"
    assert (root / "etc/default/ganeti-instance-image").is_file()
    site = root / "etc/ganeti/instance-image"
    assert (site / "variants.list").is_file()
    for directory in ("variants", "hooks", "networks/subnets", "networks/instances", "overlays"):
        assert (site / directory).is_dir()
    assert (root / "var/cache/ganeti-instance-image").is_dir()


def in_root(root: Path, link: Path) -> Path:
    """Return the target of a link when `root` is the root directory, as for a package."""
    assert link.is_symlink(), link
    text = os.readlink(link)
    return Path(f"{root}{text}") if text.startswith("/") else link.parent / text


def test_standalone_command(root: Path) -> None:
    command = in_root(root, root / "usr/local/sbin/imageos")
    assert command.samefile(root / "usr/share/ganeti/os/image/create")
    assert run(command, "--version").startswith("imageos ")


def test_modes_do_not_depend_on_the_umask(imageos: Path, tmp_path: Path) -> None:
    """Ganeti's daemons and the operators' tools read them, whoever installed them."""
    made = tmp_path / "strict"
    run("sh", "-c", f"umask 077; {imageos} install --root {made}")
    for path in made.rglob("*"):
        if path.is_symlink():
            continue
        mode = path.stat().st_mode & 0o777
        if path == made / "var/cache/ganeti-instance-image":  # no tenant may see another's images
            assert mode == 0o700
        else:
            assert mode == (0o755 if path.is_dir() or path.name == "imageos" else 0o644), path


def test_lists_as_ganeti_wants_them(root: Path) -> None:
    os_dir = root / "usr/share/ganeti/os/image"
    assert (os_dir / "ganeti_api_version").read_text() == "20\n15\n10\n"
    lines = (os_dir / "parameters.list").read_text().splitlines()
    assert all(re.fullmatch(r"[a-z0-9_-]+ \S.*", line) for line in lines), "`name description` and nothing else"
    assert sorted(line.split()[0] for line in lines) == sorted(name.lower() for name in PARAMETERS)
    assert "\n\n" not in (os_dir / "parameters.list").read_text()
    (os_dir / "parameters.list").read_text(encoding="ascii")


def test_variants_list_names_variants_that_exist(root: Path) -> None:
    site = root / "etc/ganeti/instance-image"
    names = [
        line.strip()
        for line in (site / "variants.list").read_text().splitlines()
        if line.strip() and not line.startswith("#")
    ]
    assert names, "an OS with an empty variants.list cannot be installed from"
    for name in names:
        assert re.fullmatch(r"[A-Za-z0-9_-]+", name)
        assert (site / "variants" / f"{name}.conf").is_file()


def test_bundled_hooks_cannot_run_yet(root: Path) -> None:
    hooks = list((root / "etc/ganeti/instance-image/hooks").iterdir())
    assert "grub" in [hook.name for hook in hooks]
    for hook in hooks:
        assert not hook.stat().st_mode & 0o111, hook
        assert re.fullmatch(r"[A-Za-z0-9_-]+", hook.name)
        assert hook.read_text().startswith("#!")


def test_again_from_the_installed_file(root: Path) -> None:
    before = contents(root)
    run(in_root(root, root / "usr/local/sbin/imageos"), "install", "--root", root)
    assert contents(root) == before


def test_other_directories(imageos: Path, tmp_path: Path) -> None:
    root = tmp_path / "packaged"
    run(imageos, "install", "--root", root, "--os-dir", "/srv/ganeti/os/image", "--bin-dir", "/usr/sbin")
    assert (root / "srv/ganeti/os/image/create").resolve().is_file()
    assert in_root(root, root / "usr/sbin/imageos").samefile(root / "srv/ganeti/os/image/create")
    assert not (root / "usr/share/ganeti").exists()
    assert not (root / "usr/local").exists()


def test_without_root_the_site_is_in_etc(imageos: Path, etc: Path, tmp_path: Path) -> None:
    """Use the real /etc, which is a layer of the test here."""
    run("rm", "-rf", SITE, DEFAULTS)
    cache = Path("/var/cache/ganeti-instance-image")
    was_there = cache.exists()
    try:
        run(imageos, "install", "--os-dir", tmp_path / "os/image", "--bin-dir", tmp_path / "bin")
        assert DEFAULTS.is_file() and cache.is_dir()
        assert (tmp_path / "os/image/variants.list").read_text() == (SITE / "variants.list").read_text()
        assert run(tmp_path / "bin/imageos", "--version").startswith("imageos ")
    finally:
        if not was_there:
            run("rmdir", cache, check=False)


def test_shipped_defaults_deploy(node: Node, tmp_path: Path) -> None:
    """The shipped defaults file sets ext4, and contains no unknown or wrong setting."""
    DEFAULTS.write_bytes((node.root / "etc/default/ganeti-instance-image").read_bytes())
    node.hook("show", "#!/bin/sh\necho filesystem $FILESYSTEM table $PARTITION_TABLE dir $IMAGE_DIR end\n")
    node.variant("default", f"IMAGE_TYPE=tarball\nIMAGE_DIR={node.images}\n")
    target = tmp_path / "disk"
    with target.open("wb") as file:
        file.truncate(600 << 20)
    log = node.create(target).ok().log
    assert f"filesystem ext4 table msdos dir {node.images} end" in log
    assert "warning" not in log


# verify


def verify(node: Node, **overrides: object) -> Result:
    environment = recorded("verify")
    environment.update({name: str(value) for name, value in overrides.items()})
    return node.call("verify", environment, "parameters")


def test_verify_what_double_quotes_have_lost(node: Node) -> None:
    """What the shell leaves has the form of user-data, and of a hash perhaps."""
    node.defaults('USER_DATA="#!/bin/sh\necho $HOME"\n')
    assert "single quotes" in verify(node).failed("USER_DATA", "double quotes", "$HOME").log
    node.defaults('ROOT_PASSWORD_HASH="$6$salt$0123456789abc"\n')  # 0123456789abc may be one of DES
    assert "single quotes" in verify(node).failed("ROOT_PASSWORD_HASH", "double quotes").log


def test_verify_good(node: Node) -> None:
    assert "warning" not in verify(node).ok().log
    verify(node, OSP_IMAGE_NAME="tiny", OSP_FILESYSTEM="xfs", OSP_SWAP_SIZE="100").ok()


def test_verify_of_settings_that_compute_with_the_instance(node: Node) -> None:
    """Ganeti gives no instance here."""
    node.variant("computed", "SWAP_SIZE=$((INSTANCE_BE_maxmem / 2))\n")
    verify(node, OS_VARIANT="computed").ok()


def test_verify_looks_for_the_image(node: Node) -> None:
    """A parameter may name the image later."""
    image = node.images / f"tiny-{trees.ARCH}.tar.gz"
    image.write_bytes(b"garbage")
    verify(node, OSP_IMAGE_NAME="tiny").failed(str(image), "not a tarball")
    image.unlink()
    verify(node, OSP_IMAGE_NAME="tiny").failed("cannot find image", str(image))
    verify(node, OSP_IMAGE_NAME="tiny", OSP_CDINSTALL="yes").ok()


def test_verify_says_that_create_needs_an_image(node: Node) -> None:
    """A parameter may name it later."""
    said = "there is no IMAGE_NAME and no IMAGE_URL: create needs one"
    assert said in verify(node).ok().log
    for name, value in (("IMAGE_NAME", "tiny"), ("CDINSTALL", "yes"), ("OS_IMAGE", "/srv/x.img")):
        assert said not in verify(node, **{f"OSP_{name}": value}).ok().log


def test_verify_only_warns_of_a_server_that_is_down(node: Node) -> None:
    url = "http://127.0.0.1:9"  # the discard port, on which nothing listens
    result = verify(node, OSP_IMAGE_NAME="tiny", OSP_IMAGE_URL=url).ok()
    assert [line for line in result.lines if "warning" in line and url in line], result.log


def test_verify_unknown_parameter(node: Node) -> None:
    verify(node, OSP_FILESYSTEMS="ext4").failed("unknown OS parameter filesystems")


def test_verify_of_what_ganeti_itself_reads(node: Node) -> None:
    """Ganeti itself reports a relative path too late."""
    assert "warning" not in verify(node, OSP_OS_IMAGE="/srv/none.img", OSP_OS_PACKAGE="x").ok().log
    verify(node, OSP_OS_IMAGE="none.img").failed("os-image='none.img'", "an absolute path, or the URL of a file")


def test_verify_names_all_problems(node: Node) -> None:
    node.defaults("BOOT_SIZE=large")
    node.variant("default", "PARTITION_TABLE=apm\n")
    result = verify(node, OSP_FILESYSTEM="zfs", OSP_SWAP="perhaps")
    assert result.status == 1, result.log
    for name, value in (("BOOT_SIZE", "large"), ("PARTITION_TABLE", "apm"), ("FILESYSTEM", "zfs"), ("SWAP", "perhaps")):
        assert [line for line in result.lines if name in line and value in line], f"{name} is not named\n{result.log}"


@pytest.mark.parametrize(
    "overrides, names",
    [
        ({"OSP_IMAGE_DIR": "/tmp"}, ["IMAGE_DIR"]),
        ({"OS_VARIANT": "forgotten"}, ["forgotten"]),
        ({"OSP_IMAGE_NAME": "../x"}, ["IMAGE_NAME", "../x"]),
        ({"OSP_IMAGE_CHECKSUM": "sha256:abc"}, ["IMAGE_CHECKSUM", "sha256:HEX"]),
    ],
)
def test_verify_bad(overrides: dict[str, str], names: list, node: Node) -> None:
    verify(node, **overrides).failed(*names)


def test_verify_syntax_error(node: Node) -> None:
    node.defaults("if")
    verify(node).failed(str(DEFAULTS))


def test_verify_does_not_show_secrets(node: Node) -> None:
    result = verify(node, OSP_ROOT_PASSWORD_HASH="first\nTopSecret", OSP_IMAGE_DEBUG="1").failed("ROOT_PASSWORD_HASH")
    assert "TopSecret" not in result.log
