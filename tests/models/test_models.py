"""Two real pretrained models: what is proven on a random one is not proven."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import fields

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import pro_kernels as pk
import trees
from pro_kernels.distinct import tryout
from pro_kernels.models import trl as swap
from pro_kernels.models.probe import FACTOR
from pro_trainer import PROConfig, PROTrainer
from pro_trainer.cli import commands
from pro_trainer.models import load
from pro_trainer.options import ModelOptions
from pro_trainer.text.encode import Encoder, TokenizedList
from pro_trainer.text.options import ListOptions
from pro_trainer.text.store import load_dataset
from test_integrations import ARGUMENTS

pytestmark = pytest.mark.models

QUESTIONS = {
    "What is the capital of France?": ("Paris is the capital of France.", "France has none.", "x"),
    "How many legs has a spider?": ("A spider has eight legs.", "Perhaps six?", "Legs legs legs."),
    "Name a primary colour.": ("Red is a primary colour.", "Brown, I think.", "Monday."),
    "What do bees make?": ("Bees make honey.", "They make milk.", "Bees bees."),
}
RECORDS = [
    {"prompt": q, "completions": list(a), "rewards": [1.0, 0.2, -1.0]} for q, a in QUESTIONS.items()
]


def dataset(path: str, source: object = RECORDS, **options: object):
    tokenizer = AutoTokenizer.from_pretrained(path)
    found, report = load_dataset([source], tokenizer, ListOptions(**options))
    return found, report, tokenizer


def test_gemma_has_one_bos(gemma):
    encoder = Encoder(AutoTokenizer.from_pretrained(gemma))
    for prompt in ("<bos>Hi", "Hi"):
        ids, _ = encoder.prompt(prompt)
        assert ids == [2, 10979] and encoder.text(prompt, " there")[0][:2] == ids


def test_smollm_has_one_eos_and_a_template_for_strings(smollm):
    records = [
        {"prompt": "Hi<|im_end|>", "completions": ["Hello<|im_end|>", "Go"]},
        {"prompt": "Hi", "completions": ["Hello", "Go"]},
    ]
    found, report, tokenizer = dataset(smollm, records)
    for row in found:
        assert all(ids.count(2) == 1 and ids[-1] == 2 for ids in row["completions"])
    assert tokenizer.decode(found[0]["prompts"][0]) == "Hi<|im_end|>"
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False,
                                         add_generation_prompt=True)  # fmt: skip
    assert tokenizer.decode(found[1]["prompts"][0]) == chat
    assert "lists whose strings are written as turns of the chat template: 1" in report.text()


@pytest.mark.shared
def test_dialogues_are_cut_only_where_they_do_not_fit(smollm, shared):
    source = str(shared / "data" / "hh-harmless-base-dev.jsonl.gz")
    tokenizer = AutoTokenizer.from_pretrained(smollm)
    for mode in ("off", "on"):
        whole, _ = load_dataset(
            [source], tokenizer, ListOptions(max_length=8192, chat_template=mode)
        )
        found, report = load_dataset([source], tokenizer, ListOptions(chat_template=mode))
        full = {
            i: len(row["prompts"][0]) + max(map(len, row["completions"]))
            for i, row in enumerate(whole)
        }
        cut = [i for i, row in enumerate(found) if row["cut"]]
        assert cut == [i for i, length in full.items() if length > 512]
        assert report.prompts_cut == {"off": 45, "on": 53}[mode]
        for i in cut if mode == "on" else ():
            text = tokenizer.decode(found[i]["prompts"][0])
            turns = text.split("<|im_start|>")[1:]
            assert [t.split("\n")[0] for t in turns[:2]] == ["system", "user"]
            assert all(t.endswith("<|im_end|>\n") for t in turns[:-1])
            assert turns[-1] == "assistant\n"


@pytest.mark.shared
def test_four_of_many_candidates_have_four_rewards_where_they_can(smollm, shared):
    source = str(shared / "data" / "alpaca-eval-ranked-dev.jsonl.gz")
    found, report, _ = dataset(smollm, source, num_candidates=4)
    assert sum(len(set(rewards)) == 4 for rewards in found["rewards"]) == 174
    assert report.unused == Counter(models=500)


def test_inspect_shows_what_is_trained_on(smollm, tmp_path, capsys):
    data = tmp_path / "d.jsonl"
    data.write_text("\n".join(map(json.dumps, RECORDS)))
    argv = ["--data", str(data), "--model_name_or_path", smollm, "--json", "true", "--num", "4"]
    assert commands.inspect(argv) == 0
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    found, _, _ = dataset(smollm)
    assert {f.name for f in fields(TokenizedList)} < set(found.column_names)
    assert [x["prompt_ids"] for x in shown] == [row["prompts"][0] for row in found]
    assert [x["completion_ids"] for x in shown] == [row["completions"] for row in found]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_distinct_rows_are_accepted_and_planted_faults_are_refused(real, dtype, monkeypatch):
    """Prints the numbers of docs/attach.md, "What counts as rounding" (``-s``)."""
    if dtype == torch.float16 and "gemma" in real:
        pytest.skip("overflows there")
    model = AutoModelForCausalLM.from_pretrained(real, dtype=dtype)
    agree, plain = tryout.agree, pk.TokenTree.from_sequences
    what = iter(("renamed", "distinct", "further on"))

    def printed(*args):
        off, allowed = agree(*args)
        about = f"{type(model).__name__} {dtype} {next(what)}"
        print(f"{about}: {off:.2g}, noise {allowed / FACTOR:.2g}")
        return off, allowed

    monkeypatch.setattr(tryout, "agree", printed)
    with pk.distinct_rows(model):
        pass
    for fault in (trees.moved, trees.leaking):
        what = iter(("renamed", fault.__name__, "further on"))
        with monkeypatch.context() as planted:
            planted.setattr(pk.TokenTree, "from_sequences", lambda rows, f=fault: f(plain(rows)))
            with pytest.raises(ValueError, match="rounding accounts for"):
                pk.distinct_rows(model)


def test_gemma_in_fp16_is_refused_with_what_to_use(gemma, tmp_path):
    model, tokenizer = load(gemma, ModelOptions(dtype="float16"))
    with pytest.raises(ValueError, match="overflow there: use bfloat16 or float32"):
        PROTrainer(model, PROConfig(output_dir=str(tmp_path)), RECORDS, None, tokenizer)


def train(path: str, folder, steps: int = 10, loaded=None, **options):
    model, tokenizer = loaded or load(path)
    peft = options.pop("peft_config", None)
    config = PROConfig(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, learning_rate=2e-5,
        lr_scheduler_type="constant", logging_steps=1, report_to="none", disable_tqdm=True,
        use_cpu=True, save_strategy="no", sft_weight=0.01, **options,
    )  # fmt: skip
    trainer = PROTrainer(model, config, RECORDS, RECORDS, tokenizer, peft_config=peft)
    trainer.train()
    return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def check_saved(trainer, model, tokenizer) -> None:
    """What is saved ranks as what was trained."""
    config = PROConfig(output_dir=f"{trainer.args.output_dir}/again", use_cpu=True,
                       report_to="none")  # fmt: skip
    again = PROTrainer(model, config, None, RECORDS, tokenizer)
    torch.testing.assert_close(
        again.score(again.eval_dataset).logps, trainer.score(trainer.eval_dataset).logps,
        rtol=1e-5, atol=1e-4,
    )  # fmt: skip


def test_ten_steps_fall_and_equal_the_plain_reference(real, tmp_path):
    trainer, fused = train(real, tmp_path / "fused")
    assert fused[-1] < 0.8 * fused[0]
    _, plain = train(real, tmp_path / "plain", loss_impl="reference", batching="padded")
    assert fused == pytest.approx(plain, rel=2e-3, abs=2e-3 * fused[0])
    assert fused[0] == pytest.approx(plain[0], rel=1e-5)
    trainer.save_model()
    check_saved(trainer, *load(str(tmp_path / "fused")))


def test_lora_with_the_head_trains_and_loads(smollm, tmp_path):
    from peft import LoraConfig, PeftModel

    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj", "lm_head"])
    trainer, fused = train(smollm, tmp_path / "fused", 3, peft_config=lora)
    _, plain = train(smollm, tmp_path / "plain", 3, peft_config=lora, loss_impl="reference")
    assert fused == pytest.approx(plain, rel=2e-3) and fused[0] == pytest.approx(plain[0], rel=1e-5)
    trainer.save_model()
    model, tokenizer = load(smollm)
    check_saved(trainer, PeftModel.from_pretrained(model, tmp_path / "fused"), tokenizer)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_weights_train_under_adapters(smollm, bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    from peft import LoraConfig

    found = []
    for impl in ("auto", "reference"):
        options = ModelOptions(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
        lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
        trainer, losses = train(
            smollm, tmp_path / impl, 3, loaded=load(smollm, options), peft_config=lora,
            loss_impl=impl, batching="padded",
        )  # fmt: skip
        found.append(losses)
        assert all("lora_" in n for n, p in trainer.model.named_parameters() if p.requires_grad)
    assert found[0] == pytest.approx(found[1], rel=1e-3) and found[0][-1] < found[0][0]


def trl_logs(smollm: str, folder, kind: str, rows: str | None, data: list, **options) -> list[dict]:
    """What the steps of one of TRL's trainers log, as it is or accelerated."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    more = {"reward_funcs": options.pop("reward")} if "reward" in options else {}
    options |= {"output_dir": str(folder), "learning_rate": 1e-5}
    config = getattr(trl, f"{kind}Config")(**ARGUMENTS | options | {"optim": "adamw_torch"})
    model = AutoModelForCausalLM.from_pretrained(smollm, dtype=torch.float32)
    if rows is not None:
        swap.accelerate_trl(rows=rows)
    try:
        trainer = getattr(trl, f"{kind}Trainer")(
            model, args=config, train_dataset=Dataset.from_list(data),
            processing_class=AutoTokenizer.from_pretrained(smollm), **more,
        )  # fmt: skip
        trainer.train()
    finally:
        swap.restore_trl()
    print(rows, trainer.state.log_history)
    return [x for x in trainer.state.log_history if "loss" in x]


