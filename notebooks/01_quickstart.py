# ---
# jupyter:
#   jupytext:
#     formats: py:percent,ipynb
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Quickstart: who taught your own model?
#
# Handwritten digits, one in ten with a wrong label. We train an ordinary classifier in an ordinary loop and ask, at
# every step, what each sample did to the validation loss. A value is in nats; **above 0 the sample lowered it**.

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import inrun

torch.manual_seed(0)
images, labels = (torch.tensor(a) for a in load_digits(return_X_y=True))
images = images.float() / 16
order = torch.randperm(len(images))
validation, train = order[:300], order[300:1300]

wrong = train[torch.randperm(len(train))[:100]]
labels[wrong] = (labels[wrong] + torch.randint(1, 10, (100,))) % 10

# %% [markdown]
# The loop is yours. Two blocks are added: one takes the validation gradient, one holds the training step.

# %%
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
tracker = inrun.track(model, optimizer)

for _ in range(5):
    for ids in train[torch.randperm(len(train))].split(50):
        with tracker.validation():
            F.cross_entropy(model(images[validation]), labels[validation]).backward()
        with tracker.step(ids) as step:
            F.cross_entropy(model(images[ids]), labels[ids]).backward()
            optimizer.step()
            optimizer.zero_grad()

step.values[:5]

# %% [markdown]
# Every value went to the ledger as well. Over the run, the samples with a wrong label stand out:

# %%
totals = tracker.ledger.totals()
ids, values = totals["sample_id"].to_numpy(), totals["value"].to_numpy()
is_wrong = np.isin(ids, wrong.numpy())

bins = np.linspace(*np.quantile(values, [0.005, 0.995]), 40).tolist()
plt.figure(figsize=(7, 3))
plt.hist(values[~is_wrong], bins, color="#4477aa", label="right label")
plt.hist(values[is_wrong], bins, color="#cc3311", alpha=0.8, label="wrong label")
plt.axvline(0, color="black", lw=0.8)
plt.xlabel("value over the run (nats)   > 0: lowered the validation loss")
plt.ylabel("samples")
plt.legend(frameon=False)
plt.tight_layout()
plt.show()

# %% [markdown]
# How well does the value alone find them? The chance that a wrongly labelled sample ranks below a right one:

# %%
auroc = float((values[is_wrong][:, None] < values[~is_wrong][None, :]).mean())
print(f"AUROC of the wrong labels: {auroc:.3f}")

# %% [markdown]
# And the worst ten, as Parquet rows that any tool reads:

# %%
worst = tracker.ledger.bottom(10)
print(
    worst["sample_id"].to_pylist(), "of which wrong:", int(np.isin(worst["sample_id"].to_numpy(), wrong.numpy()).sum())
)
tracker.close()
