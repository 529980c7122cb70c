"""When `ska_equilibrium` would end an ordinary run, and what would be given up: a CNN on digits, SGD and Adam.

    python benchmarks/ska_equilibrium.py [--seeds 10] [--steps 3000]

The rule looks on in shadow mode, with its defaults, at a probe each 50 steps. The training loss is that of all
training samples, read at the same steps. It is flat from where 99 % of its fall, from the first weights on, are done.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import warnings
from dataclasses import dataclass

import pytorch_lightning as pl
import torch
from hessian import Digits, digits, nets
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dynwatch.callbacks import EarlyTermination, SKAMonitor
from dynwatch.rules import SKAEquilibrium

EVERY, BATCH, TRAIN = 50, 50, 1437
RATES = {"SGD, momentum 0.9, lr 0.05": ("sgd", 0.05), "Adam, lr 0.001": ("adam", 0.001)}


class Net(Digits):
    def __init__(self, optimizer: str, lr: float) -> None:
        net = nets()["CNN"]
        super().__init__(net)
        self.optimizer, self.lr = optimizer, lr

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.optimizer == "sgd":
            return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
        return torch.optim.Adam(self.parameters(), lr=self.lr)


class Losses(pl.Callback):
    """Loss of all training and all validation samples, by step."""

    def __init__(self, train: tuple[Tensor, Tensor], unseen: tuple[Tensor, Tensor]) -> None:
        self.sets = train, unseen
        self.found: dict[int, tuple[float, float]] = {}

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        if trainer.global_step == 0:
            self.read(pl_module, -1)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        if trainer.global_step % EVERY == 0:
            self.read(pl_module, trainer.global_step - 1)

    @torch.no_grad()
    def read(self, module: pl.LightningModule, step: int) -> None:
        train, unseen = (nn.functional.cross_entropy(module.net(x), y).item() for x, y in self.sets)  # type: ignore[operator]
        self.found[step] = (train, unseen)


@dataclass(frozen=True)
class Row:
    """What became of a run."""

    flat: int  # step from which on 99 % of the fall are done
    fired: int | None
    done: float  # share of the fall that was done when it fired
    train: float  # training loss then
    unseen: float  # validation loss then
    best: float  # lowest validation loss of the run
    best_at: int
    end: float


def run(optimizer: str, lr: float, seed: int, steps: int, folder: str) -> Row:
    pl.seed_everything(seed, verbose=False)
    x, y = digits()
    order = torch.randperm(len(y))
    train, unseen = ((x[rows], y[rows]) for rows in (order[:TRAIN], order[TRAIN:]))
    module = Net(optimizer, lr)
    torch.manual_seed(seed)
    for child in module.modules():
        if isinstance(child, (nn.Linear, nn.Conv2d)):
            child.reset_parameters()
    losses = Losses(train, unseen)
    stop = EarlyTermination([SKAEquilibrium(action="shadow")])
    stop.prints = False
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        default_root_dir=folder,
        callbacks=[SKAMonitor(every_n_steps=EVERY), stop, losses],
        log_every_n_steps=EVERY,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(*train), batch_size=BATCH, shuffle=True))
    found = losses.found
    first, lowest = found[-1][0], min(loss for loss, _ in found.values())
    done = {step: (first - loss) / (first - lowest) for step, (loss, _) in found.items()}
    flat = min(step for step in done if all(share >= 0.99 for after, share in done.items() if after >= step))
    best_at = min(found, key=lambda step: found[step][1])
    fired = stop.verdicts[0][1].step if stop.verdicts else None
    at = max(found) if fired is None else fired
    return Row(flat, fired, done[at], *found[at], found[best_at][1], best_at, found[max(found)][1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=3000)
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    for name in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    for name, (optimizer, lr) in RATES.items():
        print(f"\n{name}, {asked.steps} steps")
        print(
            f"{'seed':>4}{'flat at':>9}{'fires at':>10}{'fall done':>11}{'train loss':>12}{'val loss':>10}{'best':>8}"
            f"{'at':>6}{'end':>8}{'given up':>10}"
        )
        rows = []
        for seed in range(asked.seeds):
            with tempfile.TemporaryDirectory() as folder:  # verdicts are written down
                row = run(optimizer, lr, seed, asked.steps, folder)
            rows.append(row)
            print(
                f"{seed:4}{row.flat:9}{row.fired or '-':>10}{row.done:11.2%}{row.train:12.5f}{row.unseen:10.4f}"
                f"{row.best:8.4f}{row.best_at:6}{row.end:8.4f}{row.unseen - row.best:10.4f}",
                flush=True,
            )
        fired = [row for row in rows if row.fired is not None]
        early = sum(row.fired < row.flat for row in fired if row.fired is not None)
        print(f"fired in {len(fired)} of {len(rows)} runs, in {early} before the loss was flat", end="")
        if fired:
            to_best = statistics.median(row.unseen - row.best for row in fired)
            to_end = statistics.median(row.unseen - row.end for row in fired)
            print(
                f"; at step {min(r.fired or 0 for r in fired)} to {max(r.fired or 0 for r in fired)}; validation loss "
                f"beside the best {to_best:+.4f}, beside the end {to_end:+.4f} (medians)"
            )


if __name__ == "__main__":
    main()
