"""``pro-kernels run``: what it does to the processes of a command, and what it says of them."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import BartConfig, BartForCausalLM

import pro_kernels as pk
from pro_kernels.models import loaded
from pro_trainer.cli.main import main
from pro_trainer.cli.run import summary

TRAIN = """
import multiprocessing, sys
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

def step(folder):
    model = AutoModelForCausalLM.from_pretrained(folder + "/llama").train()
    ids = torch.arange(3, 27).view(2, 12)
    ids[1, :8] = ids[0, :8]
    out = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
    out.loss.backward()
    with torch.no_grad():  # what metrics are made of
        assert type(out.logits) is not torch.Tensor is type(model(ids, labels=ids).logits)

if __name__ == "__main__":
    folder = sys.argv[1]
    AutoModel.from_pretrained(folder + "/llama")
    AutoModelForSequenceClassification.from_pretrained(folder + "/llama")
    bart = AutoModelForCausalLM.from_pretrained(folder + "/bart")
    assert bart(torch.arange(3, 9)[None]).logits.shape == (1, 6, 64)
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(bart.config)
    step(folder)
    worker = multiprocessing.get_context("spawn").Process(target=step, args=(folder,))
    worker.start()
    worker.join()
    assert worker.exitcode == 0
    raise SystemExit(3)
"""


def test_a_command_its_workers_and_a_refused_model(tmp_path, tiny, capfd):
    tiny[0].save_pretrained(tmp_path / "llama")
    config = BartConfig(
        vocab_size=64, d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16,
        is_decoder=True, is_encoder_decoder=False,
    )  # fmt: skip
    BartForCausalLM(config).save_pretrained(tmp_path / "bart")
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    command = [sys.executable, str(script), str(tmp_path)]
    assert main(["run", "--rows", "distinct", "--explain", "--", *command]) == 3
    said = [x for x in capfd.readouterr().err.splitlines() if x.startswith("pro-kernels run: ")]
    line = said.pop()
    assert len(said) == 4 and said[-1] == "pro-kernels run: LlamaForCausalLM is attached."
    assert "attached 2 LlamaForCausalLM in 2 processes. 33% of 48 tokens were not run. " in line
    assert "100% of the logits of 48 tokens were never made. " in line
    assert "BartForCausalLM was not attached: the loss of labels is" in line
    assert "BartForCausalLM was not attached: BartForCausalLM is on the meta device; load" in line


TRANSFORMERS = """
class PreTrainedModel:
    config = None
    @classmethod
    def from_pretrained(cls, depth):
        return [cls(), depth and cls._from_config(depth - 1)]
    @classmethod
    def _from_config(cls, depth):
        return cls.from_pretrained(depth)
