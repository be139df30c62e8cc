"""Faults put into true graphs at random places, each with the check that must find it and where."""

from audit_mutations import communication, dimension, model, strategy, structure
from audit_mutations.original import KINDS, Original, UnfitError

__all__ = ["KINDS", "Original", "UnfitError", "communication", "dimension", "model", "strategy", "structure"]
