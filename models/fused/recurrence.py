"""One recurrent layer over time: the input product of all steps at once, then one recurrent product a step.

Owns the parameters of a layer, their initialisation and the time loop. Must not know embeddings, heads or other layers.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from models.fused.cells import STEPS, State
from models.spec import GATES, Layer


class Recurrence(nn.Module):
    """One direction of one layer; a bidirectional layer holds its backward direction under ``reverse``.

    The parameters bear the names and shapes of ``Layer.weight_shapes``. They begin as is usual, gate by gate: ``W_x``
    Xavier (Glorot and Bengio 2010), ``W_h`` orthogonal (Saxe et al. 2014), the forget gate's bias 1 (Jozefowicz et al.
    2015), everything else 0.
    """

    W_x: nn.Parameter
    W_h: nn.Parameter
    b: nn.Parameter

    def __init__(self, layer: Layer, backward: bool = False) -> None:
        super().__init__()
        self.layer = layer
        self.backward = backward
        for name, shape in replace(layer, bidirectional=False).weight_shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))
        self.reset_parameters()
        self.reverse = Recurrence(layer, backward=True) if layer.bidirectional and not backward else None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw fresh weights for this direction."""
        gates = GATES[self.layer.cell]
        for parameter in self.parameters(recurse=False):
            nn.init.zeros_(parameter)
        for W_x, W_h in zip(self.W_x.chunk(len(gates)), self.W_h.chunk(len(gates)), strict=True):
            nn.init.xavier_uniform_(W_x)
            nn.init.orthogonal_(W_h)
        if "f" in gates and self.layer.bias:
            nn.init.ones_(self.b.chunk(len(gates))[gates.index("f")])

    @property
    def directions(self) -> tuple[Recurrence, ...]:
        """The layer's directions, forward first."""
        return (self,) if self.reverse is None else (self, self.reverse)

    def initial_state(self, N: int) -> State:
        """The state before the first step, ``[N, H]`` each: learned, or zeros."""
        names = ("h0", "c0") if self.layer.has_cell_state else ("h0",)
        if self.layer.learned_initial_state:
            return tuple(getattr(self, name).expand(N, -1) for name in names)
        return tuple(self.W_h.new_zeros(N, self.layer.hidden_size) for _ in names)

    def forward(self, x: Tensor, valid: Tensor | None, state: State) -> tuple[Tensor, State]:
        """Run this direction over time.

        Args:
            x: ``[T, N, I]``.
            valid: ``[T, N, 1]``, False past a row's length, where the state stays and the output is 0; None: all valid.
            state: the state before the first step, ``[N, H]`` each.

        Returns:
            The outputs ``[T, N, H]``, and the state after the last step read.
        """
        weights = dict(self.named_parameters(recurse=False))
        step = STEPS[self.layer.cell]
        a = nn.functional.linear(x, self.W_x, weights.get("b")).unbind(0)
        outputs: dict[int, Tensor] = {}
        for t in reversed(range(len(a))) if self.backward else range(len(a)):
            after = step(self.layer, weights, a[t], state)
            if valid is None:
                outputs[t], state = after[0], after
            else:
                outputs[t] = after[0].where(valid[t], 0.0)
                state = tuple(new.where(valid[t], old) for new, old in zip(after, state, strict=True))
        return torch.stack([outputs[t] for t in range(len(a))]), state
