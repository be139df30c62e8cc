"""The communications that a deployment needs, by what they are for: on which groups, when, how often, how large."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from truedag.launch.deployment import Deployment
from truedag.launch.expected.gradients import gradient_communications
from truedag.launch.workload import TrainWorkload
from truedag.parallel.inference import passes
from truedag.parallel.strategy import Axis
from truedag.tracer.audit.expectation import Communication, Group, Place

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class Pass:
    """A pass of a stage: when, how many tokens a replica has in it, and whether they are split along the sequence."""

    place: Place
    num_tokens: int
    num_rows: int
    is_split: bool


def expected_communications(
    deployment: Deployment, places: Sequence[Place]
) -> tuple[list[Communication], frozenset[str]]:
    """Return what must be communicated, and the purposes of what may be."""
    wanted = _Wanted(deployment, places)
    rows = [*wanted.outside()]
    for layer in range(deployment.model.num_layers):
        rows += wanted.attention(layer)
        rows += wanted.experts(layer) if deployment.model.has_experts(layer) else wanted.dense(layer)
    rows += wanted.repeated(rows)
    rows += wanted.messages()
    if isinstance(deployment.workload, TrainWorkload):
        rows += gradient_communications(deployment)
    return rows, frozenset({"optimizer", "score corrections"})


class _Wanted:
    """Works out a deployment's communications, purpose by purpose."""

    def __init__(self, deployment: Deployment, places: Sequence[Place]) -> None:
        self._deployment = deployment
        self._model = deployment.model
        self._strategy = deployment.strategy
        self._training = isinstance(deployment.workload, TrainWorkload)
        self._width = _BYTES[deployment.model.dtype]
        self._passes = list(_passes(deployment, places))

    def outside(self) -> Iterator[Communication]:
        """Of the embedding, the head and the loss."""
        if self._strategy.tp == 1:
            return
        hidden = self._model.hidden_size * self._width
        first, last = self._groups("tp", 0), self._groups("tp", self._strategy.pp - 1)
        yield from self._region("embedding", -1, first, enters=False, leaves=True)
        if self._training:
            yield from self._region("head", -1, last, enters=True, leaves=False)
            tokens = [one for one in self._ahead() if one.place[0] == "forward"]
            bytes_ = tuple(4 * one.num_tokens for one in tokens)
            yield self._of("loss", "tp", "all-reduce", -1, last, tokens, num=3, send=bytes_, recv=bytes_)
            return
        logits = self._model.vocab_size // self._strategy.tp * self._width
        for one in self._ahead():
            ends = one.num_rows * (self._strategy.tp if one.is_split else 1)
            if one.is_split:  # each rank's last position, of which one is the sequence's
                total = one.num_rows * hidden + ends * logits
                yield self._total("head", "all-gather", last, one, total, num=2)
            else:
                yield self._total("head", "all-gather", last, one, ends * logits, num=1)

    def attention(self, layer: int) -> Iterator[Communication]:
        """Of a layer's attention."""
        groups = self._layer_groups("tp", layer)
        if self._strategy.tp > 1:
            yield from self._region("attention input", layer, groups, enters=True, leaves=False)
            yield from self._region("attention output", layer, groups, enters=False, leaves=True)
        if self._strategy.cp > 1:
            yield from self._keys_and_values(layer)

    def _keys_and_values(self, layer: int) -> Iterator[Communication]:
        """Each rank gathers all keys and all values of its heads; their gradients are summed and go back."""
        strategy, model = self._strategy, self._model
        groups = self._layer_groups("cp", layer)
        width = model.kv_heads // strategy.tp * model.kv_channels * self._width
        for kind, gathers, when in (
            ("all-gather", True, self._ahead()), ("reduce-scatter", False, self._behind()),
        ):  # fmt: skip
            own = tuple(one.num_tokens * width for one in when)
            whole = tuple(one.num_tokens * strategy.cp * width for one in when)
            send, recv = (own, whole) if gathers else (whole, own)
            yield self._of("keys and values", "cp", kind, layer, groups, when, num=2, send=send, recv=recv)

    def dense(self, layer: int, name: str = "feed-forward") -> Iterator[Communication]:
        """Of a dense feed-forward layer."""
        groups = self._layer_groups("tp", layer)
        if self._strategy.tp > 1:
            yield from self._region(f"{name} input", layer, groups, enters=True, leaves=False)
            yield from self._region(f"{name} output", layer, groups, enters=False, leaves=True)

    def experts(self, layer: int) -> Iterator[Communication]:
        """Of a layer of experts: tokens are counted, dispatched, gathered, computed, scattered and combined."""
        model, strategy = self._model, self._strategy
        if model.shared_expert_hidden_size is not None:
            yield from self.dense(layer, "shared expert")
        assert model.num_experts is not None
        ahead, behind = self._ahead(), self._behind()
        if strategy.ep * strategy.etp > 1:
            counts = tuple(8 * model.num_experts for _ in ahead)
            yield self._of("token counts", "ep", "all-gather", layer, self._tp_ep(layer), ahead, send=counts)
        groups = self._layer_groups("ep", layer)
        if strategy.ep > 1:
            for purpose, size, both in (
                ("dispatch", model.hidden_size * self._width, True),
                ("dispatch of weights", 4, True),
                ("combine", model.hidden_size * self._width, False),
            ):
                # What leaves a rank is known where its own tokens leave it: in dispatch, and backward in combine.
                sent = None if model.capacity_factor else tuple(self._own(one) * model.top_k * size for one in ahead)
                back = None if model.capacity_factor else tuple(self._own(one) * model.top_k * size for one in behind)
                gives, gets = (sent, None) if both else (None, sent)
                yield self._of(purpose, "ep", "all-to-all", layer, groups, ahead, send=gives, recv=gets)
                if behind:
                    gives, gets = (None, back) if both else (back, None)
                    yield self._of(purpose, "ep", "all-to-all", layer, groups, behind, send=gives, recv=gets)
        groups = self._layer_groups("etp", layer)
        if strategy.etp > 1:
            for purpose, forward, backward in (
                ("expert input", "all-gather", "reduce-scatter"),
                ("expert input of weights", "all-gather", "reduce-scatter"),
                ("expert output", "reduce-scatter", "all-gather"),
            ):
                yield self._of(purpose, "etp", forward, layer, groups, ahead, in_parts=True)
                if behind:
                    yield self._of(purpose, "etp", backward, layer, groups, behind, in_parts=True)

    def repeated(self, rows: Sequence[Communication]) -> list[Communication]:
        """Of what the backward pass runs again: whole layers, or the core of their attention."""
        workload = self._deployment.workload
        if not isinstance(workload, TrainWorkload) or workload.recompute == "none":
            return []
        whole = workload.recompute == "full"
        return [
            replace(row, places=tuple(("backward", batch, step) for _, batch, step in row.places))
            for row in rows
            if row.layer >= 0 and row.places and row.places[0][0] == "forward"
            if whole or row.purpose == "keys and values"
        ]

    def messages(self) -> Iterator[Communication]:
        """Of the stages: activations forward, their gradients backward, sampled tokens from the last to the first."""
        strategy = self._strategy
        if strategy.pp == 1:
            return
        hidden = self._model.hidden_size * self._width
        ahead, behind = self._ahead(), self._behind()
        size = tuple(self._own(one) * hidden for one in ahead)
        back = tuple(self._own(one) * hidden for one in behind)
        groups = strategy.groups("pp")
        onwards = [(group[stage], group[stage + 1]) for group in groups for stage in range(strategy.pp - 1)]
        # From the last stage a chunk's activations go on to the first stage's next chunk.
        around = [(group[-1], group[0]) for group in groups]
        for pairs, num in ((onwards, strategy.vpp), (around, strategy.vpp - 1)):
            if not num:
                continue
            yield self._of("activations", "pp", "message", -1, pairs, ahead, num=num, send=size)
            if behind:
                turned = [(to, source) for source, to in pairs]
                yield self._of("activation gradients", "pp", "message", -1, turned, behind, num=num, send=back)
        if not self._training:
            tokens = tuple(8 * one.num_rows for one in ahead)
            ends = [(group[-1], group[0]) for group in strategy.groups("pp")]
            yield self._of("sampled tokens", "pp", "message", -1, ends, ahead, send=tokens)

    def _region(
        self, purpose: str, layer: int, groups: Sequence[Group], *, enters: bool, leaves: bool
    ) -> Iterator[Communication]:
        """Yield what the ranks of a tensor-parallel region exchange where they enter or leave it."""
        hidden = self._model.hidden_size * self._width
        for is_split in (True, False):
            ahead = [one for one in self._ahead() if one.is_split == is_split]
            behind = [one for one in self._behind() if one.is_split == is_split]
            own = tuple(self._own(one) * hidden for one in ahead)
            whole = tuple(one.num_tokens * hidden for one in ahead)
            if is_split and ahead:
                forward, given, got = (
                    ("all-gather", own, whole) if enters else ("reduce-scatter", whole, own)
                )  # fmt: skip
                yield self._of(purpose, "tp", forward, layer, groups, ahead, send=given, recv=got)
                if behind:
                    own_back = tuple(self._own(one) * hidden for one in behind)
                    whole_back = tuple(one.num_tokens * hidden for one in behind)
                    # The input is gathered again for the weight's gradient.
                    yield self._of(purpose, "tp", "all-gather", layer, groups, behind, send=own_back, recv=whole_back)
                    if enters:
                        yield self._of(
                            purpose, "tp", "reduce-scatter", layer, groups, behind, send=whole_back, recv=own_back
                        )
            elif not is_split:
                if leaves and ahead:
                    yield self._of(purpose, "tp", "all-reduce", layer, groups, ahead, send=whole, recv=whole)
                if enters and behind:
                    back = tuple(one.num_tokens * hidden for one in behind)
                    yield self._of(purpose, "tp", "all-reduce", layer, groups, behind, send=back, recv=back)

    def _of(
        self,
        purpose: str,
        axis: str,
        kind: str,
        layer: int,
        groups: Sequence[Group],
        when: Sequence[Pass],
        *,
        num: int = 1,
        send: tuple[int, ...] | None = None,
        recv: tuple[int, ...] | None = None,
        in_parts: bool = False,
    ) -> Communication:
        return Communication(
            purpose=purpose,
            axis=axis,
            kind=kind,
            layer=layer,
            groups=tuple(groups),
            places=tuple(one.place for one in when),
            num=num,
            send_bytes=send,
            recv_bytes=recv,
            in_parts=in_parts,
        )

    def _total(
        self, purpose: str, kind: str, groups: Sequence[Group], one: Pass, total: int, *, num: int
    ) -> Communication:
        return Communication(
            purpose=purpose,
            axis="tp",
            kind=kind,
            layer=-1,
            groups=tuple(groups),
            places=(one.place,),
            num=num,
            total_bytes=(total, total),
        )

    def _own(self, one: Pass) -> int:
        """Tokens of a pass that one rank has outside of the tensor-parallel regions."""
        return one.num_tokens // self._strategy.tp if one.is_split else one.num_tokens

    def _ahead(self) -> list[Pass]:
        return [one for one in self._passes if one.place[0] != "backward"]

    def _behind(self) -> list[Pass]:
        return [one for one in self._passes if one.place[0] == "backward"]

    def _groups(self, axis: Axis, stage: int) -> list[Group]:
        size = self._strategy.stage_size
        return [group for group in self._strategy.groups(axis) if group[0] // size == stage]

    def _layer_groups(self, axis: Axis, layer: int) -> list[Group]:
        return self._groups(axis, self._strategy.stage_of_layer(self._model.num_layers, layer))

    def _tp_ep(self, layer: int) -> list[Group]:
        """Ranks that share the experts of a layer, tensor-parallel ones and all."""
        span = self._strategy.etp * self._strategy.ep
        size = self._strategy.stage_size
        first = self._strategy.stage_of_layer(self._model.num_layers, layer) * size
        return [tuple(range(start, start + span)) for start in range(first, first + size, span)]


def _passes(deployment: Deployment, places: Sequence[Place]) -> Iterator[Pass]:
    workload, strategy = deployment.workload, deployment.strategy
    split = workload.sequence_parallel and strategy.tp > 1
    if isinstance(workload, TrainWorkload):
        tokens = workload.micro_batch_size * workload.sequence_length // strategy.cp
        for place in places:
            yield Pass(place, tokens, workload.micro_batch_size, split)
        return
    for place, one in zip(places, passes(workload, dp_rank=0, dp_size=strategy.dp), strict=True):
        yield Pass(place, one.length * len(one.rows), len(one.rows), split and one.phase == "prefill")
