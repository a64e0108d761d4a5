"""Show URLs in messages, quote them for requests, and choose their proxy; and the names beside an image's.

Messages never show of a URL its password, nor its query, which may be a token.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit

from imageos.errors import Failure

SCHEMES = ("http", "https")
# Where the checksum of NAME may be, and the algorithms that are believed there. The last is of
# ganeti-instance-image, which knew SHA-1 only.
STRONG = ("sha256", "sha512")
CHECKSUMS: Sequence[tuple[str, Sequence[str]]] = (
    ("SHA256SUMS", STRONG),
    ("SHA512SUMS", STRONG),
    ("CHECKSUM", STRONG),
    ("{}.sha256", STRONG),
    ("{}.sha512", STRONG),
    ("{}.sig", (*STRONG, "sha1")),
)
# Behind the name of a checksum file, or of the image itself
SIGNATURES = (".gpg", ".sign", ".asc", ".sig")
# Where publishers have it, too: asked for at servers that show no index of the image's directory.
FURTHER_CHECKSUMS = (
    *("{}.SHA256SUM", "{}.SHA512SUM", "{}.SHA256", "{}.SHA512", "{}.CHECKSUM", "{}.DIGESTS", "{}.sha256sum"),
    *("sha256sum.txt", "sha512sum.txt", "sha256sums", "sha512sums", "CHECKSUM.SHA256", "CHECKSUM.SHA512", "CHECKSUMS"),
)
LIKE_CHECKSUMS = re.compile(r"sha-?\d|checksum|digest|sha-?sum|(?<![a-z])(sums?|hash(es)?)(?![a-z])", re.IGNORECASE)


def shown(url: str) -> str:
    """Return a URL as messages show it, or the path of a file of the node."""
    if url.startswith("/"):
        return unquote(url)
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return url.partition(":")[0] + "://..."  # a password with a slash looks like this
    return f"{parts.scheme}://{server(parts)}{parts.path}" + ("?..." if parts.query else "")


def cleaned(url: str) -> str:
    """Return `url` as it is sent, special characters quoted; fail if it is none of http or https."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise Failure(f"{shown(url)} is not a URL") from None
    if parts.scheme not in SCHEMES or not parts.hostname:
        raise Failure(f"{shown(url)}: only http and https are supported")
    _check_host(shown(url), parts.hostname)
    path = quote(parts.path, safe="/%:@!$&'()*+,;=~[]", errors="surrogateescape")
    query = quote(parts.query, safe="/%:@!$&'()*+,;=~[]?", errors="surrogateescape")
    netloc = _credentials(parts) + server(parts)
    return parts._replace(netloc=netloc, path=path, query=query, fragment="").geturl()


def _check_host(where: str, host: str) -> None:
    """Fail for what the resolver, or curl, would not even try."""
    try:
        host.encode("idna")
        is_name = not re.search(r"[\0-\x20\x7f]", host)
    except UnicodeError:
        is_name = False
    if not is_name:
        raise Failure(f"{where}: {host!r} cannot be the name of a host")


def redirected(url: str, location: str) -> str:
    """Return the URL that a redirect leads to. Credentials go along within one server only."""
    old = urlsplit(url)
    try:
        new = urlsplit(cleaned(urljoin(url, location)))
    except (Failure, ValueError) as error:
        raise Failure(f"{shown(url)}: refused to be redirected: {error}") from None
    is_same = (old.scheme, server(old)) == (new.scheme, new.netloc)
    return (new._replace(netloc=old.netloc) if is_same else new).geturl()


def beside(url: str, name: str) -> str:
    """Return the URL of the file `name` (quoted) in the directory of `url`."""
    parts = urlsplit(url)
    return parts._replace(path=f"{parts.path.rpartition('/')[0]}/{name}").geturl()


def linked(page: str, url: str) -> list[str]:
    """Return the names of the files in the directory of `url` to which an HTML page there links."""
    from html import unescape  # late: few sites have such pages

    hrefs = re.findall(r"""href\s*=\s*["']?([^"'\s>]+)""", page, re.IGNORECASE)
    names = []
    for href in hrefs:
        try:
            parts = urlsplit(urljoin(beside(url, ""), unescape(href)))
        except ValueError:
            continue
        directory, _, name = parts.path.rpartition("/")
        if name and directory == urlsplit(url).path.rpartition("/")[0]:
            names.append(unquote(name))
    return list(dict.fromkeys(names))


def proxy_for(parts: SplitResult, environ: Mapping[str, str]) -> SplitResult | None:
    """Return the proxy that `environ` (http_proxy, https_proxy, no_proxy) names for this URL."""
    name = f"{parts.scheme}_proxy"
    text = environ.get(name, "")
    if not text or is_exempt(parts.hostname or "", environ.get("no_proxy", "")):
        return None
    try:
        proxy = urlsplit(text if "://" in text else f"http://{text}")
        _ = proxy.port
    except ValueError:
        raise Failure(f"{name} is not a URL") from None
    if proxy.scheme != "http" or not proxy.hostname:
        raise Failure(f"{name}: only proxies that are spoken to in http are supported")
    _check_host(name, proxy.hostname)
    return proxy


def is_exempt(host: str, no_proxy: str) -> bool:
    """Return True if `no_proxy` (hosts and domains, separated by commas, or *) names the host."""
    names = [name.strip().lstrip(".").lower() for name in no_proxy.split(",")]
    return "*" in names or any(name and (host == name or host.endswith("." + name)) for name in names)


def server(parts: SplitResult) -> str:
    return parts.netloc.rpartition("@")[2]


def peer(parts: SplitResult) -> str:
    """Return user, password, host and port as curl takes them."""
    host = (parts.hostname or "").encode("idna").decode()
    return _credentials(parts) + (f"[{host}]" if ":" in host else host) + (f":{parts.port}" if parts.port else "")


def _credentials(parts: SplitResult) -> str:
    credentials, at, _ = parts.netloc.rpartition("@")
    return quote(credentials, safe="%:", errors="surrogateescape") + at
