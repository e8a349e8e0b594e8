"""How the loss answers to a mask on every unit, found for all blocks in one backward pass a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_shrink.calibration.capture import model_inputs
from hf_shrink.calibration.frozen import frozen
from hf_shrink.calibration.labels import Labels, generator_of, log_loss
from hf_shrink.calibration.rerunning import rerunning_blocks
from hf_shrink.calibration.targets import Batch, kind_of
from hf_shrink.errors import CalibrationError
from hf_shrink.progress import ProgressCallback
from hf_shrink.pruning.samples import choose, rows_of
from hf_shrink.sharding import share

Sink = Callable[[Tensor], None]


def mask_gradients(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    readers: Mapping[str, nn.Module],
    batches: Sequence[Mapping[str, Any]],
    *,
    tokens: int | None,
    labels: Labels,
    seed: int,
    progress: ProgressCallback,
) -> dict[str, Tensor]:
    """The gradient of every sample's loss by a mask m = 1 on each input of some matrices.

    With x the matrix's input and m * x in its place, dL/dm = sum over the sample's tokens of x * dL/dx. That equals the
    sum of w * dL/dw over the weights that read the input, so it needs no gradient of any weight: one backward pass
    through the activations, with blocks that run again in it (see `rerunning_blocks`).

    Args:
        blocks: every block of the model, in order.
        readers: the matrices that read the units (output, down), by path.
        tokens: about how many tokens of the batches are used, chosen by `seed`; None: all.
        labels: what the loss is of, see `log_loss`.

    Returns:
        By path, float32 (samples, in): a mask over several inputs has the sum of their gradients.

    Raises:
        CalibrationError: no data, no labels where they are asked for, a matrix that saw no sample, or NaN or Inf.
    """
    if not batches:
        raise CalibrationError("scores by gradients need calibration data")
    found: dict[str, list[Tensor]] = {path: [] for path in readers}
    chosen, own = choose(batches, tokens, seed), []
    shared = share(len(chosen))
    with frozen(model), torch.enable_grad(), rerunning_blocks(blocks, float32=True):
        for done, number in enumerate(shared.own):
            progress("reading gradients", done, len(shared.own))
            own.append(_of_batch(model, readers, chosen[number], labels, generator_of(seed, number)))
    progress("reading gradients", len(shared.own), len(shared.own))
    for sums in shared.gather(own):
        for path, rows in sums.items():
            found[path].append(rows)
    for path, parts in found.items():
        if not parts:
            raise CalibrationError(f"{path} saw no calibration data; give data that reaches it")
        if not all(bool(torch.isfinite(part).all()) for part in parts):
            raise CalibrationError(f"{path}: NaN or Inf in gradients; check the weights and the calibration data")
    return {path: torch.cat(parts) for path, parts in found.items()}


def _of_batch(
    model: nn.Module, readers: Mapping[str, nn.Module], batch: Batch, labels: Labels, generator: torch.Generator
) -> dict[str, Tensor]:
    samples = rows_of(batch) or 1
    sums: dict[str, Tensor] = {}

    def sink(path: str) -> Sink:
        def add(products: Tensor) -> None:
            # Some blocks merge batch and sequence in front of their MLP; samples come first in either form.
            found = products.reshape(samples, -1, products.shape[-1]).sum(1)
            sums[path] = sums[path] + found if path in sums else found

        return add

    anchor = torch.zeros((), requires_grad=True)
    with _probed(readers, anchor, sink):
        outputs = model(**model_inputs(model, batch), return_dict=True)
        device = next(model.parameters()).device
        on_device = {key: value.to(device) for key, value in batch.items() if isinstance(value, Tensor)}
        # Inside, because blocks that run again must find the same probes.
        loss = log_loss(kind_of(model), on_device, outputs, labels, generator, model)
        loss.backward()  # type: ignore[no-untyped-call]
    return sums


class _Probe(torch.autograd.Function):
    """Hands its input on; in the backward pass it hands input times gradient to a sink.

    The input is saved the way autograd saves tensors, so that a block that runs again does not keep it either. The
    anchor is a leaf that wants a gradient, so that there is a graph even where nothing before the probe does.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, sink: Sink) -> Tensor:
        ctx.save_for_backward(x)
        ctx.sink = sink
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        ctx.sink(x.float() * gradients[0].float())
        return gradients[0], None, None


@contextmanager
def _probed(readers: Mapping[str, nn.Module], anchor: Tensor, sink: Callable[[str], Sink]) -> Iterator[None]:
    """A probe in front of every reader."""

    def hook(path: str) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
        own = sink(path)
        return lambda _, args: (_Probe.apply(args[0], anchor, own), *args[1:])  # type: ignore[no-untyped-call]

    with ExitStack() as stack:
        for path, module in readers.items():
            stack.callback(module.register_forward_pre_hook(hook(path)).remove)
        yield
