"""The environments in tests/env, which all other tiers use, are those of this Ganeti."""

from __future__ import annotations

import re

from clusters import ADD, Cluster, between
from support import TESTS

# An OS whose scripts log how they are called; export writes a stream, import reads one.
PROBE = r"""
os=/usr/share/ganeti/os/probe
mkdir $os /srv/probe
printf '#!/bin/sh
kind=$(basename "$0")${EXPORT_INDEX:+-disk$EXPORT_INDEX}${IMPORT_INDEX:+-disk$IMPORT_INDEX}
{ echo "# argv: $0${1:+ $*}"; echo "# cwd: $PWD"; echo "# umask: 0o$(umask | tail -c 3)  uid: $(id -u)"; env
} >/srv/probe/$kind${INSTANCE_REINSTALL:+-reinstall}.env
case $kind in export*) echo stream;; import*) cat >/dev/null;; esac
' >$os/create
chmod +x $os/create
for script in import export rename verify; do ln -s create $os/$script; done
echo 20 >$os/ganeti_api_version
printf 'image_name -\nroot_password -\n' >$os/parameters.list
echo default >$os/variants.list
"""
# Variables of the shell, of the Python that recorded them, and of the node daemon, which export and import see.
OTHERS = {"HOME", "LC_CTYPE", "OLDPWD", "PWD", "SHLVL", "_"}
RANDOM = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|[0-9]{10}\.[0-9]+|(?<=aa:00:00:)[0-9a-f:]{8}"
NUMBER = r"(?<=inst)[123]|(?<=192\.0\.2\.5)[01]"
KINDS = (
    "create",
    "create-reinstall",
    "verify",
    "rename",
    *(f"{way}-disk{n}" for way in ("export", "import") for n in "01"),
)


def test_environments(cluster: Cluster) -> None:
    """This detects a Ganeti that changes one of them."""
    script = f"""{PROBE}
        {ADD} --disk 0:size=1G --disk 1:size=1G -o probe+default -O image_name=foo,root_password=x inst1.example.org
        gnt-backup export -n node1.example.org inst1.example.org
        gnt-backup import -n node1.example.org --src-node=node1.example.org -t file --disk 0:size=1G --disk 1:size=1G \\
            --src-dir=/var/lib/ganeti/export/inst1.example.org --net 0:mode=routed,link=100,ip=192.0.2.51 \\
            --no-name-check --no-ip-check inst2.example.org
        gnt-instance rename inst1.example.org inst3.example.org
        gnt-instance rename inst3.example.org inst1.example.org
        gnt-instance reinstall --force inst1.example.org
        sed -i /^OSP_/d /srv/probe/verify.env  # recorded without parameters
        for kind in {" ".join(KINDS)}; do echo ENV $kind; cat /srv/probe/$kind.env; echo ENV $kind; done
    """
    log = cluster.run(script)
    for kind in KINDS:
        then, now = (TESTS / f"env/{kind}.env").read_text(), between(log, f"ENV {kind}")
        assert called(then) == called(now), kind
        assert variables(then) == variables(now), kind


def called(text: str) -> list[str]:
    """Return arguments, directory and umask."""
    return re.findall(r"(?m)^# (?:argv|cwd|umask): .*", text)


def variables(text: str) -> dict[str, str]:
    """Return the variables without random values and numbers of instances."""
    pairs = [line.split("=", 1) for line in text.splitlines() if not line.startswith("#")]
    return {name: re.sub(f"{RANDOM}|{NUMBER}", "*", value) for name, value in pairs if name not in OTHERS}
