"""Draws the animation in the README: digits and emoji as they are built, x_t (left) beside x̂_0.

python examples/building.py FILE [URL]
"""

import sys

from ddpm_client import Client
from PIL import Image

file, url = sys.argv[1], (sys.argv[2:] or ["http://127.0.0.1:8000"])[0]
LABELS = {"digits": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9], "emoji": [0, 1, 2, 3, 4, 5, 6, 7, 8, 0]}
SEEDS = {"digits": 0, "emoji": 60}
film = {step: Image.new("RGB", (10 * 32, 4 * 32)) for step in range(10, 101, 10)}
with Client(url) as client:
    for top, (model, labels) in enumerate(LABELS.items()):
        asked = {"model": model, "labels": labels, "n": len(labels), "seed": SEEDS[model], "steps": 100}
        for frame in client.generate(**asked, frames={"every": 10, "kind": "both"}).frames:
            if frame.step in film:
                row, column = divmod(frame.index, 5)
                place = (column + (5 if frame.kind == "x0" else 0), 2 * top + row)
                film[frame.step].paste(frame.image, (32 * place[0], 32 * place[1]))
shown = [picture.resize((2 * picture.width, 2 * picture.height)) for picture in film.values()]
ms = [250] * (len(shown) - 1) + [3000]
shown[0].save(file, save_all=True, append_images=shown[1:], duration=ms, loop=0, quality=30)
