"""Says in one line what a program computed, to the last bit."""

import hashlib
import pickle

import torch


def print_digest(*results: object) -> None:
    """Print a hash of tensors, and of whatever else there is."""
    found = hashlib.sha256()
    for result in results:
        if isinstance(result, torch.Tensor):
            found.update(str((result.dtype, tuple(result.shape))).encode())
            found.update(result.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            found.update(pickle.dumps(result, protocol=4))
    print(f"digest {found.hexdigest()[:32]}", flush=True)
