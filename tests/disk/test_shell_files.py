"""Mistakes in the site's shell files, and what they may hold: the defaults, variants, networks, and what these read."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from support import DEFAULTS, SITE, Node, recorded, wait_until

from imageos import ganeti, settings, shellfiles
from imageos.errors import Failure
from imageos.network import files
from imageos.settings import Settings

MakeDisk = Callable[..., Path]
READ = Path("/etc/default/more")
INSTANCE = SITE / "networks/instances/inst1.example.org"
SUBNET = SITE / "networks/subnets/lan"
BOM = "\ufeff"

# After each the shell goes on, or ends with status 0: text, the line of the mistake, what the message says of it
MISTAKES = [
    ("spaces around =", "SWAP=no\nIMAGE_NAME = other\n", 2, "IMAGE_NAME: command not found"),
    ("behind a test", "[ a = a ] && IMAGE_NAME = other\n", 1, "IMAGE_NAME: command not found"),
    ("in an if", "if true; then\n  IMAGE_NAME = other\nfi\n", 2, "IMAGE_NAME: command not found"),
    ("in a function", "f() {\n  IMAGE_NAME = other\n}\nf\n", 2, "IMAGE_NAME: command not found"),
    ("no quotes", "IMAGE_NAME=other one\n", 1, "one: command not found"),
    ("no space in a test, with another way", "[a = a ] || IMAGE_NAME=other\n", 1, "[a: command not found"),
    ("spaces around =, with another way", "IMAGE_NAME = other || true\n", 1, "IMAGE_NAME: command not found"),
    ("no space in a test", "[a = a ] && IMAGE_NAME=other\n", 1, "[a: command not found"),
    ("a dollar", "$IMAGE_NAME=other\n", 1, "=other: command not found"),
    ("byte order mark", f"{BOM}IMAGE_NAME=other\n", 1, "command not found"),
    ("byte order mark, comment", f"{BOM}# settings\nIMAGE_NAME=other\n", 1, "command not found"),
    ("Windows", "IMAGE_NAME=other\r\n\r\n", 2, "\\r': command not found"),
    ("Windows without an empty line", "IMAGE_NAME=other\r\nSWAP=no\r\n", 0, "ends in a carriage return"),
    ("no such file to read", "\n. /etc/missing\n", 2, "/etc/missing: No such file or directory"),
    ("no such file, by source", "source /etc/missing\n", 1, "/etc/missing: No such file or directory"),
    ("a directory to read", ". /etc\n", 1, "is a directory"),
    ("no such command", "IMAGE_NAME=$(nosuch)\n", 1, "nosuch: command not found"),
    ("in a pipe", "IMAGE_NAME=$(nosuch | head -n 1)\n", 1, "nosuch: command not found"),
    ("in an export", "export IMAGE_NAME=$(nosuch)\n", 1, "nosuch: command not found"),
    ("hushed up", "IMAGE_NAME=$(nosuch 2>/dev/null)\n", 1, "a command is not found"),
    ("no right to run it", "IMAGE_NAME=$(/etc/passwd)\n", 1, "Permission denied"),
    ("no such input", "IMAGE_NAME=$(</etc/missing)\n", 1, "No such file or directory"),
    ("not a name", "export IMAGE-NAME=other\n", 1, "not a valid identifier"),
    ("local", "local IMAGE_NAME=other\n", 1, "can only be used in a function"),
    ("read-only", "readonly IMAGE_NAME=first\nIMAGE_NAME=other\n", 2, "readonly variable"),
    ("arithmetic", "SWAP_SIZE=$((08))\n", 1, "value too great for base"),
    ("division", "SWAP_SIZE=$((1 / 0))\n", 1, "division by 0"),
    ("expansion", "IMAGE_NAME=${a b}\n", 1, "bad substitution"),
    ("unset", "set -u\nIMAGE_NAME=$NOSUCH\n", 2, "NOSUCH: unbound variable"),
    ("demanded", "IMAGE_NAME=${NOSUCH:?is needed}\n", 1, "NOSUCH: is needed"),
    ("set -e", "set -e\nfalse\n", 2, "failed with status 1"),
    ("exit", "IMAGE_NAME=other\nexit 0\n", 0, "it ended the shell with status 0"),
    ("exit 3", "exit 3\n", 0, "it ended the shell with status 3"),
    ("syntax", "if\n", 2, "syntax error"),
    ("quotes", "IMAGE_NAME='other\n", 1, "unexpected EOF"),
    ("here-document", "cat >/dev/null <<END\nx\n  END\nIMAGE_NAME=other\n", 4, "here-document at line"),
    (
        "here-document, not alone",
        "read -r -d '' X <<'END' || true\nx\nEND \nIMAGE_NAME=other\n",
        4,
        "delimited by end-of-file",
    ),
    ("keyring", "IMAGE_KEYRING=$(cat /etc/missing)\n", 0, "IMAGE_KEYRING is empty, as line 1 failed with status 1"),
    ("signer", "IMAGE_SIGNER=$(cat /etc/missing)\n", 0, "IMAGE_SIGNER is empty, as line 1 failed with status 1"),
    ("keyring, exported", "export IMAGE_KEYRING=$(cat /etc/missing)\n", 0, "IMAGE_KEYRING is empty, as line 1 failed"),
]
mistakes = pytest.mark.parametrize(
    ("text", "line", "said"), [row[1:] for row in MISTAKES], ids=[r[0] for r in MISTAKES]
)
# The same, without a word of the shell
SILENT = [
    ("a space behind =", "GROW= false\n", 1, "GROW is not set: a space is behind ="),
    ("a space behind =, hushed up", "exec 2>/dev/null\nSWAP= true\n", 2, "SWAP is not set: a space"),
    ("in a function", "f() {\n  GROW= false\n}\nf\n", 2, "GROW is not set: a space is behind ="),
    ("a secret", "ROOT_PASSWORD_HASH= true\n", 1, "ROOT_PASSWORD_HASH is not set: a space is behind ="),
    ("set", "SWAP=no\nset IMAGE_NAME=other\n", 2, "IMAGE_NAME is not set: `set` does not do that"),
    ("set, spaces", "set IMAGE_NAME = other\n", 1, "IMAGE_NAME is not set: `set` does not do that"),
    ("export", "export FILESYSTEM xfs\n", 1, "FILESYSTEM is not set: `export` wants ="),
    ("a URL", "IMAGE_URL=http://192.0.2.1/?a=b&c=d\n", 1, "IMAGE_URL is not set: an & ends the command"),
    ("in the background", "export IMAGE_NAME=other &\n", 1, "IMAGE_NAME is not set: an & ends the command"),
    ("array", "unset IMAGE_NAME; IMAGE_NAME[1]=other\n", 0, "IMAGE_NAME is an array: it has no first element"),
    ("table", "declare -A NOMOUNT=([default]=yes)\n", 0, "NOMOUNT is an array: it has no first element"),
]
silent = pytest.mark.parametrize(("text", "line", "said"), [row[1:] for row in SILENT], ids=[r[0] for r in SILENT])
READ_BY_SITE = "SUBNET=lan\nADDRESS=192.0.2.9\n"


@pytest.fixture
def load(node: Node, disk: MakeDisk) -> Callable[[], Settings]:
    node.defaults("IMAGE_NAME=tiny")
    environment = node.environment(disk(), OSP_IMAGE_NAME=None)
    return lambda: settings.load_settings(environment)


def refused(call: Callable[[], object], file: Path, line: int, said: str) -> Failure:
    with pytest.raises(Failure) as raised:
        call()
    place = f"{file}: line {line}: " if line else f"{file}: "
    assert place in str(raised.value) and said in str(raised.value)
    assert raised.value.hint
    return raised.value


@mistakes
@pytest.mark.parametrize("where", ["defaults", "variant"])
def test_mistake(where: str, text: str, line: int, said: str, node: Node, load: Callable[[], Settings]) -> None:
    file = DEFAULTS if where == "defaults" else SITE / "variants/default.conf"
    file.write_text(text, newline="")
    refused(load, file, line, said)


@silent
def test_silent(text: str, line: int, said: str, node: Node, load: Callable[[], Settings]) -> None:
    """A setting that a file means to set, and does not: also in what it reads."""
    node.variant("default", text)
    refused(load, SITE / "variants/default.conf", line, said)
    node.write(READ, text)
    node.variant("default", f"SWAP=no\n. {READ}\n")
    refused(load, READ if line else SITE / "variants/default.conf", line, said)


def test_what_a_variant_unsets(node: Node, load: Callable[[], Settings]) -> None:
    node.defaults("SWAP_SIZE=2; IMAGE_KEYRING=/keys.gpg; mine=1")
    node.variant("default", "unset SWAP_SIZE IMAGE_KEYRING mine")
    found = load()
    assert (found.swap_size, found.image_keyring) == (None, "")


@mistakes
def test_mistake_in_a_file_that_is_read(
    text: str, line: int, said: str, node: Node, load: Callable[[], Settings]
) -> None:
    READ.write_text(text, newline="")
    node.variant("default", f"SWAP=no\n. {READ}\n")
    refused(load, READ if line else SITE / "variants/default.conf", line, said)


@mistakes
@pytest.mark.parametrize("file", [INSTANCE, SUBNET], ids=["instance", "subnet"])
def test_mistake_in_networks(file: Path, text: str, line: int, said: str, node: Node, disk: MakeDisk) -> None:
    if "KEYRING" in text or "SIGNER" in text:
        return  # no file of networks can set it
    node.write(INSTANCE, READ_BY_SITE)
    node.write(SUBNET, "NETMASK=255.255.255.0\n")
    file.write_text(file.read_text() + text, newline="")
    instance = ganeti.instance(node.environment(disk()))
    before = 0 if not line else len((READ_BY_SITE if file == INSTANCE else "-").splitlines())
    refused(lambda: files.read(instance, Settings()), file, line + before, said)


def test_misspelt_in_networks(node: Node, disk: MakeDisk, capfd: pytest.CaptureFixture[str]) -> None:
    """What is near to none of ours is the site's own."""
    node.write(INSTANCE, READ_BY_SITE + "VLAN=7\nlower=x\n")
    node.write(SUBNET, "NETMASK=255.255.255.0\nGATWAY=192.0.2.1\nNETWORK=192.0.2.0\nGATEWAY6=2001:db8::1\n")
    files.read(ganeti.instance(node.environment(disk())), Settings())
    said = f"imageos: warning: unknown variable GATWAY in {SUBNET} (did you mean GATEWAY?)\n"
    assert capfd.readouterr().err == said


