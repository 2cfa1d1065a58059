"""`fit` in Keras 3, with a cosine decay on top of the learned step sizes.

pip install keras torch && KERAS_BACKEND=torch python examples/keras/fit.py
"""

import keras
import numpy as np
from metaopt_keras import MetaOptimizer
from metaopt_keras.callbacks import AverageCallback, LogCallback

import metaopt as mo


def batch(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return inputs and targets."""
    x = np.random.default_rng(seed).normal(size=(rows, 8)).astype("float32")
    return x, np.sin(x[:, :1]) + x[:, 1:2]


def main(epochs: int = 10, page: str | None = None) -> tuple[keras.Model, keras.callbacks.History]:
    """Train, and return the model and what `fit` does; write a page of the run to `page`."""
    keras.utils.set_random_seed(0)
    layers = [
        keras.layers.Dense(32, activation="tanh", name="in"),
        keras.layers.Dense(1, name="out"),
    ]
    model = keras.Sequential([keras.Input((8,)), *layers])
    x, y = batch(2048, seed=0)
    steps = epochs * len(x) // 64
    opt = MetaOptimizer(
        base=mo.AdamW(weight_decay=0.01),
        blocks="tensor",
        lr=keras.optimizers.schedules.CosineDecay(1.0, steps),
    )
    model.compile(optimizer=opt, loss="mse")
    history = model.fit(
        x,
        y,
        batch_size=64,
        epochs=epochs,
        validation_data=batch(256, seed=1),
        callbacks=[AverageCallback(), LogCallback(page)],  # it validates at averaged weights
        verbose=2 if page else 0,
    )
    return model, history


if __name__ == "__main__":
    main(page="keras_run.html")
