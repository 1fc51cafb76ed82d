"""Makes many pictures at once with the asyncio client, and saves each as soon as it is finished.

python examples/many.py COUNT FOLDER [URL]
"""

import asyncio
import sys
from pathlib import Path

from ddpm_client import AsyncClient


async def main(count: int, folder: Path, url: str) -> None:
    folder.mkdir(exist_ok=True)
    async with AsyncClient(url) as client:
        for done in asyncio.as_completed([client.generate(label=3, seed=seed, steps=20) for seed in range(count)]):
            made = await done
            made[0].save(folder / f"{made.seed}.png")
            print("seed", made.seed)


asyncio.run(main(int(sys.argv[1]), Path(sys.argv[2]), (sys.argv[3:] or ["http://127.0.0.1:8000"])[0]))
