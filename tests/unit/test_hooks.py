"""The site's hooks: selection, order, and environment."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from support import recorded

from imageos import hooks, settings
from imageos.disks.blockdev import Disk, LoopDevice
from imageos.disks.filesystem import Volume
from imageos.errors import Failure
from imageos.guests.target import guest_disk
from imageos.hook import Hook
from imageos.run import Command, Finished
from imageos.settings import Settings

ROOT = Volume("root", "ext4", "/dev/loop7p3", "11111111-1111-4111-8111-111111111111")
BOOT = Volume("boot", "ext4", "/dev/loop7p1", "22222222-2222-4222-8222-222222222222")
SWAP = Volume("swap", "swap", "/dev/loop7p2", "33333333-3333-4333-8333-333333333333")
ENVIRONMENT = recorded("create-kvm-network")
KNOWN = Settings(image_type="tarball", image_name="debian-12", user_data="#cloud-config\nx: 1\n", swap_size=256)


def context(
    *volumes: Volume, action: str = "create", settings: Settings = KNOWN, environ: dict[str, str] | None = None
) -> hooks.Context:
    return hooks.Context(
        action,
        ENVIRONMENT if environ is None else environ,
        settings,
        "/run/imageos/root",
        LoopDevice("/dev/loop7", -1, Disk("/dev/xenvg/disk0", -1, 1 << 30, is_file=False), [], set()),
        volumes or (BOOT, SWAP, ROOT),
    )


# Selection


def put(directory: Path, *names: str, mode: int = 0o755) -> None:
    for name in names:
        (directory / name).touch()
        (directory / name).chmod(mode)


def test_order_of_the_c_locale(tmp_path: Path) -> None:
    put(tmp_path, "zz_ddns", "grub", "10-first", "Zed", "_x", "9", "interfaces", "ssh", "a-b", "a_b", "ab")
    assert hooks.find(str(tmp_path)) == [
        *("10-first", "9", "Zed", "_x", "a-b", "a_b", "ab", "grub", "interfaces", "ssh", "zz_ddns")
    ]


@pytest.mark.parametrize(
    "name",
    ["grub.new", "grub~", ".grub", "grub.dpkg-old", "README.rst", "#grub#", "a b", "gr\u00fcb", "grub\n", "a\nb"],
)
def test_names_that_are_ignored(name: str, tmp_path: Path) -> None:
    put(tmp_path, "grub", name)
    assert hooks.find(str(tmp_path)) == ["grub"]


def test_what_cannot_be_executed_is_ignored(tmp_path: Path) -> None:
    put(tmp_path, "plain", mode=0o644)
    put(tmp_path, "real", mode=0o700)
    (tmp_path / "directory").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "link-to-plain").symlink_to("plain")
    os.mkfifo(tmp_path / "fifo", 0o755)
    assert hooks.find(str(tmp_path)) == ["link", "real"]


def test_no_directory(tmp_path: Path) -> None:
    assert hooks.find(str(tmp_path / "missing")) == []


def test_no_directory_but_a_file(tmp_path: Path) -> None:
    put(tmp_path, "file")
    with pytest.raises(Failure, match=f"^cannot list CUSTOMIZE_DIR {tmp_path}/file: Not a directory$"):
        hooks.find(str(tmp_path / "file"))


# Checks before the disk is written


def test_customize_dir_that_is_missing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    settings = Settings(customize_dir=f"{tmp_path}/missing")
    hooks.check(settings._replace(nomount=True))
    assert capfd.readouterr().err == ""
    hooks.check(settings)
    assert capfd.readouterr().err == f"imageos: warning: there is no CUSTOMIZE_DIR {tmp_path}/missing: no hook runs\n"
    hooks.check(Settings())
    assert capfd.readouterr().err == "", "no directory is as good as an empty one, if nobody has named it"
    put(tmp_path, "missing")
    with pytest.raises(Failure, match=f"^cannot list CUSTOMIZE_DIR {tmp_path}/missing: Not a directory$"):
        hooks.check(settings)
    hooks.check(settings._replace(nomount=True))


@pytest.fixture
def with_overlays(tmp_path: Path) -> Settings:
    (tmp_path / "hooks").mkdir()
    (tmp_path / "overlays/web").mkdir(parents=True)
    (tmp_path / "overlays/file").touch()
    put(tmp_path / "hooks", "overlays")
    return Settings(customize_dir=f"{tmp_path}/hooks", overlays_dir=f"{tmp_path}/overlays")


def check_overlay(settings: Settings) -> None:
    hooks.check_overlay(settings, hooks.find(settings.customize_dir))


@pytest.mark.parametrize("name", ["missing", "file", "web "])
def test_overlay_that_is_missing(name: str, with_overlays: Settings) -> None:
    with pytest.raises(Failure, match=f"^cannot find overlay {with_overlays.overlays_dir}/{name}$"):
        check_overlay(with_overlays._replace(overlay=name))
    check_overlay(with_overlays._replace(overlay=name, nomount=True))


def test_overlay_without_its_hook(with_overlays: Settings, capfd: pytest.CaptureFixture[str]) -> None:
    """Another hook of the site may use the setting."""
    script = f"{with_overlays.customize_dir}/overlays"
    check_overlay(with_overlays._replace(overlay="web"))
    assert capfd.readouterr().err == ""
    os.chmod(script, 0o644)
    check_overlay(with_overlays)
    assert capfd.readouterr().err == ""
    check_overlay(with_overlays._replace(overlay="missing"))
    assert f"warning: OVERLAY=missing is for the hook overlays, which is off: chmod +x {script}" in (
        capfd.readouterr().err
    )


# Environment


def test_everything_from_ganeti() -> None:
    env = hooks.variables(context())
    left_out = {"PATH", "LC_CTYPE"}
    assert {name: env.get(name) for name in recorded("create-kvm-network") if name not in left_out} == {
        name: value for name, value in recorded("create-kvm-network").items() if name not in left_out
    }


def test_every_setting() -> None:
    env = hooks.variables(context(settings=Settings(unknown={"CINIT_TYPE": "nocloud", "helper": "x"})))
    assert set(map(str.upper, settings.TABLE)) < set(env)
    assert (env["SWAP"], env["FILESYSTEM"], env["SWAP_SIZE"]) == ("yes", "ext3", "")
    assert (env["CINIT_TYPE"], env["helper"]) == ("nocloud", "x")


def test_disks() -> None:
    env = hooks.variables(context())
    names = ("TARGET", "BLOCKDEV", "DISK_DEV", "ROOT_DEV", "BOOT_DEV", "SWAP_DEV")
    assert {name: env[name] for name in names} == {
        "TARGET": "/run/imageos/root",
        "BLOCKDEV": "/dev/xenvg/disk0",
        "DISK_DEV": "/dev/loop7",
        "ROOT_DEV": "/dev/loop7p3",
        "BOOT_DEV": "/dev/loop7p1",
        "SWAP_DEV": "/dev/loop7p2",
    }


def test_disks_without_boot_and_swap() -> None:
    env = hooks.variables(context(ROOT))
    assert (env["ROOT_DEV"], env["BOOT_DEV"], env["SWAP_DEV"]) == ("/dev/loop7p3", "", "")


@pytest.mark.parametrize("action", ["create", "import", "rename"])
def test_action(action: str) -> None:
    env = hooks.variables(context(action=action))
    assert env["IMAGEOS_ACTION"] == action
    assert env.get("IMPORT_SCRIPT") == ("1" if action == "import" else None)


def test_package_is_found(tmp_path: Path) -> None:
    env = hooks.variables(context())
    assert Path(env["PYTHONPATH"], "imageos/hook.py").is_file()
    assert Path(env["IMAGEOS"]).exists()


def test_nothing_of_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", "/x.so")
    environ = {**recorded("create"), "LD_PRELOAD": "/x.so", "SHIV_INTERPRETER": "/x"}
    env = hooks.variables(context(environ=environ))
    assert not {"LD_PRELOAD", "SHIV_INTERPRETER"} & set(env)


def test_ganeti_cannot_be_overruled_by_a_setting() -> None:
    """A parameter is only a value: it does not change the command's own variables."""
    env = hooks.variables(
        context(settings=Settings(unknown={"TARGET": "/", "PYTHONPATH": "/tmp", "BLOCKDEV": "/dev/sda"}))
    )
    assert (env["TARGET"], env["BLOCKDEV"]) == ("/run/imageos/root", "/dev/xenvg/disk0")
    assert env["PYTHONPATH"] != "/tmp"


