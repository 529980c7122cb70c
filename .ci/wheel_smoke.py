"""Run by CI with the installed wheel, outside the source tree and with one Lightning namespace only."""

import importlib.util
import pathlib
import subprocess
import sys
import tempfile

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger

import dynwatch
import dynwatch.callbacks
from dynwatch.callbacks import DynWatch

assert importlib.util.find_spec("lightning") is None, "this check is for an install without 'lightning'"
home = pathlib.Path(dynwatch.__file__).parent
assert "site-packages" in home.parts, home
assert pathlib.Path(dynwatch.callbacks.__file__).parent == home / "callbacks"
assert (home / "py.typed").exists()
assert importlib.util.find_spec("callbacks") is None, "the wheel must not install a top-level 'callbacks'"


class Line(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


with tempfile.TemporaryDirectory() as folder:
    watch = DynWatch(report=False)
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=TensorBoardLogger(folder), callbacks=[watch], enable_progress_bar=False
    )
    trainer.fit(Line(), torch.utils.data.DataLoader(torch.randn(64, 4), batch_size=4))
    assert "grad_norm/total" in trainer.callback_metrics, sorted(trainer.callback_metrics)
    replay = [sys.executable, "-m", "dynwatch.rules", folder, "--when", "stop/loss < 1000"]
    told = subprocess.run(replay, check=True, capture_output=True, text=True).stdout
    assert "when_stop_loss" in told, told
print(f"wheel {dynwatch.__version__}: ok")
