"""Answer-style diversification (SEFE, arXiv 2505.02486): part of each task's answers in other styles.

It acts before training, when a task's data are prepared (`mcit.data_prep.asd`); here it is only declared.
"""

from mcit.data_prep.schema import AsdConfig

from .base import Method


class Asd(Method):
    """Nothing is left to do while a stage trains."""

    name = "asd"
    paper = "SEFE, ICML 2025, arXiv 2505.02486"
    category = "data"
    keeps = "nothing"
    cost = "none while training; by `converter: llm`, one question a converted sample"
    Config = AsdConfig
    neutral = {"fraction": 0}  # noqa: RUF012
