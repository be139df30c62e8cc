"""Our modules compute what they say: attention in both forms, and the cutting of weights."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

from truedag.parallel.environment import prepare_process

prepare_process()

from megatron.core.transformer.enums import AttnMaskType  # noqa: E402

from truedag.model.attention import FusedAttention, UnfusedAttention  # noqa: E402
from truedag.model.errors import ModelError  # noqa: E402
from truedag.model.parameters import Shard  # noqa: E402


def build(form: Any) -> Any:
    return form(config=SimpleNamespace(kv_channels=8), attn_mask_type=AttnMaskType.causal, layer_number=1)


def by_hand(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    num_queries, num_keys = query.shape[0], key.shape[0]
    heads_per_group = query.shape[2] // key.shape[2]
    rows = []
    for place in range(num_queries):
        visible = num_keys - num_queries + place + 1
        row = []
        for batch in range(query.shape[1]):
            for head in range(query.shape[2]):
                group = head // heads_per_group
                scores = key[:visible, batch, group] @ query[place, batch, head] / math.sqrt(query.shape[3])
                row.append(scores.softmax(0) @ value[:visible, batch, group])
        rows.append(torch.stack(row).view(query.shape[1], -1))
    return torch.stack(rows)


@pytest.mark.parametrize("form", [UnfusedAttention, FusedAttention])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(5, 5), (1, 5), (2, 5), (1, 1)])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_attention_is_causal_and_aligned_to_the_last_key(
    form: Any, num_queries: int, num_keys: int, groups: int
) -> None:
    torch.manual_seed(0)
    query = torch.randn(num_queries, 2, 4, 8)
    key, value = torch.randn(num_keys, 2, groups, 8), torch.randn(num_keys, 2, groups, 8)
    torch.testing.assert_close(build(form)(query, key, value, None), by_hand(query, key, value))


@pytest.mark.parametrize("form", [UnfusedAttention, FusedAttention])
def test_attention_refuses_what_it_does_not_do(form: Any) -> None:
    tensor = torch.zeros(1, 1, 1, 8)
    with pytest.raises(ModelError, match="bias"):
        build(form)(tensor, tensor, tensor, None, attention_bias=tensor)
    with pytest.raises(ModelError, match="packed"):
        build(form)(tensor, tensor, tensor, None, packed_seq_params=object())
    with pytest.raises(ModelError, match="causal"):
        form(config=SimpleNamespace(kv_channels=8), attn_mask_type=AttnMaskType.padding)


@given(some.integers(1, 4), some.integers(1, 3), some.sampled_from([0, 1]), some.sampled_from([1, 2]))
def test_the_slices_of_all_ranks_are_the_whole_weight_once(size: int, part: int, dim: int, stride: int) -> None:
    shape = [3, 3]
    shape[dim] = size * part * stride
    full = torch.arange(math.prod(shape)).view(shape)
    shard = Shard(
        name="weight",
        parameter=torch.nn.Parameter(torch.zeros(1)),
        index=None,
        dim=dim,
        stride=stride,
        is_expert=False,
    )
    slices = [shard.cut(full, rank=rank, size=size) for rank in range(size)]
    assert all(piece.shape == slices[0].shape for piece in slices)
    assert sorted(torch.cat(slices, dim).flatten().tolist()) == full.flatten().tolist()


def test_a_gated_projection_is_cut_in_gate_and_values_each() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    shard = Shard(name="linear_fc1.weight", parameter=parameter, index=None, dim=0, stride=2, is_expert=False)
    assert shard.cut(torch.arange(8), rank=1, size=2).tolist() == [2, 3, 6, 7]
