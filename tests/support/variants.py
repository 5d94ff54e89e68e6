"""Variants of a run with one attack and one model."""

from pipeline.core.variants import Variant, make_variants


def fgsm_at(*levels: int, model: str = "make") -> tuple[Variant, ...]:
    """Clean, and FGSM at some levels."""
    return make_variants({"fgsm": ([model], [level for level in levels if level])})
