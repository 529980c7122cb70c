"""A learning rate that is 10 000 times too high, for one step: what it does to a transformer, and what helps.

A small transformer reads handwritten digits as eight rows of eight pixels. When it has learned them, a mistake in its
schedule multiplies the learning rate by 10 000 for a single step. Three runs learn from the same data and weights:

* plain: the step throws the weights far away, and accuracy stays near that of guessing.
* clipped: `Trainer(gradient_clip_val=1.0)` bounds the gradient, but what is too large is the rate. (With Adam it would
  not bound the step at all: Adam divides the size of the gradient out.)
* controlled: `StepRadiusController` measures the update itself, once the rate has jumped, and leaves of it what lies
  within the radius in which the loss can be predicted. It looks at each 50th step otherwise.

    python examples/lr_spike.py [--logdir logs/lr_spike] [--steps 550] [--seeds 1]
"""

from __future__ import annotations

import argparse
import logging
import statistics
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dynwatch.callbacks import StepRadiusController, StepRadiusMonitor

SPIKE = 410  # the step, counted from 1; no multiple of the controller's cadence
FACTOR = 1e4
LR, MOMENTUM, BATCH = 0.05, 0.9, 50
WIDTH = 32
RUNS = ("plain", "clipped", "controlled")


class Rows(pl.LightningModule):
    """A transformer that reads the rows of a digit as eight tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, WIDTH)
        self.positions = nn.Parameter(0.1 * torch.randn(8, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.embed(x) + self.positions).mean(1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.SGD(self.parameters(), lr=LR, momentum=MOMENTUM)
        spike = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: FACTOR if done == SPIKE - 1 else 1.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": spike, "interval": "step"}}


class Accuracy(pl.Callback):
    """Accuracy on held-out digits after every step, so that no drop is missed between two validations."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    @torch.no_grad()
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        right = pl_module(self.x).argmax(1) == self.y
        pl_module.log("val_accuracy", right.float().mean())


@dataclass(frozen=True)
class Row:
    """What became of a run."""

    before: float  # accuracy just before the spike
    r: float  # the length of that step in radii, as it was taken
    lowest: float  # accuracy after it
    final: float


def train(kind: str, seed: int, steps: int, logdir: Path) -> Row:
    pl.seed_everything(seed, verbose=False)
    digits = load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float32) / 16, torch.tensor(digits.target)
    order = torch.randperm(len(y))
    known, unseen = order[:1500], order[1500:]
    callbacks: list[pl.Callback] = [Accuracy(x[unseen], y[unseen]), StepRadiusMonitor(every_n_steps=10)]
    if kind == "controlled":
        callbacks.insert(0, StepRadiusController(every_n_steps=50))  # before the monitor, which shows what it left
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        gradient_clip_val=1.0 if kind == "clipped" else None,
        logger=TensorBoardLogger(logdir, name=None, version=f"{kind}_{seed}", default_hp_metric=False),
        callbacks=callbacks,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Rows(), DataLoader(TensorDataset(x[known], y[known]), batch_size=BATCH, shuffle=True))
    events = EventAccumulator(trainer.log_dir, size_guidance={"scalars": 0}).Reload()
    accuracy, r = (
        {event.step + 1: event.value for event in events.Scalars(tag)} for tag in ("val_accuracy", "step_radius/r")
    )
    after = [value for step, value in sorted(accuracy.items()) if step >= SPIKE]
    return Row(accuracy[SPIKE - 1], r[SPIKE], min(after), after[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logdir", type=Path, default=Path("logs/lr_spike"))
    parser.add_argument("--steps", type=int, default=550, help=f"of each run; the spike is at step {SPIKE}")
    parser.add_argument("--seeds", type=int, default=1, help="how many times to do it, with other data and weights")
    asked = parser.parse_args()
    if asked.steps <= SPIKE:
        parser.error(f"--steps {asked.steps} ends before the spike: give more than {SPIKE}")
    for name in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*(does not have many workers|smaller than the logging interval|treespec).*")
    torch.set_num_threads(1)  # a net this small gains nothing from more, and waits where cores are busy

    print(f"The learning rate is {LR:g}, and {LR * FACTOR:g} at step {SPIKE} of {asked.steps}.")
    print("Accuracy on unseen digits:\n")
    print(f"{'':12}{'seed':>5}{'before':>9}{'r of the step':>15}{'lowest after':>14}{'at the end':>12}")
    table: dict[str, list[Row]] = {kind: [] for kind in RUNS}
    for seed in range(asked.seeds):
        for kind in RUNS:
            row = train(kind, seed, asked.steps, asked.logdir)
            table[kind].append(row)
            print(f"{kind:12}{seed:5}{row.before:9.3f}{row.r:15.3g}{row.lowest:14.3f}{row.final:12.3f}", flush=True)
    if asked.seeds > 1:
        print(f"\nOver {asked.seeds} seeds")
        for kind, rows in table.items():
            final = [row.final for row in rows]
            print(
                f"{kind:12} at the end {statistics.mean(final):.3f} on average, {min(final):.3f} at least; "
                f"lowest after the spike {min(row.lowest for row in rows):.3f}"
            )
    print(f"\nAll runs side by side: tensorboard --logdir {asked.logdir}")


if __name__ == "__main__":
    main()
