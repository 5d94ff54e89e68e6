"""The transfer matrix: who is fooled by whose images. It follows from the counts of the receipts, no row is read."""

from collections.abc import Iterable, Sequence

from pipeline.core.variants import maker
from pipeline.output.folder import Id, Level, Record, Split, VariantCounts, Whole

# A model that predicts less than this share of the clean images right says little about transfer.
FEW = 0.5


class Transfer(Record):
    """What one model makes of the images of one variant in one split.

    attack, model, level: what the images are; `model` is None where the attack asks none. looking: the model that
    looks. images: labelled ones. correct of them it predicts right, and clean_correct it predicts right when they are
    clean; lost of those are wrong now.
    """

    split: Split
    attack: Id
    model: Id | None
    level: Level
    looking: Id
    images: Whole
    correct: Whole
    clean_correct: Whole
    lost: Whole

    @property
    def maker(self) -> str:
        """As `variants.maker`."""
        return maker(self.attack, self.model)

    @property
    def accuracy(self) -> float | None:
        """The share of the images that it predicts right; None without images."""
        return self.correct / self.images if self.images else None

    @property
    def share_lost(self) -> float | None:
        """Of the images that it gets right when clean the share that it gets wrong now; None where there are none."""
        return self.lost / self.clean_correct if self.clean_correct else None


def transfer_matrix(counts: Iterable[tuple[str, VariantCounts]]) -> tuple[Transfer, ...]:
    """The matrix of a dataset: by split, in the order of the variants and of the models.

    `counts` are splits, and what the images of one variant in each add up to, clean first.
    """
    made: list[Transfer] = []
    clean: dict[str, VariantCounts] = {}
    for split, own in counts:
        if own.attack is None:
            clean[split] = own
            continue
        made += [
            # Not checked: of numbers that others wrote the sum may be more than any of them may.
            Transfer.model_construct(
                split=split,
                attack=own.attack,
                model=own.model,
                level=own.level,
                looking=looking,
                images=own.labelled,
                correct=answers.correct,
                clean_correct=clean[split].models[looking].correct,
                lost=answers.lost,
            )
            for looking, answers in own.models.items()
        ]
    return tuple(made)


def few_right(matrix: Iterable[Transfer]) -> list[str]:
    """Why a model loses few images that fool another: sentences for those that few clean images could be lost of."""
    found = {
        (cell.looking, cell.split): f"{cell.looking} is right in only {cell.clean_correct:,} of {cell.images:,} clean "
        f"{cell.split} images ({cell.clean_correct / cell.images:.1%}), so there are few that could transfer to it."
        for cell in matrix
        if cell.images and cell.clean_correct < FEW * cell.images
    }
    return [*found.values()]


def by_epsilon(matrix: Sequence[Transfer]) -> list[list[Transfer]]:
    """The rows of the matrix, each the cells of one variant in one split, in the order of the models that look.

    Without labelled images there are none. Rows at one epsilon stand together, those of attacks that ask no model,
    against which others are measured, last.
    """
    rows: dict[tuple[str, int, bool, str, str], list[Transfer]] = {}
    for cell in matrix:
        if not cell.images:
            continue
        key = cell.split, cell.level, cell.model is None, cell.attack, cell.model or ""
        rows.setdefault(key, []).append(cell)
    order = list(dict.fromkeys(cell.split for cell in matrix))
    return [rows[key] for key in sorted(rows, key=lambda key: (order.index(key[0]), key[1], key[2]))]
