"""Watches the denoising of one picture over a websocket, and saves frames as they arrive.

python examples/watch.py SEED FOLDER [URL]
"""

import json
import struct
import sys
from pathlib import Path

from websockets.sync.client import connect

seed, folder, url = int(sys.argv[1]), Path(sys.argv[2]), (sys.argv[3:] or ["ws://127.0.0.1:8000"])[0]
folder.mkdir(exist_ok=True)
with connect(f"{url}/generate/stream") as stream:
    stream.send(json.dumps({"label": 3, "seed": seed, "frames": {"count": 10, "kind": "both"}}))
    for message in stream:
        if isinstance(message, str):
            said = json.loads(message)
            print(said["type"], said.get("eta_s", ""))
        else:
            _, length = struct.unpack_from(">II", message)
            header = json.loads(message[8 : 8 + length])
            (folder / f"{header['step']:04d}-{header['kind']}.png").write_bytes(message[8 + length :])
