"""The `publish:` section of a recipe."""

from typing import Annotated

from pydantic import Field

from mcit.data_prep.schema import Config

HubId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")]


class PublishConfig(Config):
    """Where a run is published, and what of it may be known.

    Data are not named unless `datasets` names them. `base_model` is the Hub's name of a base that lies in a folder.
    """

    repo_id: HubId
    private: bool = True
    predictions: bool = False  # each answer, with prompt and references, in the dataset <repo_id>-predictions
    base_model: HubId | None = None
    license: str | None = None  # an identifier of the Hub's list: apache-2.0; None: none is stated
    datasets: dict[str, HubId] = Field(default_factory=dict)  # task → the dataset on the Hub that its test part is of
