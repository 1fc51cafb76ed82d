"""Generates ddpm_client/threads.py from ddpm_client/asyncio.py: `python client/unasync.py`.

`async`, `await` and the prefix Async go. A line with `# threads: CODE` becomes CODE; with `# threads: -` it goes.
"""

import re
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent / "ddpm_client"
HEADER = "# Generated from asyncio.py by client/unasync.py. Edit asyncio.py and run `python client/unasync.py`.\n"
RULES = (
    (r"^.*# threads: -\n", ""),
    (r"^( *).*# threads: (.+)$", r"\1\2"),
    (r"\(await (\S+\(.*\))\)([.\[])", r"\1\2"),
    (r"\b(?:async|await) ", ""),
    (r"Async(?=[A-Z])", ""),
    (r"__a(iter|enter|exit)__", r"__\1__"),
    (r"\baclose\b", "close"),
    (r"\bwebsockets\.asyncio\b", "websockets.sync"),
)


def unasync(source: str) -> str:
    """The synchronous twin of a module."""
    for pattern, replacement in RULES:
        source = re.sub(pattern, replacement, source, flags=re.MULTILINE)
    command = [sys.executable, "-m", "ruff", "format", "--line-length", "120", "-"]
    return subprocess.run(command, input=HEADER + source, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    (PACKAGE / "threads.py").write_text(unasync((PACKAGE / "asyncio.py").read_text()))
