"""Train the nets for the embedded digits from the train split alone, and write pipeline/models/digits*.safetensors.

    python scripts/train_digits.py

About 20 seconds on two cores. The held-out accuracies are printed at the end and never looked at before.
"""

from functools import partial

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from training import accuracy, train

from pipeline.config.schema import MOST_PIXELS, PreprocessConfig
from pipeline.engine.decode import read_image
from pipeline.models.digits_net import NETS
from pipeline.sources.digits import digits_split

EPOCHS = 40
BATCH_SIZE = 64


def load(split: str, side: int) -> tuple[Tensor, Tensor]:
    """Images (N, 1, side, side) uint8, as a run makes them, and labels (N,) int64."""
    images, labels = digits_split(split)
    preprocess = PreprocessConfig(mode="L", resize=side)
    pixels = [read_image(partial(Image.fromarray, image), preprocess, MOST_PIXELS) for image in images]
    return torch.stack(pixels), torch.from_numpy(labels)


def logits_of(module: nn.Module, images_u8: Tensor) -> Tensor:
    logits: Tensor = module(images_u8.float() / 255)
    return logits


def main() -> None:
    trained = []
    for net in NETS.values():
        torch.manual_seed(0)
        images, labels = load("train", net.side)
        module = net.make()
        logits = partial(logits_of, module)
        train(module, logits, images, labels, epochs=EPOCHS, batch_size=BATCH_SIZE)
        save_file(module.state_dict(), net.weights)
        trained.append((net, logits, accuracy(logits, images, labels)))
    for net, logits, right in trained:
        held_out = accuracy(logits, *load("test", net.side))
        print(f"{net.weights}: {net.weights.stat().st_size:,} bytes; train {right:.4f}, held-out test {held_out:.4f}")


if __name__ == "__main__":
    main()
