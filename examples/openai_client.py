"""Makes a seven with OpenAI's own package, and saves it and three partial images as they arrive.

python examples/openai_client.py SEED FOLDER [URL]
"""

import base64
import sys
from pathlib import Path

from openai import OpenAI

seed, folder, url = int(sys.argv[1]), Path(sys.argv[2]), (sys.argv[3:] or ["http://127.0.0.1:8000"])[0]
folder.mkdir(exist_ok=True)
client = OpenAI(base_url=f"{url}/v1", api_key="none")
asked = {"seed": seed, "sampler": "ddim"}  # fields of POST /generate
for event in client.images.generate(prompt="7", stream=True, partial_images=3, extra_body=asked):
    last = event.type == "image_generation.completed"
    name = "picture" if last else f"partial-{event.partial_image_index}"
    (folder / f"{name}.png").write_bytes(base64.b64decode(event.b64_json))
    print(name)
