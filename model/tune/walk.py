"""Walks a batch of pictures down a plan, step by step, from any step on. Plans add no noise here."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from model.checkpoint.load import Model
from model.nets.cpu import CpuNet
from model.sampling.noise import INITIAL, gaussian
from model.sampling.schedule import FloatArray
from model.sampling.table import A, B, C, D, E, G, H, K, M, N, P, Q

Predict: TypeAlias = Callable[[Tensor, int], Tensor]  # (x [B, C, H, W], k) -> the net's output [B, C or 2C, H, W]
TUNED = [M, H, G, D, N]  # the columns whose terms are `Step.terms`, in this order
NAMES = "mhgdn"


def predictor(model: Model) -> Predict:
    """The net as a function of pictures and a row of its table, in float32 outside. It is told no label."""
    net, table = model.net, model.table
    told = table[model.card.unlabelled - net.labels] if net.labels else 0.0  # the last rows are those of labels

    def predict(x: Tensor, k: int) -> Tensor:
        picture = x if isinstance(net, CpuNet) else x.to(table.dtype, memory_format=torch.channels_last)
        return net(picture, (table[k] + told).expand(len(x), -1).contiguous()).float()

    return predict


def noise(seeds: Sequence[int], shape: tuple[int, int, int], device: torch.device) -> Tensor:
    """x_T of these seeds, as the engine draws it. -> [B, C, H, W]"""
    key = torch.tensor(seeds, device=device)
    return gaussian(key, torch.zeros_like(key), shape, INITIAL)


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a batch: what its row weighs, and what comes of it."""

    terms: Tensor  # [5, B, C, H, W] x0, y1, y2, y3 and x
    after: Tensor  # [B, C, H, W] x of the next level
    y: Tensor  # [B, C, H, W] what enters the history

    @property
    def state(self) -> Tensor:
        """x and the history before the next step. -> [4, B, C, H, W]"""
        return torch.cat([self.after[None], self.y[None], self.terms[1:3]])


def begin(x: Tensor) -> Tensor:
    """The state before the first step: x and an empty history. -> [4, B, C, H, W]"""
    return torch.cat([x[None], torch.zeros(3, *x.shape, device=x.device)])


def steps(predict: Predict, rows: FloatArray, state: Tensor) -> Iterator[Step]:
    """The steps of these rows from a state on. rows: [steps, 16], state: [4, B, C, H, W]"""
    for row in rows:
        x = state[0]
        out = predict(x, int(row[K]))[:, : x.shape[1]]
        x0 = (row[P] * x + row[Q] * out).clamp(-row[C], row[C])
        terms = torch.stack([x0, *state[1:], x])
        after = torch.tensordot(torch.tensor(row[TUNED], dtype=x.dtype, device=x.device), terms, 1) + row[E] * out
        step = Step(terms, after, row[A] * x0 + row[B] * x)
        state = step.state
        yield step


def end(predict: Predict, rows: FloatArray, state: Tensor) -> Tensor:
    """The pictures at the end of these rows. -> [B, C, H, W] in [-1, 1]"""
    x = state[0]
    for step in steps(predict, rows, state):
        x = step.after
    return x.clamp(-1, 1)
