"""A claim in words: "EP8-TP4-PP2-DP4 on 256 GPUs, 30B parameters, 48 layers, batch 128, 16 experts per GPU".

Each number that a claim may state has a table of phrases, tried in order; a phrase that was taken is not read again,
so that "16 experts per GPU" is no number of experts. Axes are read as ``TP4``, ``TP=4``, ``tensor parallel size 4`` and
``4-way tensor parallelism``. Numbers that no phrase takes, and a second number for what was stated before, are listed
as not understood; so are ranges, which say where something is and not how much of it there is. Tables and emphasis of
Markdown are text like any other.
"""

from __future__ import annotations

import re

from truedag.tracer.audit.claim import Claim, ClaimError, parse_number
from truedag.tracer.audit.published import published_sizes

# No end of a range, and no factor: 0-127, 64 x 8, 8x7B.
_ALONE = r"(?<![\d,.])(?<!\d[-\u2013x\u00d7*])(?<!\d[ .][-\u2013.x\u00d7*][ .])(?<!\d to )(?<!\d\.\.)"
_NO_RANGE = r"(?!\s?(?:[-\u2013]|\.\.\.?|to\b|through\b)\s?\d)"
_NUMBER = rf"{_ALONE}(?>\d(?:[\d,]{{0,30}}\d)?(?:\.\d{{1,9}})?){_NO_RANGE}"
_N = rf"({_NUMBER}\s?(?:[KMBTkmbt](?:illion)?\b)?|(?:one|two|four|eight)\b)"
_IS = r"\s*(?:size|count|length|dimension|dim|width)?\s*(?::\s*)*(?:=|\bis\b|\bof\b|\bare\b)?\s*(?::\s*)*"
_GPU = r"(?:gpus?|ranks?|devices?|accelerators?)"
_EACH = r"\s*(?:per|/|an?|on each|on every)\s*"
_HAS = r"\s*(?:holds|hosts|has|gets|runs|with|:)?\s*"
_NOT_EACH = r"(?!\s*(?:each|per|/|(?:an?|in each|on each)\s+(?:node|server|host|machine|replica|stage)))"
_REPLICA = r"(?:dp\s+|data[\s\-]parallel\s+)?(?:replica|rank)"
_PHRASES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("layers_per_stage", (
        rf"{_N}\s*layers?{_EACH}(?:pipeline\s+)?stage", rf"layers?{_EACH}stage{_IS}{_N}",
        rf"(?:each|every)\s+(?:pipeline\s+)?stage{_HAS}{_N}\s*layers?",
    )),
    ("experts_per_rank", (
        rf"{_N}\s*experts?{_EACH}{_GPU}", rf"experts?{_EACH}{_GPU}{_IS}{_N}",
        rf"(?:each|every)\s+{_GPU}{_HAS}{_N}\s*experts?",
    )),
    ("tokens_per_second_per_gpu", (rf"{_N}\s*tokens?\s*(?:/|per)\s*s(?:ec(?:ond)?)?\s*(?:/|per)\s*{_GPU}",)),
    ("tokens_per_second", (rf"{_N}\s*tokens?\s*(?:/|per)\s*s(?:ec(?:ond)?)?\b",)),
    ("time_to_first_token_ms", (rf"(?:time to first token|ttft){_IS}{_N}\s*ms",)),
    ("memory_per_gpu", (
        rf"((?<![\d,.])\d[\d,]{{0,30}}(?:\.\d{{1,9}})?\s?[KMGT]i?B)(?:\s+of)?(?:\s+(?:memory|hbm|vram))?{_EACH}{_GPU}",
        rf"memory{_EACH}{_GPU}{_IS}((?<![\d,.])\d[\d,]{{0,30}}(?:\.\d{{1,9}})?\s?[KMGT]i?B)",
    )),
    ("batch_per_replica", (
        rf"batch{_EACH}{_REPLICA}{_IS}{_N}", rf"batch(?:[\s\-]*size)?{_IS}{_N}(?:\s*sequences)?{_EACH}{_REPLICA}",
    )),
    ("kv_heads", (
        rf"{_N}\s*(?:kv|key[\s\-/]*(?:and[\s\-])?value)[\s\-]*heads", rf"(?:kv|key[\s\-]value)[\s\-]*heads{_IS}{_N}",
    )),
    ("head_dim", (rf"head[\s\-_]*(?:dim(?:ension)?|size){_IS}{_N}", rf"heads of (?:size )?{_N}")),
    ("heads", (rf"{_N}\s*(?:attention\s+|query\s+|q\s+)?heads\b", rf"(?<!kv )\bheads{_IS}{_N}")),
    ("expert_hidden", (rf"expert\s+(?:hidden|ffn)(?:\s+size)?{_IS}{_N}",)),
    ("hidden", (
        rf"(?:hidden|model)[\s\-]*(?:size|dim(?:ension)?|width){_IS}{_N}", rf"\bhidden{_IS}{_N}", rf"d model{_IS}{_N}",
    )),
    ("ffn", (rf"(?:ffn|feed[\s\-]?forward|intermediate)(?:[\s\-_]*hidden)?{_IS}{_N}",)),
    ("vocabulary", (rf"vocab(?:ulary)?[\s_]*(?:size)?{_IS}{_N}",)),
    ("top_k", (r"top[\s\-]?(\d+)\b",)),
    ("sequence", (rf"seq(?:uence)?[\s\-_]*(?:len(?:gth)?){_IS}{_N}", rf"{_N}\s*tokens?\s+(?:per|a)\s+sequence")),
    ("batch", (
        rf"(?<!micro)(?<!micro[\s\-])batch(?:[\s\-_]*size)?{_IS}{_N}"
        rf"(?!(?:\s*sequences)?\s*(?:per|/)\s*(?:{_GPU}|micro))",
    )),
    ("stages", (rf"{_N}\s*(?:pipeline[\s\-]+)?stages\b", rf"(?:pipeline[\s\-]+)?stages{_IS}{_N}")),
    ("gpus", (
        rf"{_GPU}\s*(?:count)?\s*[=:]\s*(?:\d{{1,9}}\s*[x\u00d7*]\s*){{1,9}}\d{{1,9}}\s*=\s*{_N}",
        rf"(?<!nodes of )(?<!nodes with )(?<!nodes x )(?<!groups of ){_N}\s*(?:x\s+)?"
        rf"(?:(?:nvidia|amd|total|[ABHV]\d{{2,3}}\w*|MI\d+\w*)\s+){{0,2}}{_GPU}\b{_NOT_EACH}",
        # GPU 0 is one of them, and so are GPUs 4, 5 and 6.
        rf"(?:{_GPU}(?=\s*(?:count|[:=]))|gpus|ranks|devices|accelerators)(?:\s+count)?{_IS}(?!0\b){_N}"
        r"(?!\s*[x\u00d7*]\s*\d)(?!\s*(?:,|and|&)\s*\d{1,9}\b(?!\s*(?!and\b)[A-Za-z]))",
        rf"world[\s_]size{_IS}{_N}",
    )),
    ("experts", (rf"{_N}\s*(?:routed\s+)?experts\b", rf"\bexperts(?:\s+per\s+layer)?{_IS}{_N}")),
    ("layers", (rf"{_N}\s*(?:transformer\s+|decoder\s+|moe\s+)*layers\b", rf"\blayers{_IS}{_N}")),
    ("parameters", (
        rf"(?:parameters|params){_IS}{_N}", rf"{_N}\s*(?:-?\s*parameters?|params)\b",
        r"((?<![\d.])(?<!\d[x\u00d7])\d{1,9}(?:\.\d{1,9})?\s?[BT])\b(?!\w)",
    )),
)  # fmt: skip
_READ = tuple((name, tuple(re.compile(phrase, re.I) for phrase in phrases)) for name, phrases in _PHRASES)
_WORDS = {"one": "1", "two": "2", "four": "4", "eight": "8"}
_NAMES = {"tensor": "TP", "pipeline": "PP", "data": "DP", "expert": "EP", "context": "CP"}
_AXES = (
    re.compile(
        r"(?<![A-Za-z])(VPP|ETP|EDP|TP|PP|DP|EP|CP)(?:[\s_]*(?:size|degree))?\s?[=:]?\s?(\d{1,9})(?![\d.]*\w)", re.I
    ),
    re.compile(
        r"\b(tensor|pipeline|data|expert|context)[\s\-]*(?:model[\s\-]*)?parallel(?:ism)?(?:[\s\-_]*(?:size|degree))?"
        rf"{_IS}(\d{{1,9}})\b",
        re.I,
    ),
    re.compile(r"\b(\d{1,9})[\s\-]*way[\s\-]+(tensor|pipeline|data|expert|context)", re.I),
)
_GROUPS = re.compile(r"(\d{1,9})\s+(ETP|EDP|TP|PP|DP|EP|CP)[\s\-]+groups", re.I)
_LEFT = re.compile(r"(?<![\w.])\d[\d,.]*\w*(?:\s?(?:[-\u2013]|to\b)\s?\d[\d,.]*\w*)?")
_LONGEST = 20_000
_MOST_LEFT = 50
_AROUND = 24


