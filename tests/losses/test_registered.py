"""A loss from outside the package: one file, no edit of anything."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Annotated

import pytest
import torch

from pro_kernels.losses import LOSSES, differences, get_loss, pair_sum, register
from pro_kernels.losses.ranked import Ranked
from pro_kernels.option_types import Beta, LengthNormalize, Limits

PAGE = Path(__file__).resolve().parents[2] / "docs" / "extending.md"
TABLE = PAGE.with_name("losses.md")
TOY = re.search(r"## A loss.*?```python\n(.*?)```", PAGE.read_text(), re.S)[1]


@pytest.fixture
def toy(tmp_path):
    """The file of the loss; what it or the test registers is forgotten afterwards."""
    known = dict(LOSSES)
    path = tmp_path / "gap_hinge.py"
    path.write_text(TOY)
    yield path
    LOSSES.clear()
    LOSSES.update(known)
    sys.modules.pop(str(path), None)


def config(tmp_path, **options):
    from pro_trainer.train.config import PROConfig

    return PROConfig(output_dir=str(tmp_path / "run"), use_cpu=True, **options)


def test_it_is_a_loss_as_the_others_are(toy):
    exec(compile(TOY, str(toy), "exec"), {"__name__": "gap_hinge"})
    loss = get_loss("gap_hinge")
    assert list(LOSSES)[-1] == "gap_hinge" and loss.uses_gaps() and not loss.needs()
    logps = torch.tensor([[-4.0, -1.0, -9.0]], requires_grad=True)
    rewards, mask = torch.tensor([[0.0, 3.0, 9.0]]), torch.tensor([[True, True, False]])
    value, metrics = loss(logps, torch.tensor([[2, 1, 3]]), rewards=rewards, mask=mask, slope=2.0)
    value.backward()
    assert value.item() == pytest.approx(2 * 3 - (-1 + 2)) and metrics["rewards/margins"] == 1
    assert logps.grad.tolist() == [[0.5, -1.0, 0.0]]
    with pytest.raises(ValueError, match="slope must be > 0, got 0"):
        loss(logps, torch.ones(1, 3), slope=0)
    assert loss.reward_fault([-100.0, 0.0]) == "low" and loss.reward_fault([1.0, 0.0]) is None
    assert "too far apart" in loss.reward_fault([3e38, -3.0])


def test_the_trainer_takes_it_and_does_not_mix_order_with_gaps(toy, tmp_path):
    from pro_trainer.data.report import DataReport
    from pro_trainer.train.inputs import check_lists

    options = {"loss_type": "gap_hinge", "loss_module": str(toy)}
    args = config(tmp_path, **options, loss_options={"slope": 0.5})
    assert args.given() == {"slope": 0.5} and args.scores_are_means()
    assert not args.ranks_only() and not args.needs_reference()
    assert args.reward_fault([-100.0, 1.0]) == "low"
    mixed = DataReport()
    mixed.lists, mixed.with_rewards = 2, 1
    with pytest.raises(ValueError, match="1 of 2 lists have rewards, the others only an order"):
        check_lists(mixed, args)
    check_lists(mixed, config(tmp_path, loss_type="simpo"))
    nowhere = str(tmp_path / "nowhere.py")
    for wrong, message in (
        ({"loss_options": '{"slope": -1}'}, "slope must be > 0"),
        ({"loss_options": {"slop": 1}}, "slop=1 is no option of loss_type='gap_hinge', .* slope"),
        ({"loss_options": "slope"}, "loss_options must be a JSON object: .*, got slope"),
        ({"loss_module": nowhere}, "loss_module .*nowhere.py cannot be imported"),
    ):
        with pytest.raises(ValueError, match=message):
            config(tmp_path, **{**options, **wrong})


def test_the_command_trains_and_evaluates_with_it(toy, tmp_path, capsys):
    from pro_trainer.cli.main import main

    run = tmp_path / "run"
    argv = ["train", "--demo", "--loss_module", str(toy), "--loss_type", "gap_hinge"]
    argv += ["--loss_options", '{"slope": 0.5}', "--output_dir", str(run), "--max_steps", "2"]
    argv += ["--logging_steps", "1", "--max_length", "64", "--use_cpu", "true"]
    assert main(argv) == 0, capsys.readouterr().err
    identity = json.loads((run / "pro_run.json").read_text())
    assert identity["loss_type"] == "gap_hinge" and identity["loss_module"] == str(toy)
    assert "loss" in capsys.readouterr().out
    assert main([*argv, "--loss_options", '{"slope": -1}', "--overwrite", "true"]) == 2
    assert "slope must be > 0, got -1" in capsys.readouterr().err


def test_what_is_needed_is_asked_for(toy):
    @register(needs=lambda beta, **_: ["ref_logps"], uses_gaps=lambda beta, **_: beta > 1)
    def toy_ratio(ranked: Ranked, *, beta: Beta = 0.1):
        implicit = beta * ranked.log_ratios()
        return ranked.result(pair_sum(-differences(implicit), ranked.better()), implicit)

    assert toy_ratio.needs() == ("ref_logps",) and toy_ratio.__doc__ is None
    assert toy_ratio.needs(reference_free=True) == ()
    assert (toy_ratio.uses_gaps(), toy_ratio.uses_gaps(beta=2.0)) == (False, True)
    assert toy_ratio.reward_fault([3e38, -3e38]) is None
    ones = torch.ones(1, 2)
    with pytest.raises(ValueError, match="toy_ratio needs ref_logps: expected a .* tensor, got No"):
        toy_ratio(ones, ones)
    assert toy_ratio(ones, ones, ref_logps=ones)[0] == 0


def test_an_integer_option_has_limits_of_its_own(toy):
    @register()
    def toy_ratio(
        ranked: Ranked, *, k: Annotated[int, Limits(at_least=0, at_most=4), "Terms."] = 2
    ):
        return ranked.result(k * ranked.logps.sum(1), ranked.logps)

    ones = torch.ones(1, 2)
    assert [toy_ratio(ones, ones, k=k)[0] for k in (0, 4)] == [0, 8]
    for k, error in ((5, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match=f"k must be an integer >= 0 and <= 4, got {k}"):
            toy_ratio(ones, ones, k=k)


def test_the_table_of_the_docs_has_every_loss_and_what_it_needs():
    rows = re.findall(
        r"^\| `(\w+)` \|.*\| ([^|]*) \| [^|]* \| ([^|]*) \|$", TABLE.read_text(), re.M
    )
    names = {"ref": "ref_logps", "r": "rewards"}
    for name, needs, source in rows:
        said = re.sub(r"\(.*\)", "", needs).strip(" –")
        assert {names[x.strip()] for x in said.split(",") if x} == set(LOSSES[name].needs()), name
        assert re.search(r"\d{4}\.\d{5}|20\d\d", source)[0] in LOSSES[name].__doc__, name
    ours = {
        name for name, loss in LOSSES.items() if loss.body.__module__.startswith("pro_kernels.")
    }
    assert {name for name, *_ in rows} == ours
    assert f"[{len(ours)} losses](docs/losses.md)" in (PAGE.parents[1] / "README.md").read_text()


def result(ranked):
    return ranked.result(ranked.logps.sum(1), ranked.logps)


def positional(ranked, beta=0.1):
    return result(ranked)


def without_default(ranked, *, beta: Beta):
    return result(ranked)


def bad_default(ranked, *, beta: Beta = -1.0):
    return result(ranked)


def dpo(ranked, *, normalize: LengthNormalize = True, t: Annotated[float, Limits()] = 1.0):
    return result(ranked)


def masked(ranked, *, beta: Beta = 0.1):
    return result(ranked)


KNOWN = "there is a loss 'dpo' already, of pro_kernels.losses.pairs"
NEEDS = "must be one of ['rewards', 'ref_logps'], got 'mask'"


@pytest.mark.parametrize(
    ("body", "options", "error", "message"),
    [
        (positional, {}, TypeError, "beta of loss positional must be by keyword"),
        (without_default, {}, TypeError, "beta of loss without_default must be by"),
        (bad_default, {}, ValueError, "beta must be > 0, got -1.0"),
        (dpo, {}, ValueError, KNOWN),
        (masked, {"needs": ["mask"]}, ValueError, NEEDS),
        (print, {}, TypeError, "a loss is registered from a function"),
    ],
)
def test_what_cannot_be_registered(body, options, error, message, toy):
    with pytest.raises(error, match=re.escape(message)):
        register(**options)(body)
    assert body.__name__ not in LOSSES or LOSSES[body.__name__].body is not body
