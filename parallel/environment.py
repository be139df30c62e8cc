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
