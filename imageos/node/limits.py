"""The limits of resources that we were started with (setrlimit(2)): lowered, never raised; named where they end us."""

from __future__ import annotations

import resource
from resource import RLIM_INFINITY, RLIMIT_AS, RLIMIT_CPU, RLIMIT_FSIZE, RLIMIT_NOFILE, RLIMIT_NPROC

# What is said where a limit is reached (signal(7), strerror(3)) -> the limit, and how it is named
REACHED = {
    "SIGXFSZ": (RLIMIT_FSIZE, "the size of a file (ulimit -f) is {} bytes"),
    "File too large": (RLIMIT_FSIZE, "the size of a file (ulimit -f) is {} bytes"),
    "SIGXCPU": (RLIMIT_CPU, "processor time (ulimit -t) is {} s"),
    "SIGKILL": (RLIMIT_CPU, "processor time (ulimit -t) is {} s"),  # where the soft limit is the hard one
    "Too many open files": (RLIMIT_NOFILE, "open files (ulimit -n) is {}"),
    "PID namespace: Resource temporarily unavailable": (RLIMIT_NPROC, "processes (ulimit -u) is {}"),
    "can't start new thread": (RLIMIT_NPROC, "processes (ulimit -u) is {}"),
    "memory": (RLIMIT_AS, "memory (ulimit -v) is {} bytes"),
}


def lower(kind: int, most: int) -> None:
    """Let a limit be `most`, unless it is lower."""
    _, hard = resource.getrlimit(kind)
    limit = min((value for value in (hard, most) if value != RLIM_INFINITY), default=RLIM_INFINITY)
    resource.setrlimit(kind, (limit, limit))


def cause(text: str) -> str:
    """Return which of our limits is the cause of a failure that says `text`; empty if none is."""
    for words, (kind, name) in REACHED.items():
        soft, hard = resource.getrlimit(kind)
        limit = hard if kind == RLIMIT_AS else soft  # the soft one is our own (isolation)
        if words in text.replace("Memory", "memory") and limit != RLIM_INFINITY:
            return f"the limit on {name.format(limit)}"
    return ""
