"""verify: say everything that is wrong with the settings, the variant, the OS parameters and the image."""

from __future__ import annotations

import os
from collections.abc import Sequence

from imageos import ganeti, hooks, log, settings
from imageos.errors import Failure
from imageos.images import imagetypes
from imageos.node import isolation
from imageos.settings import Settings


def main(_arguments: Sequence[str]) -> int:
    """Ganeti gives no instance here: what depends on one is checked by create."""
    ganeti.check_api(os.environ)
    isolation.enter()
    unknown = settings.unknown_parameters(os.environ)
    known, problems = settings.examine({**ganeti.EXAMPLE, **os.environ})
    problems += [Failure(f"unknown OS parameter {name}") for name in unknown]
    problems += [] if problems else image_problems(known)  # with a wrong setting replaced, it would be another image
    problems += hook_problems(known)
    for problem in problems[:-1]:
        _say(problem)
    if problems:
        raise problems[-1]
    log.info("settings and parameters are right")
    return 0


def image_problems(known: Settings) -> list[Failure]:
    """Whether the image is on this node and can be read. A server may be down now and up for the create: a warning."""
    if known.cdinstall or not (known.image_name or known.image_url):
        return []
    if known.image_url:
        reason = imagetypes.why_unreachable(known)
        if reason:
            log.warning(reason)
        return []
    try:
        imagetypes.IMAGE_TYPES[known.image_type].check(imagetypes.find(known))
    except Failure as problem:
        return [problem]
    return []


def hook_problems(known: Settings) -> list[Failure]:
    try:
        hooks.check(known)
    except Failure as problem:
        return [problem]
    return []


def _say(problem: Failure) -> None:
    if problem.hint:
        log.info(f"hint: {problem.hint}")
    log.info(str(problem))
