"""
PyTorch: wrap the optimizer that you have
=========================================

Muon moves the matrices and AdamW the rest. One step size for each of them is learned.
"""

# %%
# Two optimizers, each with the parameters that it is made for.
import matplotlib.pyplot as plt
import torch
from metaopt_torch import wrap
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

images, labels = load_digits(return_X_y=True)
x = torch.tensor(images / 16.0, dtype=torch.float32)
y = torch.tensor(labels)

torch.manual_seed(0)
net = torch.nn.Sequential(
    torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64), torch.nn.ReLU(),
    torch.nn.Linear(64, 10),
)  # fmt: skip
matrices = [param for param in net.parameters() if param.ndim == 2]
others = [param for param in net.parameters() if param.ndim != 2]
opt = wrap(
    [torch.optim.Muon(matrices, lr=1.0), torch.optim.AdamW(others, lr=1.0)],
    step_size=1e-6,
    blocks="tensor",
    compile=False,
)

# %%
# Training is as with any optimizer.
losses, sizes = [], []
for _ in range(400):
    batch = torch.randint(1500, (64,))
    opt.zero_grad()
    loss = cross_entropy(net(x[batch]), y[batch])
    loss.backward()
    opt.step()
    losses.append(loss.item())
    sizes.append([size.item() for size in opt.step_sizes().values()])

# %%
# Every tensor finds its own step size.
figure, (above, below) = plt.subplots(2, sharex=True, layout="constrained")
above.semilogy(losses)
above.set_ylabel("training loss")
below.semilogy(sizes)
below.set(ylabel="step sizes", xlabel="step")
plt.show()
