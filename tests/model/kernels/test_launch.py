"""Whether kernels may start before the one in front of them has ended: asked of the GPU, shown without one."""

import logging
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import pytest
import torch

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
GPU, DEPENDENT, ALONE = torch.device("cuda"), {"DEPENDENT": True, "launch_pdl": True}, {"DEPENDENT": False}


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., dict[str, bool]]]:
    """A function that says what is given along to a launch on a GPU of this kind, on which a trial ends so."""
    from model.kernels import launch

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)

    def ask(capability: tuple[int, int], trial: bool | Exception) -> dict[str, bool]:
        def chain(device: torch.device) -> bool:
            if isinstance(trial, Exception):
                raise trial
            return trial

        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(launch, "_chain_counts", chain)
        launch._supported.cache_clear()
        return launch.dependent(GPU)

    yield ask
    launch._supported.cache_clear()


@pytest.mark.parametrize(
    ("capability", "expected"), [((8, 9), ALONE), ((9, 0), DEPENDENT), ((10, 0), DEPENDENT), ((12, 0), ALONE)]
)
def test_kernels_start_early_on_the_large_gpus_from_hopper_on(
    capability: tuple[int, int], expected: dict[str, bool], given: Callable[..., dict[str, bool]]
) -> None:
    assert given(capability, True) == expected


@pytest.mark.parametrize(
    "trial", [False, RuntimeError("CUDA error: invalid resource handle")], ids=["wrong", "refused"]
)
def test_where_a_graph_of_early_kernels_fails_they_wait_and_one_warning_says_so(
    trial: bool | Exception, given: Callable[..., dict[str, bool]], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert given((9, 0), trial) == ALONE

    assert [record.getMessage()[:42] for record in caplog.records] == ["no kernel starts before the one in front o"]


def test_a_gpu_that_died_in_the_trial_raises(
    given: Callable[..., dict[str, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def died(device: torch.device) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", died)
    with pytest.raises(torch.AcceleratorError):
        given((9, 0), RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(torch.OutOfMemoryError):
        given((9, 0), torch.OutOfMemoryError("none left"))


def test_a_benchmark_may_switch_early_starts_off(
    given: Callable[..., dict[str, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.kernels.launch.WANTED", False)

    assert given((9, 0), True) == ALONE