# Text, its SWAP_SIZE, and what is said of it
LEGAL = [
    ("[ a = b ] && SWAP_SIZE=1\nSWAP_SIZE=2\n[ a = b ] && SWAP_SIZE=3\n", 2, ""),
    ("[[ $OS_VARIANT == def* ]] && SWAP_SIZE=2\n", 2, ""),
    ("grep -q nothing /dev/null\nSWAP_SIZE=2\n", 2, ""),
    ("SWAP_SIZE=2\ngrep -q nothing /dev/null\n", 2, ""),
    ("if grep -q nothing /dev/null; then SWAP_SIZE=1; else SWAP_SIZE=2; fi\n", 2, ""),
    ("found=$(grep nothing /dev/null)\nSWAP_SIZE=${found:-2}\n", 2, ""),
    ("SWAP_SIZE=$(echo 2; false)\n", 2, ""),
    ("SWAP_SIZE=$(nosuch 2>/dev/null || echo 2)\n", 2, ""),
    ("nosuch 2>/dev/null || SWAP_SIZE=2\n", 2, ""),
    ("command -v nosuch >/dev/null || SWAP_SIZE=2\n", 2, ""),
    ("[ -f /etc/missing ] && . /etc/missing\nSWAP_SIZE=2\n", 2, ""),
    (". /etc/missing 2>/dev/null || true\nSWAP_SIZE=2\n", 2, ""),
    ("sizes=(1 2 3); SWAP_SIZE=${sizes[1]}\n", 2, ""),
    ("declare -A of=([a]=2); SWAP_SIZE=${of[a]}\n", 2, ""),
    ("half() { local n=$1; echo $((n / 2)); }\nSWAP_SIZE=$(half 4)\n", 2, ""),
    ("for n in 1 2; do SWAP_SIZE=$n; done\n", 2, ""),
    ("source <(echo SWAP_SIZE=2)\n", 2, ""),
    ("read -r SWAP_SIZE <<<2\n", 2, ""),
    ("lower=(); printf -v SWAP_SIZE %s 2\n", 2, ""),
    ("set -euo pipefail\nfalse || true\nSWAP_SIZE=2\n", 2, ""),
    ("set -e; SWAP_SIZE=2", 2, ""),
    ("SWAP_SIZE=2\nreturn\nSWAP_SIZE=1\n", 2, ""),
    ("read -r lower\nSWAP_SIZE=2\n", 2, ""),
    ("cat\nSWAP_SIZE=2\n", 2, ""),
    ("exec 3>/dev/null 9>/dev/null\nSWAP_SIZE=2\n", 2, ""),
    ("exec >/dev/null 2>&1\nSWAP_SIZE=2\n", 2, ""),
    ("trap 'true' EXIT\nSWAP_SIZE=2\n", 2, ""),
    ("IFS=:; PATH=/nonexistent; SWAP_SIZE=2\n", 2, ""),
    ("set -f; shopt -s extglob nullglob; set -- a b; SWAP_SIZE=2\n", 2, ""),
    ("SWAP_SIZE=2  # caf\udce9\n", 2, ""),
    # not exported
    ("set -a; lower=x; set +a\nSWAP_SIZE=2\n", 2, ""),
    ("SWAP_SIZE=2\nexport -n SWAP_SIZE\n", 2, ""),
    ("SWAP_SIZE=(2)\n", 2, ""),
    ("SWAP_SIZE=(2 3)\n", 2, ": SWAP_SIZE is an array: only its first element counts"),
    ("SWAP_SIZE=2; (SWAP_SIZE=3)\n", 2, ": line 1: SWAP_SIZE is not set: it is in a subshell, made by ( or |"),
    ("SWAP_SIZE=2; echo 3 | read -r SWAP_SIZE\n", 2, ": line 1: SWAP_SIZE is not set: it is in a subshell"),
    ("SWAP_SIZE=2\necho 3 | while read -r n; do\nSWAP_SIZE=$n\ndone\n", 2, ": line 3: SWAP_SIZE is not set: it is in"),
    ("SWAP_SIZE=2\n{ SWAP_SIZE=3; } | cat\n", 2, ": line 2: SWAP_SIZE is not set: it is in a subshell"),
    ("SWAP_SIZE=2\nSWAP_SIZE=3|cat\n", 2, ": line 2: SWAP_SIZE is not set: it is in a subshell"),
    ("SWAP_SIZE=2  # not | SWAP_SIZE=2 | x\n", 2, ""),
    ("SWAP_SIZE=2 || true\n", 2, ""),
    ("SWAP_SIZE=$(\nSWAP=no; ARCH=2\necho $ARCH)\n", 2, ""),
    ("export SWAP GROW; IFS= read -r SWAP_SIZE <<<2\n", 2, ""),
    ("USER_DATA='set SWAP=no\nSWAP= no\nSWAP=no &'; SWAP_SIZE=2\n", 2, ""),
    ("IMAGE_URL='http://192.0.2.1/?a=b&c=d'; SWAP_SIZE=2 && true\n", 2, ""),
    ("false && SWAP= no; false ||SWAP_SIZE=2\n", 2, ""),
    ("set -v\nSWAP_SIZE=2\n", 2, ": SWAP_SIZE=2"),
    ("set -u; declare -A sizes; SWAP_SIZE=2\n", 2, ""),
    (f"lower=; for n in {{1..5000}} 2; do SWAP_SIZE=$n{'$lower' * 40}; done\n", 2, ""),
    # the first ends with a failure under its own `set -e`
    ("set -e; SWAP_SIZE=2\n[ a = b ] && SWAP_SIZE=1\n", 2, ""),
    ("shopt -s extglob\ncase abc in @(abc|def)) SWAP_SIZE=2 ;; esac\n", 2, ""),
    ("exec 8>/dev/null\nSWAP_SIZE=2\n", 2, ""),
    ("set -e; SWAP_SIZE=2\ntrue & sleep 0.01\n", 2, ""),
    ("lower=$'a\\r\\nb\\r'\nSWAP_SIZE=2\n", 2, ""),
    # and said
    ("nosuch || SWAP_SIZE=2\n", 2, ": line 1: nosuch: command not found"),
    ("SWAP_SIZE=$(nosuch || echo 2)\n", 2, ": line 1: nosuch: command not found"),
    ("if nosuch; then SWAP_SIZE=1; else SWAP_SIZE=2; fi\n", 2, ": line 1: nosuch: command not found"),
    ("sh -c nosuch || SWAP_SIZE=2\n", 2, ": sh: 1: nosuch: not found"),
    ("echo 'proxy: line 3: address not found'; SWAP_SIZE=2\n", 2, ": proxy: line 3: address not found"),
    ("printf '\\1a\\1b\\1c\\n'; SWAP_SIZE=2\n", 2, ": \\x01a\\x01b\\x01c"),
    ("echo talkative; SWAP_SIZE=2\n", 2, ": talkative"),
    ("[ $nothing = y ] && SWAP_SIZE=1\nSWAP_SIZE=2\n", 2, ": line 1: [: =: unary operator expected"),
    (". /etc/missing || SWAP_SIZE=2\n", 2, ": line 1: /etc/missing: No such file or directory"),
    ("lower=$(cat /etc/missing)\nSWAP_SIZE=2\n", 2, ": line 1: the command failed with status 1"),
]


