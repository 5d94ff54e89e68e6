# %% [markdown]
# # Adversarial digits in a notebook
#
# Open this file as a notebook (in VS Code, or after `jupytext --to notebook docs/notebook.py`), or run it as a script.
# It needs no network and takes a few seconds.

# %%
import torch
from torch.utils.data import DataLoader

import pipeline

# %% [markdown]
# First estimate time, memory and bytes. This leaves nothing behind.

# %%
pipeline.plan("digits", limit=100)

# %% [markdown]
# Make the dataset. A progress bar and the log appear below the cell, and the result is shown as a table.

# %%
pipeline.generate("digits", output="out/notebook", limit=100)

# %% [markdown]
# The config may be a mapping as well, with the keys of a YAML file.

# %%
config = {
    "source": {"kind": "digits", "split": ["test"], "limit": 50},
    "preprocess": {"mode": "L"},
    "model": {"kind": "digits"},
    "attack": {"kind": "pgd", "epsilons": ["32/255"], "steps": 5},
    "output": {"path": "out/notebook-pgd"},
}
pipeline.generate(config)

# %% [markdown]
# Check every file, image and prediction.

# %%
print("problems:", pipeline.verify("out/notebook", recompute=True).problems)

# %% [markdown]
# Read it back at any epsilon, as a `Dataset` of the library `datasets`.

# %%
rows = pipeline.load("out/notebook", [0, "64/255"], split="test")
clean, attacked = rows[0], rows[len(rows) // 2]
print(f"{clean['prediction']} became {attacked['prediction']}, with a confidence of {attacked['confidence']:.2f}")
attacked["image"]

# %% [markdown]
# Train on it: half of the images clean, half attacked. Images are uint8, and normalisation belongs to the model.

# %%
data = pipeline.training_dataset("out/notebook", "train", clean=0.5)
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(len(data.classes)))
optimizer = None
for _ in range(3):
    for images_u8, labels in DataLoader(data, batch_size=32):
        loss = torch.nn.functional.cross_entropy(model(images_u8.float() / 255), labels)
        optimizer = optimizer or torch.optim.Adam(model.parameters(), 1e-3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
print(f"loss {loss.item():.2f}")

# %% [markdown]
# The clean image next to the attacked one, with the epsilon and whether the attacked image fools the model:

# %%
pairs = pipeline.training_dataset("out/notebook", "train", pairs=True, columns=["label", "epsilon", "fooled"])
images_u8, labels, epsilons, fooled = next(iter(DataLoader(pairs, batch_size=32)))
clean_u8, attacked_u8 = images_u8.unbind(1)
print(f"{fooled.float().mean():.0%} of these fool the model")

# %% [markdown]
# Make the report, a page that shows what the attack did.

# %%
pipeline.report("out/notebook")
