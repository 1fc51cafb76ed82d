"""The binary websocket message that carries a picture, in ComfyUI's layout.

uint32 4 | uint32 length of the JSON | JSON | PNG        both numbers big-endian
"""

import json
import struct
from collections.abc import Mapping
from typing import Any

PICTURE = 4  # ComfyUI's PREVIEW_IMAGE_WITH_METADATA
_PREFIX = struct.Struct(">II")


def pack(header: Mapping[str, Any], png: bytes) -> bytes:
    """The message with this header and PNG."""
    text = json.dumps(header).encode()
    return _PREFIX.pack(PICTURE, len(text)) + text + png


def unpack(message: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the PNG of a message. Raises ValueError if it does not carry a picture."""
    if len(message) < _PREFIX.size:
        raise ValueError(f"a picture has at least {_PREFIX.size} bytes, got {len(message)}")
    kind, length = _PREFIX.unpack_from(message)
    if kind != PICTURE or length > len(message) - _PREFIX.size:
        raise ValueError(f"not a picture: type {kind}, header of {length} bytes in {len(message)}")
    start = _PREFIX.size + length
    return json.loads(message[_PREFIX.size : start]), message[start:]