# Messages of a hook


@pytest.mark.parametrize(
    ("said", "shown", "hint", "cause"),
    [
        (["one", "two"], ["one", "two"], "see /hooks/x and its messages above", ": two"),
        (["two", " "], ["two", ""], "see /hooks/x and its messages above", ": two"),
        ([], [], "see /hooks/x and its messages above", ""),
        (["one", "imageos: hint: do", "imageos: bad"], ["one"], "do", ": bad"),
        (["hint: a", "hint: b", "bad"], ["hint: a"], "b", ": bad"),
        (["hint: a", "one", "bad"], ["hint: a", "one", "bad"], "see /hooks/x and its messages above", ": bad"),
        (["hint: a", "one", "hint: b", "bad"], ["hint: a", "one"], "b", ": bad"),
        (["one", "hint: a"], ["one"], "a", ": one"),
    ],
)
@pytest.mark.parametrize("status", [0, 3, -9])
def test_a_hint_is_said_once(
    status: int,
    said: list[str],
    shown: list[str],
    hint: str,
    cause: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A hint appears before the cause if the hook fails, otherwise where the hook prints it."""

    def pipeline(command: Command, *, on_line: Callable[[str], None], **_: object) -> list[Finished]:
        for line in said:
            on_line(line)
        return [Finished(command.argv, status, b"", "")]

    monkeypatch.setattr(hooks, "pipeline", pipeline)
    if not status:
        hooks._run_one("x", ["/hooks/x"], {}, 1)
        shown = [line.replace("imageos: ", "").strip() for line in said]
    else:
        with pytest.raises(Failure) as raised:
            hooks._run_one("x", ["/hooks/x"], {}, 1)
        how = "failed with status 3" if status > 0 else "was killed by SIGKILL"
        assert (str(raised.value), raised.value.hint) == (f"hook x {how}{cause}", hint)
    lines = [line.replace("imageos: x: ", "").strip() for line in capfd.readouterr().err.splitlines()]
    assert lines == shown


# The same for a hook in Python


@pytest.fixture
def environ(guest: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Return the environment of a hook for the guest `guest`; its disks are files, which only need to exist."""
    volumes = []
    for volume in (BOOT, SWAP, ROOT):
        node = guest.parent / os.path.basename(volume.device)
        node.touch()
        volumes.append(Volume(volume.role, volume.kind, str(node), volume.uuid))
    env = {**hooks.variables(context(*volumes)), "TARGET": str(guest), "DISK_DEV": str(guest.parent)}
    monkeypatch.setattr(os, "environ", env)
    monkeypatch.setattr("sys.argv", ["/etc/ganeti/instance-image/hooks/x", "-r"])
    return env


def test_hook_gets_what_the_command_knows(environ: dict[str, str], guest: Path) -> None:
    seen: list[Hook] = []

    def main(hook: Hook) -> None:
        hook.target.write("/etc/motd", f"This is {hook.instance.name}\n")
        seen.append(hook)

    with pytest.raises(SystemExit) as raised:
        Hook.run(main)
    assert raised.value.code == 0
    (hook,) = seen
    assert (guest / "etc/motd").read_text() == "This is inst1.example.org\n"
    assert hook.action == "create"
    assert hook.arguments == ("-r",)
    assert hook.settings == KNOWN
    assert hook.instance.nics[0].network["NAME"] == "net1"
    assert [(volume.role, volume.kind, volume.uuid) for volume in hook.volumes] == [
        (volume.role, volume.kind, volume.uuid) for volume in (BOOT, SWAP, ROOT)
    ]
    assert hook.environ == environ


def test_hook_that_fails(environ: dict[str, str], capfd: pytest.CaptureFixture[str]) -> None:
    def main(_: Hook) -> None:
        raise Failure("no GRUB", hint="install it")

    with pytest.raises(SystemExit) as raised:
        Hook.run(main)
    assert raised.value.code == 1
    assert capfd.readouterr().err == "imageos: hint: install it\nimageos: no GRUB\n"


def test_disk_as_the_sandbox_shows_it() -> None:
    shown = guest_disk("/dev/loop7", (BOOT, SWAP, ROOT))
    assert list(shown.nodes) == ["/dev/loop7", BOOT.device, SWAP.device, ROOT.device]
    assert list(shown.uuids) == [(volume.uuid, volume.device) for volume in (BOOT, SWAP, ROOT)]