@pytest.mark.parametrize(("text", "size", "said"), LEGAL)
def test_legal(
    text: str, size: int, said: str, load: Callable[[], Settings], node: Node, capfd: pytest.CaptureFixture[str]
) -> None:
    variant = SITE / "variants/default.conf"
    variant.write_text(text, errors="surrogateescape")
    assert load().swap_size == size
    warned = capfd.readouterr().err
    assert f"warning: {variant}{said}" in warned if said else warned == ""


def test_many_at_once(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """One shell for many variants finds of each what a shell of its own does, whatever the files before it do."""
    texts = [*(row[1] for row in MISTAKES), *(row[0] for row in LEGAL)]
    monkeypatch.setattr(settings, "AT_ONCE", len(texts))
    names = [f"v{number}" for number in range(len(texts))]
    for name, text in zip(names, texts):
        (SITE / f"variants/{name}.conf").write_text(text, errors="surrogateescape")
    environments = [{**ganeti.EXAMPLE, "OS_VARIANT": name} for name in names]
    warned: list[str] = []

    def found(one: tuple[Settings, list[Failure]]) -> object:
        said, warned[:] = [*warned], []
        return one[0], [(str(problem), problem.hint, problem.details) for problem in one[1]], said

    alone = [found(settings.examine_settings(environ, warn=warned.append)) for environ in environments]
    run = shellfiles._run
    started: list[object] = []
    monkeypatch.setattr(shellfiles, "_run", lambda *call: (started.append(call), run(*call))[1])
    for name, expected, one in zip(names, alone, settings.examine_each(environments, warned.append)):
        assert found(one) == expected, name
    assert len(started) == 1


def test_one_of_many_does_not_end(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shellfiles, "TIMEOUT", 1.0)
    endless = "echo $BASHPID >>/etc/pids\nwhile :; do sleep 0.2; done\n"
    for name, text in {"a": "SWAP_SIZE=1\n", "b": endless, "c": "kill $$\n"}.items():
        (SITE / f"variants/{name}.conf").write_text(text)
    environments = [{**ganeti.EXAMPLE, "OS_VARIANT": name} for name in "abc"]
    (a, _), (_, b), (_, c) = settings.examine_each(environments, lambda _: None)
    assert a.swap_size == 1
    assert "b.conf does not come to an end" in str(b[0]) and "c.conf: it ended the shell" in str(c[0])
    processes = [Path("/proc", pid) for pid in Path("/etc/pids").read_text().split()]
    assert len(processes) == 2, "with the others, and alone"
    wait_until(lambda: not any(map(is_running, processes)), "none is left")


def test_a_program_complains(load: Callable[[], Settings], node: Node, capfd: pytest.CaptureFixture[str]) -> None:
    """What it makes of its own mistakes is its affair; a file that is read is the site's, executable or not."""
    node.write(READ, "#!/bin/bash\nnosuch\necho 2\n")
    READ.chmod(0o755)
    node.variant("default", f"SWAP_SIZE=$({READ})\n")
    assert load().swap_size == 2
    assert f"{READ}: line 2: nosuch: command not found" in capfd.readouterr().err
    node.write(READ, "IMAGE_NAME=$(nosuch | head -n 1)\n")
    node.variant("default", f". {READ}\n")
    refused(load, READ, 1, "nosuch: command not found")


def test_set_plus_a_in_the_defaults(load: Callable[[], Settings], node: Node) -> None:
    """What the variant says then counts, too."""
    node.write(DEFAULTS, "set +a\nSWAP_SIZE=1\nlower=(x); IMAGE_DIR=/srv/images\n")
    node.variant("default", "SWAP_SIZE=2\n")
    found = load()
    assert (found.swap_size, found.image_dir) == (2, "/srv/images")
    assert set(found.unknown) == {"lower"}


def test_os_release(load: Callable[[], Settings], node: Node) -> None:
    node.variant("default", ". /etc/os-release\nIMAGE_NAME=$ID-image\n")
    assert load().image_name.endswith("-image") and load().image_name != "-image"


def test_a_function_is_no_setting(load: Callable[[], Settings], node: Node) -> None:
    node.variant("default", "helper() { echo 2; }\nSWAP_SIZE=$(helper)\n")
    assert load().unknown == {}


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("IMAGE_NAME = other\n", "without spaces around ="),
        (f"{BOM}IMAGE_NAME=other\n", "byte order mark: sed"),
        ("IMAGE_NAME=other\r\n\r\n", "line ends of Windows: sed"),
        ("IMAGE_NAME=other\r\n", "line ends of Windows: sed"),
        ("exit 0\n", "`return` ends a file"),
        ("if\n", "bash -n"),
    ],
)
def test_remedy(text: str, remedy: str, load: Callable[[], Settings]) -> None:
    """The commands in hints mend the file."""
    DEFAULTS.write_text(text, newline="")
    hint = refused(load, DEFAULTS, 0, "").hint or ""
    assert remedy in hint
    _, is_command, command = hint.partition(": sed ")
    if is_command:
        assert os.system(f"sed {command}") == 0
        assert load().image_name == "other"


