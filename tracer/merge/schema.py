"""What an operator does to its arguments, from the schema that its trace carries.

The alias annotations of a schema say which arguments it writes and which results are views: `Tensor(a!) self` is
written, `-> Tensor(a)` shares memory with the argument of the same letter. What they do not say is in tables
here: which operators overwrite what they write without reading it first, which look at an argument's shape only, which
allocate memory and leave it empty, which write without saying so, and what c10d's operators do (theirs carry no
annotations, and what a root does differs from what the others do).

Outside of `aten`, annotations say that an argument is written but not whether it is read first, and a result may lie in
an argument's memory that the operator has just filled. Such an operator is taken to do both.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class OpSchema:
    """An operator's effect on memory, by argument position."""

    name: str
    writes: frozenset[int]  # arguments written
    unread: frozenset[int]  # arguments whose content does not matter: overwritten, or asked for their shape only
    is_view: bool  # aliases and moves nothing: no node
    fresh: frozenset[int]  # results that are new tensors by contract
    rewritten: tuple[tuple[int, int], ...] = ()  # (result, argument): the result is the argument, after it was written
    is_empty: bool = False  # its results are memory without content
    in_training: frozenset[int] = frozenset()  # of `writes`: only where the second result has elements

    @property
    def is_exact(self) -> bool:
        """Whether what it reads and writes is known, and not merely bounded."""
        return self.name.startswith(("aten::", "c10d::"))


# In place, without reading what was there. Out-variants of aten are recognised by their schema.
_OVERWRITING = frozenset(
    f"aten::{name}"
    for name in (
        "copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_", "uniform_", "normal_", "random_", "bernoulli_",
        "exponential_", "geometric_", "log_normal_", "cauchy_", "eye_",
    )
) | {"fsdp::split_with_sizes_copy", "fsdp::chunk_cat"}  # fmt: skip

# Write one argument that they never read: the noise that a later backward pass reads.
_UNREAD = {"aten::rrelu_with_noise": {1}, "aten::rrelu_with_noise_": {1}}

# Makes a tensor like another one: looks at its shape, dtype and device.
_LIKE = frozenset(
    f"aten::{name}"
    for name in (
        "new_empty", "new_empty_strided", "new_full", "new_ones", "new_zeros", "empty_like", "full_like", "ones_like",
        "zeros_like", "rand_like", "randn_like", "randint_like",
    )
)  # fmt: skip

# Allocates and writes nothing. Who fills the memory may be code that the dispatcher does not see.
_EMPTY = frozenset(
    f"aten::{name}"
    for name in (
        "empty", "empty_like", "empty_permuted", "empty_quantized", "empty_strided", "new_empty", "new_empty_strided",
        "_empty_affine_quantized", "_empty_per_channel_affine_quantized",
    )
)  # fmt: skip

# Write running statistics without saying so; the first four only in training, and then they save the batch's mean,
# which is a tensor without elements otherwise. Source: aten/src/ATen/native/Normalization.cpp.
_STATISTICS_IN_TRAINING = {
    "aten::native_batch_norm": (3, 4),
    "aten::_native_batch_norm_legit": (3, 4),
    "aten::cudnn_batch_norm": (3, 4),
    "aten::miopen_batch_norm": (3, 4),
}
_STATISTICS = {
    "aten::batch_norm_update_stats": (1, 2),
    "aten::batch_norm_gather_stats": (3, 4),
    "aten::batch_norm_gather_stats_with_counts": (3, 4),
}

# Wait for what is under way in their argument, or tell the allocator of a stream that uses it; nothing is moved.
_MOVING_NOTHING = frozenset(
    {"_c10d_functional::wait_tensor", "_c10d_functional::_wrap_tensor_autograd", "aten::record_stream"}
)

# c10d: the arguments it writes, and those of them that it reads as well. Source: torch/csrc/distributed/c10d/Ops.cpp.
_C10D_WRITES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "allreduce_": ((0,), (0,)),
    "allreduce_coalesced_": ((0,), (0,)),
    "broadcast_": ((0,), (0,)),
    "reduce_": ((0,), (0,)),
    "allgather_": ((0,), ()),
    "_allgather_base_": ((0,), ()),
    "allgather_coalesced_": ((0,), ()),
    "allgather_into_tensor_coalesced_": ((0,), ()),
    "reduce_scatter_": ((0,), ()),
    "_reduce_scatter_base_": ((0,), ()),
    "reduce_scatter_tensor_coalesced_": ((0,), ()),
    "alltoall_": ((0,), ()),
    "alltoall_base_": ((0,), ()),
    "gather_": ((0,), ()),
    "scatter_": ((0,), ()),
    "recv_": ((0,), ()),
    "recv_any_source_": ((0,), ()),
    "send": ((), ()),
    "barrier": ((), ()),
    "monitored_barrier_": ((), ()),
    "check_for_nan": ((), ()),
}


