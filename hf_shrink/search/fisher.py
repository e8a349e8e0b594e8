"""How the predictions answer to errors in what matrices put out: the Fisher information, from one backward pass.

With labels drawn from the model's own predictions, the expected outer product of the log-likelihood's gradients g is
the Hessian of the KL divergence. Of it we keep a diagonal, g_tr^2 of every token t and output row r of a matrix, and of
that its sums over tokens and over rows, whose product stands for it. Output errors e then cost 1/2 sum over t, r of
g_tr^2 e_tr^2 nats: errors of different rows and tokens are taken for independent, which rounding makes them nearly.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_shrink.architectures.linears import matrix
from hf_shrink.calibration.capture import model_inputs
from hf_shrink.calibration.frozen import frozen
from hf_shrink.calibration.labels import generator_of, log_loss
from hf_shrink.calibration.rerunning import rerunning_blocks
from hf_shrink.calibration.targets import Batch, kind_of, targets_of
from hf_shrink.errors import CalibrationError
from hf_shrink.progress import ProgressCallback
from hf_shrink.sharding import share

Sink = Callable[[Tensor], None]


@dataclass
class OutputGradients:
    """Of one matrix's output.

    Attributes:
        rows: float64 (out,), the sum of g_tr^2 over tokens t.
        tokens: for each batch of this process float32 (tokens,), the sum of g_tr^2 over rows r; 0 for padding, which
            nothing reads. None are kept of matrices that tokens are routed to.
    """

    rows: Tensor
    tokens: list[Tensor]


@dataclass(frozen=True)
class Fisher:
    """Attributes:
    outputs: by path of the matrix.
    predictions: how many predictions the log-likelihoods were summed over.
    """

    outputs: Mapping[str, OutputGradients]
    predictions: int


def output_gradients(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    matrices: Mapping[str, nn.Module],
    batches: Sequence[Mapping[str, Any]],
    seed: int,
    progress: ProgressCallback,
    routed: Collection[str] = (),
) -> Fisher:
    """The Fisher information at the outputs of matrices, on the predictions of all batches.

    Args:
        blocks: every block of the model, in order; they run again in the backward pass, in float32.
        matrices: by path.
        routed: those to which only some tokens come, perhaps none: experts'.

    Raises:
        CalibrationError: a matrix that saw no tokens, or NaN or Inf.
    """
    found: dict[str, OutputGradients] = {}
    predictions = 0
    shared = share(len(batches))
    with frozen(model), torch.enable_grad(), rerunning_blocks(blocks, float32=True):
        for done, number in enumerate(shared.own):
            progress("reading gradients", done, len(shared.own))
            generator = generator_of(seed, number)
            for path, gradients in _of_batch(model, matrices, batches[number], generator).items():
                if path == "":
                    predictions += int(gradients)
                    continue
                squares = gradients.flatten(0, -2).square()
                rows = squares.sum(0, dtype=torch.float64)
                own = found.setdefault(path, OutputGradients(torch.zeros_like(rows), []))
                own.rows += rows
                if path not in routed:
                    own.tokens.append(squares.sum(1))
    progress("reading gradients", len(shared.own), len(shared.own))
    for path in routed:
        if path not in found:
            weight = matrix(matrices[path])
            found[path] = OutputGradients(torch.zeros(len(weight), dtype=torch.float64, device=weight.device), [])
    for path in matrices:
        if path not in routed and (path not in found or len(found[path].tokens) != len(shared.own)):
            raise CalibrationError(f"{path} does not see all of the calibration data; give data that reaches it")
        shared.add_up(found[path].rows)
        if not torch.isfinite(found[path].rows).all():
            raise CalibrationError(f"{path}: NaN or Inf in gradients; check the weights and the calibration data")
    return Fisher(found, int(shared.totals([predictions])[0]))


def _of_batch(
    model: nn.Module, matrices: Mapping[str, nn.Module], batch: Mapping[str, Any], generator: torch.Generator
) -> dict[str, Tensor]:
    """Gradients by path, (..., out); under "" the number of predictions."""
    sums: dict[str, Tensor] = {}

    def sink(path: str) -> Sink:
        def add(gradient: Tensor) -> None:
            sums[path] = sums[path] + gradient if path in sums else gradient

        return add

    anchor = torch.zeros((), requires_grad=True)
    with _probed(matrices, anchor, sink):
        outputs = model(**model_inputs(model, batch), return_dict=True)
        device = next(model.parameters()).device
        on_device: Batch = {key: value.to(device) for key, value in batch.items() if isinstance(value, Tensor)}
        kind = kind_of(model)
        # Inside, because blocks that run again must find the same probes.
        log_loss(kind, on_device, outputs, "model", generator, model).backward()  # type: ignore[no-untyped-call]
    sums[""] = targets_of(kind, on_device, outputs, model).positions.sum()
    return sums


class _Probe(torch.autograd.Function):
    """Hands its input on, and its gradient to a sink. The anchor wants a gradient, so that there is a graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, sink: Sink) -> Tensor:
        ctx.sink = sink
        return x.clone()  # models may add to it in place, which autograd refuses of a view

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        ctx.sink(gradients[0].detach().float())
        return gradients[0], None, None


@contextmanager
def _probed(matrices: Mapping[str, nn.Module], anchor: Tensor, sink: Callable[[str], Sink]) -> Iterator[None]:
    """A probe behind every matrix."""

    def hook(path: str) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        own = sink(path)
        return lambda _, args, output: _Probe.apply(output, anchor, own)  # type: ignore[no-untyped-call]

    with ExitStack() as stack:
        for path, module in matrices.items():
            stack.callback(module.register_forward_hook(hook(path)).remove)
        yield
