"""How the small models of this project are trained: `train_digits.py`, `train_sources.py` and `train_robust.py`."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LEARNING_RATE, WEIGHT_DECAY = 3e-3, 1e-2
# Small shifts stand in for more data: up to a 16th of a side, 4 pixels of 64, none below 16.
SHIFT_SHARE = 16


def shifted(images: Tensor, draws: torch.Generator | None = None) -> Tensor:
    """Move a batch by one random offset; what leaves on one side is black on the other.

    Args:
        images: (N, C, H, W).
        draws: what the offset is drawn from, PyTorch's own by default.
    """
    height, width = images.shape[-2:]
    most = min(height, width) // SHIFT_SHARE
    down, right = torch.randint(-most, most + 1, (2,), generator=draws).tolist()
    top, left = most - down, most - right
    return F.pad(images, [most] * 4)[..., top : top + height, left : left + width]


def flipped(images: Tensor) -> Tensor:
    """Mirror half of the images of a batch, by lot."""
    return torch.where(torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5, images.flip(-1), images)


def descent(module: nn.Module, learning_rate: float, steps: int) -> Callable[[Tensor], None]:
    """AdamW and one cycle of its learning rate, of so many steps; what is returned takes a step down a loss."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=learning_rate, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=learning_rate, total_steps=steps)

    def descend(loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    return descend


def train(
    module: nn.Module,
    logits: Callable[[Tensor], Tensor],
    images_u8: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    batch_size: int,
    flip: bool = False,
) -> None:
    """Train a module in place, by AdamW and one cycle of its learning rate.

    Args:
        module: untrained; it is left in eval mode.
        logits: what the module makes of images (n, C, H, W) uint8.
        images_u8: (N, C, H, W) uint8, N at least `batch_size`. What is left over of an epoch's last batch is left out.
        labels: (N,) int64.
        epochs, batch_size: how long.
        flip: whether images may be mirrored.
    """
    steps = len(images_u8) // batch_size
    descend = descent(module, LEARNING_RATE, epochs * steps)
    module.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(images_u8)).split(batch_size)[:steps]:
            batch = shifted(images_u8[rows])
            descend(F.cross_entropy(logits(flipped(batch) if flip else batch), labels[rows]))
    module.eval()


@torch.inference_mode()
def accuracy(logits: Callable[[Tensor], Tensor], images_u8: Tensor, labels: Tensor) -> float:
    """The share of images (N, C, H, W) uint8 whose largest logit is their label's."""
    predictions = torch.cat([logits(chunk).argmax(1) for chunk in images_u8.split(1000)])
    return float((predictions == labels).float().mean())
