"""Makes one picture with the Python client and saves it, with a frame of every fifth step.

python examples/client.py SEED FOLDER [URL]
"""

import sys
from pathlib import Path

from ddpm_client import Client

seed, folder, url = int(sys.argv[1]), Path(sys.argv[2]), (sys.argv[3:] or ["http://127.0.0.1:8000"])[0]
folder.mkdir(exist_ok=True)
with Client(url) as client:
    made = client.generate(label=3, seed=seed, steps=20, frames={"every": 5})
for frame in made.frames:
    frame.save(folder / f"{frame.step:04d}.png")
made[0].save(folder / "picture.png")
print(made.image.size, made[0].texts["digest"])
