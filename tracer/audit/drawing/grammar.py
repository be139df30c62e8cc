"""How a label is read: tables of patterns, each with how sure it is.

stated   the label says it with its name and a number: ``GPU: 0-127``, ``layer 3``, ``expert 5``
named    a word of the trade: ``QKV projection``, ``all-to-all``, ``RMSNorm``
inferred from a node's id, its clusters, its shape or its neighbours: ``l3_gpu_1_qkv``, an ellipse, "TP" around it

What stands for nothing here is listed as not understood. Nothing is executed and nothing is guessed from position.

Numbers: a list such as ``0-3, 8 and 10..12``, ``E0-E7`` or ``0-1016 step 8`` (`drawing/numbers.py`), after the word for
what it counts (`drawing/whereabouts.py`); a node may stand for many. Roles and purposes are those of
`truedag.tracer.audit.roles`; a coarse word stands for several of them ("self-attention" for projection, scores, softmax
and context, "expert" for its three parts, "MLP" for both layers and the activation).

Several lines ``experts 0-7: GPU 0-3`` in one label say which experts are where; the node is then each of them there,
and not all of them everywhere.

``decode steps 1-15, each like decode step 0`` with ``stands for 5,190 recorded`` is a declared fold, no ellipsis
(`drawing/folds.py`); whether step 0 is drawn and the count is right is checked (`checks/steps.py`).
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, field
from typing import Literal

from truedag.tracer.audit.drawing.folds import Fold, read_count, read_fold
from truedag.tracer.audit.drawing.numbers import MOST_NUMBERS, mark_steps
from truedag.tracer.audit.drawing.whereabouts import Places, name_numbers, read_places, say_once
from truedag.tracer.audit.roles import ATTENTION_CORE

Certainty = Literal["stated", "named", "inferred", "unknown"]
EXCHANGES = ("send", "recv", "message")
"""Kinds of what leads from one rank to another; a message is a node for both of its halves."""

_EVERY_LAYER = re.compile(r"\b(?:all|each|every)\s+(?:of\s+the\s+)?(?:\d+\s+)?layers?\b|\bper[\s\-]layer\b", re.I)
# A label that is longer is read as far as this: nobody reads more of it either.
_LONGEST_LABEL = 1000

_KINDS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("all-reduce", re.compile(r"all[\s\-_]?reduce", re.I)),
    ("reduce-scatter", re.compile(r"reduce[\s\-_]?scatter", re.I)),
    ("all-gather", re.compile(r"all[\s\-_]?gather", re.I)),
    ("all-reduce", re.compile(r"(?<![A-Za-z])AR(?![A-Za-z])(?!\s+(?:decod|generat|loop|step|model))")),
    ("reduce-scatter", re.compile(r"(?<![A-Za-z])RS(?![A-Za-z])")),
    ("all-gather", re.compile(r"(?<![A-Za-z])AG(?![A-Za-z])")),
    ("all-to-all", re.compile(r"all[\s\-_]?(?:to|2)[\s\-_]?all|\ba2a\b", re.I)),
    ("broadcast", re.compile(r"\bbroadcast\b", re.I)),
    ("send", re.compile(r"(?<![a-z])i?send(?!er)", re.I)),
    ("recv", re.compile(r"(?<![a-z])i?(?:recv|receive)", re.I)),
    ("message", re.compile(r"\bp2p\b|point[\s\-]?to[\s\-]?point", re.I)),
    ("message", re.compile(r"(?:stage|pipeline|pp|activation)[\s\-_]*(?:transfer|comm)", re.I)),
)  # fmt: skip
_AXES: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("etp", re.compile(r"\betp\b|expert[\s\-]tensor", re.I)),
    ("edp", re.compile(r"\bedp\b|expert[\s\-]data", re.I)),
    ("tp", re.compile(r"(?<![a-z])tp(?![a-z])|tensor[\s\-]?(?:model[\s\-]?)?parallel", re.I)),
    ("ep", re.compile(r"(?<![a-z])ep(?![a-z])|expert[\s\-]?(?:model[\s\-]?)?parallel", re.I)),
    ("dp", re.compile(r"(?<![a-z])dp(?![a-z])|data[\s\-]?parallel", re.I)),
    ("cp", re.compile(r"(?<![a-z])cp(?![a-z])|context[\s\-]?parallel", re.I)),
    ("pp", re.compile(r"(?<![a-z])pp(?![a-z])|pipeline", re.I)),
)
# In order; the first that fits has the word. Names of purposes come first, as our own drawings write them out.
_PURPOSES: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (purpose, re.compile(pattern, re.I))
    for purpose, pattern in (
        ("dispatch of weights", r"dispatch of weights"),
        ("expert input of weights", r"expert input of weights"),
        ("shared expert input", r"shared expert input"),
        ("shared expert output", r"shared expert output"),
        ("expert input", r"expert input"),
        ("expert output", r"expert output"),
        ("attention input", r"attention input"),
        ("attention output", r"attention output|attn[\s_\-]*out"),
        ("feed-forward input", r"feed-forward input"),
        ("feed-forward output", r"feed-forward output"),
        ("token counts", r"token counts"),
        ("score corrections", r"score correction"),
        ("expert gradients", r"expert grad"),
        ("sequence gradients", r"sequence grad"),
        ("embedding gradients", r"embedding grad"),
        ("activation gradients", r"activation grad|grad\w*\W+(?:send|recv|receive)|(?:send|recv|receive)\W+grad"),
        ("dense gradients", r"(?<!input )(?<!output )(?<!activation )grad"),
        (
            "dense parameters",
            r"dense parameters|param\w*\W+(?:all\W?)?gather|gather\w*\W+(?:\w+\W+)?param|gather\b.*\bparam",
        ),
        ("expert parameters", r"expert parameters"),
        ("sampled tokens", r"sampled token"),
        ("dispatch", r"dispatch"),
        ("combine", r"combin|unpermut"),
        ("loss", r"\bloss\b"),
        ("head", r"\bhead\b|logits"),
        ("embedding", r"embed"),
        ("activations", r"\bactivations?\b"),
    )
)
# In a label's words; ~ is what may stand between two parts of one.
_GAP = r"[\s_\-]*"
_ROLES: tuple[tuple[tuple[str, ...], Certainty, re.Pattern[str]], ...] = tuple(
    (roles, "named", re.compile(pattern.replace("~", _GAP), re.I))
    for roles, pattern in (
        (("shared expert first layer",), r"shared expert first layer"),
        (("shared expert activation",), r"shared expert activation"),
        (("shared expert second layer",), r"shared expert second layer"),
        (("final norm",), r"final~(?:layer|rms)?~norm|\bln_?f\b|norm~f(?:inal)?\b"),
        (("attention residual",), r"attention residual|residual~(?:1|attn|attention)|post~attention~residual"),
        (("feed-forward residual",),
         r"feed-forward residual|residual~(?:2|ffn|mlp|moe)"
         r"|post~(?:ffn|mlp|moe)~residual"),
        (("residual",),
         r"residual|skip~connection|\badd\b\s*&|\badd[\s_]*\d*\s*$"
         r"|(?:^|[\s:|])[+\u2295](?=\s*(?:$|[(|]))"),
        (("feed-forward norm",),
         r"(?:feed-forward|post~attention|post~attn|pre~(?:mlp|ffn|moe)|ffn|mlp|moe)~(?:layer|rms)?~norm|(?:layer|rms)?norm~2|\bln_?2\b"),
        (("attention norm",),
         r"(?:attention|attn|input|pre~attention|pre~attn)~(?:layer|rms)?~norm"
         r"|(?:layer|rms)?norm~1|\bln_?1\b"),
        (("norm",), r"(?:layer|rms)~norm|\bnorm\b|\bln\b"),
        (("QKV projection",), r"qkv|q\s*[,/&]\s*k\s*[,/&]\s*v|query[\s,/&]+key[\s,/&]+(?:and\s+)?value"),
        (("Q projection",), r"(?<![a-z])(?:q|query)~(?:proj|linear)"),
        (("K projection",), r"(?<![a-z])(?:k|key)~(?:proj|linear)"),
        (("V projection",), r"(?<![a-z])(?:v|value)~(?:proj|linear)"),
        (("output projection",), r"out(?:put)?~proj|\bo~proj|linear_proj|\bw_?o\b"),
        (("attention output",), r"(?:attention|attn)~out(?:put)?\b"),
        (("attention scores",), r"scores?\b|q\s*k\s*\^?\s*t\b|q\s*[@·x*]\s*k"),
        (("router",), r"(?<![a-z])(?:router|routing|gating|gate)(?!~(?:up|proj|(?:&|\+|/|and)~up))"),
        (("top-k choice",), r"top~k"),
        (("attention softmax",), r"softmax"),
        (("attention context",),
         r"(?:attention|attn)~context|\bcontext\b"
         r"|(?:attention|attn|weights?|a|p)\s*[@·x*]\s*v\b|weighted sum of v|\bpv\b"),
        (("fused attention",), r"fused attention|flash~att|\bsdpa\b"),
        (("expert aggregation",), r"aggregat|weighted~sum"),
        (("head",), r"(?:lm|language~model)~head"),
        (("first layer",),
         r"first~(?:layer|linear)|\bfc_?1\b|\bw_?1\b|\blinear_?(?:fc)?1\b|up~proj"
         r"|gate~(?:&|\+|/|and|up|proj)|column~parallel"),
        (("second layer",),
         r"second~(?:layer|linear)|\bfc_?2\b|\bw_?2\b"
         r"|\blinear_?(?:fc)?2\b|down~proj|row~parallel"),
        (("activation",), r"\bgelu\b|\bsilu\b|swiglu|\brelu\b|(?<!post[\s_\-])\bactivation\b"),
        (("cache write",), r"(?:kv|key~value)~cache|cache write"),
        (("embedding",), r"embed|\bwte\b"),
        (("attention",), r"self~att\w*|multi~head|\bmha\b|\bgqa\b|\battention\b|\battn\b"),
        (("head",), r"(?:lm|output|language~model)~head|\bhead\b(?!s)|unembed|\blogits\b"),
        (("loss",), r"\bloss\b|cross~entropy"),
        (("expert",), r"(?<![a-z])experts?(?![a-z\s_\-]*parallel)"),
        (("feed-forward",), r"\bmlp\b|\bffn\b|feed~forward"),
        (("optimizer",), r"optimi[sz]er|\badam\w*\b"),
        (("sample",), r"\bsampl(?:e|ing) (?:next )?token|argmax"),
    )
)  # fmt: skip
COARSE: dict[str, tuple[str, ...]] = {
    "attention": ("QKV projection", *ATTENTION_CORE),
    "feed-forward": ("first layer", "activation", "second layer"),
    "expert": ("expert first layer", "expert activation", "expert second layer"),
}
_ENDS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("input", re.compile(r"^\s*(?:(?:model|batch|total)\s+)?(?:inputs?|tokens?|prompts?)\b", re.I)),
    ("output", re.compile(r"^\s*(?:model\s+|final\s+)?outputs?\b(?!\s*proj)|^\s*next token", re.I)),
)  # fmt: skip
_PASS_BEFORE = re.compile(
    r"^\s*[\[(]?(?:prefill|decode|forward|backward)(?:\s+(?:step|pass|phase))?\s*\d*\s*[\])]?\s*[:\-]?\s*", re.I
)
# What begins with such a word and is no end: Input LayerNorm, Output Projection, Token Embedding.
_NO_END = re.compile(r"proj|embed|norm|residual|att(?:entio)?n|expert|rout|gat(?:e|ing)\b|linear|head", re.I)
_BATCH = re.compile(r"(?:split|scatter|partition|merge|gather|concat\w*)\b.*\bbatch|\bbatch\b.*(?:split|merge)", re.I)
_PHASES = (
    ("backward", re.compile(r"backward|\bbwd\b", re.I)),
    ("forward", re.compile(r"(?<!feed[\s_\-])(?<!feed)forward|\bfwd\b", re.I)),
    ("prefill", re.compile(r"prefill", re.I)),
    ("decode", re.compile(r"\bdecod(?:e|ing)\b", re.I)),
    ("optimizer", re.compile(r"optimi[sz]er", re.I)),
)
ELLIPSIS = re.compile(
    r"\.\.\.|…|⋮|⋯|\betc\b|and so on|\bsimilar(?:ly)?\b|\brepeat(?:ed|s)?\b(?!\s+(?:kv?\b|keys?|heads?))"
    r"|\bsame as\b|\bidentical\b|\bomitted\b"
    r"|\bnot shown\b|\b\d+ (?:more|other) (?:\w+ )?(?:layers?|experts?|gpus?|ranks?|stages?|blocks?)"
    r"|(?:^|\()\s*[x\u00d7]\s?\d+\b|\b(?:layers?|blocks?|experts?)\s*[x\u00d7]\s*\d+"
    r"|\b\d+\s*[x\u00d7]\s*(?:transformer|decoder|layers?|blocks?|experts?)",
    re.I | re.M,
)
# Dots between two numbers are a range.
_DOTTED_RANGE = re.compile(r"(?<=\d)\s*(?:\.\.\.?|…)\s*(?=\d)")
_WHOLE = re.compile(r"(?<![a-z])(?:layers?|blocks?)(?![a-z])", re.I)
SAMPLED = re.compile(
    r"representative|sampled?\s+(?:gpus?|ranks?|layers?|experts?)|for example|\be\.g\.|one of (?:the )?\d+", re.I
)
_TYPED = re.compile(r"(?<![a-z])(?!(?:layers?|blocks?|experts?|gpus?|ranks?|stages?|h)\[)[a-z]+\d*\[[\d,]*\]")
_IN_LINE = re.compile(
    r"(?:^|[\s|;,])(in|out)(?:puts?)?(?:[\s_]*(?:shape|dims?|size)s?)?\s*[:=]\s*"
    r"(.*?)(?=$|[\s|;,]+(?:in|out)(?:puts?)?(?:[\s_]*(?:shape|dims?|size)s?)?\s*[:=])",
    re.I,
)
_FROM_TO = re.compile(r"(\[[^\[\]]*\])\s*(?:->|=>|\u2192)\s*(\[[^\[\]]*\])")
_PLACE_ON_AXIS = re.compile(r"\b(?:e?tp|ep|e?dp|pp|cp|local)[ _\-]*rank[ _:=#]*\d+", re.I)
_PART = re.compile(r"\bpart of (\d{1,4})\b", re.I)
# A most is no size to compare.
_BYTES = re.compile(r"(?<!up to )(?<![\d,.])(\d[\d,]*)\s*bytes", re.I)


@dataclass(slots=True)
class Reading:
    """What a label says; empty where it says nothing."""

    certainty: Certainty = "unknown"
    roles: tuple[str, ...] = ()
    kind: str | None = None
    """Of a communication."""

    purpose: str | None = None
    axis: str | None = None
    end: str | None = None
    """input or output."""

    phase: str | None = None
    numbers: dict[str, tuple[int, ...]] = field(default_factory=dict)
    places: Places = ()
    """Experts and their ranks, where a label lists who is where."""

    everywhere: bool = False
    """It says that it is on all GPUs."""

    in_every_layer: bool = False
    """It says that it is in all layers."""

    inputs: str = ""
    outputs: str = ""
    bytes: int | None = None
    num_parts: int = 1
    """Of how many such nodes a whole communication consists."""

    is_coarse: bool = False
    is_whole: bool = False
    """It stands for whole layers, of which it shows nothing."""

    is_ellipsis: bool = False
    is_sampled: bool = False
    fold: Fold | None = None
    """Of decode steps that it declares to be like another."""

    num_recorded: int | None = None
    """Nodes of a run that it says it stands for."""

    @property
    def passes(self) -> tuple[tuple[str | None, int, int], ...]:
        """Phase, microbatch and decode step (-1: untold) of each pass that it is in."""
        batches = self.numbers.get("microbatch", (-1,))
        steps = self.numbers.get("decode_step", (-1,)) if self.phase == "decode" else (-1,)
        pairs = itertools.islice(itertools.product(batches, steps), MOST_NUMBERS)
        return tuple((self.phase, batch, step) for batch, step in pairs)


def read_label(label: str) -> Reading:
    """Return what a label says by itself."""
    reading = Reading()
    label, reading.places = read_places(mark_steps(label))
    for end, name in enumerate(("experts", "ranks")):
        if reading.places:
            reading.numbers[name] = tuple(sorted({number for place in reading.places for number in place[end]}))
    label = label[:_LONGEST_LABEL]
    text = _without_types(label)
    reading.kind = next((kind for kind, pattern in _KINDS if pattern.search(text)), None)
    text = say_once(text, is_message=reading.kind in EXCHANGES)
    reading.numbers = name_numbers(text) | reading.numbers
    reading.everywhere = bool(re.search(r"\ball\s+(?:\d+\s+)?(?:gpus|ranks|devices)", text, re.I))
    reading.in_every_layer = "layers" not in reading.numbers and bool(_EVERY_LAYER.search(text))
    reading.is_ellipsis = bool(ELLIPSIS.search(_DOTTED_RANGE.sub("-", text)))
    reading.is_sampled = bool(SAMPLED.search(text))
    reading.phase = next((phase for phase, pattern in _PHASES if pattern.search(text)), None)
    reading.axis = next((axis for axis, pattern in _AXES if pattern.search(text)), None)
    _read_shapes(label, reading)
    reading.num_recorded = read_count(text)
    if (fold := read_fold(text)) is not None:
        reading.fold, reading.certainty, reading.phase = fold, "stated", "decode"
        reading.numbers["decode_step"] = fold.steps
        reading.kind, reading.is_ellipsis = None, False
        return reading
    if reading.kind is not None:
        if (part := _PART.search(text)) is not None:
            reading.num_parts = max(1, int(part.group(1)))
        reading.purpose = next((purpose for purpose, pattern in _PURPOSES if pattern.search(text)), None)
        reading.certainty = "stated" if reading.purpose or reading.axis else "named"
        return reading
    head = text.strip().splitlines()[0] if text.strip() else ""
    named = _PASS_BEFORE.sub("", head)
    reading.end = next((end for end, pattern in _ENDS if pattern.search(named)), None)
    if reading.end is not None and not _NO_END.search(head):
        reading.certainty = "named"
        return reading
    reading.end = None
    if _BATCH.search(text):
        reading.roles, reading.certainty = ("batch",), "named"
        return reading
    # The first line is the node's name; only where it says nothing do the others.
    for words in (head, text):
        for roles, certainty, pattern in _ROLES:
            if pattern.search(words):
                reading.roles, reading.certainty = roles, certainty
                break
        if reading.roles:
            break
    _settle(reading, text)
    if not reading.roles and "layers" in reading.numbers and _WHOLE.search(head):
        reading.is_whole, reading.certainty = True, "stated"
    return reading


def _settle(reading: Reading, text: str) -> None:
    """Parts of an expert, and coarse words."""
    if not reading.roles:
        return
    (role,) = reading.roles
    of_expert = "experts" in reading.numbers or re.search(r"expert", text, re.I)
    if role in ("first layer", "activation", "second layer") and of_expert and not re.search(r"shared", text, re.I):
        reading.roles = (f"expert {role}",)
    if role == "attention softmax" and re.search(r"rout|gat(?:e|ing)", text, re.I):
        reading.roles = ("router",)
    if role in COARSE:
        reading.roles, reading.is_coarse = COARSE[role], True


def _without_types(label: str) -> str:
    """Take types, shapes and places on an axis out, whose numbers are no ranks."""
    label = _PLACE_ON_AXIS.sub(" ", label)
    return re.sub(r"\[[^\[\]]*(?:=|\u00d7|x\d|\bbatch|\bseq|\bhidden)[^\[\]]*\]", " ", _TYPED.sub(" ", label))


def _read_shapes(label: str, reading: Reading) -> None:
    for line in label.splitlines():
        for way, text in _IN_LINE.findall(line):
            types = " ".join(_TYPED.findall(text)) or text.strip()
            if way.lower() == "in":
                reading.inputs = types
            else:
                reading.outputs = types
        if (both := _FROM_TO.search(line)) is not None:
            reading.inputs, reading.outputs = reading.inputs or both.group(1), reading.outputs or both.group(2)
    if (told := _BYTES.search(label)) is not None:
        reading.bytes = int(told.group(1).replace(",", ""))
