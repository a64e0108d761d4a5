"""imageos: an OS definition that turns an image into a running Ganeti instance."""

from __future__ import annotations

__version__ = "1.1.dev0"
