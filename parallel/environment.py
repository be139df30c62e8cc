"""What a process must know before it imports megatron-core. No torch."""

from __future__ import annotations

import os
import warnings

_MEGATRON = r"megatron\.core\..*"

# Warnings of other packages that say nothing about a run, with the reason why.
_SAY_NOTHING: tuple[tuple[str, type[Warning], str], ...] = (
    # megatron-core is used without Transformer Engine and Apex on purpose: our own modules take their place.
    (r"Transformer Engine and Apex are not installed", UserWarning, _MEGATRON),
    (r"Apex is not installed", UserWarning, _MEGATRON),
    # Said of megatron-core's own default.
    (r"full scope is deprecated", UserWarning, _MEGATRON),
    # Said of the core attention's recomputation with Transformer Engine, whatever the implementation.
    (r"If you are using transformer_engine as the transformer implementation", UserWarning, _MEGATRON),
    # The distributed optimizer's shards are views of float32 parameters, and it sets their gradients itself.
    (r"The \.grad attribute of a Tensor that is not a leaf", UserWarning, r"(megatron\.core|truedag\.parallel)\..*"),
    # Attention has its modules in another order than it runs them: a bucket is gathered early, and that is all.
    (r"The next bucket's parameter all-gather operation has already been dispatched", UserWarning, _MEGATRON),
    # About calls and imports among megatron-core's own modules.
    (r"Warning: tp_group is None, using default tp group", DeprecationWarning, _MEGATRON),
    (r"The following imports from `dynamic_context\.py` will be removed", DeprecationWarning, _MEGATRON),
    # About the overlap of CUDA kernels; nothing here overlaps.
    (r"When using (sequence parallelism|async grad allreduce) it is recommended", UserWarning, _MEGATRON),
    # torch 2.13 renamed collectives that megatron-core 0.16 calls by their old names.
    (r"`torch\.distributed\.\w+` is deprecated", FutureWarning, r"torch\.distributed\..*"),
)


def prepare_process() -> None:
    """Ignore what says nothing, and switch torch.compile off. Local; call it before megatron-core is imported.

    megatron-core compiles its fused functions as it is imported. None of them is used here, a compiled function would
    hide its operators, and importing the compiler takes as long as all the rest.
    """
    for message, category, module in _SAY_NOTHING:
        warnings.filterwarnings("ignore", message=message, category=category, module=module)
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
