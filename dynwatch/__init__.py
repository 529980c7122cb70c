"""dynwatch: live diagnostics of a PyTorch Lightning run, and a reasoned end to poor ones.

This package is the engine: tensors in, numbers out. It imports torch and numpy only. The Lightning
callbacks are in `dynwatch.callbacks`:

    from dynwatch.callbacks import DynWatch

    trainer = pl.Trainer(callbacks=[DynWatch()])
"""

__version__ = "0.1.0"
