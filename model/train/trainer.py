"""A net in training: its moving averages, its optimiser, one update after another. `model.train.train` calls it."""

import copy

import torch
from torch import Tensor, distributed
from torch.nn import functional as F

from model.nets.config import Architecture
from model.nets.unet import UNet
from model.sampling.schedule import Process
from model.train.recipe import Recipe, ema_at

PROBE_T = (10, 100, 300, 600, 900)  # the held-out loss is taken at these levels of noise (thousandths of T)
Losses = dict[int, float]  # by level of noise


def place() -> tuple[int, int]:
    """(rank of this process, number of processes) among those that share the batch."""
    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)


def _mixed(weights: tuple[Tensor, Tensor], x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """Pictures and noise with their weights [T + 1] at t. -> [B, C, H, W]"""
    of_x0, of_eps = (each[t].view(-1, 1, 1, 1) for each in weights)
    return of_x0 * x0 + of_eps * eps


class Trainer:
    """A net, its moving averages and its optimiser, as they stand after `seen` pictures."""

    def __init__(self, arch: Architecture, process: Process, recipe: Recipe, device: str) -> None:
        self.arch, self.recipe, self.device = arch, recipe, device
        alpha_bar = torch.tensor(process.schedule.alpha_bar, dtype=torch.float32, device=device)  # [T + 1]
        beta_bar = torch.tensor(process.schedule.beta_bar, dtype=torch.float32, device=device)  # [T + 1]
        one, zero = torch.ones_like(alpha_bar), torch.zeros_like(alpha_bar)
        self.noising = (alpha_bar, beta_bar)  # of x_0 and eps in x_t
        self.target = {  # of x_0 and eps in what the net is to predict
            "epsilon": (zero, one),
            "v_prediction": (-beta_bar, alpha_bar),  # Salimans & Ho (2022), section 4
            "sample": (one, zero),
        }[process.prediction]
        self.T, self.seen, self.step, self.seconds = process.schedule.T, 0, 0, 0.0  # seconds: over all runs
        self.rank, self.world = place()
        torch.manual_seed(0)
        self.net = UNet(arch).to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for layer in self._starting_at_zero():
            torch.nn.init.zeros_(layer)
        self.averages = {ema: {name: p.detach().clone() for name, p in self.parameters()} for ema in recipe.emas}
        self.shown: UNet = copy.deepcopy(self.net)  # looks are taken at it, by weights that `averaged` gives it
        self.optimizer = torch.optim.AdamW(self.net.parameters(), recipe.rate, fused=True)

    def parameters(self) -> list[tuple[str, Tensor]]:
        """The net's parameters by name."""
        return list(self.net.named_parameters())

    def _starting_at_zero(self) -> list[Tensor]:
        """The last layer of every branch: the net starts as the identity on its residual path (Ho et al. 2020)."""
        ends = ("conv2.weight", "conv2.bias", "to_out.0.weight", "to_out.0.bias", "conv_out.weight", "conv_out.bias")
        return [p for name, p in self.parameters() if name.endswith(ends)]

    def predict(self, x: Tensor, t: Tensor, labels: Tensor | None, by: UNet | None = None) -> Tensor:
        """What the net in training, or another, predicts of x: the noise, v or x_0.
        x: [B, C, H, W], t, labels: [B] -> [B, C, H, W] float32"""
        net = self.net if by is None else by
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.recipe.autocast):
            embedding = net.embed(t - 1)
            if labels is not None:
                embedding = embedding + net.embed_labels()[labels]
            out: Tensor = net(x.contiguous(memory_format=torch.channels_last), embedding)
        return out.float()

    def loss(
        self, x0: Tensor, t: Tensor, eps: Tensor, labels: Tensor | None = None, *, by: UNet | None = None
    ) -> Tensor:
        """|| f - f_theta(x_t, t) ||², per picture, where f is what the net predicts: eps, v or x_0, by the process.
        x0, eps: [B, C, H, W] -> [B]"""
        out = self.predict(self.noised(x0, t, eps), t, labels, by)
        return (self.taught(x0, t, eps) - out).square().mean(dim=(1, 2, 3))

    def noised(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """alpha_bar_t x_0 + beta_bar_t eps. x0, eps: [B, C, H, W], t: [B] -> [B, C, H, W]"""
        return _mixed(self.noising, x0, t, eps)

    def taught(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """What the net is to predict of that: eps, v or x_0. x0, eps: [B, C, H, W], t: [B] -> [B, C, H, W]"""
        return _mixed(self.target, x0, t, eps)

    def update(self, x0: Tensor, labels: Tensor | None = None) -> float:
        """One update with a batch of clean pictures in [-1, 1], and their labels if the net is conditional. Returns the
        mean loss of this process's share of it."""
        return self.descend(self.loss(*self.prepared(x0, labels)).mean(), len(x0))

    def prepared(self, x0: Tensor, labels: Tensor | None = None) -> list[Tensor]:
        """What `loss` takes for this process's share of a batch: pictures, levels, noise and perhaps labels."""
        batch, share = len(x0), slice(self.rank, None, self.world)
        # One t from each of `batch` equal ranges: uniform, with less variance (Kingma et al. 2021, appendix I.1).
        t = ((torch.arange(batch) + torch.rand(1)) / batch % 1 * self.T).long()[torch.randperm(batch)] + 1
        eps = torch.randn(x0.shape)
        parts = [self.augmented(x0), t, eps]
        if self.arch.labels:  # the last label is the null label (Ho & Salimans 2022)
            assert labels is not None
            parts.append(torch.where(torch.rand(batch) < self.recipe.label_dropout, self.arch.labels - 1, labels))
        return [part[share].to(self.device) for part in parts]

    def descend(self, loss: Tensor, batch: int) -> float:
        """The update by a loss of a batch of so many pictures. Returns the loss."""
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        self._share_gradients()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.recipe.max_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate_at(self.seen, self.seconds)
        self.optimizer.step()
        with torch.no_grad():
            for ema, average in self.averages.items():
                weight = 1 - ema_at(self.step, ema)
                torch._foreach_lerp_(list(average.values()), list(self.net.parameters()), weight)
        self.seen, self.step = self.seen + batch, self.step + 1
        return loss.item()

    def augmented(self, x0: Tensor) -> Tensor:
        """The pictures mirrored and moved at random, as the recipe says. [B, C, H, W] -> [B, C, H, W]"""
        batch, most = len(x0), self.recipe.crops
        if self.recipe.flips:
            x0 = torch.where((torch.rand(batch) < 0.5).view(-1, 1, 1, 1), x0.flip(3), x0)
        if most:
            _, _, H, W = x0.shape
            down, across = torch.randint(2 * most + 1, (2, batch, 1))
            rows, columns = down + torch.arange(H), across + torch.arange(W)  # [B, H], [B, W]
            wide = F.pad(x0, (most,) * 4, mode="replicate").permute(0, 2, 3, 1)
            x0 = wide[torch.arange(batch)[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        return x0

    def _share_gradients(self) -> None:
        """Averages the gradients of all processes that share the batch."""
        if self.world == 1:
            return
        gradients = [p.grad for p in self.net.parameters() if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        distributed.all_reduce(flat)
        for g, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            g.copy_(total.view(g.shape) / self.world)  # in place: the layout must stay the parameter's

    @torch.no_grad()
    def held_out_losses(self, pictures: Tensor, labels: Tensor | None = None) -> dict[float, Losses]:
        """Each moving average's loss on pictures that are held out, by noise level. The noise is always the same."""
        return {ema: self._held_out_loss(ema, pictures, labels) for ema in self.averages}

    def _held_out_loss(self, ema: float, pictures: Tensor, labels: Tensor | None) -> Losses:
        generator, losses, net = torch.Generator().manual_seed(1), Losses(), self.averaged(ema)
        for level in PROBE_T:
            eps = torch.randn(pictures.shape, generator=generator).to(self.device)
            t = torch.full((len(pictures),), max(1, level * self.T // 1000), device=self.device)
            parts = [pictures, t, eps, *([] if labels is None else [labels])]
            shares = zip(*(part.split(self.recipe.batch) for part in parts), strict=True)
            losses[level] = round(torch.cat([self.loss(*share, by=net) for share in shares]).mean().item(), 5)
        return losses

    def averaged(self, ema: float) -> UNet:
        """A net with the weights of a moving average, until it is asked for another. A look at it may end anywhere, for
        the net in training is not touched."""
        _assign(self.shown, self.averages[ema])
        return self.shown

    def assign(self, values: dict[str, Tensor]) -> None:
        """Gives the net in training these weights."""
        _assign(self.net, values)


@torch.no_grad()
def _assign(net: UNet, values: dict[str, Tensor]) -> None:
    for name, p in net.named_parameters():
        p.copy_(values[name])  # in place: the layout must stay the parameter's
