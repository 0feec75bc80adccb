"""Token losses that never store all positions x vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree

from minigpt4.common.types import Batch

_CHUNK_LOGITS = 1 << 23
"""Most logits of a chunk: 262 positions of 32,000 words, 65 of 128,000, 32 of 256,000."""


@dataclass
class LossOutput:
    """loss_sum: scalar float32, summed over target tokens. sample_loss [B]: the same per sample, detached."""

    loss_sum: Tensor
    sample_loss: Tensor
    num_targets: int


_pytree.register_dataclass(LossOutput)  # so that fully_shard finds the loss in it and acts before its backward


@dataclass(frozen=True)
class LogitShape:
    """What a model does to the logits of its head: ``scale`` them, then bend them into (-cap, cap); 0 = no cap."""

    scale: float = 1.0
    cap: float = 0.0

    @property
    def changes(self) -> bool:
        """Whether logits are anything else than the head's output."""
        return self != LogitShape()

    def __call__(self, logits: Tensor) -> Tensor:
        """logits of any shape -> logits as the model gives them out."""
        if self.scale != 1.0:
            logits = logits * self.scale
        return torch.tanh(logits / self.cap) * self.cap if self.cap else logits

    def slope(self, logits: Tensor) -> Tensor | float:
        """Derivative with respect to the head's output; ``logits`` are the shaped ones."""
        return self.scale * (1 - (logits / self.cap) ** 2) if self.cap else self.scale


class _FrozenHeadCrossEntropy(torch.autograd.Function):
    """Cross-entropy through a frozen linear head; the gradient of the hidden states is made chunk by chunk in the
    forward, so neither logits nor their gradient outlive a chunk (idea of Liger and of cut cross-entropy)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: tuple[Tensor, Tensor | None, LogitShape], targets: Tensor, chunk: int
    ) -> Tensor:
        """hidden [n, D], head weight [V, D] and bias [V], targets [n] -> losses [n] float32."""
        weight, bias, shape = head
        needs_grad = bool(ctx.needs_input_grad[0])
        grad = torch.empty_like(hidden) if needs_grad else None
        losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            logits = shape(functional.linear(hidden[part].to(weight.dtype), weight, bias).float())  # [c, V]
            slope = shape.slope(logits) if needs_grad else 1.0  # from here on the logits are changed in place
            logits -= logits.amax(-1, keepdim=True)
            target = targets[part, None]
            target_logit = logits.gather(1, target)[:, 0]
            total = logits.exp_().sum(-1)
            losses[part] = total.log() - target_logit
            if grad is not None:
                logits /= total[:, None]
                logits.scatter_add_(1, target, logits.new_full(target.shape, -1.0))
                if shape.changes:
                    logits *= slope
                grad[part] = (logits.to(weight.dtype) @ weight).to(hidden.dtype)
            del logits, slope  # else they are alive while the next chunk's logits are made
        if grad is not None:
            ctx.save_for_backward(grad)
        return losses

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Scales the stored gradient by each position's weight."""
        (grad,) = ctx.saved_tensors
        return grad * grad_outputs[0][:, None].to(grad.dtype), None, None, None


def token_losses(
    hidden: Tensor, head: nn.Module, targets: Tensor, chunk: int = 0, shape: LogitShape = LogitShape()
) -> Tensor:
    """Cross-entropy per supervised position: hidden [n, D], targets [n] -> [n] float32.

    A frozen linear head takes the chunked path; a head that trains takes the ordinary one. chunk: positions per chunk;
    0 = equal parts of at most 32 MB of float32 logits. shape: what the model does to its logits.
    """
    if len(targets) == 0:
        return hidden.float().sum(-1)  # [0], still part of the graph
    if type(head) is nn.Linear and not any(parameter.requires_grad for parameter in head.parameters()):
        if not chunk:
            num_chunks = -(-len(targets) // max(1, _CHUNK_LOGITS // head.out_features))
            chunk = -(-len(targets) // num_chunks)
        losses: Tensor = _FrozenHeadCrossEntropy.apply(hidden, (head.weight, head.bias, shape), targets, chunk)
        return losses
    return functional.cross_entropy(shape(head(hidden).float()), targets, reduction="none")


def per_sample(losses: Tensor, batch: Batch) -> Tensor:
    """Token losses [n] at ``batch.supervised`` -> sums per sample [B]."""
    sample = batch.supervised // batch.labels.shape[1]
    if len(batch.lengths) != batch.input_ids.shape[0]:  # packed: one row, samples one after another
        ends = torch.tensor(batch.lengths).cumsum(0).to(losses.device, non_blocking=True)
        sample = torch.searchsorted(ends, batch.supervised, right=True)
    return torch.zeros(len(batch.lengths), device=losses.device).index_add_(0, sample, losses)
