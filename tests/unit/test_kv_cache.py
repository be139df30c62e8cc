"""The cache of keys and values: what a row has kept is what its queries see."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from truedag.parallel.environment import prepare_process

prepare_process()

from megatron.core.transformer.enums import AttnMaskType  # noqa: E402

from truedag.model.attention import FusedAttention, UnfusedAttention  # noqa: E402
from truedag.model.kv_cache import KVCache  # noqa: E402


def build_cache(num_rows: int) -> KVCache:
    return KVCache(
        [3],
        max_length=8,
        num_rows=num_rows,
        num_heads=2,
        head_dim=4,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def test_its_tensors_have_the_names_of_the_whole_model() -> None:
    cache = build_cache(2)
    names = [name for name, _ in cache.named_tensors()]
    assert names[:2] == ["decoder.layers.3.self_attention.key_cache", "decoder.layers.3.self_attention.value_cache"]
    assert names[2:] == ["cache.lengths", "cache.rows", "cache.positions"]
    assert cache.num_bytes == 2 * 8 * 2 * 2 * 4 * 4


@pytest.mark.parametrize("form", [UnfusedAttention, FusedAttention])
@pytest.mark.parametrize("lengths", [(5, 5, 5), (5, 2, 4)])
def test_a_decode_step_equals_attention_over_all_positions(form: Any, lengths: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    core = form(config=SimpleNamespace(kv_channels=4), attn_mask_type=AttnMaskType.causal)
    cache = build_cache(len(lengths))
    for tensor in (cache.keys_KRGD[3], cache.values_KRGD[3]):
        tensor.fill_(1e3)  # whatever an earlier run has left
    keys = [torch.randn(length + 2, 1, 2, 4) for length in lengths]
    values = [torch.randn(length + 2, 1, 2, 4) for length in lengths]
    for row, length in enumerate(lengths):
        cache.prefill(range(row, row + 1), length)
        assert not cache.is_decode_only()
        cache.extend(3, keys[row][:length], values[row][:length])
    for step in range(2):
        cache.decode(range(len(lengths)))
        assert cache.is_decode_only()
        query = torch.randn(1, len(lengths), 4, 4)
        new = [torch.cat([own[length + step] for own, length in zip(whole, lengths, strict=True)])[None]
               for whole in (keys, values)]  # fmt: skip
        found = core(query, *cache.extend(3, *new))
        for row, length in enumerate(lengths):
            end = length + step + 1
            alone = core(query[:, row : row + 1], keys[row][:end], values[row][:end], None)
            torch.testing.assert_close(found[:, row : row + 1], alone)
    assert cache.lengths == [length + 2 for length in lengths]


def test_each_row_is_rotated_by_its_own_position() -> None:
    table = torch.arange(8.0).view(8, 1, 1, 1)
    cache = build_cache(3)
    cache.prefill(range(2), 3)
    assert cache.rotation(table, 3).flatten().tolist() == [0, 1, 2]
    cache.prefill(range(2, 3), 5)
    cache.decode(range(2))
    assert cache.rotation(table, 1).shape == (1, 1, 1, 1)
    assert cache.rotation(table, 1).flatten().tolist() == [3]
    cache.decode(range(3))
    assert cache.rotation(table, 1).shape == (1, 3, 1, 1)
    assert cache.rotation(table, 1).flatten().tolist() == [4, 4, 5]
    cache.reset()
    assert cache.lengths == [0, 0, 0]


def test_rows_that_are_not_written_stay_as_they_are() -> None:
    cache = build_cache(2)
    cache.prefill(range(1), 3)
    cache.extend(3, torch.ones(3, 1, 2, 4), torch.ones(3, 1, 2, 4))
    for tensor in (cache.keys_KRGD[3], cache.values_KRGD[3]):
        assert tensor[:3, 0].eq(1).all()
        assert tensor[3:].eq(0).all()
        assert tensor[:, 1].eq(0).all()
