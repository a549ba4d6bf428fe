"""The losses that TRL 1.16 has, against TRL's own computation on the same log-probs."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from pro_kernels.losses import LOSSES

trl = pytest.importorskip("trl", minversion="1.16", reason="needs TRL 1.16")
PROMPTS, TOKENS = 7, 9

# Ours and its options, TRL's loss type and options of its config.
DPO = [
    ("dpo", {}, "sigmoid", {}),
    ("dpo", {"sft_weight": 0.3, "sft_reduction": "tokens"}, ["sigmoid", "sft"], {}),
    ("ipo", {}, "ipo", {}),
    ("exo", {"label_smoothing": 0.2}, "exo_pair", {"label_smoothing": 0.2}),
    ("nca", {"alpha": 0.0, "beta": 0.1}, "nca_pair", {}),
    ("robust", {"label_smoothing": 0.2}, "robust", {"label_smoothing": 0.2}),
    ("bco", {"delta": 0.0}, "bco_pair", {}),
    ("sppo_hard", {}, "sppo_hard", {}),
    ("apo_zero", {}, "apo_zero", {}),
    ("apo_down", {}, "apo_down", {}),
    ("discopop", {"tau": 0.5}, "discopop", {}),
    ("sigmoid_norm", {}, "sigmoid_norm", {}),
    *(
        ("f_dpo", {"divergence": name} | alpha, "sigmoid", {"f_divergence_type": name})
        for name in ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
        for alpha in [{"alpha": 0.3} if name == "alpha_divergence" else {}]
    ),
]


def batch():
    """Log-probs of the tokens, chosen and then rejected, (2B, T), which are scored, and S_ref."""
    gen = torch.Generator().manual_seed(7)
    lengths = torch.randint(1, TOKENS + 1, (2 * PROMPTS,), generator=gen)
    scored = torch.arange(TOKENS) < lengths[:, None]
    logps = -2 * torch.rand(2 * PROMPTS, TOKENS, generator=gen).masked_fill(~scored, 0.0)
    ref = (logps.sum(1) + torch.randn(2 * PROMPTS, generator=gen)).detach()
    return logps.requires_grad_(), scored, ref


def trainer_of(**attributes):
    accelerator = MagicMock(device=torch.device("cpu"))
    accelerator.gather = accelerator.gather_for_metrics = lambda x: x
    return MagicMock(accelerator=accelerator, aux_loss_enabled=False, beta=0.1,
                     precompute_ref_logps=True, _total_train_tokens=0, _tp_size=1,
                     **attributes)  # fmt: skip


def model_of(logps):
    outputs = SimpleNamespace(
        log_probs=logps,
        entropy=torch.zeros_like(logps),
        mean_logits=torch.zeros_like(logps),
        is_top1=logps.detach() > 9,
    )
    return lambda **_: outputs


def inputs_of(scored, **others):
    completion = torch.nn.functional.pad(scored, (1, 0)).long()  # one token of a prompt before it
    whole = torch.ones_like(completion)
    return {"input_ids": whole, "attention_mask": whole, "completion_mask": completion, **others}


def pairs(x):
    """(2B,) -> (B, 2)."""
    return x.view(2, PROMPTS).t()


def check_same(theirs, name, logps, scored, **options):
    """Values, and gradients of each token's log-prob."""
    ours, _ = LOSSES[name](pairs(logps.sum(1)), pairs(scored.sum(1)), **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    found = [torch.autograd.grad(x, logps)[0] * scored for x in (ours, theirs)]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("name", "options", "loss_type", "config"), DPO)
def test_those_of_the_dpo_trainer(name, options, loss_type, config):
    logps, scored, ref = batch()
    types = [loss_type] if isinstance(loss_type, str) else loss_type
    args = {"label_smoothing": 0.0, "f_divergence_type": "reverse_kl", **config}
    trainer = trainer_of(ld_alpha=None, loss_types=types, loss_weights=[1.0, 0.3][: len(types)],
                         use_weighting=False, f_alpha_divergence_coef=0.7, **args)  # fmt: skip
    trainer.args.discopop_tau = 0.5
    chosen, rejected = ref.chunk(2)
    inputs = inputs_of(scored, ref_chosen_logps=chosen, ref_rejected_logps=rejected)
    loss = trl.DPOTrainer._compute_loss(trainer, model_of(logps), inputs, False)
    check_same(loss, name, logps, scored, ref_logps=pairs(ref), **options)


def test_kto():
    """Some of a prompt's candidates desirable, and KL from log-probs of other completions."""
    logps, scored, ref = batch()
    desirable = torch.rand(2 * PROMPTS) < 0.4
    kl, ref_kl = torch.randn(2 * PROMPTS), torch.randn(2 * PROMPTS) - 1
    trainer = trainer_of(loss_type="kto", calculate_KL=True, desirable_weight=1.3,
                         undesirable_weight=0.7)  # fmt: skip
    trainer._compute_kl_logps = lambda *_: kl
    others = {"label": desirable, "ref_logps": ref, "ref_KL_logps": ref_kl}
    loss = trl.KTOTrainer._compute_loss(
        trainer, model_of(logps), inputs_of(scored, **others), False
    )
    check_same(loss, "kto", logps, scored, ref_logps=pairs(ref), desirable=pairs(desirable),
               kl=(kl - ref_kl).mean(), desirable_weight=1.3, undesirable_weight=0.7)  # fmt: skip


@pytest.mark.parametrize(("name", "loss_type"), [("cpo", "sigmoid"), ("simpo", "simpo")])
def test_those_of_the_cpo_trainer(name, loss_type):
    from trl.experimental.cpo import CPOTrainer

    logps, scored, _ = batch()
    trainer = trainer_of(loss_type=loss_type, alpha=0.0, label_smoothing=0.2, simpo_gamma=0.4)
    scores = logps.sum(1) / (scored.sum(1) if name == "simpo" else 1)
    losses, *_ = CPOTrainer.cpo_loss(trainer, *scores.chunk(2))
    options = {"beta": 0.1, "label_smoothing": 0.2, "sft_weight": 0.0}
    options |= {"gamma": 0.4} if name == "simpo" else {}
    check_same(losses.mean(), name, logps, scored, **options)
