"""Ganeti's own QA functions, from Debian's package ganeti-testsuite, on a cluster with instances of imageos."""

from __future__ import annotations

import json
import re
from pathlib import Path

from clusters import IMAGES, Cluster, between

# The part of its configuration that these functions read.
CONFIG = {
    "name": "cluster.example.org",
    "enabled-hypervisors": ["fake"],
    "enabled-disk-templates": ["file", "diskless"],
    "default-disk-template": "file",
    "os": "image+default",
    "maxmem": "256M",
    "minmem": "256M",
    "disks": [{"size": "1G", "growth": "100M"}],
    "nodes": [{"primary": "node1.example.org"}],
    "instances": [{"name": f"inst{number}.example.org"} for number in range(1, 4)],
    "tests": {"default": True},
}
# Prints which functions have returned.
DRIVER = """
import os
import sys

sys.path[:0] = ["/usr/share/ganeti/testsuite/qa", "/usr/share/ganeti/testsuite", "/usr/share/ganeti/default"]
from qa import qa_cluster, qa_config, qa_instance, qa_os

def run(function, *arguments):
    result = function(*arguments)
    print("RAN", function.__name__, flush=True)
    return result

qa_config.Load(sys.argv[1])
qa_config.SetExclusiveStorage(False)
if not os.path.exists("/proc/sysrq-trigger"):  # some kernels have none, and Ganeti wants to see it
    qa_cluster._CLUSTER_VERIFY.append("--ignore-errors=ENODESETUP")
node, other = qa_config.GetMasterNode(), qa_config.AcquireInstance()

run(qa_os.TestOsList)
run(qa_os.TestOsDiagnose)
one = run(qa_instance.TestInstanceAddFile, [node])
another = run(qa_instance.TestInstanceAddDiskless, [node])
run(qa_instance.TestInstanceInfo, one)
run(qa_instance.TestInstanceInfo, another)
run(qa_instance.TestInstanceModify, one)
run(qa_instance.TestInstanceList)
run(qa_instance.TestInstanceListFields)
run(qa_instance.TestInstanceExportNoTarget, one)
run(qa_instance.TestInstanceExport, one, node)
run(qa_instance.TestBackupList, node)
run(qa_instance.TestInstanceShutdown, one)
run(qa_instance.TestInstanceStoppedModify, one)
run(qa_instance.TestInstanceReinstall, one)
run(qa_instance.TestInstanceRenameAndBack, one.name, other.name)
run(qa_instance.TestInstanceGrowDisk, one)
run(qa_instance.TestInstanceStartup, one)
run(qa_cluster.TestClusterVerify)
run(qa_instance.TestInstanceRemove, one)
run(qa_instance.TestInstanceRemove, another)
"""
# They call every command over ssh, which writes to root's home.
SSHD = r"""
mkdir -p /run/sshd
mount -t tmpfs -o mode=700 tmpfs /root
usermod --password '*' root
ssh-keygen -q -t ed25519 -N '' -f /srv/key
echo 'IdentityFile /srv/key' >>/etc/ssh/ssh_config
echo "node1.example.org $(cat /etc/ssh/ssh_host_rsa_key.pub)" >/etc/ssh/ssh_known_hosts
/usr/sbin/sshd -f /dev/null -oAuthorizedKeysFile=/srv/key.pub -oStrictModes=no -oPermitRootLogin=yes \
    -oHostKey=/etc/ssh/ssh_host_rsa_key -oPidFile=/srv/sshd.pid
wait_for test -e /srv/sshd.pid
"""


def test_qa(cluster: Cluster, tiny: Path, tmp_path: Path) -> None:
    config, driver = tmp_path / "qa.json", tmp_path / "qa.py"
    config.write_text(json.dumps(CONFIG))
    driver.write_text(DRIVER)
    script = f"""
        cp {tiny} {IMAGES}/
        printf 'IMAGE_NAME=tiny\\nIMAGE_TYPE=tarball\\nSWAP_SIZE=16\\n' >>/etc/default/ganeti-instance-image
        gnt-cluster modify --nic-parameters mode=bridged,link=eth0
        {SSHD}
        python3 {driver} {config}
        for action in add export rename; do echo OS $action; cat /var/log/ganeti/os/$action-*; echo OS $action; done
        echo LIST; gnt-instance list --no-headers; echo LIST
    """
    log = cluster.run(script)
    assert re.findall(r"(?m)^RAN (\w+)$", log) == re.findall(r"run\(\w+\.(\w+)", DRIVER), log
    # They do not check this: imageos did the work.
    assert between(log, "OS add").count("instance inst2.example.org is ready to boot") == 2, "added and reinstalled"
    assert "of disk 0 (" in between(log, "OS export"), log
    assert sorted(re.findall(r"renamed the guest from (\S+) to (\S+):", between(log, "OS rename"))) == [
        ("inst1.example.org", "inst2.example.org"),
        ("inst2.example.org", "inst1.example.org"),
    ]
    assert between(log, "LIST") == ""
