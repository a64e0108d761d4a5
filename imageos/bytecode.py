"""The modules as bytecode of this node's Python, in an archive beside the installed program.

Without it Python compiles, at each start, all modules that a command needs. `__main__.py` (in build.py) looks there
first, for a directory that has the name of its own build: another build's is not found. Another Python finds the
sources there, and compiles those.
"""

from __future__ import annotations

import compileall
import glob
import io
import os
import re
import tempfile
import zipfile
from importlib.util import MAGIC_NUMBER
from py_compile import PycInvalidationMode


def compiled(program: bytes, path: str) -> bytes:
    """Return the archive that will be at `path`."""
    with tempfile.TemporaryDirectory(prefix="imageos-") as top, zipfile.ZipFile(io.BytesIO(program)) as sources:
        sources.extractall(top, [name for name in sources.namelist() if name.startswith("site-packages/")])
        modules = f"{top}/{build_of(program)}"
        os.rename(f"{top}/site-packages", modules)
        compileall.compile_dir(
            modules,
            quiet=2,
            legacy=True,  # beside the sources
            stripdir=top,
            prependdir=path,
            invalidation_mode=PycInvalidationMode.UNCHECKED_HASH,  # not compared with the source at each start
        )
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            for file in sorted(filter(os.path.isfile, glob.glob(f"{modules}/**", recursive=True))):
                with open(file, "rb") as member:
                    # a ZipInfo, because the same program must give the same archive at any time
                    archive.writestr(zipfile.ZipInfo(file.removeprefix(f"{top}/")), member.read())
        return packed.getvalue()


def is_whole(program: bytes) -> bool:
    """Return whether it is an archive to its end, where its table of contents is."""
    try:
        zipfile.ZipFile(io.BytesIO(program)).close()
    except zipfile.BadZipFile:
        return False
    return True


def build_of(program: bytes) -> str:
    """Return the name of a program's build, which is a digest of its files."""
    with zipfile.ZipFile(io.BytesIO(program)) as archive:
        match = re.search(rb'BUILD = "([0-9a-f]+)"', archive.read("__main__.py"))
    if not match:
        raise ValueError("a program without the name of its build")
    return match[1].decode()


def is_compiled(program: bytes, path: str) -> bool:
    """Return whether the archive at `path` is of this program and of the Python that we run under."""
    try:
        with zipfile.ZipFile(path) as archive:
            module = archive.read(f"{build_of(program)}/imageos/cli.pyc")
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return False
    return module.startswith(MAGIC_NUMBER)
