"""Fused kernels for Preference Ranking Optimization (PRO, arXiv 2306.17492) and its relatives.

``linear_pro_loss(hidden, weight, targets, rewards).loss.backward()`` is the whole use: from hidden
states and LM-head weight to the listwise ranking loss and its gradients, logits never all held.
"""

from pro_kernels import backends, integrations, losses, reference
from pro_kernels._version import __version__
from pro_kernels.api import linear_pro_loss, linear_token_logps, pro_loss, token_logps
from pro_kernels.cross_entropy import linear_cross_entropy
from pro_kernels.distinct.decoder import distinct_rows
from pro_kernels.distinct.tree import TokenTree
from pro_kernels.layout import Layout
from pro_kernels.models.attach import OpenModel, attach, detach
from pro_kernels.output import PROOutput
from pro_kernels.policy import group_advantages, policy_loss

__all__ = [
    "__version__",
    "backends",
    "Layout",
    "OpenModel",
    "PROOutput",
    "TokenTree",
    "attach",
    "detach",
    "distinct_rows",
    "group_advantages",
    "integrations",
    "linear_cross_entropy",
    "linear_pro_loss",
    "linear_token_logps",
    "losses",
    "policy_loss",
    "pro_loss",
    "reference",
    "token_logps",
]
