"""What a create is to do, as checked before the first write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from imageos.disks.layout import Layout
from imageos.errors import Failure
from imageos.ganeti import Instance
from imageos.images.imagefile import Image
from imageos.images.imagetypes import IMAGE_TYPES
from imageos.network import Interface
from imageos.settings import Settings


class Request(NamedTuple):
    instance: Instance
    settings: Settings
    image: Image
    interfaces: tuple[Interface, ...] | Failure  # why they cannot be planned
    hooks: Sequence[str]  # their names, in order
    layout: Layout | None  # None: the image brings its own

    @property
    def deploy(self) -> Callable[[Image, str], None] | None:
        return IMAGE_TYPES[self.settings.image_type].deploy
