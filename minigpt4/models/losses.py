"""Token losses that never store all positions x vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_CHUNK_LOGITS = 1 << 22


class _FrozenHeadCrossEntropy(torch.autograd.Function):
    """Cross-entropy through a frozen linear head; the gradient of the hidden states is made chunk by chunk in the
    forward, so neither logits nor their gradient outlive a chunk (idea of Liger and of cut cross-entropy)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        """hidden [n, D], weight [V, D], targets [n] -> losses [n] float32."""
        needs_grad = bool(ctx.needs_input_grad[0])
        grad = torch.empty_like(hidden) if needs_grad else None
        losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            logits = (hidden[part].to(weight.dtype) @ weight.t()).float()  # [c, V]
            log_sum = logits.logsumexp(-1)
            target = targets[part, None]
            losses[part] = log_sum - logits.gather(1, target)[:, 0]
            if grad is not None:
                soft = logits.sub_(log_sum[:, None]).exp_()
                soft.scatter_add_(1, target, soft.new_full(target.shape, -1.0))
                grad[part] = (soft.to(weight.dtype) @ weight).to(hidden.dtype)
        if grad is not None:
            ctx.save_for_backward(grad)
        return losses

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Scales the stored gradient by each position's weight."""
        (grad,) = ctx.saved_tensors
        return grad * grad_outputs[0][:, None].to(grad.dtype), None, None, None


def token_losses(hidden: Tensor, head: nn.Module, targets: Tensor, chunk: int = 0) -> Tensor:
    """Cross-entropy per supervised position: hidden [n, D], targets [n] -> [n] float32.

    A frozen, bias-free linear head takes the chunked path; a head that trains takes the ordinary one. chunk: positions
    per chunk; 0 = as many as make 16 MB of float32 logits.
    """
    if len(targets) == 0:
        return hidden.float().sum(-1)  # [0], still part of the graph
    bias: Tensor | None = head.bias if isinstance(head, nn.Linear) else None
    if type(head) is nn.Linear and bias is None and not head.weight.requires_grad:
        chunk = chunk or max(64, _CHUNK_LOGITS // head.out_features)
        losses: Tensor = _FrozenHeadCrossEntropy.apply(hidden, head.weight, targets, chunk)
        return losses
    return functional.cross_entropy(head(hidden).float(), targets, reduction="none")
