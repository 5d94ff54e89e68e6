"""The layouts that there are, by the names that configs give them: a new one is one line here."""

from pipeline.layouts.base import Layout
from pipeline.layouts.images import Images
from pipeline.layouts.signs import Signs
from pipeline.layouts.wide import Wide

LAYOUTS: dict[str, Layout] = {
    "images": Images(),
    "signs": Signs(),
    "wide": Wide(),
}