@pytest.mark.shared
def test_twenty_steps_of_trl_are_the_same_on_distinct_rows(smollm, shared, tmp_path):
    """TRL's DPO on dialogues: as it is, with the fused head, on distinct rows. Prints (``-s``)."""
    from datasets import load_dataset as load_records

    path = str(shared / "data" / "hh-harmless-base-dev.jsonl.gz")
    records = load_records("json", data_files=path, split="train").select(range(40)).to_list()
    found = {}
    for rows in (None, "padded", "distinct"):
        logs = trl_logs(
            smollm, tmp_path / str(rows), "DPO", rows, records, max_steps=20, max_length=192,
            per_device_train_batch_size=2,
        )  # fmt: skip
        found[rows] = [x["loss"] for x in logs]
    assert len(found[None]) == 20 and found[None][0] == pytest.approx(0.693, abs=1e-3)
    for rows in ("padded", "distinct"):
        assert found[rows] == pytest.approx(found[None], rel=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "grpo", "importance_sampling_level": "sequence"},
        {"loss_type": "dr_grpo", "top_entropy_quantile": 0.3, "beta": 0.1},
    ],
    ids=str,
)
def test_steps_of_trls_grpo_are_the_same_on_distinct_rows(smollm, tmp_path, options):
    """As it is, then on the fused head and distinct rows; prints what they log (``-s``)."""
    prompts = [{"prompt": [{"role": "user", "content": question}]} for question in QUESTIONS]
    plain, fused = (
        trl_logs(
            smollm, tmp_path, "GRPO", rows, prompts, max_steps=4, per_device_train_batch_size=4,
            num_generations=2, num_iterations=2, max_completion_length=16, **options,
            reward=lambda completions, **_: [float(len(set(x[0]["content"]))) for x in completions],
        )
        for rows in (None, "distinct")
    )  # fmt: skip
    assert plain[3]["grad_norm"] > 0.1  # of a step on old samples
    for name in ("loss", "grad_norm", "entropy"):
        values = [x[name] for x in plain]
        assert [x[name] for x in fused] == pytest.approx(values, rel=1e-3, abs=2e-5), name


def test_log_probs_of_an_fp32_head_are_those_of_a_plain_fp32_forward(smollm):
    tokenizer = AutoTokenizer.from_pretrained(smollm)
    ids = torch.tensor(tokenizer(__doc__ + "".join(QUESTIONS)).input_ids)[None]
    model = AutoModelForCausalLM.from_pretrained(smollm, dtype=torch.bfloat16)
    with torch.no_grad():
        hidden = model.model(ids).last_hidden_state[0, :-1]
        plain = (hidden.float() @ model.lm_head.weight.float().T).log_softmax(-1)
        plain = plain.gather(1, ids[0, 1:, None])[:, 0]
        off = []
        for head_dtype in (None, "float32"):
            out = pk.attach(model, head_dtype=head_dtype)(input_ids=ids, labels=ids)
            off.append((out.token_logps[0, :-1] - plain).abs().max())
            pk.detach(model)
    assert off[1] < 5e-5 < 1e-2 < off[0]
