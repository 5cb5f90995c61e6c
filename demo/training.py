"""Trains a fused-gate LSTM that names the digit anew after each row.

Owns the recipe. Knows models.fused and torch; must not know export or the server.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from demo.digits import CLASSES, ROWS, VALUES, Digits
from models.fused import SequenceModel
from models.spec import Layer, ModelSpec

SPEC = ModelSpec((Layer("lstm", input_size=VALUES, hidden_size=96),), head_size=CLASSES)
EPOCHS = 60
_BATCH = 64
_LEARNING_RATE = 1e-2


def train(digits: Digits, each_epoch: Callable[[float], None]) -> SequenceModel:
    """Trains from a fixed seed.

    Args:
        digits: the images to train on.
        each_epoch: told the loss after each of ``EPOCHS`` epochs.
    """
    torch.manual_seed(0)
    images, labels = torch.from_numpy(digits.images), torch.from_numpy(digits.labels)
    model = SequenceModel(SPEC)
    optimizer = torch.optim.AdamW(_parameter_groups(model))
    batches = len(images) // _BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=EPOCHS * batches)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(images))[: batches * _BATCH].view(batches, _BATCH):
            outputs, _ = model(_disturb(images[chosen]))
            loss = _loss(outputs, labels[chosen])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        each_epoch(loss.item())
    return model.eval()


def _parameter_groups(model: SequenceModel) -> list[dict[str, object]]:
    """All weights with their decay, the recurrent ones with ten times as much.

    Large recurrent weights make a model chaotic: on sequences unlike those it was trained on, a difference in the last
    bit grows from step to step. Export holds it to 2e-6 on just such sequences.
    """
    parameters = dict(model.named_parameters())
    recurrent = [parameters.pop(name) for name in list(parameters) if name.endswith("W_h")]
    return [{"params": recurrent, "weight_decay": 1.0}, {"params": list(parameters.values()), "weight_decay": 0.1}]


def _loss(outputs: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy after each row of ``outputs[N, T, O]``, later rows counting for more: they have seen more."""
    weights = torch.arange(1, ROWS + 1) / sum(range(1, ROWS + 1))
    each = functional.cross_entropy(
        outputs.transpose(1, 2), labels[:, None].expand(-1, ROWS), reduction="none", label_smoothing=0.05
    )
    return (each * weights).sum(1).mean()


def _disturb(images: Tensor) -> Tensor:
    """Turns, moves and scales each image ``[N, 8, 8]`` a little and adds noise, so that few images go a long way."""
    N = len(images)
    angle, scale = torch.empty(N).uniform_(-0.15, 0.15), torch.empty(N).uniform_(0.9, 1.1)
    placing = torch.empty(N, 2, 3).uniform_(-0.125, 0.125)
    placing[:, 0, 0] = placing[:, 1, 1] = angle.cos() * scale
    placing[:, 1, 0] = angle.sin() * scale
    placing[:, 0, 1] = -placing[:, 1, 0]
    grid = functional.affine_grid(placing, [N, 1, ROWS, VALUES], align_corners=False)
    moved = functional.grid_sample(images[:, None], grid, align_corners=False)[:, 0]
    return moved + 0.05 * torch.randn_like(moved)