def test_a_file_that_does_not_end(load: Callable[[], Settings], monkeypatch: pytest.MonkeyPatch, node: Node) -> None:
    node.variant("default", "while :; do :; done\n")
    monkeypatch.setattr(shellfiles, "TIMEOUT", 0.3)
    refused(load, Path(f"{SITE}/variants/default.conf does not come to an end"), 0, "after 0 s")


@pytest.mark.parametrize("text", ["yes\n", "yes >&2\n", "yes & SWAP_SIZE=2\n", "echo x; (yes &)\n"])
def test_a_file_that_floods(text: str, load: Callable[[], Settings], node: Node) -> None:
    """It could drive what was said before out of what we keep."""
    node.variant("default", f"IMAGE_NAME = other\n{text}")
    with pytest.raises(Failure, match=r"default.conf(: line 1: | prints or sets more than 1 MiB)"):
        load()


@pytest.mark.parametrize("text", ["sleep 1000 &\n", "(sleep 1000 & echo $! >/etc/pid)\n"])
def test_a_process_that_is_left_is_not_waited_for(text: str, load: Callable[[], Settings], node: Node) -> None:
    """Neither by us nor, if it is a job of the file, by anybody else."""
    node.variant("default", f"{text}[ -e /etc/pid ] || echo $! >/etc/pid\nSWAP_SIZE=2\n")
    assert load().swap_size == 2
    process = Path("/proc", Path("/etc/pid").read_text().strip())
    if "(" in text:
        os.kill(int(process.name), 9)
    wait_until(lambda: not is_running(process), "it has ended")


