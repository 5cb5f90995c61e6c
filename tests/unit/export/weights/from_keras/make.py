"""How the files beside it were made: with Keras 3.15.1 on torch, by ``KERAS_BACKEND=torch python make.py``.

Keras is no dependency of the project; this runs wherever it is installed.
"""

from __future__ import annotations

from pathlib import Path

import keras
import numpy as np

FOLDER = Path(__file__).parent
x = np.random.default_rng(0).standard_normal((2, 9, 3)).astype(np.float32)


def model(*layers: keras.layers.Layer) -> keras.Model:
    """Layers on each other, with the biases that training would give them."""
    made = keras.Sequential([keras.Input((None, 3)), *layers], name="net")
    random = np.random.default_rng(1)
    for weight in made.weights:
        if "bias" in weight.name:
            weight.assign(random.normal(0, 0.3, weight.shape))
    return made


keras.utils.set_random_seed(0)
stack = model(
    keras.layers.GRU(5, return_sequences=True, dropout=0.1),
    keras.layers.GRU(4, return_sequences=True, reset_after=False),
    keras.layers.Dense(2),
)
both = model(
    keras.layers.Bidirectional(keras.layers.LSTM(4, return_sequences=True)),
    keras.layers.Bidirectional(keras.layers.LSTM(3, return_sequences=True)),
    keras.layers.Dense(2),
)
trained = model(keras.layers.SimpleRNN(4, activation="relu"), keras.layers.Dense(2))
trained.compile(optimizer="adam", loss="mse")
trained.fit(x, np.ones((2, 2)), verbose=0)

stack.save_weights(FOLDER / "stack.weights.h5")
both.save(FOLDER / "both.h5")
trained.save_weights(FOLDER / "trained.weights.h5")
outputs = {name: each.predict(x, verbose=0) for name, each in (("stack", stack), ("both", both), ("trained", trained))}
np.savez(FOLDER / "outputs.npz", x=x, **outputs)