def claim_of_prose(text: str, *, name: str) -> Claim:
    """Return what a text declares.

    Raises:
        ClaimError: it states nothing that a claim states, or is longer than a claim may be.
    """
    if len(text) > _LONGEST:
        raise ClaimError(
            f"{name}: a claim in words is no more than {_LONGEST:,} characters; this one has {len(text):,}"
        )
    # An asterisk between numbers is a product, any other is emphasis.
    plain = re.sub(r"[*`]", "", re.sub(r"(\d\s?)\*(?=\s?\d)", r"\1x", text)).replace("|", " : ").replace("_", " ")
    # Long runs of what may stand between a word and its number would cost time.
    whole = rest = re.sub(r"[\s:]+", lambda match: " : " if ":" in match[0] else " ", plain)
    unread: list[str] = []
    groups: dict[str, int] = {}
    for match in _GROUPS.finditer(rest):
        groups.setdefault(match[2].lower(), int(match[1]))
    rest = _without(rest, _GROUPS)
    axes: dict[str, str] = {}
    for pattern in _AXES:
        for match in pattern.finditer(rest):
            axis, size = (match[1], match[2]) if not match[1].isdigit() else (match[2], match[1])
            axis = _NAMES.get(axis.lower(), axis.upper())
            if axes.setdefault(axis, size) != size:
                unread.append(f"{axis}{size}: {axis}{axes[axis]} is stated before")
        rest = _without(rest, pattern)
    numbers: dict[str, float] = {}
    for key, phrases in _READ:
        for phrase in phrases:
            for match in phrase.finditer(rest):
                said = match[1].strip()
                value = parse_number(_WORDS.get(said.lower(), re.sub(r"illion$", "", said)), f"{name}: {key}")
                if numbers.setdefault(key, value) != value:
                    unread.append(f"{key} {said}: {numbers[key]:,.12g} is stated before")
            rest = _without(rest, phrase)
    if not axes and not numbers and not groups:
        raise ClaimError(f"{name}: it states no strategy and no number of a deployment, such as EP8-TP4 on 32 GPUs")
    for match in _LEFT.finditer(rest):
        if len(unread) == _MOST_LEFT:
            break
        unread.append(f'{match[0].rstrip(",.")} in "{_around(whole, *match.span())}"')
    first = text.strip().splitlines()[0][:200]
    return Claim(
        name=name,
        model=next((line for line in (first, text[:2000]) if published_sizes(line) is not None), None),
        strategy="-".join(f"{axis}{size}" for axis, size in axes.items()) or None,
        numbers=numbers,
        groups=groups,
        not_understood=tuple(unread),
    )


def _without(text: str, pattern: re.Pattern[str]) -> str:
    """Take out what was read, so that nothing grows together and all else keeps its place."""
    return pattern.sub(lambda match: ";" * len(match[0]), text)


def _around(text: str, begin: int, end: int) -> str:
    """Return a part of a text with the words beside it."""
    before, after = text[max(0, begin - _AROUND) : begin], text[end : end + _AROUND]
    if begin > _AROUND:
        before = before.partition(" ")[2]
    if end + _AROUND < len(text):
        after = after.rpartition(" ")[0]
    return f"{before}{text[begin:end]}{after}".strip()
