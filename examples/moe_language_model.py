"""A mixture of experts whose router collapses, beside one that stays balanced: what the monitor sees of it.

A small transformer with three mixture layers (8 experts, each byte goes to 2) learns to write Python, byte by byte,
from the sources of Python's own standard library. Two runs begin with the same weights and see the same text:

* healthy: a load balancing loss of 0.02 spreads the bytes over the experts.
* collapsed: no such loss, and a learning rate for the router that is 500 times too high. Within a few steps each layer
  sends every byte to one expert, most of them beside the same second one, and its softmax is so sure of itself that no
  gradient is left to undo it.

The loss hardly shows it: both runs learn. `MoEPathwayMonitor` does, and the rule `router_collapse` warns. The pathways
of different texts become the same, too: a distance that falls is no good sign by itself.

    python examples/moe_language_model.py [--logdir logs/moe_language_model] [--steps 300] [--seeds 1]
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sysconfig
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dynwatch.callbacks import DynWatch, MoEPathwayMonitor

PACKAGES = ("asyncio", "email", "json", "logging", "multiprocessing", "unittest", "urllib", "xml")
BYTES = 100_000  # of each package, at most
CONTEXT, BATCH = 64, 16
WIDTH, HEADS, LAYERS = 64, 4, 3
EXPERTS, TOP_K = 8, 2
LR = 2e-3
READ_EVERY = 20
LAST = 100  # steps of which the table tells the mean


@dataclass(frozen=True)
class Run:
    name: str
    balance: float  # weight of the load balancing loss
    router_lr: float


RUNS = (Run("healthy", 0.02, LR), Run("collapsed", 0.0, 500 * LR))


class MoE(nn.Module):
    """A feed-forward layer of experts, of which a router chooses two for each byte."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)  # the router's own
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)) for _ in range(EXPERTS)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the experts make of x [N, d], and the load balancing loss E Σ f P (arXiv 2101.03961)."""
        probabilities = self.gate(self.norm(x)).softmax(-1)
        weights, chosen = probabilities.topk(TOP_K)
        weights = weights / weights.sum(-1, keepdim=True)
        load = torch.bincount(chosen.flatten(), minlength=EXPERTS)
        order = chosen.flatten().argsort()  # slots by expert, so that each expert runs once
        token = order // TOP_K
        parts = x[token].split(load.tolist())
        done = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        mixed = torch.zeros_like(x).index_add(0, token, done * weights.flatten()[order, None])
        return mixed, EXPERTS * (load / load.sum() * probabilities.mean(0)).sum()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.moe = MoE()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        n, length, _ = x.shape
        q, k, v = self.qkv(self.norm_1(x)).view(n, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(n, length, WIDTH))
        mixed, balance = self.moe(self.norm_2(x).flatten(0, 1))
        return x + mixed.view_as(x), balance


class Writer(pl.LightningModule):
    """Byte-level language model."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run
        self.tokens, self.positions = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        for table in (self.tokens, self.positions):
            nn.init.normal_(table.weight, std=0.02)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256, bias=False)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x, balance = self.tokens(ids) + self.positions.weight, torch.zeros(())
        for block in self.blocks:
            x, of_block = block(x)
            balance = balance + of_block
        return self.head(self.norm(x)), balance

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        logits, balance = self(batch["input_ids"])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
        self.log("train_loss", loss)
        return loss + self.run.balance * balance

    def configure_optimizers(self) -> torch.optim.Optimizer:
        routers = [p for block in self.blocks for part in (block.moe.norm, block.moe.gate) for p in part.parameters()]
        known = set(map(id, routers))
        rest = [p for p in self.parameters() if id(p) not in known]
        return torch.optim.AdamW(
            [{"params": rest}, {"params": routers, "lr": self.run.router_lr}], lr=LR, weight_decay=0.01
        )


