"""Where a dataset comes from, for the card. None of it decides a byte, so none of it is part of the run id."""

from pydantic import BaseModel, ConfigDict


class Origin(BaseModel):
    """The dataset that the images come from; what is not known stays None, and the card says so.

    `repository` is its id on the Hub and `revision` the commit that was read; `license` is stated as the source
    states it; `credit` names whom to thank, in plain words.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str | None = None
    repository: str | None = None
    revision: str | None = None
    license: str | None = None
    credit: str | None = None


UNKNOWN = Origin()
