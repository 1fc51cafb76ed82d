"""An update: its loss, its noise, its labels, and the moving averages that follow."""

from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from model.sampling.samplers import Walk
from model.sampling.schedule import FloatArray, NoiseSchedule, Prediction, Process
from model.train.recipe import Recipe, ema_at
from model.train.trainer import Trainer
from tests.model.tiny import ARCHITECTURE, PROCESS, T
from tests.model.train.worlds import trainer


def noise(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, *ARCHITECTURE.shape, generator=torch.Generator().manual_seed(seed))


class Oracle(nn.Module):
    """A net that knows the pictures, and names their noise but for a half."""

    def __init__(self, pictures: Tensor) -> None:
        super().__init__()
        self.pictures, self.most = pictures, 0  # the largest batch that it saw

    def embed(self, k: Tensor) -> Tensor:
        return k

    def forward(self, x: Tensor, k: Tensor) -> Tensor:
        self.most = max(self.most, len(x))
        a, b = (
            torch.tensor(bar[k + 1])[:, None, None, None]
            for bar in (PROCESS.schedule.alpha_bar, PROCESS.schedule.beta_bar)
        )
        return ((x - a * self.pictures[: len(x)]) / b + 0.5).float()


def with_oracle(made: Trainer, pictures: Tensor) -> Oracle:
    """Puts an oracle in the place of the net."""
    oracle = Oracle(pictures)
    made.net = made.shown = oracle  # type: ignore[assignment]
    made.averages = dict.fromkeys(made.averages, {})
    return oracle


def test_the_loss_is_how_far_the_noise_was_missed_at_both_ends() -> None:
    pictures, made = noise(2, seed=1), trainer()
    with_oracle(made, pictures)
    missed = made.loss(pictures, torch.tensor([1, T]), noise(2))

    torch.testing.assert_close(missed, torch.full((2,), 0.25), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("prediction", "of_x0", "of_eps"), [("epsilon", 0, 1), ("v_prediction", -0.6, 0.8), ("sample", 1, 0)]
)
def test_the_loss_is_of_what_the_process_says_that_the_net_predicts(
    prediction: Prediction, of_x0: float, of_eps: float
) -> None:
    process = Process(NoiseSchedule.of([0.36]), prediction)  # alpha_bar_1 = 0.8, beta_bar_1 = 0.6
    made, pictures, eps, t = Trainer(ARCHITECTURE, process, Recipe(), "cpu"), noise(2), noise(2, seed=1), torch.ones(2)
    missed = made.loss(pictures, t.long(), eps)  # by a net that predicts 0, as a new one does

    torch.testing.assert_close(missed, (of_x0 * pictures + of_eps * eps).square().mean((1, 2, 3)))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_from_what_is_taught_the_samplers_read_the_picture_and_its_noise(prediction: Prediction) -> None:
    process = replace(PROCESS, prediction=prediction)
    made, x0, eps = Trainer(ARCHITECTURE, process, Recipe(), "cpu"), noise(T), noise(T, seed=1)
    walk, t = Walk(process, np.arange(T, -1, -1)), torch.arange(T, 0, -1)
    x, taught = made.noised(x0, t, eps), made.taught(x0, t, eps)

    def read(of_x: FloatArray, of_out: FloatArray) -> Tensor:
        a, b = (torch.from_numpy(each).view(-1, 1, 1, 1) for each in (of_x, of_out))
        return (a * x + b * taught).float()

    torch.testing.assert_close(read(walk.p, walk.q), x0, rtol=0, atol=1e-3)
    torch.testing.assert_close(read(walk.eps_x, walk.eps_out), eps, rtol=0, atol=1e-3)


def test_the_held_out_loss_is_taken_in_batches_of_the_usual_size() -> None:
    pictures = noise(1).expand(20, -1, -1, -1)
    oracle = with_oracle(made := trainer(batch=8, emas=(0.5, 0.9)), pictures)
    found = made.held_out_losses(pictures)

    assert {ema: {*losses.values()} for ema, losses in found.items()} == {0.5: {0.25}, 0.9: {0.25}}
    assert oracle.most == 8


def test_every_average_follows_the_net_at_the_pace_of_its_step() -> None:
    made = trainer(batch=8, warm_up=1, emas=(0.5, 0.999))
    made.seen, made.step = 80, 10
    before = {name: tensor.clone() for name, tensor in made.averages[0.5].items()}
    made.update(noise(8))

    for ema, decay in ((0.5, 0.5), (0.999, ema_at(10, 0.999))):
        for name, tensor in made.net.named_parameters():
            expected = decay * before[name] + (1 - decay) * tensor.detach()
            torch.testing.assert_close(made.averages[ema][name], expected, rtol=1e-5, atol=1e-7)
        assert any(not torch.equal(made.averages[ema][name], before[name]) for name in before)


