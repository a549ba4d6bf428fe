"""``pro-kernels train`` on 2 and 4 ranks: the run of one process, what becomes of faults, parts."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import TIMEOUT, Run, argv, launch, words
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import BatchSampler
from trainer_runs import records

import tiny_models
from pro_trainer.batch.sampler import RankBatches, TokenBatches
from pro_trainer.train import faults
from pro_trainer.train.checkpoints import last_whole
from pro_trainer.train.distributed import call_through
from pro_trainer.train.usage import Activations

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")

# 11 lists and 8 a step: the second step of each epoch has 3, so that ranks are left without any.
DATA = [*records(9), *records(2, n=5)]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    for name, lists in (("train", DATA), ("eval", DATA[4:]), ("other", [*DATA[:10], DATA[0]])):
        text = "".join(json.dumps(x) + "\n" for x in lists)
        (folder / f"{name}.jsonl").write_text(text)
    return folder


def train(work: Path, name: str, world: int, accumulation: int = 1, fault=None, **more) -> Run:
    """Run the command with 8 lists a step and its output in a folder of this name."""
    one = argv(work, work / name, 8 // world // accumulation, accumulation, **more)
    return launch(world, work / f"{name} logs", one, fault=fault)


def finished(run: Run, output: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    assert run.codes == [0] * len(run.codes), "\n".join(run.printed)
    assert all("terminate called" not in text for text in run.printed)
    found = json.loads((output / "metrics.json").read_text())
    return found, load_file(output / "model.safetensors")


def close(one: tuple, other: tuple) -> None:
    """The same log, evaluation and parameters, to another order of sums."""
    for when in ("before", "after"):
        for name, value in one[0][when].items():
            if not any(part in name for part in ("second", "time", "memory", "epoch")):
                assert other[0][when][name] == pytest.approx(value, rel=1e-5), (when, name)
    logs = [[e for e in found[0]["log_history"] if "loss" in e] for found in (one, other)]
    assert len(logs[0]) == 5
    for a, b in zip(*logs, strict=True):
        for name in ("loss", "grad_norm", "sft_loss", "pairwise_accuracy", "ndcg"):
            assert b[name] == pytest.approx(a[name], rel=1e-5), (a["step"], name)
    for name, weight in one[1].items():
        torch.testing.assert_close(other[1][name], weight, rtol=0, atol=2e-5, msg=name)


@pytest.fixture(scope="module")
def whole(work) -> dict[int, tuple]:
    """Runs that nothing interrupts, by ranks."""
    return {w: finished(train(work, f"whole{w}", w), work / f"whole{w}") for w in (1, 2, 4)}


def test_2_and_4_ranks_take_the_steps_of_one_process(whole):
    for world in (2, 4):
        close(whole[1], whole[world])


def test_lists_without_weight_and_the_means_of_ranks(work):
    """A step of lists that all weigh 0 has loss 0; a rank without lists adds none to its mean."""
    lists = (json.dumps({**x, "prompt_weight": 0}) + "\n" for x in DATA)
    (work / "weightless.jsonl").write_text("".join(lists))
    options = {"data": work / "weightless.jsonl", "loss_type": "bco", "max_steps": 2}
    found, _ = finished(train(work, "bco", 2, **options), work / "bco")
    assert [e["loss"] for e in found["log_history"] if "loss" in e] == [0, 0]
    means = json.loads((work / "bco" / "checkpoint-2" / "running.json").read_text())
    candidates = [count for _, count in means]  # each rank's
    assert len(candidates) == 2 and sum(candidates) == sum(len(x["completions"]) for x in DATA)


def resumed(work: Path, cut: str, wrote: int, world: int, accumulation: int = 1) -> tuple:
    name = f"{cut} on {world}"
    shutil.copytree(work / cut, work / name)
    run = train(work, name, world, accumulation, resume_from_checkpoint="last")
    notice = f"resuming on {world} processes what {wrote} wrote"
    assert (notice in run.printed[0]) == (world != wrote)
    return finished(run, work / name)


FAULTS = {  # kind: (ranks, the one that fails, what the others say, in a regular expression)
    "killed": (4, 2, r"rank 2 is gone \(killed, or its machine or network is down\)"),
    "killed with the store": (2, 0, r"store is gone, and with it the process that kept it: rank 0"),
    "out of memory": (2, 1, "rank 1 failed with OutOfMemoryError: out of memory. Tried to"),
    "out of host memory": (2, 0, "rank 0 failed with MemoryError: no 1.00 GiB left"),
    "interrupted": (2, 1, "rank 1 was interrupted"),
    "stuck": (2, 1, f"rank 1 is stuck or slow: .* given up after ddp_timeout={TIMEOUT} s"),
    "nan": (2, 1, r"losses that are not finite on ranks \[1\]; stopped"),
}


def test_errors_of_collectives_are_known_by_what_gloo_says():
    """With and without the place in its sources, as both were seen."""
    for text in (
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer",
        "Application timeout caused pair closure",
    ):
        assert faults.of_a_collective(RuntimeError(text))
    for other in (RuntimeError("shape mismatch"), torch.OutOfMemoryError("gone"), OSError("gloo")):
        assert not faults.of_a_collective(other)


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_of_one_rank_ends_all_and_leaves_the_last_checkpoint(kind, whole, work):
    world, failing, cause = FAULTS[kind]
    run = train(work, kind, world, fault=(failing, kind))
    own = 143 if kind == "interrupted" else -signal.SIGKILL if kind.startswith("killed") else 1
    codes = [own if rank == failing else 1 for rank in range(world)]
    assert run.codes == codes, "\n".join(run.printed)  # a rank that hangs is killed: another code
    for rank, text in enumerate(run.printed):
        assert rank == failing or re.search(f"(rank|error: rank) {rank}.*{cause}", text), text
    left = last_whole(work / kind)
    assert left.name == "checkpoint-2" and not (work / kind / "model.safetensors").exists()
    written, expected = (
        (folder / left.name / "model.safetensors").read_bytes()
        for folder in (work / kind, work / f"whole{world}")
    )
    assert written == expected  # up to there, a run on as many ranks is repeatable bitwise
    if kind != "killed":
        return
    _, weights = resumed(work, kind, world, world)
    assert all(weight.equal(whole[world][1][name]) for name, weight in weights.items())
    close(whole[1], resumed(work, kind, world, 1))
    close(whole[1], resumed(work, kind, world, 2, accumulation=2))
    # Another number of lists a step is another run.
    shutil.copytree(work / kind, work / "refused")
    options = {"per_device_train_batch_size": 3, "resume_from_checkpoint": "last"}
    refused = train(work, "refused", 2, accumulation=2, **options)
    assert refused.codes == [2, 2]
    for text in refused.printed:
        assert (
            "8 lists (4 processes x 2 a batch x 1 accumulated) then, "
            "12 lists (2 processes x 3 a batch x 2 accumulated) now" in text
        ), text


def test_ranks_that_disagree_all_raise(work):
    output = work / "disagree"
    other = {"data": work / "other.jsonl", "num_candidates": 2, "learning_rate": 0.5}
    one, other = argv(work, output, 4), argv(work, output, 4, **other)
    run = launch(2, work / "disagree logs", one, other)
    assert run.codes == [2, 2]
    for rank, text in enumerate(run.printed):
        (line,) = [x for x in text.splitlines() if x.startswith("error: ")]
        assert line.startswith(f"error: rank {rank}: the ranks of this run disagree on ")
        for part in (
            "learning_rate: 0.001 on ranks [0], 0.5 on ranks [1]",
            "num_candidates: None on ranks [0], 2 on ranks [1]",
            "train_dataset: 11 lists, sha256 ",
        ):
            assert part in line
    assert not output.exists() or not any(output.iterdir())


def evaluation(work: Path, output: str, data: str = "eval.jsonl") -> list[str]:
    given = {"model": work / "whole1", "data": work / data, "output_dir": work / output}
    return words(given | {"per_device_eval_batch_size": 2, "ddp_timeout": TIMEOUT, "use_cpu": True})


def test_eval_is_that_of_one_process(whole, work):
    found = []
    for world in (1, 2):
        name = f"eval{world}"
        run = launch(world, work / f"{name} logs", evaluation(work, name), command="evaluate")
        assert run.codes == [0] * world, "\n".join(run.printed)
        found.append(json.loads((work / name / "eval.json").read_text())["metrics"])
    assert found[1] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_an_error_of_one_rank_before_the_first_step_ends_all(command, whole, work):
    """Here, a file that one rank lacks."""
    if command == "train":
        one, other = (argv(work, work / "m", 4, data=work / x) for x in ("train.jsonl", "missing"))
    else:
        one, other = (evaluation(work, "m", data) for data in ("eval.jsonl", "missing"))
    run = launch(2, work / f"missing {command}", one, other, command=command)
    assert run.codes == [1, 2]
    assert "rank 1 failed with DataError" in run.printed[0]
    assert str(work / "missing") in run.printed[0] and "error: rank 1: " in run.printed[1]


@pytest.mark.parametrize(("lists", "drop_last"), [(11, False), (16, False), (3, False), (11, True)])
def test_batches_are_dealt_out_once(lists, drop_last):
    batches = BatchSampler(range(lists), 2, drop_last)
    found = [list(RankBatches(batches, rank, 4)) for rank in range(4)]
    rounds = lists // 8 if drop_last else -(-lists // 8)
    assert [len(x) for x in found] == [rounds] * 4 == [len(RankBatches(batches, 0, 4))] * 4
    taken = [i for turn in zip(*found, strict=True) for batch in turn for i in batch]
    assert taken == list(range(8 * rounds if drop_last else lists))


@pytest.mark.parametrize("padded", [False, True])
def test_batches_of_tokens(padded):
    """Each list once an epoch, none over the limit but by itself, and as many in every epoch."""
    lists = [
        {
            "prompts": [[1] * (1 + i)],
            "completions": [[2] * (1 + i * k % 7) for k in range(1 + i % 3)],
        }
        for i in range(40)
    ]

    def size(batch: list[int]) -> int:
        chosen = [lists[i] for i in batch]
        own = [len(x) for one in chosen for x in one["completions"]]
        if not padded:
            return sum(len(one["prompts"][0]) for one in chosen) + sum(own)
        longest = [len(one["prompts"][0]) + len(x) for one in chosen for x in one["completions"]]
        return len(own) * max(longest)

    batches = TokenBatches(lists, 60, padded=padded, seed=3)
    first = list(batches)
    assert sorted(i for batch in first for i in batch) == list(range(40))
    assert all(size(batch) <= 60 or len(batch) == 1 for batch in first)
    assert len(first) == len(batches) < 40 and any(len(batch) > 1 for batch in first)
    batches.set_epoch(1)
    again = list(batches)
    assert again != first and sorted(again) == sorted(first)
    assert list(TokenBatches(lists, 60, padded=padded, seed=3)) == first
    dealt = [list(RankBatches(batches, rank, 3)) for rank in range(3)]
    assert sorted(x for turn in dealt for x in turn if x) == sorted(again)
    assert len({len(turn) for turn in dealt}) == 1


class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module, self.calls = module, 0

    def forward(self, *inputs):
        self.calls += 1
        return self.module(*inputs)


def test_runs_through_the_wrapper_once_and_restores_forward_also_after_an_error():
    module = nn.Linear(2, 2)
    wrapper, x = Wrapper(module), torch.ones(1, 2)
    plain = module(x)
    # The module's own forward is back inside.
    assert call_through(wrapper, module, lambda: module(x) * 2).equal(plain * 2)
    assert wrapper.calls == 1 and "forward" not in vars(module)
    assert call_through(module, module, lambda: 7) == 7  # without a wrapper, a plain call
    module.forward = own = lambda x: x + 1
    with pytest.raises(ZeroDivisionError):
        call_through(wrapper, module, lambda: 1 / 0)
    assert module.forward is own


def test_runs_inside_the_hooks_of_fsdp2_and_what_it_keeps_is_measured(tmp_path):
    """fully_shard wraps nothing: the module's own hooks gather its parameters."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        module = nn.Linear(4, 4)
        weight, x = module.weight.detach().clone(), torch.randn(2, 4)
        fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
        made = call_through(module, module, lambda: x @ module.weight.t())
        torch.testing.assert_close(made, x @ weight.t())
        made.sum().backward()
        assert module.weight.grad.full_tensor().shape == (4, 4)

        model = tiny_models.make()
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        batch = {"input_ids": torch.ones(1, 4, dtype=torch.int64)}
        with Activations(torch.device("cpu"), True).measured(model, batch):
            model(**batch).logits.sum().backward()
    finally:
        dist.destroy_process_group()
