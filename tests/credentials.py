"""Public keys and password hashes of the right form."""

from __future__ import annotations

import base64
import hashlib

HASH = "$6$salt$" + "TheHash" * 12 + "./"


def public_key(comment: str, kind: str = "ssh-ed25519") -> str:
    """Return a line of authorized_keys: for another comment, with another key."""
    fields = [kind.encode(), hashlib.sha256(comment.encode()).digest()]
    blob = b"".join(len(field).to_bytes(4, "big") + field for field in fields)
    return f"{kind} {base64.b64encode(blob).decode()} {comment}"
