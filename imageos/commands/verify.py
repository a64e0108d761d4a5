"""verify: say everything that is wrong with the settings, the variant and the OS parameters."""

import os
from collections.abc import Sequence

from imageos import ganeti, log, settings
from imageos.errors import Failure


def main(_arguments: Sequence[str]) -> int:
    """Ganeti gives no instance here: what depends on one is checked by create."""
    ganeti.check_api(os.environ)
    _, problems = settings.examine(os.environ)
    for problem in problems[:-1]:
        _say(problem)
    if problems:
        raise problems[-1]
    log.info("settings and parameters are right")
    return 0


def _say(problem: Failure) -> None:
    if problem.hint:
        log.info(f"hint: {problem.hint}")
    log.info(str(problem))
