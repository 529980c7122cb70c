"""One `Callback` for both of Lightning's namespaces.

`lightning.pytorch` and `pytorch_lightning` each have a `Callback` class and some of their Trainers and
CLIs refuse the other's. A class that derives from both is accepted by both.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

NAMESPACES = ("pytorch_lightning", "lightning.pytorch")

if TYPE_CHECKING:
    from pytorch_lightning import Callback, LightningModule, Trainer
    from pytorch_lightning.loggers import Logger
else:

    def _import(name: str) -> ModuleType | None:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name in (name, name.split(".")[0]):
                return None
            raise  # installed but broken: that is another error, and hiding it would mislead

    _installed = [module for module in map(_import, NAMESPACES) if module is not None]
    if not _installed:
        raise ImportError(
            "dynwatch.callbacks needs PyTorch Lightning, and neither 'pytorch_lightning' nor 'lightning' can be "
            "imported. Run: pip install pytorch-lightning"
        )
    _bases = tuple(module.Callback for module in _installed)
    Callback = _bases[0] if len(_bases) == 1 else type("Callback", _bases, {"__doc__": "Both Lightning callbacks."})
    LightningModule = _installed[0].LightningModule
    Trainer = _installed[0].Trainer
    Logger = importlib.import_module(f"{_installed[0].__name__}.loggers").Logger

__all__ = ["Callback", "LightningModule", "Logger", "Trainer"]
