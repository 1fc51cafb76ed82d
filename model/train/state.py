"""The files of a training: its whole state, from which it goes on to the same bits, and the weights to serve."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.checkpoint.header import read_header
from model.checkpoint.load import read_tensors
from model.errors import ModelRefused, printable
from model.train.trainer import Trainer

AVERAGE = "average"  # of its tensors' names in a state: average.DECAY.NAME
LABELS = 0.5  # standard deviation of the embeddings of added labels; that of timesteps' is about as large
OPTIMISER = ("step", "exp_avg", "exp_avg_sq")  # AdamW's state of a parameter


def save(trainer: Trainer, path: Path, best: float, labels: Sequence[str] = ()) -> None:
    """Writes the whole state of a training to one safetensors file, which is replaced atomically. Raises OSError.

    best: the moving average that is served; labels: their names, if the net learns some
    """
    tensors = {
        f"{AVERAGE}.{ema}.{name}": each for ema, average in trainer.averages.items() for name, each in average.items()
    }
    for name, p in trainer.parameters():
        tensors[f"net.{name}"] = p.detach()
        for key, value in trainer.optimizer.state.get(p, {}).items():
            tensors[f"{key}.{name}"] = value
    numbers = {"seen": trainer.seen, "step": trainer.step, "seconds": round(trainer.seconds, 1), "ema": best}
    metadata = {key: str(number) for key, number in numbers.items()}
    write(tensors, path, metadata | ({"labels": json.dumps(labels)} if labels else {}))


def resume(trainer: Trainer, path: Path, labels: Sequence[str] = ()) -> float | None:
    """Goes on from a state that `save` wrote. Returns the moving average that was served, if the recipe has it.

    Raises ModelRefused if the state is damaged, of another net, has no moving average that the recipe asks for, or has
    learned other labels.
    """
    try:
        with torch.no_grad():
            return _resume(trainer, path, labels)
    except torch.OutOfMemoryError:
        raise
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        words = "is damaged, of another net, or has other moving averages"
        raise ModelRefused(f"{path.name} {words}; without it, training begins anew") from error


def _resume(trainer: Trainer, path: Path, labels: Sequence[str]) -> float | None:
    with safe_open(path, "pt", device=trainer.device) as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}
    learned = json.loads(metadata.get("labels", "null"))  # which states of earlier versions lack
    if learned not in (None, [*labels]):
        raise ModelRefused(printable(f"{path.name} {_unlike(learned, labels)}; without it, training begins anew"))
    trainer.seen, trainer.step = int(metadata["seen"]), int(metadata["step"])
    trainer.seconds = float(metadata.get("seconds", 0))  # which states of earlier versions lack
    trainer.assign({name: tensors[f"net.{name}"] for name, _ in trainer.parameters()})
    for name, p in trainer.parameters():
        for ema, average in trainer.averages.items():
            average[name].copy_(tensors[f"{AVERAGE}.{ema}.{name}"])
        kept = {key: tensors[f"{key}.{name}"] for key in OPTIMISER}
        trainer.optimizer.state[p] = {k: v if k == "step" else torch.empty_like(p).copy_(v) for k, v in kept.items()}
    best = float(metadata.get("ema", "nan"))
    return best if best in trainer.averages else None


def _unlike(learned: Sequence[str], labels: Sequence[str]) -> str:
    """How the labels that were learned are others than these."""
    told = f"has learned {len(learned)} labels, {learned[0]} to {learned[-1]}, not {len(labels)}"
    if {*learned} == {*labels}:
        return f"has learned the same labels in another order, from {learned[0]} to {learned[-1]}"
    other = next((label for label in labels if label not in learned), None)
    return told if other is None else f"{told}, of which the first other one is {other}"


@torch.no_grad()
def start_from(trainer: Trainer, path: Path) -> None:
    """Begins with these weights instead of random ones; those of an unconditional net begin a conditional one, whose
    labels are random then: from zeros they are hardly learned. Raises ModelRefused if they are not this net's."""
    shapes = {name: tuple(p.shape) for name, p in trainer.parameters()}
    found = {name: shape for name, (_, shape) in read_header(path).items()}
    added = {name: shape for name, shape in shapes.items() if name.startswith("class_embedding.")}
    if found not in (shapes, {name: shape for name, shape in shapes.items() if name not in added}):
        raise ModelRefused(f"{path.name} does not hold the weights of this net, by their names of today")
    weights = {name: LABELS * torch.randn(shape) for name, shape in added.items()} | read_tensors(path, shapes)[0]
    trainer.assign(weights)
    for average in trainer.averages.values():
        for name, tensor in average.items():
            tensor.copy_(weights[name])


def write(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Writes a safetensors file that all users may read. It is replaced atomically. Raises OSError."""
    part = path.with_suffix(".part")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part, metadata)
    except SafetensorError as error:
        part.unlink(missing_ok=True)
        raise OSError(f"{path.name} could not be written: {error}") from None
    part.chmod(0o644)  # the server may be run by another user
    part.replace(path)


def write_weights(average: Mapping[str, Tensor], path: Path) -> None:
    """Writes a moving average as a model's weights."""
    write(average, path, {"format": "pt"})
