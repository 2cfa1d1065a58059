"""A network of two hidden layers in plain NumPy: 64 pixels, 128, 128, 10 digits."""

from typing import Any

import numpy as np

__all__ = ["Params", "accuracy", "init", "loss", "loss_and_grads"]

Array = np.ndarray[Any, np.dtype[Any]]
Params = dict[str, Array]

WIDTHS = (64, 128, 128, 10)
LAYERS = range(1, len(WIDTHS))


def init(
    rng: np.random.Generator, dtype: str = "float32", widths: tuple[int, ...] = WIDTHS
) -> Params:
    """Return weights drawn from N(0, 2 / inputs), He et al. (2015), and biases of zero.

    Names and shapes are PyTorch's: "layer1.weight" is (outputs, inputs), "layer1.bias" (outputs,).
    """
    params = {}
    for layer, inputs, outputs in zip(LAYERS, widths, widths[1:], strict=False):
        weight = rng.normal(scale=(2 / inputs) ** 0.5, size=(outputs, inputs))
        params[f"layer{layer}.weight"] = weight.astype(dtype)
        params[f"layer{layer}.bias"] = np.zeros(outputs, dtype)
    return params


def loss(params: Params, images: Array, labels: Array) -> float:
    """Return the mean cross-entropy of the network's softmax against `labels`."""
    return _cross_entropy(_activations(params, images)[-1], labels)[0]


def accuracy(params: Params, images: Array, labels: Array) -> float:
    """Return the share of images, between 0 and 1, whose digit the network gets right."""
    return float(np.mean(_activations(params, images)[-1].argmax(axis=1) == labels))


def loss_and_grads(params: Params, images: Array, labels: Array) -> tuple[float, Params]:
    """Return `loss` and its gradient by parameter name, by backpropagation."""
    activations = _activations(params, images)
    value, upstream = _cross_entropy(activations[-1], labels)
    grads = {}
    for layer in reversed(LAYERS):
        below = activations[layer - 1]
        grads[f"layer{layer}.weight"] = upstream.T @ below
        grads[f"layer{layer}.bias"] = upstream.sum(axis=0)
        if layer > 1:
            upstream = (upstream @ params[f"layer{layer}.weight"]) * (below > 0)
    return value, grads


def _activations(params: Params, images: Array) -> list[Array]:
    """Return the images, the ReLU outputs of every hidden layer, and the logits."""
    activations = [images]
    for layer in LAYERS:
        sums = activations[-1] @ params[f"layer{layer}.weight"].T + params[f"layer{layer}.bias"]
        activations.append(np.maximum(sums, 0) if layer < LAYERS[-1] else sums)
    return activations


def _cross_entropy(logits: Array, labels: Array) -> tuple[float, Array]:
    """Return the mean cross-entropy and its gradient with respect to `logits`."""
    rows = np.arange(len(labels))
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_softmax = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    grad = np.exp(log_softmax)
    grad[rows, labels] -= 1
    return float(-log_softmax[rows, labels].mean()), grad / len(labels)
