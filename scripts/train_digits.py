"""Train the digits victim from the train split alone, and write pipeline/models/digits.safetensors.

    python scripts/train_digits.py

About half a minute on two cores. Small shifts of the train images stand in for more data. The held-out
accuracy is printed at the end and never looked at before.
"""

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from pipeline.models.digits_net import WEIGHTS, DigitsNet
from pipeline.sources.digits import digits_split

EPOCHS = 40
BATCH_SIZE = 64
LARGEST_SHIFT = 4  # pixels of 64


def load(split: str) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 64, 64) float32 in [0, 1] and labels (N,) int64."""
    images, labels = digits_split(split)
    return torch.from_numpy(images).unsqueeze(1).float() / 255, torch.from_numpy(labels)


def shift(images: Tensor) -> Tensor:
    """Move a batch by a random offset; what leaves on one side is black on the other."""
    down, right = torch.randint(-LARGEST_SHIFT, LARGEST_SHIFT + 1, (2,)).tolist()
    padded = F.pad(images, [LARGEST_SHIFT] * 4)
    top, left = LARGEST_SHIFT - down, LARGEST_SHIFT - right
    return padded[:, :, top : top + images.shape[2], left : left + images.shape[3]]


def accuracy(model: DigitsNet, images: Tensor, labels: Tensor) -> float:
    with torch.inference_mode():
        return float((model(images).argmax(1) == labels).float().mean())


def main() -> None:
    torch.manual_seed(0)
    images, labels = load("train")
    model = DigitsNet()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    steps = EPOCHS * (len(images) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(images)).split(BATCH_SIZE)[: len(images) // BATCH_SIZE]:
            optimizer.zero_grad()
            F.cross_entropy(model(shift(images[rows])), labels[rows]).backward()
            optimizer.step()
            schedule.step()
    model.eval()
    save_file(model.state_dict(), WEIGHTS)
    print(f"{WEIGHTS}: {WEIGHTS.stat().st_size:,} bytes")
    print(f"accuracy: train {accuracy(model, images, labels):.4f}, held-out test {accuracy(model, *load('test')):.4f}")


if __name__ == "__main__":
    main()
