"""A CA of the tests, and servers' certificates by it."""

from __future__ import annotations

import os
import ssl
from pathlib import Path

from support import run


def make_certificate(directory: Path, name: str, extensions: str, ca: Path | None = None) -> Path:
    """A key, and a certificate signed with the key of `ca` or its own; both are in the file returned."""
    config, key, request, made = (directory / f"{name}.{suffix}" for suffix in ("cnf", "key", "csr", "pem"))
    config.write_text(
        "[req]\ndistinguished_name=dn\n[dn]\n"
        "[server]\nsubjectAltName=IP:127.0.0.1,DNS:cloud.debian.org\nsubjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid:always\n"
        "[ca]\nbasicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign\nsubjectKeyIdentifier=hash\n"
    )
    run(
        "openssl",
        "req",
        "-new",
        "-config",
        config,
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-keyout",
        key,
        "-out",
        request,
        "-subj",
        f"/CN={name}",
        "-sha256",
    )
    signer = ["-CA", ca, "-CAkey", ca, "-CAcreateserial"] if ca else ["-signkey", key]
    run("openssl", "x509", "-req", "-in", request, "-out", made, "-extfile", config, "-extensions", extensions, *signer)
    made.write_text(key.read_text() + made.read_text())
    return made


def trust(ca: Path) -> None:
    """As update-ca-certificates does it, in what is a private layer over /etc."""
    paths = ssl.get_default_verify_paths()
    certificate = run("openssl", "x509", "-in", ca)
    name = run("openssl", "x509", "-noout", "-hash", "-in", ca).strip()
    # .0: OpenSSL does not look for .1 where there is none, and Debian 11's has no file, only this directory
    bundles = (os.path.realpath(paths.openssl_cafile), "/etc/ssl/certs/ca-certificates.crt")  # Debian's curl wants that
    for path in dict.fromkeys((*bundles, f"{os.path.realpath(paths.openssl_capath)}/{name}.0")):
        if path.startswith("/etc/"):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "a") as file:
                file.write(certificate)
