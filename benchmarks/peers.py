"""What people run today instead of this server, at its best settings, so that both can be measured in one run.

    python -m benchmarks.peers {pipeline,batcher,litserve} --weights DIR --port PORT [--device cpu] [--batch 8]
                               [--net {torch,openvino}] [--workers 1]

`pipeline`: FastAPI around DDPMPipeline, one request at a time, in float32, since it cannot do anything else. `batcher`:
requests of one step count that arrive within 20 ms share a batch, which runs to its end. `litserve`: LitServe's
ContinuousBatchingLoop, one step of all requests at a time, one diffusers scheduler per request. These two run
diffusers' U-Net in bfloat16 where the processor has it, and draw noise per request, so that a seed means something. The
net runs in torch, channels-last, or in OpenVINO, with a compiled model for each batch size, so that no step is padded.
"""

import argparse
import asyncio
import io
import warnings
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import uvicorn
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from fastapi import FastAPI
from PIL import Image
from pydantic import BaseModel
from starlette.responses import Response
from torch import Tensor

from benchmarks.runtimes import Net, OpenVino, by_torch, native_dtype
from server.worker.cpus import cores

WINDOW_S = 0.02


class Asked(BaseModel):
    """What all of them understand."""

    seed: int
    steps: int


@dataclass(slots=True, eq=False)
class Picture:
    """A picture on its way."""

    x: Tensor
    scheduler: Any
    generator: torch.Generator
    step: int = 0

    @property
    def ended(self) -> bool:
        """Whether all its steps are done."""
        return self.step == len(self.scheduler.timesteps)


def torch_net(weights: Path, device: torch.device) -> Net:
    """diffusers' U-Net in torch, at its best: numbers as the device multiplies best, channels-last."""
    dtype = native_dtype(device)
    net = by_torch(weights, device, dtype, channels_last=True)
    return lambda x, t: net(x.to(dtype, memory_format=torch.channels_last), t.to(device)).float()


def openvino_net(weights: Path, most: int, threads: int) -> Net:
    """diffusers' U-Net in OpenVINO, at its best: compiled for every batch size up to `most` before it is used."""
    half = native_dtype(torch.device("cpu")) is torch.bfloat16
    net = OpenVino(weights, "bf16" if half else "f32", threads)
    for batch in range(1, most + 1):
        net.compile(batch)
    return net


def make_net(kind: str, weights: Path, device: torch.device, most: int, threads: int) -> Net:
    """One of the two."""
    return openvino_net(weights, most, threads) if kind == "openvino" else torch_net(weights, device)


class Diffusers:
    """diffusers' schedulers around a net, stepping any pictures together."""

    def __init__(self, weights: Path, device: torch.device, net: Net) -> None:
        self.device, self.net = device, net
        config = UNet2DModel.load_config(weights)
        self.shape = (1, config["in_channels"], config["sample_size"], config["sample_size"])
        self.scheduler = DDPMScheduler.from_pretrained(weights)

    def begin(self, asked: Asked) -> Picture:
        """x_T of a request."""
        scheduler = DDPMScheduler.from_config(self.scheduler.config)
        scheduler.set_timesteps(asked.steps)
        generator = torch.Generator(self.device).manual_seed(asked.seed)
        return Picture(torch.randn(self.shape, generator=generator, device=self.device), scheduler, generator)

    @torch.inference_mode()
    def step(self, pictures: list[Picture]) -> None:
        """One step of all of them."""
        t = torch.stack([p.scheduler.timesteps[p.step] for p in pictures])
        out = self.net(torch.cat([p.x for p in pictures]), t)
        for row, p in enumerate(pictures):
            timestep = p.scheduler.timesteps[p.step]
            p.x = p.scheduler.step(out[row : row + 1], timestep, p.x, generator=p.generator).prev_sample
            p.step += 1

    def run(self, asked: list[Asked]) -> list[bytes]:
        """A batch from its start to its end."""
        pictures = [self.begin(each) for each in asked]
        while live := [p for p in pictures if not p.ended]:
            self.step(live)
        return [self.png(p) for p in pictures]

    def png(self, picture: Picture) -> bytes:
        """The finished picture."""
        pixels = ((picture.x[0] / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
        return encode(Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels))


class Pipeline:
    """diffusers' pipeline as it comes."""

    def __init__(self, weights: Path, device: torch.device) -> None:
        self.pipeline = DDPMPipeline.from_pretrained(weights, low_cpu_mem_usage=False).to(device)
        self.pipeline.unet.to(memory_format=torch.channels_last)
        self.pipeline.set_progress_bar_config(disable=True)

    def run(self, asked: list[Asked]) -> list[bytes]:
        """One after the other."""
        return [
            encode(self.pipeline(generator=torch.manual_seed(each.seed), num_inference_steps=each.steps).images[0])
            for each in asked
        ]


def encode(picture: Image.Image) -> bytes:
    """As PNG."""
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


def batcher(load: Callable[[], Diffusers | Pipeline], most: int) -> FastAPI:
    """Requests of one step count that arrive within a window share a batch; with `most` = 1, one after the other.

    The net is loaded by the thread that uses it: OpenMP would slow it down for the sake of another one's threads.
    """
    waiting: asyncio.Queue[tuple[Asked, asyncio.Future[bytes]]] = asyncio.Queue()
    thread = ThreadPoolExecutor(1)
    core = thread.submit(load).result()

    async def work() -> None:
        loop, left = asyncio.get_running_loop(), list[tuple[Asked, asyncio.Future[bytes]]]()
        while True:
            left = left or [await waiting.get()]
            if most > 1:
                await asyncio.sleep(WINDOW_S)
            while not waiting.empty():
                left.append(waiting.get_nowait())
            steps = left[0][0].steps
            batch = [each for each in left if each[0].steps == steps][:most]
            left = [each for each in left if each not in batch]
            made = await loop.run_in_executor(thread, core.run, [asked for asked, _ in batch])
            for (_, answer), png in zip(batch, made, strict=True):
                if not answer.cancelled():
                    answer.set_result(png)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker = asyncio.create_task(work())
        yield
        worker.cancel()

    app = FastAPI(lifespan=lifespan)

    @app.post("/generate")
    async def generate(asked: Asked) -> Response:
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        await waiting.put((asked, answer))
        return Response(await answer, media_type="image/png")

    @app.get("/readyz")
    async def ready() -> str:
        return "ready"

    return app


def main() -> None:
    """Serves one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=["pipeline", "batcher", "litserve"])
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--net", choices=["torch", "openvino"], default="torch", help="not for the pipeline")
    parser.add_argument("--workers", type=int, default=1, help="of LitServe (default: 1)")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    device = torch.device(args.device)
    if args.peer == "litserve":
        from benchmarks.litserve_loop import serve

        return serve(args.weights, device, args.net, args.port, args.batch, args.workers)
    most = 1 if args.peer == "pipeline" else args.batch

    def load() -> Diffusers | Pipeline:
        torch.set_num_threads(cores())  # a thread has a number of its own
        if args.peer == "pipeline":
            return Pipeline(args.weights, device)
        return Diffusers(args.weights, device, make_net(args.net, args.weights, device, most, cores()))

    uvicorn.run(batcher(load, most), host="127.0.0.1", port=args.port, log_level="warning")


if __name__ == "__main__":
    main()
