"""Colours: a stage's, and shades of it by kind and group of GPUs."""

from __future__ import annotations

from collections.abc import Sequence

# Okabe and Ito's palette, which people with any colour vision tell apart; black and yellow are left out. Two of Tol's
# muted scheme follow, so that eight stages have eight colours.
# Source: Okabe, Ito, "Color Universal Design", 2008; Tol, "Colour Schemes", SRON/EPS/TN/09-002, 2021.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#882255", "#999933")
ACROSS = "#6f6f6f"
DARK, LIGHT = "#3a3a3a", "#9a9a9a"  # of lines
SHARES = {"ellipse": 0.42, "box": 0.16, "parallelogram": 0.27}


def stage_colour(stage: int) -> str:
    """Return a stage's colour; grey for what is in none."""
    return ACROSS if stage < 0 else PALETTE[stage % len(PALETTE)]


def tint(colour: str, share: float) -> str:
    """Mix a colour into white."""
    parts = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(255 - (255 - part) * share):02x}" for part in parts)


def group_tint(colour: str, ranks: tuple[int, ...], groups: Sequence[tuple[int, ...]]) -> str:
    """Return the shade of a group of GPUs among all that there are."""
    return tint(colour, 0.30 + 0.35 * (groups.index(ranks) / max(1, len(groups) - 1)))
