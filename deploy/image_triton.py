"""What lets Triton run in an image without a compiler.

Triton translates its kernels with what it brings along. But it reaches the CUDA driver through a small C extension of
its own, which it compiles the first time it sees a GPU and keeps in its cache. The source of that extension depends on
Triton's version alone, not on the GPU; so it is compiled when the image is built (`python image_triton.py`), and looked
up beside this file before the cache is (TRITON_CACHE_MANAGER=image_triton:ImageCache).
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
    """Triton's cache, behind what the image brings. What is compiled later goes to TRITON_CACHE_DIR."""

    def get_file(self, filename: str) -> str | None:
        """The path of a file, or None if it has not been made yet."""
        brought = BUILT / filename  # not by key: that depends on whether the program `file` is installed
        return str(brought) if brought.exists() else super().get_file(filename)


def stub(source: str, folder: Path) -> Path:
    """A library that has the name of CUDA's driver, and the functions that `source` calls, which do nothing."""
    functions = sorted(set(re.findall(r"\bcu[A-Z]\w*(?=\()", source)))
    code = "".join(f"int {name}(void) {{ return 1; }}\n" for name in functions)
    library = folder / DRIVER
    command = ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{DRIVER}", "-o", str(library), "-x", "c", "-"]
    subprocess.run(command, input=code, text=True, check=True)
    return library


def build() -> None:
    """Lets Triton compile its extension, load it, and keeps it. It takes a C compiler, and no driver."""
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
