"""Options out of range or of the wrong type."""

from __future__ import annotations

import math
import sys

import pytest
from trainer_runs import config

from pro_kernels.losses import LOSSES
from pro_trainer.train.config import PROConfig
from pro_trainer.train.losses import LOSS_SETTINGS, declared

TOKENS = {"per_device_train_batch_size": 8, "tokens_per_batch": 64}
TWO_WAYS = "tokens_per_batch=64 says which lists are in a batch, and so does .*: choose one"


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ({"max_length": "64"}, "max_length must be an integer"),
        ({"num_candidates": 2.5}, "num_candidates must be an integer"),
        ({"max_length": 1}, "max_length must be at least 2"),
        ({"max_length": 8, "max_prompt_length": 8}, r"max_prompt_length must lie in \[1, max_"),
        ({"num_candidates": 1}, "num_candidates must be at least 2"),
        ({"temperature": "warm"}, r"must be a number or one of \['reward'\], got 'warm'"),
        ({"temperature": "0"}, "temperature must be"),
        ({"reward_scale": math.nan}, "reward_scale must be of a size in"),
        ({"ddp_timeout": 0}, "ddp_timeout must be finite and > 0, got 0"),
        ({"budget_mb": 0}, "budget_mb must be finite and > 0"),
        ({"grad_filter": "1.5"}, r"grad_filter must be a number in \(0, 1\) or auto, got '1.5'"),
        ({"grad_filter": 0.1, "loss_impl": "reference"}, "grad_filter is an option of the fused"),
        ({"loss_type": "best"}, "unknown loss 'best'"),
        ({"loss_type": "dpo", "compat": "official"}, "compat='official' is a meaning of"),
        ({"beta": 0.1}, "beta=0.1 is no option of loss_type='pro', which has sft_weight"),
        ({"loss_type": "dpo", "eps": 0.1}, "no option of loss_type='dpo', which has beta"),
        ({"sync_ref_model": True, "precompute_ref_log_probs": True}, "choose one"),
        ({"ref_model_mixup_alpha": 1.5}, r"ref_model_mixup_alpha must lie in \[0, 1\], got 1.5"),
        ({"compat": "offical"}, "compat must be one of 'none', 'official', got 'offical'"),
        ({"truncation_mode": "end"}, "truncation_mode must be one of 'keep_end', 'keep_start'"),
        ({"batching": "maybe"}, "batching must be one of 'auto', 'lists', 'padded'"),
        ({"sample_steps": -1}, "sample_steps must be >= 0"),
        ({"remove_unused_columns": True}, "remove_unused_columns must stay False, got True"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor must stay 0.0"),
        (
            {"loss_options": {"equal_rewards": "keep"}},  # the trainer sets it
            "equal_rewards='keep' is no option of loss_type='pro'",
        ),
        ({**TOKENS, "per_device_train_batch_size": 4}, TWO_WAYS),
        ({**TOKENS, "train_sampling_strategy": "group_by_length"}, TWO_WAYS),
        ({**TOKENS, "dataloader_drop_last": True}, TWO_WAYS),
        ({**TOKENS, "accelerator_config": {"split_batches": True}}, TWO_WAYS),
    ],
)
def test_options_out_of_range_are_refused(options, wrong, tmp_path):
    with pytest.raises(TypeError if "an integer" in wrong else ValueError, match=wrong):
        config(tmp_path, **options)


def test_each_of_several_processes_finds_no_batch_size_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(PROConfig, "world_size", 2)
    with pytest.raises(ValueError, match="auto_find_batch_size is for one process: of 2"):
        config(tmp_path, auto_find_batch_size=True)


def test_every_option_of_every_loss_is_a_flag_and_no_other():
    there, without_a_flag = {}, set()
    for name, loss in LOSSES.items():
        if loss.body.__module__.startswith("pro_kernels."):
            own = {x: kind for x, kind in loss.types.items() if kind.text}
            there[name] = {x: (tuple(kind), loss.defaults[x]) for x, kind in own.items()}
            without_a_flag |= loss.defaults.keys() - own.keys()
    read = {
        name: {option: (tuple(kind), default) for option, (kind, default) in options.items()}
        for name, options in declared().items()
    }
    assert read == there
    assert list(read) == ["pro", *sorted(there.keys() - {"pro"})]  # as help lists them
    assert list(there) == sorted(there)  # and a refusal
    assert without_a_flag == {"sft_index", "equal_rewards", "desirable", "kl", "running"}
    assert {option for options in read.values() for option in options} == set(LOSS_SETTINGS)


def test_a_loss_gets_what_was_given_and_keeps_its_own_defaults(tmp_path):
    assert config(tmp_path).given() == {}
    given = config(tmp_path, loss_type="dpo", beta=0.3, pairs="best").given()
    assert given == {"beta": 0.3, "pairs": "best"}
    for two in (2, "2"):
        assert config(tmp_path, temperature=two).given() == {"temperature": 2.0}
    assert config(tmp_path, loss_type="slic").scores_are_means() is False
    assert config(tmp_path, loss_type="dpo").scores_are_means() is True


OWN_LOSS = """
from __future__ import annotations
from dataclasses import dataclass
from pro_kernels.losses import register
from pro_kernels.option_types import Beta

@dataclass
class Kept:  # dataclasses look their module up
    value: int = 1

@register()
def {name}(ranked, *, beta: Beta = 0.1, margin{hint} = 1.0):
    return ranked.logps.sum(), {terms}
"""


@pytest.mark.parametrize(
    ("name", "hint", "terms", "options", "wrong"),
    [
        ("untyped", "", "{}", {}, "margin of loss untyped must be by keyword and have a type hint"),
        ("bare", ": float", "", {}, "must return a scalar tensor and a dict"),
        ("typed", ": float", "{}", {"margin": "a"}, "margin must be a number, got 'a'"),
        ("twice", ": float", "{}", {"beta": 2}, "beta was given as a flag and in loss_options"),
    ],
)
def test_a_wrong_loss_of_ones_own_is_named(tmp_path, name, hint, terms, options, wrong):
    module = tmp_path / f"{name}.py"
    module.write_text(
        OWN_LOSS.replace("{name}", name).replace("{hint}", hint).replace("{terms}", terms)
    )
    given = {"loss_module": str(module), "loss_type": name, "beta": 1.0, "loss_options": options}
    with pytest.raises(ValueError, match=wrong):
        config(tmp_path, **given)
    assert (str(module) in sys.modules) == bool(hint)
    LOSSES.pop(name, None)
