"""What a file is that holds no weights we read, told by its first bytes whatever its name is.

One table for what is served and for what is converted. It needs no torch: refusing costs little.
"""

import re

HEAD_BYTES = 512  # that are enough to tell
PICKLE = re.compile(rb"\x80[\x02-\x05]")
ZIP = b"PK\x03\x04"
KINDS: list[tuple[bytes, str]] = [
    (rb"\x89PNG\r\n", "a PNG picture"),
    (rb"\xff\xd8\xff", "a JPEG picture"),
    (rb"GIF8", "a GIF picture"),
    (rb"RIFF", "a WebP picture, or sound or video"),
    (rb"GGUF", "a GGUF file, of quantised language models"),
    (rb"ggml", "a GGML file, of quantised language models"),
    (rb"\x89HDF\r\n", "an HDF5 file, as Keras and TensorFlow save weights"),
    (rb"\x93NUMPY", "a NumPy array"),
    (rb"version https://git-lfs", "a pointer of Git LFS, not the file itself: `git lfs pull` fetches it"),
    (rb"%PDF", "a PDF document"),
    (rb"\x1f\x8b", "a gzip archive: unpack it first"),
    (rb"BZh", "a bzip2 archive: unpack it first"),
    (rb"\xfd7zXZ", "an xz archive: unpack it first"),
    (rb"7z\xbc\xaf", "a 7-Zip archive: unpack it first"),
    (rb"Rar!", "a RAR archive: unpack it first"),
    (rb".{257}ustar", "a tar archive: unpack it first"),
    (rb"\x7fELF", "a program"),
    (rb"\x08\x01\x12", "a SavedModel of TensorFlow"),
    (rb"\x08[\x02-\x1f][\x12\x1a\x22\x28\x32\x3a\x42]", "an ONNX model"),  # the format's version, another field
    (rb"[\x81-\x8f\xde\xdf].{0,4}?[\xa1-\xbf\xd9]", "a msgpack file, as Flax saves weights"),  # a map, a string
    (rb"(?i)\s*<(!doctype|html|\?xml)", "a web page, such as a login or an error in place of the file"),
    (rb"\0{16}", "nothing but zeros at its start: an unfinished download"),
    (rb"\Z", "empty"),
    (rb"\s+\Z", "blank"),
    (rb"[\t-\r -~]+\Z", "a text file"),
]


def recognised(head: bytes) -> str:
    """What a file is whose first HEAD_BYTES are these; "" if that is unknown, as of a damaged safetensors file."""
    if head[8:9] == b"{" and not any(head[6:8]):  # behind a length
        return ""
    return next((what for pattern, what in KINDS if re.match(pattern, head, re.DOTALL)), "")