def library() -> list[dict[str, object]]:
    """Windows of Python's own sources, which are on every machine that has Python, with the package of each."""
    found: list[dict[str, object]] = []
    for package in PACKAGES:
        files = sorted(Path(sysconfig.get_paths()["stdlib"], package).rglob("*.py"))
        text = b"".join(path.read_bytes() for path in files)[:BYTES]
        whole = text[: len(text) // (CONTEXT + 1) * (CONTEXT + 1)]
        for window in torch.frombuffer(bytearray(whole), dtype=torch.uint8).long().view(-1, CONTEXT + 1):
            found.append({"input_ids": window[:-1], "labels": window[1:], "domain": package})
    return found


@dataclass(frozen=True)
class Row:
    """The end of a run."""

    loss: float
    effective: Sequence[float]  # experts, by layer
    busiest: float  # largest share of the bytes that one expert gets, over the layers
    distance: float  # normalised, between pathways of one package
    verdicts: dict[str, str]  # reasons, by rule


def train(run: Run, seed: int, steps: int, logdir: Path) -> Row:
    pl.seed_everything(seed, verbose=False)
    # Pathways are compared within a package: "domain" is where the monitor looks for a sample's group.
    monitor = MoEPathwayMonitor(every_n_steps=READ_EVERY, probe_every_n_steps=READ_EVERY)
    # Curvature and step radius have examples of their own.
    watch = DynWatch(moe=monitor, hessian=False, step_radius=False, report=False)
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=TensorBoardLogger(logdir, name=None, version=f"{run.name}_{seed}", default_hp_metric=False),
        callbacks=[watch],
        log_every_n_steps=READ_EVERY // 2,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Writer(run), DataLoader(library(), batch_size=BATCH, shuffle=True))  # type: ignore[arg-type]
    events = EventAccumulator(trainer.log_dir, size_guidance={"scalars": 0}).Reload()

    def late(tag: str) -> float:
        return statistics.mean(event.value for event in events.Scalars(tag) if event.step >= steps - LAST)

    assert watch.early_termination is not None
    layers = range(LAYERS)
    return Row(
        late("train_loss"),
        [late(f"moe/layer_{layer}/effective_experts") for layer in layers],
        max(late(f"moe/layer_{layer}/max_load") for layer in layers),
        late("moe/distance_normalized"),
        {verdict.rule: verdict.reason for _, verdict in watch.early_termination.verdicts},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logdir", type=Path, default=Path("logs/moe_language_model"))
    parser.add_argument("--steps", type=int, default=300, help="of each run")
    parser.add_argument("--seeds", type=int, default=1, help="how many times to do it, with other weights")
    asked = parser.parse_args()
    if asked.steps < LAST:
        parser.error(f"--steps {asked.steps} is too few for a mean over the last {LAST}")
    for name in ("pytorch_lightning", "lightning.pytorch", "dynwatch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*(does not have many workers|smaller than the logging interval|treespec).*")
    torch.set_num_threads(1)  # a net this small gains nothing from more, and waits where cores are busy

    print(f"{EXPERTS} experts, {TOP_K} for each byte. Means of the last {LAST} of {asked.steps} steps; an even load is")
    print(f"{EXPERTS} effective experts, with {TOP_K / EXPERTS:.0%} of the bytes at the busiest one.\n")
    names = "".join(f"{f'layer {layer}':>9}" for layer in range(LAYERS))
    print(f"{'':26}effective experts")
    print(f"{'':11}{'seed':>4}{'loss':>7}{names}{'busiest':>9}{'distance':>10}  warned by")
    said = []
    for seed in range(asked.seeds):
        for run in RUNS:
            row = train(run, seed, asked.steps, asked.logdir)
            effective = "".join(f"{value:9.2f}" for value in row.effective)
            verdict = ", ".join(row.verdicts) or "none"
            figures = f"{row.loss:7.3f}{effective}{row.busiest:9.0%}{row.distance:10.3f}"
            print(f"{run.name:11}{seed:4}{figures}  {verdict}", flush=True)
            if "router_collapse" in row.verdicts:
                said.append(f"{run.name}, seed {seed}: {row.verdicts['router_collapse']}")
    print("", *said, sep="\n")
    print(f"\nThe runs side by side: tensorboard --logdir {asked.logdir}")


if __name__ == "__main__":
    main()
