"""What a tuning has found out so far, in files that are replaced atomically, so that it can be resumed."""

import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from model.errors import ModelRefused


def load(path: Path, task: str) -> dict[str, Any]:
    """The arrays that `save` wrote for this task; none if there is no file, or another task's.

    Raises ModelRefused if the file is damaged, OSError if it cannot be read."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file} if str(file["task"]) == task else {}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ModelRefused(f"{path} is damaged; delete it, and tuning begins anew") from error


def save(path: Path, task: str, **arrays: Any) -> None:
    """Writes arrays and the task that they belong to. Raises OSError."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # others may tune for other steps
    with part.open("wb") as file:
        np.savez(file, task=np.array(task), **arrays)
    part.replace(path)
