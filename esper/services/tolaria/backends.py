"""What the ranks of a session meet over; known before PyTorch is imported."""

from __future__ import annotations


def backend(*, gpus: bool) -> str:
    """The backends of torch.distributed, where there are GPUs and where there are none."""
    return "cpu:gloo,cuda:nccl" if gpus else "gloo"