"""


def test_a_failure_of_ours_is_one_line_and_other_hooks_run(tmp_path, monkeypatch, capfd):
    for name, text in {
        "transformers/__init__.py": "",
        "transformers/modeling_utils.py": TRANSFORMERS,
        "pro_kernels/__init__.py": "raise RuntimeError('no\\nlibrary')",
        "sitecustomize.py": "print('another hook')",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    code = (
        "import sys; print(sys.modules['sitecustomize'].__file__, [x for x in sys.path if 'hook' in"
        " x]); from transformers.modeling_utils import PreTrainedModel as P; P.from_pretrained(2)"
    )
    assert main(["run", "--", sys.executable, "-c", code]) == 0
    out, err = capfd.readouterr()
    assert out == f"another hook\n{tmp_path}/sitecustomize.py []\n"
    why = "RuntimeError: no library"
    assert err.splitlines() == [
        f"pro-kernels run: models are left as they are: {why}",
        f"pro-kernels run: nothing was attached. {why}.",
    ]


def test_a_process_without_models_imports_nothing_more(capfd):
    code = "import sys; print(*sorted(sys.modules))"
    assert main(["run", "--", sys.executable, "-c", code]) == 0
    out, err = capfd.readouterr()
    why = "nothing was attached. No causal LM was loaded by transformers."
    assert err == f"pro-kernels run: {why}\n"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert out == capfd.readouterr().out


@pytest.mark.parametrize(
    ("argv", "code", "wrong"),
    [
        (["--", "no-such-program", "x"], 127, "error: no-such-program cannot be run: No such file"),
        (["--", os.path.dirname(__file__)], 126, "cannot be run: Permission denied"),
        ([], 2, "error: there is no command; usage: pro-kernels run [--rows distinct]"),
        (["--rows", "some", "--", "true"], 2, "error: argument --rows: invalid choice: 'some'"),
        (["python", "train.py"], 2, "error: unrecognized arguments: python train.py; usage: "),
    ],
)
def test_a_wrong_call_is_one_line(argv, code, wrong, capfd):
    assert main(["run", *argv]) == code
    (line,) = capfd.readouterr().err.splitlines()
    assert wrong in line


def test_signals_go_to_the_command_and_come_back_as_128_and_more(tmp_path):
    assert main(["run", "--", "sh", "-c", "kill -TERM $$"]) == 128 + signal.SIGTERM
    child = (
        "import sys, time\ntry: print('up', flush=True), time.sleep(60)\n"
        "except KeyboardInterrupt: sys.exit(7)"
    )
    code = (
        "import signal, sys\nfrom pro_trainer.cli.main import main\n"
        # Whoever runs the tests in the background may ignore it, which processes inherit.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\nsys.exit(main(sys.argv[1:]))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, "run", "--", sys.executable, "-c", child],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        assert process.stdout.readline() == b"up\n"
        time.sleep(0.1)  # the handlers are set after the command was started
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 7


def test_summary_adds_up_processes():
    one = {
        "attached": {"A": 1},
        "said": {"B was not attached: why.": 1},
        "tokens": {"padded": 50, "run": 20},
        "logits": {"rows": 30, "made": 3},
    }
    assert summary([one, one]) == (
        "attached 2 A in 2 processes. 60% of 100 tokens were not run. 90% of the logits of 60 "
        "tokens were never made. B was not attached: why. (2 times)"
    )
    assert summary([{"attached": {"A": 1}}]) == (
        "attached 1 A in 1 process. No logits were left out."
    )


@pytest.fixture
def attached(tiny, tmp_path, monkeypatch):
    """A model as ``run`` leaves it in a process."""
    monkeypatch.setenv("PRO_KERNELS_RUN", str(tmp_path))
    monkeypatch.setattr(torch.nn.DataParallel, "__init__", torch.nn.DataParallel.__init__)
    loaded._begin.cache_clear()
    loaded._forget()
    model = copy.deepcopy(tiny[0])
    with torch.device("meta"):  # the program's default, which is none of its weights'
        loaded.attach_loaded(model)
    assert loaded.report_of_process()["attached"] == {"LlamaForCausalLM": 1}
    yield model
    loaded._forget()


def test_a_program_may_attach_the_model_itself(attached):
    pk.attach(attached, loss="cross_entropy")
    with pytest.raises(ValueError, match="attached already"):
        pk.attach(attached)
    pk.detach(attached)
    assert "forward" not in vars(attached)


def test_data_parallel_gets_a_plain_model(attached):
    torch.nn.DataParallel(attached)
    report = loaded.report_of_process()
    assert "forward" not in vars(attached) and report["attached"] == {}
    assert "LlamaForCausalLM was detached: torch.nn.DataParallel" in summary([report])


def test_a_deep_copy_is_attached_and_counted(attached):
    ids = torch.arange(12).view(1, 12)
    copy.deepcopy(attached).train()(ids, labels=ids)
    assert loaded.report_of_process()["logits"]["rows"] == 12
    with pytest.raises(TypeError, match="cannot be pickled; detach"):
        pickle.dumps(attached)


def test_ranks_whose_weights_are_not_there_yet_are_left_alone(attached, tiny, monkeypatch):
    monkeypatch.setattr("transformers.integrations.is_fsdp_enabled", lambda: True)
    loaded.attach_loaded(copy.deepcopy(tiny[0]))
    assert "only rank 0 loads its weights" in summary([loaded.report_of_process()])
