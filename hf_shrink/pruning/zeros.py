"""Keep what is zero at zero while a model is trained."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from hf_shrink.errors import RecipeError


class ZeroKeeper:
    """Holds a model's zeros while it is trained; made by `keep_zeros`.

    Gradients of zeros are zeroed as they come (so they count neither in their norm nor in an optimizer's momentum),
    and after every step of an optimizer that has such a parameter the zeros are put back, whatever it did to them. The
    model itself is not changed: no parametrization, nothing more in its state dict. A context manager; or call `close`.

    Attributes:
        kept: bool, by path of the parameter: where it is not zero.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._handles: list[RemovableHandle] = []
        self._paths: dict[int, str] = {}
        self.kept: dict[str, Tensor] = {}
        self.update()
        self._step = register_optimizer_step_post_hook(self._after_step)

    def update(self, pruned: Collection[str] = ()) -> None:
        """Hold the zeros that the model has now: after more of its weights were pruned, or other ones.

        Args:
            pruned: paths of parameters that pruning may have emptied. Others that are zero altogether are new ones.
        """
        self._forget_gradients()
        self.kept, self._paths = {}, {}
        for path, parameter in self._model.named_parameters():
            if parameter.dim() < 2 or not parameter.requires_grad:
                continue
            kept = parameter.detach() != 0
            if kept.all() or not (path in pruned or kept.any()):
                continue
            self.kept[path], self._paths[id(parameter)] = kept, path
            self._handles.append(parameter.register_hook(self._gradient_hook(path)))  # type: ignore[no-untyped-call]

    def apply(self) -> None:
        """Put the zeros back now. For weights that something else than a `torch.optim` optimizer has changed."""
        self._zero(self._model.parameters())

    def sparsity(self) -> dict[str, float]:
        """The fraction of zeros held, by path of the parameter."""
        return {path: 1 - float(kept.float().mean()) for path, kept in self.kept.items()}

    def close(self) -> None:
        """Let go: from now on zeros are trained like other weights."""
        self._forget_gradients()
        self._step.remove()

    def __enter__(self) -> ZeroKeeper:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _mask(self, path: str, like: Tensor) -> Tensor:
        """The mask on the tensor's device, to which the model may have moved since."""
        if self.kept[path].device != like.device:
            self.kept[path] = self.kept[path].to(like.device)
        return self.kept[path]

    def _gradient_hook(self, path: str) -> Any:
        def hook(gradient: Tensor) -> Tensor:
            return gradient * self._mask(path, gradient)

        return hook

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._zero(parameter for group in optimizer.param_groups for parameter in group["params"])

    def _zero(self, parameters: Iterable[nn.Parameter]) -> None:
        with torch.no_grad():
            for parameter in parameters:
                path = self._paths.get(id(parameter))
                if path is not None:
                    parameter.mul_(self._mask(path, parameter))

    def _forget_gradients(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


def keep_zeros(model: nn.Module) -> ZeroKeeper:
    """Keep a pruned model's zeros at zero while it is trained, in a loop of your own or by transformers' Trainer.

        with hf_shrink.keep_zeros(model):
            trainer.train()
        model.save_pretrained(...)          # has the zeros

    Held are the zeros of every parameter that has two dimensions or more and wants gradients; not biases and norms.
    Parameters that are zero altogether are left alone: they are new ones that are to be trained (LoRA's B); where
    pruning emptied some, name them to `ZeroKeeper.update`.

    Not for optimizers that train copies of the parameters (DeepSpeed, FSDP): call `ZeroKeeper.apply` there after
    loading the trained weights back.

    Raises:
        RecipeError: the model has no zeros to hold.
    """
    keeper = ZeroKeeper(model)
    if not keeper.kept:
        keeper.close()
        raise RecipeError(
            "the model has no zeros to keep; prune its weights first (prune: {what: weights}), before it is quantized, "
            "and let them want gradients"
        )
    return keeper
