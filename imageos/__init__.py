"""imageos: an OS definition that turns an image into a running Ganeti instance."""

__version__ = "1.0"
