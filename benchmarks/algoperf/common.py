"""What both submissions have in common: batch sizes, the data as it comes, and evaluations."""

from collections.abc import Iterator
from typing import Any

__all__ = ["PASSES", "RECENT", "data_selection", "get_batch_size"]

#: Averaged weights need statistics of batch normalization of their own: this many of the latest
#: batches are kept, and so many forward passes are made over them before an evaluation.
RECENT, PASSES = 8, 32
#: Of all devices together: those of the benchmark's own NAdamW.
BATCH_SIZES = {
    "cifar": 128,
    "criteo1tb": 262_144,
    "fastmri": 32,
    "imagenet_resnet": 1024,
    "imagenet_resnet_gelu": 512,
    "imagenet_resnet_silu": 512,
    "imagenet_vit": 1024,
    "librispeech_conformer": 256,
    "librispeech_deepspeech": 256,
    "mnist": 16,
    "ogbg": 512,
    "wmt": 128,
}


def get_batch_size(workload_name: str) -> int:
    """Return the batch size of a workload, over all devices.

    Raises
    ------
    ValueError
        If the workload is not known; the harness then asks for the one that it is a variant of.
    """
    if workload_name not in BATCH_SIZES:
        known = ", ".join(BATCH_SIZES)
        msg = f"`workload_name` must be one of {known}; got {workload_name!r}."
        raise ValueError(msg)
    return BATCH_SIZES[workload_name]


def data_selection(
    workload: Any,
    input_queue: Iterator[dict[str, Any]],
    optimizer_state: Any,
    current_param_container: Any,
    model_state: Any,
    hyperparameters: Any,
    global_step: int,
    rng: Any,
) -> dict[str, Any]:
    """Return the next batch, as it comes."""
    return next(input_queue)
