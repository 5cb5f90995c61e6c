"""A whole sequence model in torch: optional embedding, a stack of recurrent layers, optional head.

Owns the module that people train and export. Must not know ONNX.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.fused.cells import State
from models.fused.recurrence import Recurrence
from models.spec import Activation, ModelSpec
from models.state_dicts import from_torch_state_dict
from models.weights import check_shapes


class Head(nn.Module):
    """The linear map from the top layer's output to the model's, ``W[O, F]`` and ``b[O]``; Xavier, bias 0."""

    def __init__(self, input_size: int, output_size: int) -> None:
        super().__init__()
        self.W = nn.Parameter(nn.init.xavier_uniform_(torch.empty(output_size, input_size)))
        self.b = nn.Parameter(torch.zeros(output_size))

    def forward(self, x: Tensor) -> Tensor:
        """``x[..., F]`` to ``[..., O]``."""
        return nn.functional.linear(x, self.W, self.b)


class SequenceModel(nn.Module):
    """A recurrent sequence model with fused gates.

    Its ``state_dict`` has the canonical names of ``models.spec``: ``layers.0.W_x``, ``embedding``, ``head.W``.

    Args:
        spec: what the model is made of.

    Example:
        >>> model = SequenceModel(ModelSpec((Layer("lstm", 8, 64),), head_size=10))
        >>> y, states = model(torch.zeros(32, 8, 8))
        >>> y.shape
        torch.Size([32, 8, 10])
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embedding: nn.Parameter | None = None
        if spec.vocabulary_size is not None:
            self.embedding = nn.Parameter(torch.randn(spec.vocabulary_size, spec.layers[0].input_size))
        self.layers = nn.ModuleList(Recurrence(layer) for layer in spec.layers)
        self.head = None if spec.head_size is None else Head(spec.layers[-1].output_size, spec.head_size)

    @property
    def directions(self) -> list[Recurrence]:
        """The directions of all layers, bottom first, forward before backward: the order of the states."""
        return [d for layer in self.layers if isinstance(layer, Recurrence) for d in layer.directions]

    def forward(
        self, x: Tensor, lengths: Tensor | None = None, states: Sequence[State] | None = None
    ) -> tuple[Tensor, list[State]]:
        """Run over whole sequences, or over their next steps.

        Args:
            x: ``[N, T, I]``, or token ids ``[N, T]`` where the model has an embedding.
            lengths: ``[N]`` integers, the valid steps of each row; None for all T.
            states: the state before the first step, ``(h,)`` or ``(h, c)`` of ``[N, H]`` for each layer and direction,
                bottom first, forward before backward; None for the model's own initial state.

        Returns:
            The output, ``[N, T, O]`` with zeros past a row's length, or ``[N, O]`` where the head is on the last valid
            step; and the states after each row's last valid step, in the form of ``states``.

        Raises:
            ValueError: there is no step, or none where the last one is asked for; lengths or states do not fit.
        """
        N, T = x.shape[:2]
        self._check_lengths(lengths, N, T)
        states = [d.initial_state(N) for d in self.directions] if states is None else states
        if len(states) != len(self.directions):
            raise ValueError(
                f"got {len(states)} states, expected {len(self.directions)}: one for each layer and direction"
            )
        y = x.transpose(0, 1) if self.embedding is None else self.embedding[x.T]
        valid = None
        if lengths is not None:
            lengths = lengths.to(x.device)
            valid = (torch.arange(T, device=x.device)[:, None] < lengths).unsqueeze(2)
            y = y.where(valid, 0.0)  # whatever the padding is: 0 times not-a-number would spoil every gradient
        before, after = iter(states), []
        for layer in self.layers:
            assert isinstance(layer, Recurrence)
            outputs = []
            for direction in layer.directions:
                output, state = direction(y, valid, next(before))
                outputs.append(output)
                after.append(state)
            y = torch.cat(outputs, dim=2)
        if self.spec.head_on == "last":
            last = torch.full((N,), T, device=x.device) if lengths is None else lengths
            y = y[(last - 1).clamp(min=0).long(), torch.arange(N, device=x.device)]
            return (y if self.head is None else self.head(y)), after
        if self.head is not None:
            y = self.head(y) if valid is None else self.head(y).where(valid, 0.0)
        return y.transpose(0, 1), after

    def _check_lengths(self, lengths: Tensor | None, N: int, T: int) -> None:
        if T == 0:
            raise ValueError("x has no steps (T = 0), expected at least one")
        if lengths is None:
            return
        if lengths.shape != (N,) or lengths.is_floating_point():
            raise ValueError(f"lengths are {lengths.dtype} of shape {list(lengths.shape)}, expected integers [{N}]")
        least = 1 if self.spec.head_on == "last" else 0
        if N and not (lengths.min() >= least and lengths.max() <= T):
            raise ValueError(f"lengths lie between {lengths.min()} and {lengths.max()}, expected {least} to T = {T}")

    @classmethod
    def from_torch(cls, recurrent: nn.LSTM | nn.GRU | nn.RNN, head: nn.Linear | None = None) -> SequenceModel:
        """Make a model that computes what a torch module computes; the weights are copied.

        Args:
            recurrent: the torch module, of any depth, in one direction or two. ``batch_first`` does not matter here: a
                ``SequenceModel`` has the batch first. Dropout is left out.
            head: what is applied to every step's output.

        Raises:
            ValueError: there is no such model here: the LSTM has projections, or the head does not fit.
        """
        activation: Activation = "relu" if recurrent.mode == "RNN_RELU" else "tanh"
        state_dict = {name: tensor.detach().cpu() for name, tensor in recurrent.state_dict().items()}
        layers, weights = from_torch_state_dict(state_dict, prefix="", activation=activation)
        spec = ModelSpec(tuple(layers), head_size=None if head is None else head.out_features)
        if head is not None:
            W = head.weight.detach().cpu().numpy()
            zeros = np.zeros(head.out_features, W.dtype)
            weights |= {"head.W": W, "head.b": zeros if head.bias is None else head.bias.detach().cpu().numpy()}
        return cls.from_weights(spec, weights)

    def weights(self) -> dict[str, NDArray[np.floating]]:
        """All weights under their canonical names, copied."""
        return {name: tensor.detach().cpu().numpy().copy() for name, tensor in self.state_dict().items()}

    @classmethod
    def from_weights(cls, spec: ModelSpec, weights: Mapping[str, NDArray[np.floating]]) -> SequenceModel:
        """Make a model that has these weights.

        Args:
            spec: what the model is made of.
            weights: every array of ``spec.weight_shapes``, all of one dtype.

        Raises:
            ValueError: a weight is missing, unknown, of the wrong shape, of another dtype than the others, or no
                floating point of 16, 32 or 64 bits.
        """
        check_shapes(weights, spec.weight_shapes)
        if len(dtypes := {array.dtype for array in weights.values()}) != 1:
            raise ValueError(f"weights must share one dtype, got {', '.join(sorted(map(str, dtypes)))}")
        if (dtype := dtypes.pop()) not in (np.float16, np.float32, np.float64):
            raise ValueError(f"weights are {dtype}, expected float16, float32 or float64")
        model = cls(spec).to(torch.from_numpy(np.zeros(0, dtype)).dtype)
        model.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in weights.items()})
        return model
