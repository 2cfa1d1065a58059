"""What `MetaOptimize()` is, without any option: written down before runs that are scored."""

import functools
import json
import tempfile
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

import metaopt as mo

__all__ = ["configuration", "digest", "digest_of_defaults"]


def configuration() -> Any:
    """Return `MetaOptimize()` as files of a state have it."""
    opt = mo.MetaOptimize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.safetensors"
        mo.save(path, opt, opt.init({"w": np.zeros(1)}))
        with safe_open(path, framework="numpy") as file:
            return json.loads(file.metadata()["metaopt"])["config"]


def digest(content: Any) -> str:
    """Return the SHA-256 of what JSON can hold."""
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@functools.cache
def digest_of_defaults() -> str:
    """Return the digest of `configuration`, which every log has in its head."""
    return digest(configuration())
