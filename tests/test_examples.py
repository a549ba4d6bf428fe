"""The programs in examples/ run, and learn; the recipes in docs/integrations do what they say."""

from __future__ import annotations

import functools
import gzip
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import pro_kernels as pk
from stubs import stub_verl

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES, PAGES = ROOT / "examples", ROOT / "docs" / "integrations"


@pytest.fixture
def example(monkeypatch):
    """Import a program as running it as a script would."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def load(name: str):
        sys.modules.pop(name, None)
        return importlib.import_module(name)

    yield load
    for path in EXAMPLES.glob("*.py"):
        sys.modules.pop(path.stem, None)


# Whether what an example returns shows that it learnt; where it is not named, losses that fall.
LEARNT = {
    "plain_loop": lambda right: right == 1.0,
    "lightning_module": lambda loss: loss < 20,
    "ranked_trainer": lambda losses: losses[-1] < 0.95 * losses[0],
    "trl_dpo": lambda losses: len(losses) == 4,
    "trl_pro": lambda losses: losses[-1] < losses[0],
}
NEEDED = {"lightning_module": "lightning", "trl_dpo": "trl", "trl_pro": "trl"}


@pytest.mark.parametrize("name", sorted({path.stem for path in EXAMPLES.glob("*.py")} - {"tiny"}))
def test_every_example_learns(example, name, own_accelerate_state):
    if name in NEEDED:
        pytest.importorskip(NEEDED[name])
    learnt = LEARNT.get(name, lambda losses: losses[-1] < 0.8 * losses[0])
    assert learnt(example(name).main())


def test_the_loops_begin_with_the_loss_of_the_reference(example, own_accelerate_state):
    pytest.importorskip("lightning")
    tiny = example("tiny")
    batch = tiny.collate(tiny.ranked_lists()[:2])
    logits = tiny.model()(batch["input_ids"], batch["attention_mask"]).logits
    shape = (2, 3, batch["labels"].shape[1])
    want = pk.reference.pro_loss(
        logits.view(*shape, -1), batch["labels"].view(shape), batch["rewards"], shift=True
    ).loss.item()
    found = example("lightning_module").PRO().training_step(batch, 0).item()
    assert found == pytest.approx(want, rel=1e-5)
    in_bf16 = example("accelerate_loop").main(1)[0]
    assert in_bf16 == pytest.approx(want, rel=5e-3)


# ---- the recipes of the documentation, against a stub of the call they stand in for


def run_page(page: str, **names) -> None:
    """Run the python blocks of a page, but for those that show a file."""
    for code in code_blocks(f"docs/integrations/{page}"):
        if "--8<--" not in code:
            exec(code, names)


def test_verl(monkeypatch):
    functional, _ = stub_verl(monkeypatch)
    run_page("verl.md")
    assert functional.FusedLinearForPPO.forward is pk.integrations.verl.fused_linear_for_ppo
    pk.integrations.verl.restore()


def test_the_switches_of_trl_and_liger(request):
    trl = pytest.importorskip("trl")
    dpo_loss = pytest.importorskip("liger_kernel.chunked_loss.dpo_loss")
    models_trl = importlib.import_module("pro_kernels.models.trl")
    request.addfinalizer(models_trl.restore_trl)
    request.addfinalizer(pk.integrations.liger.restore)
    train, function = trl.DPOTrainer.train, dpo_loss.LigerFusedLinearDPOFunction
    run_page("trl.md")
    run_page("liger.md", trl=trl)
    assert trl.DPOTrainer.train is not train
    assert dpo_loss.LigerFusedLinearDPOFunction is not function


def test_the_pages_name_what_there_is():
    included = set()
    for page in PAGES.glob("*.md"):
        text = page.read_text()
        titles = re.findall(r'title="(.*?)"\n(.*)', text)
        assert all(line == f'--8<-- "{path}"' for path, line in titles), page.name
        for path, _ in titles:
            assert (ROOT / path).is_file(), f"{page.name}: {path}"
            included.add(Path(path))
    assert {path.relative_to(ROOT) for path in EXAMPLES.glob("*.py")} <= included


# ---- the code on the other pages


def code_blocks(page: str) -> list[str]:
    """Python blocks of a page."""
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


RUN = ["README.md", *(f"docs/{x}.md" for x in ("api", "attach", "distinct", "logprobs", "losses"))]


@pytest.mark.parametrize("page", RUN)
def test_code_of_the_pages_runs(page, example, request):
    """Against the small model of the examples; those with ``f(...)`` are lists of what there is."""
    tiny = example("tiny")
    batch = tiny.collate(tiny.ranked_lists(3))
    shape = (len(tiny.PROMPTS), 3, batch["labels"].shape[1])
    model = tiny.model()
    hidden = model.model(batch["input_ids"]).last_hidden_state
    names = {
        "pk": pk,
        "torch": torch,
        "ids": batch["input_ids"],
        "mask": batch["attention_mask"],
        "labels": batch["labels"],
        "rewards": batch["rewards"],
        "hidden": hidden.detach().view(*shape, -1).requires_grad_(),
        "weight": model.lm_head.weight.detach(),
        "targets": batch["labels"].view(shape),
        "trainer": SimpleNamespace(
            train=lambda: names["model"](batch["input_ids"], batch["attention_mask"])
        ),
        "ref_model": pk.attach(tiny.model()),
        "inputs": {key: batch[key] for key in ("input_ids", "attention_mask")},
        "n": 3,
        "ranking_loss": lambda logits, labels, rewards: (
            pk.reference.pro_loss(
                logits.view(*shape, -1), labels.view(shape), rewards, shift=True
            ).loss
        ),
    }
    scores = torch.randn(shape[:2])
    names |= {"logps": scores, "lengths": torch.full(shape[:2], 7), "ref_logps": scores + 1}
    names |= {"ref_hidden": names["hidden"].detach(), "ref_weight": names["weight"]}
    names["temperature"] = torch.full(shape, 0.7)
    names["old_logps"] = torch.zeros(shape[0] * 3, shape[2])
    if page == "docs/losses.md":  # its rows are those of the batch
        names |= {x: names[x].flatten(0, 1) for x in ("hidden", "ref_hidden", "targets")}
    losses = []
    blocks = [code for code in code_blocks(page) if "pro_trainer" not in code]
    assert blocks
    if page == "README.md":  # its first block has the code before and after
        blocks[:1] = blocks[0].split("\n# after\n")
    if importlib.util.find_spec("trl"):
        request.addfinalizer(importlib.import_module("pro_kernels.models.trl").restore_trl)
    else:
        blocks = [code for code in blocks if "accelerate_trl" not in code]
    for code in blocks:
        if re.search(r"\.\.\.\)$", re.sub(r" *#.*", "", code), re.MULTILINE):
            for name in re.findall(r"^pk\.([\w.]+)", code, re.MULTILINE):
                assert functools.reduce(getattr, name.split("."), pk)
            continue
        if "attach(" in code or "model" not in names:
            names["model"] = tiny.model()
        exec(code, names)
        losses += [names["loss"]] if re.search(r"^loss =", code, re.M) else []
    if page == "docs/distinct.md":
        assert names["rows"].saved > 0.2
    elif page == "docs/logprobs.md":
        assert names["top"].ids.shape == (*shape, 8) and names["logps"].isfinite().all()
    else:
        assert torch.isfinite(names["loss"] if losses else names["out"].loss)
    if page == "README.md":
        torch.testing.assert_close(losses[0], losses[1])


def test_code_of_the_trainer_runs(tmp_path, monkeypatch):
    tiny_llama = pytest.importorskip("pro_trainer.models").tiny_llama
    monkeypatch.chdir(tmp_path)
    model, tokenizer = tiny_llama(0)
    model.save_pretrained("path/or/hub-name")
    tokenizer.save_pretrained("path/or/hub-name")
    items = [
        {"prompt": f"q{i}: ", "completions": ["good", "bad!"], "rewards": [1.5, -1.0]}
        for i in range(8)
    ]
    for name in ("lists", "held-out"):
        with gzip.open(f"{name}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(item) + "\n" for item in items)
    (code,) = [code for code in code_blocks("docs/trainer.md") if "pro_trainer" in code]
    names: dict = {}
    exec(code, names)
    assert names["trainer"].state.global_step >= 1
