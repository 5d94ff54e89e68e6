"""The layouts that there are, by the names that configs give them: those of `config/kinds.py`, each made once."""

from pkgutil import resolve_name

from pipeline.config import kinds
from pipeline.layouts.base import Layout

LAYOUTS: dict[str, Layout] = {name: resolve_name(where)() for name, where in kinds.LAYOUTS.items()}
