"""From the catalog to an instance of a real cluster, and back."""

from __future__ import annotations

from pathlib import Path

from clusters import ADD, IMAGES, SITE, Cluster, between, said

ENTRY = """
title = Tiny
type = tarball
x86_64 = http://127.0.0.1:8008/tiny-x86_64.tar.gz
checksum = {}.sha256
"""


def test_three_lines(cluster: Cluster, tiny: Path) -> None:
    """Enabled, fetched, deployed; then it is disabled only when no instance uses it."""
    log = cluster.run(f"""
        PATH=/usr/local/sbin:$PATH
        mkdir /srv/publisher; cp {tiny} /srv/publisher/
        (cd /srv/publisher && sha256sum *.gz >tiny-x86_64.tar.gz.sha256)
        python3 -m http.server --bind 127.0.0.1 --directory /srv/publisher 8008 2>/srv/requests &
        publisher=$!
        printf '[tiny-1.0]%s' '{ENTRY}' >{SITE}/catalog.conf
        wait_for bash -c '</dev/tcp/127.0.0.1/8008'
        imageos variants enable tiny-1.0
        imageos variants fetch
        {ADD} --disk 0:size=1G -o image+tiny-1.0 -O swap=no inst1.example.org
        say USED imageos variants disable tiny-1.0
        echo OFFERED; gnt-os list --no-headers; echo OFFERED
        echo FILES; ls {IMAGES}; echo FILES
        gnt-instance remove --force inst1.example.org
        say FREE imageos variants disable tiny-1.0
        echo AFTER; gnt-os list --no-headers; echo AFTER
        echo REQUESTS; cat /srv/requests; echo REQUESTS
        kill $publisher
    """)
    status, lines = said(log, "USED")
    assert (status, lines[-1]) == (
        1, "variant tiny-1.0 is used by inst1.example.org: they could not be reinstalled any more"
    )  # fmt: skip
    assert "image+tiny-1.0" in between(log, "OFFERED").split() and "image+tiny-1.0" not in between(log, "AFTER").split()
    assert said(log, "FREE")[0] == 0
    assert between(log, "REQUESTS").count('"GET /tiny-x86_64.tar.gz HTTP') == 1, "fetch has downloaded it"
    assert len([name for name in between(log, "FILES").split() if name.endswith("-tiny-x86_64.tar.gz")]) == 1
