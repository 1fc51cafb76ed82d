"""Compiles a net with OpenVINO: calls its `forward` with Symbols, and compiles the graph that this builds.

A graph serves one batch size: with static shapes a picture's bits do not depend on the batch; with a dynamic batch they
do. Nothing is traced, exported or stored.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor

from model.nets.build import Net
from model.nets.openvino_symbols import Symbol, attend, op

# isort: split
import openvino as ov  # behind the symbols, whose module keeps its telemetry from being loaded

# One for the process, which is never freed. Each gives the thread that begins to use it a stack for signals, and takes
# back the one before when it is freed: of two that go in the order they came in, the first takes back what the second
# has, and the next signal ends the process (SIGSEGV).
CORE = ov.Core()
VERSION = ov.get_version().partition("-")[0]
PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
CAPABILITIES = {torch.float32: "FP32", torch.bfloat16: "BF16", torch.float16: "FP16"}

Run: TypeAlias = Callable[[Tensor, Tensor], Tensor]  # (x, embedding) -> out


@cache
def computes_in(dtype: torch.dtype) -> bool:
    """Whether the processor has native instructions for `dtype`."""
    if CAPABILITIES[dtype] not in CORE.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        return False
    x = Symbol(op.parameter([1, 16, 4, 4], np.float32))  # a listed capability may have been switched off
    out = attend(*(x.reshape(1, 1, 16, 16),) * 3)
    try:
        CORE.compile_model(ov.Model([op.result(out.node)], [x.node.get_node()], "trial"), "CPU", _hints(dtype, 1))
    except RuntimeError:
        return False
    return True


def _hints(dtype: torch.dtype, threads: int) -> dict[str, Any]:
    return {
        "INFERENCE_PRECISION_HINT": PRECISIONS[dtype],
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,  # all engines of a machine would be bound to its first cores
    }


def compile_net(net: Net, shape: Sequence[int], batch: int, dtype: torch.dtype, threads: int) -> Callable[[], Run]:
    """Compiles the net for one batch size. Each call of the returned function gives a Run with its own buffers, for one
    thread. shape: [C, H, W]; dtype: of the numbers inside the net

    Raises RuntimeError if OpenVINO refuses the net, and NotImplementedError, or whatever `forward` raises, if it does
    something that Symbols do not support.
    """
    x = op.parameter([batch, *shape], np.float32)
    embedding = op.parameter([batch, net.embedding_width], np.float32)
    with torch.inference_mode():
        out: Any = net(cast(Tensor, Symbol(x)), cast(Tensor, Symbol(embedding)))
    whole = ov.Model([op.result(out.node)], [x, embedding], "net")
    compiled = CORE.compile_model(whole, "CPU", _hints(dtype, threads))
    return lambda: _run(compiled.create_infer_request())


def _run(request: ov.InferRequest) -> Run:
    with torch.inference_mode(False):  # tensors made in inference mode could not be written to outside of it
        inputs = [torch.from_numpy(request.get_input_tensor(i).data) for i in range(2)]
        result = torch.from_numpy(request.get_output_tensor(0).data)

    def run(x: Tensor, embedding: Tensor) -> Tensor:
        """x: [b, C, H, W], embedding: [b, width], float32, b <= batch -> [b, out, H, W], valid until the next call"""
        inputs[0][: len(x)].copy_(x)
        inputs[1][: len(x)].copy_(embedding)
        request.infer(share_inputs=True, share_outputs=True)
        return result[: len(x)]

    return run
