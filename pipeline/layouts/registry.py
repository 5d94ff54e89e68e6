"""The layouts that there are, as `OutputConfig.kind` calls them: those of `config/kinds.py`, each made once."""

from pkgutil import resolve_name

from pipeline.config import kinds
from pipeline.layouts.base import Layout

LAYOUTS: dict[str, Layout] = {name: resolve_name(where)() for name, where in (kinds.LAYOUTS | kinds.BITS).items()}
