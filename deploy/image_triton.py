"""Lets Triton run in an image without a compiler.

Triton compiles its kernels itself. But it calls the CUDA driver through a small C extension, which it compiles with
the system's compiler when it first sees a GPU, and keeps in its cache. The source of that extension depends only on
Triton's version, not on the GPU. So `python image_triton.py` compiles it while the image is built, and
TRITON_CACHE_MANAGER=image_triton:ImageCache looks beside this file before it looks into the cache.
"""

import ctypes
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from triton.runtime.cache import FileCacheManager

BUILT = Path(__file__).parent / "built"
DRIVER = "libcuda.so.1"


class ImageCache(FileCacheManager):  # type: ignore[misc]
    """Triton's cache, after the files of the image. Later files go to TRITON_CACHE_DIR."""

    def get_file(self, filename: str) -> str | None:
        """The path of a file, or None if it does not exist yet."""
        brought = BUILT / filename  # not by key: that depends on whether the program `file` is installed
        return str(brought) if brought.exists() else super().get_file(filename)


def stub(source: str, folder: Path) -> Path:
    """Builds a library with the name of CUDA's driver, in which the functions that `source` calls do nothing."""
    functions = sorted(set(re.findall(r"\bcu[A-Z]\w*(?=\()", source)))
    code = "".join(f"int {name}(void) {{ return 1; }}\n" for name in functions)
    library = folder / DRIVER
    command = ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{DRIVER}", "-o", str(library), "-x", "c", "-"]
    subprocess.run(command, input=code, text=True, check=True)
    return library


def build() -> None:
    """Makes Triton compile and load its extension, and keeps the result. Needs a C compiler and no driver."""
    from triton.backends.nvidia import driver

    source = (Path(driver.__file__).parent / "driver.c").read_text()
    with tempfile.TemporaryDirectory() as scratch:
        library = stub(source, Path(scratch))
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)  # so that the extension finds it when it is loaded
        os.environ |= {"TRITON_CACHE_DIR": scratch, "TRITON_LIBCUDA_PATH": scratch}
        driver.CudaUtils()
        BUILT.mkdir()
        for made in Path(scratch).glob("*/*.so"):
            shutil.copy(made, BUILT)


if __name__ == "__main__":
    build()
