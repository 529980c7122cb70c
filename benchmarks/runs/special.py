"""Modules whose step is not one loss of one network: generative, contrastive and reinforcement learning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from learner import Batch, Learner, MakeOptimizer, classify
from models import VariationalAutoencoder, mlp
from tasks import Split
from torch import Tensor, nn
from torch.nn import functional


def gaussian(net: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Negative log likelihood of a Gaussian whose mean and log variance the network gives."""
    x, y = batch
    mean, log_variance = net(x).chunk(2, dim=1)
    return functional.gaussian_nll_loss(mean, y, log_variance.exp()), {}


class Variational(Learner):
    """A variational autoencoder; `weight` of its second term depends on the share of the run that is over."""

    def __init__(self, weight: Callable[[float], float], optimizer: MakeOptimizer) -> None:
        super().__init__(VariationalAutoencoder(), self.bound, optimizer)
        self._weight = weight

    def bound(self, net: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        x = batch[0].flatten(1)
        logits, mean, log_variance = net(x)
        fit = functional.binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x)
        surprise = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()
        return fit + self._weight(self.share) * surprise, {"pixels": functional.mse_loss(logits.sigmoid(), x)}


class Contrastive(Learner):
    """Two noisy, shifted views of a digit must find each other among those of the whole batch (InfoNCE)."""

    def __init__(self, optimizer: MakeOptimizer, temperature: float = 0.2) -> None:
        super().__init__(mlp(64, 128, 32), self.matching, optimizer)
        self._temperature = temperature

    def matching(self, net: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        one, other = (functional.normalize(net(self._view(batch[0]))) for _ in range(2))
        return classify(nn.Identity(), [one @ other.T / self._temperature, torch.arange(len(one))])

    def _view(self, x: Tensor) -> Tensor:
        shift = int(torch.randint(-1, 2, ()))
        return x.roll(shift, dims=-1) + 0.15 * torch.randn_like(x)


class Denoiser(Learner):
    """A diffusion model of points in the plane: guesses the noise that was added."""

    def __init__(self, optimizer: MakeOptimizer) -> None:
        super().__init__(mlp(3, 64, 64, 2, activation=nn.SiLU), self.noise_error, optimizer)

    @staticmethod
    def noise_error(net: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        (x,) = batch
        time, noise = torch.rand(len(x), 1), torch.randn_like(x)
        angle = time * torch.pi / 2
        guess = net(torch.cat([angle.cos() * x + angle.sin() * noise, time], 1))
        return functional.mse_loss(guess, noise), {}


class Gan(pl.LightningModule):
    """A generator of points against a critic; the validation loss is the distance of made and real points.

    Args:
        lr: Learning rate of the generator.
        critic_lr: Learning rate of the critic.
        penalty: Weight of the critic's squared gradient at real points, without which the game swings for ever.
    """

    def __init__(self, lr: float = 1e-3, critic_lr: float = 1e-3, penalty: float = 0.03) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.lr, self.critic_lr, self.penalty = lr, critic_lr, penalty
        self.generator = mlp(4, 64, 64, 2, activation=nn.LeakyReLU)
        self.critic = mlp(2, 64, 64, 1, activation=nn.LeakyReLU)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        real = batch[0].requires_grad_()
        of_generator, of_critic = self.optimizers()
        made = self.generator(torch.randn(len(real), 4))
        judged = self.critic(real)
        (slope,) = torch.autograd.grad(judged.sum(), real, create_graph=True)
        critic_loss = functional.softplus(-judged).mean() + functional.softplus(self.critic(made.detach())).mean()
        critic_loss = critic_loss + self.penalty * slope.square().sum(1).mean()
        self._step(of_critic, critic_loss)
        loss = functional.softplus(-self.critic(made)).mean()
        self._step(of_generator, loss)
        self.log_dict({"train_loss": loss, "critic_loss": critic_loss})
        return loss.detach()

    def _step(self, optimizer: Any, loss: Tensor) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        (real,) = batch
        self.log("val_loss", _distance(real, self.generator(torch.randn(len(real), 4))))

    def configure_optimizers(self) -> Any:
        betas = (0.5, 0.99)
        return (
            torch.optim.Adam(self.generator.parameters(), self.lr, betas),
            torch.optim.Adam(self.critic.parameters(), self.critic_lr, betas),
        )


def _distance(one: Tensor, other: Tensor) -> Tensor:
    """Mean distance of two sets of points in the plane when both are sorted along many directions."""
    angle = torch.arange(32) * torch.pi / 32
    directions = torch.stack([angle.cos(), angle.sin()])
    return ((one @ directions).sort(0).values - (other @ directions).sort(0).values).abs().mean()


class Bandit(Learner):
    """REINFORCE on digits: naming a digit pays 1 if it is right; the validation loss is minus the reward."""

    def __init__(self, optimizer: MakeOptimizer) -> None:
        super().__init__(mlp(64, 64, 10), self.surrogate, optimizer)
        self._usual = 0.1

    def surrogate(self, net: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        x, y = batch
        policy = torch.distributions.Categorical(logits=net(x))
        action = policy.sample()
        reward = (action == y).float()
        if not self.training:
            return -reward.mean(), {"reward": reward.mean()}
        self._usual += 0.05 * (reward.mean().item() - self._usual)
        return -((reward - self._usual) * policy.log_prob(action)).mean(), {}


class Pole(Learner):
    """REINFORCE balances poles with pushes to the left or right; the reward is the share of time that they stand."""

    STEPS = 40

    def __init__(self, optimizer: MakeOptimizer) -> None:
        super().__init__(mlp(2, 32, 2, activation=nn.Tanh), self.surrogate, optimizer)

    @staticmethod
    def starts(seed: int, n_train: int) -> Split:
        """Angles and speeds from which poles start to fall."""
        start = 0.1 * torch.randn(n_train + 100, 2, generator=torch.Generator().manual_seed(seed))
        return Split((start[:n_train],), (start[n_train:],))

    def surrogate(self, net: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        (state,) = batch
        stands = torch.ones(len(state))
        rewards, logs = [], []
        for _ in range(self.STEPS):
            policy = torch.distributions.Categorical(logits=net(5 * state))
            push = policy.sample()
            logs.append(policy.log_prob(push) * stands)
            angle, speed = state.unbind(1)
            speed = speed + 0.05 * (6 * angle + 4 * (2 * push - 1)) + 0.05 * torch.randn(len(state))
            state = torch.stack([angle + 0.05 * speed, speed], 1)
            stands = stands * (state[:, 0].abs() < 0.5)
            rewards.append(stands)
        reward = torch.stack(rewards)
        if not self.training:
            return -reward.mean(), {"reward": reward.mean()}
        to_come = reward.flip(0).cumsum(0).flip(0) / self.STEPS
        return -((to_come - to_come.mean(1, keepdim=True)) * torch.stack(logs)).mean(), {}
