"""The parameters of the models whose steps are timed."""

__all__ = ["LARGE", "PROBLEMS"]


def resnet18(classes: int = 10) -> dict[str, tuple[int, ...]]:
    """Return the shapes of ResNet-18's parameters, named as in torchvision."""
    shapes: dict[str, tuple[int, ...]] = {"conv1.weight": (64, 3, 7, 7)}

    def batch_norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    batch_norm("bn1", 64)
    inputs = 64
    for stage, width in enumerate((64, 128, 256, 512), start=1):
        for block in range(2):
            name = f"layer{stage}.{block}"
            shapes[f"{name}.conv1.weight"] = (width, inputs, 3, 3)
            batch_norm(f"{name}.bn1", width)
            shapes[f"{name}.conv2.weight"] = (width, width, 3, 3)
            batch_norm(f"{name}.bn2", width)
            if inputs != width:
                shapes[f"{name}.downsample.0.weight"] = (width, inputs, 1, 1)
                batch_norm(f"{name}.downsample.1", width)
            inputs = width
    shapes["fc.weight"], shapes["fc.bias"] = (classes, 512), (classes,)
    return shapes


def llama15m() -> dict[str, tuple[int, ...]]:
    """Return the shapes of the 15M-parameter language model of llama2.c, embedding tied."""
    width, hidden, words = 288, 768, 32000
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (words, width)}
    for layer in range(6):
        name = f"layers.{layer}"
        for part in ("wq", "wk", "wv", "wo"):
            shapes[f"{name}.attention.{part}.weight"] = (width, width)
        for part, shape in (
            ("w1", (hidden, width)),
            ("w2", (width, hidden)),
            ("w3", (hidden, width)),
        ):
            shapes[f"{name}.feed_forward.{part}.weight"] = shape
        shapes[f"{name}.attention_norm.weight"] = shapes[f"{name}.ffn_norm.weight"] = (width,)
    shapes["norm.weight"] = (width,)
    return shapes


PROBLEMS: dict[str, dict[str, tuple[int, ...]]] = {
    "flat": {"weights": (10_000_000,)},
    "resnet18": resnet18(),
    "llama15m": llama15m(),
}

#: For devices with the memory, and the need, of more.
LARGE: dict[str, dict[str, tuple[int, ...]]] = {"large": {"weights": (100_000_000,)}, **PROBLEMS}