def test_a_look_at_an_average_does_not_touch_the_net_in_training() -> None:
    made = trainer(batch=8, warm_up=1, emas=(0.9,))
    made.seen, made.step = 80, 10
    made.update(noise(8))
    own = [p.detach().clone() for _, p in made.parameters()]
    shown = made.averaged(0.9)

    assert all(torch.equal(p, made.averages[0.9][name]) for name, p in shown.named_parameters())
    assert not all(torch.equal(p, shown.get_parameter(name)) for name, p in made.parameters())
    assert all(torch.equal(p, before) for (_, p), before in zip(made.parameters(), own, strict=True))


def conditional(**recipe: Any) -> Trainer:
    """A trainer of the tiny net with three labels and the null label."""
    return Trainer(replace(ARCHITECTURE, num_class_embeds=4), PROCESS, Recipe(**recipe), "cpu")


@pytest.mark.parametrize(("dropout", "shares"), [(0.0, [0, 0, 1, 0]), (1.0, [0, 0, 0, 1]), (0.25, [0, 0, 0.75, 0.25])])
def test_a_share_of_the_pictures_is_shown_with_the_null_label(dropout: float, shares: list[float]) -> None:
    torch.manual_seed(0)
    *_, labels = conditional(label_dropout=dropout).prepared(noise(1).expand(2000, -1, -1, -1), torch.full((2000,), 2))

    assert [float((labels == label).float().mean()) for label in range(4)] == pytest.approx(shares, abs=0.03)


def test_only_the_labels_that_were_shown_learn() -> None:
    made = conditional(label_dropout=0.0, batch=8, warm_up=1)
    made.seen = 8
    with torch.no_grad():  # layers that start at zero let no gradient through
        for _, p in made.parameters():
            p.normal_(generator=torch.Generator().manual_seed(0))
    made.update(noise(8), torch.full((8,), 2))
    gradient = made.net.class_embedding.weight.grad

    assert isinstance(gradient, Tensor)
    assert gradient.any(dim=1).tolist() == [False, False, True, False]


def test_flips_mirror_half_of_the_pictures() -> None:
    torch.manual_seed(0)
    pictures = noise(200)
    made = trainer(flips=True).augmented(pictures)
    kept = (made == pictures).flatten(1).all(1)

    assert torch.equal(made[~kept], pictures[~kept].flip(3))
    assert 70 < int(kept.sum()) < 130


def test_crops_move_each_picture_and_repeat_its_edge() -> None:
    torch.manual_seed(0)
    ramp = torch.arange(64.0).view(1, 1, 8, 8).expand(500, -1, -1, -1)
    made = trainer(crops=2).augmented(ramp)

    def moved(down: int, across: int) -> Tensor:
        rows, columns = ((torch.arange(8) + by).clamp(0, 7) for by in (down, across))
        return 8.0 * rows[:, None] + columns

    allowed = {tuple(moved(down, across).flatten().tolist()) for down in range(-2, 3) for across in range(-2, 3)}
    assert {tuple(each.flatten().tolist()) for each in made} == allowed


def test_without_options_pictures_are_shown_as_they_are() -> None:
    pictures = noise(8)

    assert trainer().augmented(pictures) is pictures


@pytest.mark.parametrize(("native", "expected"), [(True, True), (False, False)])
def test_bfloat16_is_used_only_where_the_processor_computes_in_it(native: bool, expected: bool) -> None:
    from model.train import flags

    with mock.patch("model.nets.cpu.supports", return_value=native) as asked:
        assert flags.uses_bfloat16("auto", "cpu") is expected
        assert flags.uses_bfloat16("bfloat16", "cpu") is True
        assert flags.uses_bfloat16("float32", "cpu") is False
    asked.assert_called_once_with(torch.bfloat16)


def test_in_bfloat16_the_parameters_and_the_loss_stay_float32() -> None:
    made = trainer(batch=8, autocast=True)
    loss = made.loss(*made.prepared(noise(8)))

    assert loss.dtype == torch.float32
    assert {p.dtype for _, p in made.parameters()} == {torch.float32}
    torch.testing.assert_close(made.update(noise(8)), trainer(batch=8).update(noise(8)), rtol=0.3, atol=0.1)
