"""Converted checkpoints are served: one server, a model of every format, each picture equal to that of the engine."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from server.cli.main import main
from tests.model.convert.flat_ports import FlatUNet
from tests.model.convert.lucidrains_nets import diffusion
from tests.model.convert.lucidrains_nets import shaken as shaken_lucidrains
from tests.model.convert.openai_nets import Kind
from tests.model.convert.openai_nets import shaken as shaken_openai
from tests.model.convert.ports import PortedUNet
from tests.model.convert.test_convert import shake
from tests.model.worlds import opened, pictures, planned
from tests.server.conftest import Server

OPENAI_FLAGS = ("--image-size", "16", "--heads", "4")


def state_of(net: nn.Module) -> dict[str, torch.Tensor]:
    return dict(net.state_dict())


def test_a_model_of_every_format_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    formats = {
        "ho": (state_of(shake(PortedUNet())), ()),
        "flat": (state_of(shake(FlatUNet())), ()),
        "improved": (state_of(shaken_openai(Kind(learn_sigma=True))), OPENAI_FLAGS),
        "lucidrains": ({"step": 1, "model": diffusion(shaken_lucidrains())}, ("--image-size", "16")),
    }
    (tmp_path / "weights").mkdir()
    for name, (checkpoint, flags) in formats.items():
        torch.save(checkpoint, tmp_path / f"{name}.pt")
        arguments = ["convert", f"{name}.pt", f"weights/{name}", *flags]
        if name == "ho":  # once from a shell, and then without another process that imports torch
            command = [sys.executable, "-m", "server", *arguments]
            subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(Path(__file__).parents[2])}, check=True)
        else:
            assert main(arguments) == 0
    server = Server(tmp_path / "weights", DDPM_DTYPE="float32", DDPM_SLOTS="2").wait_until_ready()
    try:
        for name in formats:
            made = server.client.post("/generate", json={"model": name, "seed": 5, "steps": 3, "sampler": "ddpm"})
            assert made.status_code == 200, made.text
            model = opened(tmp_path / "weights" / name)
            (alone,) = pictures(model, [(5, planned(model.card.process, steps=3))])
            over_http = np.asarray(Image.open(io.BytesIO(made.content)))
            assert np.abs(over_http.astype(int) - alone.picture.squeeze()).max() <= 1, name
        variances = {m["name"]: m["variances"] for m in server.client.get("/models").json()["models"]}
        assert ("learned" in variances["improved"], "learned" in variances["ho"]) == (True, False)
    finally:
        assert server.stop()[0] == 0
