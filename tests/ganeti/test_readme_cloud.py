"""From nothing to the login prompt of a cloud image, by the ten lines of README.rst and the catalog as it is.

cloud.debian.org is a server of the test. Like the real one it speaks https and redirects.
"""

from __future__ import annotations

import re
from pathlib import Path

import readme
from bootdisks import boot_disks
from certificates import make_certificate
from clusters import started
from debian import debian
from qemu import Console
from support import run
from test_cluster_install import SSHD, layered

IMAGE = "debian-13-genericcloud-amd64.qcow2"
SERVER = """
import http.server, ssl, sys


class Mirrored(http.server.SimpleHTTPRequestHandler):
    def send_head(self):
        if self.path.startswith("/images/"):
            self.send_response(302)
            self.send_header("Location", self.path.replace("/images/", "/mirror/"))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None
        return super().send_head()


context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(sys.argv[1])
server = http.server.ThreadingHTTPServer(("127.0.0.1", 443), Mirrored)
server.socket = context.wrap_socket(server.socket, server_side=True)
server.serve_forever()
"""


def publish(top: Path) -> None:
    """Make the publisher's files: the image of a Debian with cloud-init that boots, and its checksum."""
    directory = top / "mirror/cloud/trixie/latest"
    directory.mkdir(parents=True)
    disk = boot_disks({"cloud": ("cloud", debian("bookworm", "cloud-init"))})["cloud"]
    run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", disk.path, directory / IMAGE)
    digest = run("sha512sum", directory / IMAGE).split()[0]
    (directory / "SHA512SUMS").write_text(f"{digest}  {IMAGE}\n")
    (top / "server.py").write_text(SERVER)


def test_ten_lines(tmp_path: Path) -> None:
    publish(tmp_path)
    ca = make_certificate(tmp_path, "ca", "ca")
    certificate = make_certificate(tmp_path, "server", "server", ca)
    *lines, console = readme.block("./build.py && cp").splitlines()
    commands = "\n".join(lines).replace("-t plain", "-t file").replace("link=br0", "link=eth0")
    assert console == "gnt-instance console web1.example.org"
    script = f"""
        {SSHD}
        export PATH=$PATH:/usr/local/sbin HOME=/srv/admin
        mkdir -p ~/.ssh && ssh-keygen -q -t ed25519 -N '' -f ~/.ssh/id_ed25519
        echo 192.0.2.201 web1.example.org web1 >>/etc/hosts
        echo 127.0.0.1 cloud.debian.org >>/etc/hosts
        openssl x509 -in {ca} >>/etc/ssl/certs/ca-certificates.crt
        cd {tmp_path}; python3 {tmp_path}/server.py {certificate} &
        wait_for bash -c '</dev/tcp/127.0.0.1/443'
        cd {readme.CHECKOUT}
        {commands}
        imageos variants
        cat /var/log/ganeti/os/add-*
        socat -u UNIX-CONNECT:/run/ganeti/kvm-hypervisor/ctrl/web1.example.org.serial STDOUT
    """
    log = tmp_path / "cluster.log"
    with started(layered(script, tmp_path / "layers", "--kvm"), log) as process:
        text = Console(process, log).wait_for(r"^web1 login: ")
    assert "verified: sha512 of https://cloud.debian.org/images/cloud/trixie/latest/SHA512SUMS" in text
    assert re.search(r"(?m)^debian-13 +qcow2 +cache ", text)
    assert text.count("imageos: downloaded ") == 1, "fetch has downloaded it for create"
