"""LitServe's continuous batching loop around diffusers: one step of every request at a time, a scheduler for each."""

import base64
from pathlib import Path
from typing import Any

import torch
from litserve import LitAPI, LitServer
from litserve.loops.continuous_batching_loop import ContinuousBatchingLoop, Output
from litserve.utils import LitAPIStatus

from benchmarks.peers import Asked, Diffusers, Picture, make_net
from server.worker.cpus import cores


class Steps(LitAPI):  # type: ignore[misc]
    """What LitServe asks of an API that is stepped."""

    def __init__(self, weights: Path, device: torch.device, net: str, batch: int, threads: int) -> None:
        super().__init__(stream=True, loop=ContinuousBatchingLoop(), api_path="/generate")
        self.weights, self.where, self.net, self.most, self.threads = weights, device, net, batch, threads

    def setup(self, device: str) -> None:
        """Loads the net, in LitServe's own process."""
        torch.set_num_threads(self.threads)
        net = make_net(self.net, self.weights, self.where, self.most, self.threads)
        self.core = Diffusers(self.weights, self.where, net)
        self.live: dict[str, Picture] = {}

    def decode_request(self, request: dict[str, int]) -> dict[str, int]:
        """The body as it is."""
        return request

    def add_request(self, uid: str, request: dict[str, int]) -> None:
        """A request joins."""
        self.live[uid] = self.core.begin(Asked(**request))

    def has_capacity(self) -> bool:
        """Whether one more may join."""
        return len(self.live) < self.most

    def has_active_requests(self) -> bool:
        """Whether there is anything to step."""
        return bool(self.live)

    def step(self, previous: object) -> list[Any]:
        """One step of everybody; the pictures that have ended leave."""
        self.core.step(list(self.live.values()))
        said = []
        for uid in [uid for uid, picture in self.live.items() if picture.ended]:
            png = base64.b64encode(self.core.png(self.live.pop(uid))).decode()
            said += [Output(uid, png, LitAPIStatus.OK), Output(uid, "", LitAPIStatus.FINISH_STREAMING)]
        return said or [Output(next(iter(self.live)), "", LitAPIStatus.OK)]  # or it would sleep, thinking itself idle

    def encode_response(self, output: str) -> str:
        """The picture as base64."""
        return output


def serve(weights: Path, device: torch.device, net: str, port: int, batch: int, workers: int) -> None:
    """Serves until it is killed, with workers that share the cores."""
    accelerator = "cpu" if device.type == "cpu" else "cuda"
    server = LitServer(
        Steps(weights, device, net, batch, max(1, cores() // workers)),
        accelerator=accelerator,
        workers_per_device=workers,
        timeout=3600,
        healthcheck_path="/readyz",
    )
    server.run(host="127.0.0.1", port=port, generate_client_file=False, log_level="warning")