def is_running(process: Path) -> bool:
    """Return whether a process has not ended; process 1 may take its time to ask how an orphan has."""
    try:
        return ") Z " not in (process / "stat").read_text()
    except OSError:
        return False


SECRET = "sosecret"


@pytest.mark.parametrize(
    "text",
    [
        f"USER_DATA=a {SECRET}\n",
        f"USER_DATA=(${SECRET}\n",
        f"USER_DATA=('{SECRET}' ;\n",
        f"set -x; USER_DATA={SECRET}\n",
        f"set -x; USER_DATA={SECRET}; false; exit 1\n",
        f"USER_DATA={SECRET}; echo $USER_DATA\n",
        f"USER_DATA={SECRET}; echo $USER_DATA; set -e; false\n",
        f"set -u; USER_DATA=${SECRET}\n",
        f"USER_DATA={SECRET}; echo $USER_DATA; exit 1\n",
        f"  export USER_DATA={SECRET}; ${{USER_DATA}} || true\n",
    ],
)
@pytest.mark.parametrize("where", ["file", "read", "dash"])
def test_secrets_are_not_told(
    text: str, where: str, load: Callable[[], Settings], node: Node, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    if where == "dash":
        monkeypatch.setattr(shellfiles.shutil, "which", lambda *_, **__: None)
    node.write(READ, text)
    node.variant("default", f". {READ}\n" if where == "read" else text)
    try:
        load()
    except Failure as failure:
        assert SECRET not in f"{failure} {failure.hint} {failure.details}"
    assert SECRET not in capfd.readouterr().err


@pytest.mark.parametrize("end", ["", "false\n", "exit 1\n", "nosuch\n"])
@pytest.mark.parametrize(
    "text",
    [
        "env\n",
        "export\n",
        "set -x; IMAGE_URL=https://me:sosecret@example.org/\n",
        "echo $OSP_OF_OUR_HOOK $OSP_OS_IMAGE\n",
        "LDAP_PASSWORD=sosecret; echo $LDAP_PASSWORD\n",
        "cat /proc/self/environ\n",
        "$OSP_OF_OUR_HOOK || true\n",
        'cd "$OSP_QUOTED" || true\n',
        "set -x; MINE=$OSP_QUOTED OTHER=$OSP_LINES\n",
    ],
)
def test_secrets_of_the_environment_are_not_told(
    text: str, end: str, node: Node, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What Ganeti calls a secret parameter looks to an OS definition as any other."""
    given = {
        "OSP_OF_OUR_HOOK": SECRET,
        "OSP_IMAGE_URL": f"https://h/?t={SECRET}",
        "OSP_OS_IMAGE": f"http://a:{SECRET}@h",
        "OSP_QUOTED": "a\"b$c'so7quoted",
        "OSP_LINES": "one\nso7third 'two'",
    }
    node.variant("default", text + end)
    said = ""
    try:
        settings.load_settings({**recorded("create"), **given})
    except Failure as failure:
        said = f"{failure} {failure.hint} {failure.details}"
    said += capfd.readouterr().err
    assert not [word for word in (SECRET, "so7quoted", "so7third") if word in said], said


def test_comments_name_secrets(load: Callable[[], Settings], node: Node) -> None:
    """As those of the installed defaults file do: it holds none."""
    node.write(DEFAULTS, settings.defaults_file() + "SWAP_SISE=other one\n")
    refused(load, DEFAULTS, len(DEFAULTS.read_text().splitlines()), "one: command not found")


@pytest.mark.parametrize("text", ["IMAGE_NAME = other\n", f"{BOM}IMAGE_NAME=other\n", ". /etc/missing\n"])
def test_every_command_refuses_it(text: str, node: Node, disk: MakeDisk) -> None:
    node.defaults("IMAGE_NAME=tiny")
    node.variant("default", text)
    target = disk()
    path = f"{SITE}/variants/default.conf: line 1: "
    node.create(target, OSP_IMAGE_NAME=None).failed(path)
    assert not target.stat().st_blocks
    node.call("verify", recorded("verify"), "parameters").failed(path)
    doctor = node.tool("../imageos", "doctor", "--os-dir", str(node.os_dir))
    assert doctor.status == 1 and path in " ".join(doctor.log.split())


def test_what_is_said_is_seen_by_verify_and_doctor(node: Node) -> None:
    node.variant("default", "lower=$(cat /etc/missing)\n")
    said = f"{SITE}/variants/default.conf: cat: /etc/missing: No such file or directory"
    assert f"warning: {said}" in node.call("verify", recorded("verify"), "parameters").ok().log
    assert said in " ".join(node.tool("../imageos", "doctor", "--os-dir", str(node.os_dir)).log.split())
