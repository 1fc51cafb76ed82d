"""diffusers' net as a function of (x, t), run by torch, OpenVINO or onnxruntime.

The latter two are imported where they are asked for, so that a machine without them runs the rest.
"""

import io
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from server.worker.cpus import cores
from server.worker.device import choose_dtype

Net = Callable[[Tensor, Tensor], Tensor]  # (x [B, C, H, W], t [B]) -> [B, C, H, W]
NEEDED = {"OpenVINO": ["openvino"], "onnxruntime": ["onnxruntime", "onnx"]}  # packages, by the first word of a name


def native_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where torch has instructions for it on this device, else float32.

    oneDNN alone knows which of a processor's it may use (ONEDNN_MAX_CPU_ISA), but takes AVX-512 without any for enough.
    """
    if device.type != "cpu":
        return choose_dtype("auto", device)
    there = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if there and torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def why_not(name: str, device: torch.device) -> str:
    """Why a contender cannot take part on this device; empty if it can."""
    missing = [package for package in NEEDED.get(name.partition(",")[0], []) if find_spec(package) is None]
    if missing:
        return f"{' and '.join(missing)} cannot be found"
    if name.endswith(", bfloat16") and native_dtype(device) is not torch.bfloat16:
        return "there are no instructions for bfloat16"
    return ""


class Unet(torch.nn.Module):
    """diffusers' net as what traces it wants to have it: a tensor out, not a dataclass."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        from diffusers import UNet2DModel

        self.net = UNet2DModel.from_pretrained(directory, low_cpu_mem_usage=False).eval()

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of a picture."""
        config = self.net.config
        return config.in_channels, config.sample_size, config.sample_size

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.net(x, t, return_dict=False)[0]
        return out


def by_torch(directory: Path, device: torch.device, dtype: torch.dtype, channels_last: bool) -> Net:
    """The net in torch, as it comes. x: of this dtype, and so is what it gives."""
    net = Unet(directory).to(device, dtype)
    return net.to(memory_format=torch.channels_last) if channels_last else net  # type: ignore[call-overload]


class OpenVino:
    """The net in OpenVINO: converted once, then compiled for each batch size as it is first asked for.

    precision: f32 or bf16. x: float32, and so is what it gives. Threads are bound to cores where all are theirs.
    """

    def __init__(self, directory: Path, precision: str, threads: int) -> None:
        import openvino

        from model.nets.openvino_graph import CORE  # more than one in a process ends it at a signal

        net = Unet(directory)
        self.shape, self.core = net.shape, CORE
        self.hints = {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_CPU_PINNING": threads == cores(),  # several processes would be bound to the same cores
        }
        given = torch.zeros(2, *self.shape), torch.zeros(2, dtype=torch.int64)
        with warnings.catch_warnings(action="ignore"):  # the tracer's, of each Python number in diffusers' code
            self.graph = openvino.convert_model(net, example_input=given, input=[(-1, *self.shape), (-1,)])
        self.requests: dict[int, Any] = {}  # by batch

    def compile(self, batch: int) -> None:
        """Makes ready for this batch size, with static shapes."""
        graph = self.graph.clone()
        graph.reshape({0: (batch, *self.shape), 1: (batch,)})
        self.requests[batch] = self.core.compile_model(graph, "CPU", self.hints).create_infer_request()

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        if len(x) not in self.requests:
            self.compile(len(x))
        given = [x.contiguous().numpy(), t.numpy()]
        return torch.from_numpy(self.requests[len(x)].infer(given, share_inputs=True)[0])


class OnnxRuntime:
    """The net in onnxruntime: exported and optimized for each batch size as it is first asked for. float32."""

    def __init__(self, directory: Path, threads: int) -> None:
        import onnxruntime

        self.net, self.sessions = Unet(directory), dict[int, Any]()
        self.options = onnxruntime.SessionOptions()
        self.options.intra_op_num_threads, self.options.inter_op_num_threads = threads, 1
        self.make = onnxruntime.InferenceSession

    def compile(self, batch: int) -> None:
        """Makes ready for this batch size, with static shapes.

        The exporter is torch's older one, by tracing: the newer one takes ten times as long, needs onnxscript, and what
        it exports runs no faster.
        """
        given, file = (torch.zeros(batch, *self.net.shape), torch.zeros(batch, dtype=torch.int64)), io.BytesIO()
        with warnings.catch_warnings(action="ignore"), torch.no_grad():
            options: dict[str, Any] = {"dynamo": False, "input_names": ["x", "t"], "opset_version": 20}
            torch.onnx.export(self.net, given, file, **options)  # type: ignore[arg-type]  # it writes to open files too
        self.sessions[batch] = self.make(file.getvalue(), self.options, providers=["CPUExecutionProvider"])

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        if len(x) not in self.sessions:
            self.compile(len(x))
        given = {"x": x.contiguous().numpy(), "t": t.numpy()}
        return torch.from_numpy(self.sessions[len(x)].run(None, given)[0])