@functools.cache
def parse_schema(text: str, *, name: str, inplace_view: bool) -> OpSchema:
    """Read a schema as PyTorch prints it. An operator without one reads its arguments and gives fresh results."""
    if name.startswith("c10d::"):
        return _c10d_schema(name)
    arguments, results = _split(text)
    letters = [_alias(argument) for argument in arguments]
    keyword_only = arguments.index("*") if "*" in arguments else len(arguments)
    # The star takes no position.
    written = {i - (i > keyword_only): letter for i, (letter, is_written) in enumerate(letters) if is_written}
    out = {i for i in written if i >= keyword_only} if name.startswith("aten::") else set()
    unread = {0} if name in _LIKE else set(written) if name in _OVERWRITING else out | _UNREAD.get(name, set())
    result_letters = [_alias(result)[0] for result in results]
    argument_of = {letter: i for i, letter in written.items()}
    fresh = frozenset(i for i, letter in enumerate(result_letters) if letter is None)
    statistics = frozenset(_STATISTICS_IN_TRAINING.get(name, ()))
    unsaid = frozenset(_STATISTICS.get(name, ())) | statistics
    return OpSchema(
        name=name,
        writes=frozenset(written) | unsaid,
        unread=frozenset(unread),
        is_view=inplace_view or name in _MOVING_NOTHING or (bool(results) and not written and not fresh),
        fresh=fresh,
        rewritten=tuple((i, argument_of[letter]) for i, letter in enumerate(result_letters) if letter in argument_of),
        is_empty=name in _EMPTY and not out,
        in_training=statistics,
    )


def without_training(schema: OpSchema) -> OpSchema:
    """Return what the operator does when its running statistics are not written."""
    return replace(schema, writes=schema.writes - schema.in_training)


def _c10d_schema(name: str) -> OpSchema:
    # An operation of c10d that is not in the table is taken to read and write its first argument.
    writes, reads_too = _C10D_WRITES.get(name.removeprefix("c10d::"), ((0,), (0,)))
    return OpSchema(
        name=name,
        writes=frozenset(writes),
        unread=frozenset(writes) - frozenset(reads_too),
        is_view=False,
        fresh=frozenset(),
    )


def in_role(schema: OpSchema, *, is_root: bool) -> OpSchema:
    """Return what an operation of c10d does on a rank that is its root, or is not.

    A broadcast reads at its root and overwrites elsewhere; a reduction updates its root's tensor and reads the others.
    The lists that only the root of a gather writes and of a scatter reads are empty on other ranks.
    """
    if schema.name == "c10d::broadcast_":
        written, unread = (frozenset[int](), frozenset[int]()) if is_root else (frozenset({0}), frozenset({0}))
        return replace(schema, writes=written, unread=unread)
    if schema.name == "c10d::reduce_" and not is_root:
        return replace(schema, writes=frozenset())
    return schema


def _split(text: str) -> tuple[list[str], list[str]]:
    """Split `ns::op.overload(arguments) -> results` into the texts of arguments and of results."""
    begin = text.find("(")
    if begin < 0:
        return [], []
    end = _closing(text, begin)
    results = text[end + 1 :].partition("->")[2].strip()
    if results.startswith("(") and _closing(results, 0) == len(results) - 1:
        results = results[1:-1]
    return _commas(text[begin + 1 : end]), _commas(results)


def _closing(text: str, begin: int) -> int:
    depth = 0
    for i in range(begin, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    return len(text)


def _commas(text: str) -> list[str]:
    parts, depth, begin = [], 0, 0
    for i, char in enumerate(text):
        depth += (char in "([") - (char in ")]")
        if char == "," and depth == 0:
            parts.append(text[begin:i].strip())
            begin = i + 1
    last = text[begin:].strip()
    return [*parts, last] if last else parts


_ALIAS = re.compile(r"^Tensor(?:\[\])?\(([\w|*]+)(!?)(?:\s*->\s*[\w*|]+)?(!?)\)")


def _alias(declaration: str) -> tuple[str | None, bool]:
    """Return the alias letter of a declaration (None: none) and whether it is written."""
    found = _ALIAS.match(declaration)
    if found is None:
        return None, False
    return found.group(1), bool(found.group(2) or found.group(3))
