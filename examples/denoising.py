"""The picture in the README: six digits on their way from noise to picture, drawn with the engine alone, no server.

python examples/denoising.py denoising.png
"""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from model.card import read_card
from model.checkpoint import load_model
from model.engine import Engine
from model.events import Preview, Request
from model.plan import plan, resolve
from model.runner import Runner

SEEDS, STEPS, EVERY, ENLARGED = range(40, 46), 1000, 100, 3

card = read_card(Path(__file__).parent.parent / "weights" / "digits")
engine = Engine(Runner(load_model(card, torch.device("cpu"), torch.float32), slots=len(SEEDS)))
table = plan(card.process, resolve(card.process, "ddpm", STEPS))
shown = [step for step in range(0, STEPS + 1, EVERY)]
for seed in SEEDS:
    engine.submit(Request(seed, seed, table, frames=frozenset(shown)))
frames = {}
while engine.busy:
    frames |= {(e.id, e.step): e.x for e in engine.step() if isinstance(e, Preview) and e.x is not None}
rows = [np.concatenate([frames[seed, step] for step in shown], axis=1) for seed in SEEDS]
strip = Image.fromarray(np.concatenate(rows)[:, :, 0])
strip.resize((strip.width * ENLARGED, strip.height * ENLARGED), Image.Resampling.NEAREST).save(sys.argv[1])
