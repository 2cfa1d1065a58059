"""
PyTorch: a network from step sizes that are far too small
=========================================================

One call, no learning rate. The step size starts at 1e-8 and at 1e-2, and ends where it is useful.
"""

# %%
# A network with one hidden layer, on scikit-learn's handwritten digits.
import matplotlib.pyplot as plt
import torch
from metaopt_torch import MetaOptimizer
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

images, labels = load_digits(return_X_y=True)
x = torch.tensor(images / 16.0, dtype=torch.float32)
y = torch.tensor(labels)


def run(step_size, steps=600):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    opt = MetaOptimizer(net.parameters(), step_size=step_size, compile=False)
    losses, sizes = [], []
    for _ in range(steps):
        batch = torch.randint(1500, (64,))
        opt.zero_grad()
        loss = cross_entropy(net(x[batch]), y[batch])
        loss.backward()
        opt.step()
        losses.append(loss.item())
        sizes.append(opt.step_sizes()["all"].item())
    with opt.averaged_params(), torch.no_grad():
        accuracy = (net(x[1500:]).argmax(1) == y[1500:]).float().mean().item()
    return losses, sizes, accuracy


# %%
# Both runs find about the same step size, and the same accuracy on the last 297 digits.
figure, (above, below) = plt.subplots(2, sharex=True, layout="constrained")
for step_size in (1e-8, 1e-2):
    losses, sizes, accuracy = run(step_size)
    above.semilogy(losses, label=f"from {step_size:g}: {accuracy:.1%} of test digits")
    below.semilogy(sizes)
above.set_ylabel("training loss")
above.legend()
below.set(ylabel="step size", xlabel="step")
plt.show()
