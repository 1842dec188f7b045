"""What last hidden states say of the next tokens: the loss of the answers, and how far predictions have moved.

Logits are made of a sample's hidden states when they are needed, and made again for the backward pass: a vocabulary of
150,000 makes them 0.6 MB a token.
"""

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..training.collator import IGNORED

TEMPERATURE = 2.0  # GeRe (code, in a function that it does not use)


def answer_loss(hidden: Tensor, labels: Tensor, head: nn.Linear) -> Tensor:
    """Mean cross-entropy, in nats, of a sample's next tokens that carry loss.

    `hidden` [tokens, units] are last hidden states, `labels` [tokens] as in a batch. Logits are not kept.
    """
    learned = labels[1:] != IGNORED

    def loss(states: Tensor) -> Tensor:
        return F.cross_entropy(logits(states, head), labels[1:][learned])

    return checkpoint(loss, hidden[:-1][learned], use_reentrant=False, preserve_rng_state=False)


def divergence(hidden: Tensor, kept: Tensor, head: nn.Linear) -> Tensor:
    """KL(anchor || now) of the next token, in nats, a mean over tokens, both at `TEMPERATURE`.

    `hidden` and `kept` [tokens, units] are last hidden states now and of the anchor; the head is the same for both.
    """

    def loss(states: Tensor) -> Tensor:
        now, then = (F.log_softmax(logits(one, head) / TEMPERATURE, -1) for one in (states, kept))
        return F.kl_div(now, then, reduction="none", log_target=True).sum(-1).mean()

    return checkpoint(loss, hidden, use_reentrant=False, preserve_rng_state=False)


def distance_to(hidden: Tensor, target: Tensor, head: nn.Linear, temperature: float) -> Tensor:
    """KL(target || now) of the next token, in nats, a mean over tokens.

    `hidden` [tokens, units] are last hidden states, `target` [tokens, vocabulary] log-probabilities at `temperature`.
    """

    def loss(states: Tensor) -> Tensor:
        now = F.log_softmax(logits(states, head) / temperature, -1)
        return F.kl_div(now, target, reduction="none", log_target=True).sum(-1).mean()

    return checkpoint(loss, hidden, use_reentrant=False, preserve_rng_state=False)


def logit_gap(hidden: Tensor, places: Tensor, values: Tensor, head: nn.Linear) -> Tensor:
    """Mean squared distance of logits from kept ones: of each token those at `places`, both [tokens, kept]."""

    def loss(states: Tensor) -> Tensor:
        return F.mse_loss(logits(states, head).gather(1, places.long()), values.float())

    return checkpoint(loss, hidden, use_reentrant=False, preserve_rng_state=False)


def logits(hidden: Tensor, head: nn.Linear) -> Tensor:
    """Logits, float32 [tokens, vocabulary], of last hidden states."""
    return head(hidden.to(head.weight.dtype)).float()
