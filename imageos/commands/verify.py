"""verify: report all errors in the settings, the variant, the OS parameters and the image."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from imageos import ganeti, log, preload
from imageos.errors import Failure
from imageos.node import isolation
from imageos.node.programs import require
from imageos.settings import Settings, examine_settings, reserved_parameters, unknown_parameters


def main(_arguments: Sequence[str]) -> int:
    """Check everything that does not depend on the instance, which only create knows."""
    ganeti.check_api(os.environ)
    isolation.enter()
    preload.later("imageos.hooks", "imageos.images.imagetypes", "imageos.images.preview")
    unknown = unknown_parameters(os.environ)
    settings, problems = examine_settings({**ganeti.EXAMPLE, **os.environ})
    problems += [Failure(f"unknown OS parameter {name}") for name in unknown]
    preload.load()  # without settings files, no shell has run
    from imageos import hooks

    problems += [] if problems else problems_of(check_image, settings)  # a wrong setting would select another image
    problems += problems_of(hooks.check, settings)
    for problem in problems[:-1]:
        if problem.hint:
            log.info(f"hint: {problem.hint}")
        log.info(str(problem))
    if problems:
        raise problems[-1]
    log.info("settings and parameters are right")
    return 0


def problems_of(check: Callable[[Settings], object], settings: Settings) -> list[Failure]:
    try:
        check(settings)
    except Failure as problem:
        return [problem]
    return []


def check_image(settings: Settings) -> None:
    """Fail if the image on this node is wrong. Only warn about a server: it may be up again for the create."""
    if settings.cdinstall or "os-image" in reserved_parameters(os.environ):
        return
    from imageos.images import imagetypes, preview  # late: preloaded

    if settings.image_url:
        require("curl")
        reason = imagetypes.why_unreachable(settings)
        if reason:
            log.warning(reason)
    elif settings.image_name:
        image_type, image = imagetypes.IMAGE_TYPES[settings.image_type], imagetypes.find(settings)
        imagetypes.check(image_type, image)
        if not image_type.deploy:
            preview.check(settings, image)
    else:
        log.info("there is no IMAGE_NAME and no IMAGE_URL: create needs one, such as the OS parameter image_name")
