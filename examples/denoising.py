"""Draws the denoising of six digits, from noise (left) to picture, with the engine alone and no server.

python examples/denoising.py denoising.png [STEPS]
"""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from model.checkpoint import card, load
from model.engine import engine, events, runner
from model.sampling import plan

SEEDS, STEPS, ENLARGED = range(77, 83), int((sys.argv[2:] or [1000])[0]), 3

digits = card.read_card(Path(__file__).parent.parent / "weights" / "digits")
machine = engine.Engine(runner.prepared(load.load_model(digits, torch.device("cpu"), torch.float32), len(SEEDS)))
table = plan.plan(digits.process, plan.resolve(digits.process, "ddpm", STEPS))
shown = range(0, STEPS + 1, STEPS // 10)
for seed in SEEDS:
    machine.submit(events.Request(seed, seed, table, frames=frozenset(shown), labels=(seed % 10,)))
told = [event for _ in iter(lambda: machine.busy, False) for event in machine.step()]
frames = {(event.id, event.step): event.x for event in told if isinstance(event, events.Preview)}
strip = Image.fromarray(np.block([[frames[seed, step][:, :, 0] for step in shown] for seed in SEEDS]))
strip.resize((strip.width * ENLARGED, strip.height * ENLARGED), Image.Resampling.NEAREST).save(sys.argv[1])
