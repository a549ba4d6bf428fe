"""The recipes of examples/launch: run here where a machine without GPU and cluster can."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from ranks import argv, free_port, launch
from safetensors.torch import load_file
from trainer_runs import records

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "examples" / "launch"


def environment(**more: object) -> dict[str, str]:
    found = os.environ | {k: str(v) for k, v in more.items()} | {"OMP_NUM_THREADS": "1"}
    found["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{found['PATH']}"
    return found


@pytest.fixture(autouse=True)
def files(tmp_path, write_lines):
    """Of options and lists, for a short run."""
    (tmp_path / "run.yaml").write_text("demo: true\nlearning_rate: 0.5\n")
    write_lines(*records(8), name="train.jsonl")


def processes_of(output: Path) -> int:
    run = json.loads((output / "checkpoint-2" / "pro_run.json").read_text())
    return run["step"]["processes"]


def test_torchrun_on_two_nodes(tmp_path):
    """Two agents on this machine, one rank each, meet over c10d."""
    output = tmp_path / "out"
    options = argv(tmp_path, output, 2, max_steps=2, demo=None)
    script = ["bash", str(LAUNCH / "torchrun_nodes.sh"), *options]
    variables = environment(
        HEAD="localhost", NODES=2, RANKS=1, PORT=free_port(), CONFIG=tmp_path / "run.yaml"
    )
    agents = [
        subprocess.Popen(
            script, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for _ in range(2)
    ]
    try:
        printed = [agent.communicate(timeout=120)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.terminate()  # where it has not ended; it ends its ranks
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(printed)
    assert (output / "model.safetensors").exists() and processes_of(output) == 2
    assert not any("terminate called" in text for text in printed)


def accelerated(folder: Path, name: str, command: list[str], **changed: object) -> list[str]:
    """``accelerate launch`` with the file of this kind, for two processes of a CPU."""
    config = yaml.safe_load((LAUNCH / f"accelerate_{name}.yaml").read_text())
    file = folder / "accelerate.yaml"
    file.write_text(yaml.safe_dump(config | {"num_processes": 2, "use_cpu": True} | changed))
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
    return [*launcher, "--main_process_port", str(free_port()), *command]


def finished(command: list[str], **variables: object) -> subprocess.CompletedProcess[str]:
    env = environment(**variables)
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.slow  # the test above starts ranks, too
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_one_node(launcher, tmp_path):
    output, config = tmp_path / "out", tmp_path / "run.yaml"
    command = ["bash", str(LAUNCH / "torchrun.sh")]
    if launcher == "accelerate":
        module = ["-m", "pro_kernels", "train", "--config", str(config)]
        command = accelerated(tmp_path, "ddp", module, mixed_precision="no")
    options = argv(tmp_path, output, 2, max_steps=2, demo=None)
    done = finished([*command, *options], RANKS=2, CONFIG=config)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "terminate called" not in done.stderr and processes_of(output) == 2
    rate = json.loads((output / "metrics.json").read_text())["log_history"][0]["learning_rate"]
    assert rate == pytest.approx(1e-3)  # the flag wins over the file


def sharded(kind: str, folder: Path, options: list[str]) -> subprocess.CompletedProcess[str]:
    """``kind``: fsdp2, or deepspeed and the name or path of its file."""
    name, _, zero = kind.partition(" ")
    changed = {"mixed_precision": "no"}
    module = [str(Path(__file__).with_name("fsdp_on_cpu.py"))]
    if zero:
        config = yaml.safe_load((LAUNCH / "accelerate_deepspeed.yaml").read_text())
        file = LAUNCH / f"deepspeed_{zero}.json"
        own = {"deepspeed_config_file": str(file if file.exists() else zero)}
        changed = {"deepspeed_config": config["deepspeed_config"] | own}
        module = ["-m", "pro_kernels"]
    return finished(accelerated(folder, name, [*module, "train", *options], **changed))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp2", "deepspeed zero2", "deepspeed zero3"])
def test_sharded_runs_are_those_of_ddp_and_resume_bitwise(kind, tmp_path):
    if kind != "fsdp2":
        pytest.importorskip("deepspeed")  # make zero-launch

    def options(output: str, **more: object) -> list[str]:
        return argv(tmp_path, tmp_path / output, 2, max_steps=4, ddp_timeout=60, **more)

    run = launch(2, tmp_path / "ddp logs", options("ddp"))
    assert run.codes == [0, 0], "\n".join(run.printed)
    done = sharded(kind, tmp_path, options("whole"))
    assert done.returncode == 0, done.stderr[-3000:]
    whole, plain = (load_file(tmp_path / x / "model.safetensors") for x in ("whole", "ddp"))
    assert whole.keys() == plain.keys()
    for name, weight in whole.items():
        torch.testing.assert_close(weight, plain[name], rtol=0, atol=2e-5, msg=name)
    state = {"fsdp2": "pytorch_model_fsdp.bin"}.get(kind, "global_step2")
    assert (tmp_path / "whole" / "checkpoint-2" / state).exists()  # it was sharded

    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    done = sharded(kind, tmp_path, options("again", resume_from_checkpoint="last"))
    assert done.returncode == 0, done.stderr[-3000:]
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(again[name], weight) for name, weight in whole.items())


@pytest.mark.slow
def test_zero3_that_would_save_no_model_is_refused(tmp_path):
    pytest.importorskip("deepspeed")  # make zero-launch
    config = json.loads((LAUNCH / "deepspeed_zero3.json").read_text())
    del config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"]
    (tmp_path / "zero3.json").write_text(json.dumps(config))
    output = tmp_path / "out"
    options = argv(tmp_path, output, 2, max_steps=1)
    done = sharded(f"deepspeed {tmp_path / 'zero3.json'}", tmp_path, options)
    assert done.returncode and "stage3_gather_16bit_weights_on_model_save must be" in done.stderr
    assert not output.exists() or not any(output.iterdir())


@pytest.mark.parametrize("name", ["accelerate_ddp", "accelerate_fsdp2", "accelerate_deepspeed"])
def test_accelerate_takes_its_files(name, monkeypatch):
    """Unknown keys are errors there, and the plugin takes the values."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.utils import DistributedType

    config = load_config_from_file(str(LAUNCH / f"{name}.yaml"))
    kind = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed": "DEEPSPEED"}[name.split("_")[1]]
    assert config.distributed_type == DistributedType(kind)
    if kind == "FSDP":
        monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # the plugin sets it
        values = {k.removeprefix("fsdp_"): v for k, v in config.fsdp_config.items()}
        values["fsdp_version"] = values.pop("version")
        plugin = FullyShardedDataParallelPlugin(**values)
        assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True


def test_the_deepspeed_file_says_what_its_config_says():
    launch = yaml.safe_load((LAUNCH / "accelerate_deepspeed.yaml").read_text())
    named = launch["deepspeed_config"]["deepspeed_config_file"]
    config = json.loads((LAUNCH / named).read_text())
    assert config["zero_optimization"]["stage"] == 2
    for name in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        assert config[name] == "auto"  # transformers fills in the run's own
    other = json.loads((LAUNCH / "deepspeed_zero3.json").read_text())
    saving = other["zero_optimization"].pop("stage3_gather_16bit_weights_on_model_save")
    assert saving is True and other["zero_optimization"].pop("stage") == 3
    del config["zero_optimization"]["stage"]
    assert other == config


@pytest.mark.parametrize("name", ["torchrun.sh", "torchrun_nodes.sh", "slurm.sbatch"])
def test_scripts(name):
    assert subprocess.run(["bash", "-n", str(LAUNCH / name)]).returncode == 0
    if shutil.which("shellcheck"):
        assert subprocess.run(["shellcheck", str(LAUNCH / name)]).returncode == 0


def test_the_slurm_script_starts_what_it_says(tmp_path):
    """With stand-ins for what SLURM brings."""
    for name, body in (
        ("scontrol", 'test "$*" = "show hostnames node[1-2]" && printf "node1\\nnode2\\n"'),
        ("srun", 'echo "srun $*"; env | grep -E "^(HEAD|NODES|RANKS|PORT|RUN_ID)=" | sort'),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    given = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": 2, "SLURM_JOB_ID": 12345}
    given |= {"SLURM_GPUS_ON_NODE": 8, "SLURM_SUBMIT_DIR": LAUNCH}
    env = environment(**given)
    env["PATH"] = f"{tmp_path}{os.pathsep}{env['PATH']}"
    command = ["bash", str(LAUNCH / "slurm.sbatch"), "--learning_rate", "1e-5"]
    lines = subprocess.run(command, env=env, capture_output=True, text=True).stdout.splitlines()
    assert lines[0] == (
        f"srun --kill-on-bad-exit=1 bash {LAUNCH}/torchrun_nodes.sh --learning_rate 1e-5"
    )
    assert lines[1:] == ["HEAD=node1", "NODES=2", "PORT=32345", "RANKS=8", "RUN_ID=12345"]


def test_the_kubernetes_manifest_starts_the_same_ranks():
    """What torchrun needs: every pod the same command, as many pods as nodes, one GPU a rank."""
    job = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    spec = job["spec"]
    ranks = spec["nprocPerNode"]
    pods = spec["pytorchReplicaSpecs"]
    assert set(pods) == {"Master", "Worker"}
    nodes = sum(pod["replicas"] for pod in pods.values())
    assert pods["Master"]["replicas"] == 1
    containers = [pod["template"]["spec"]["containers"] for pod in pods.values()]
    assert containers[0] == containers[1]
    (container,) = containers[0]
    assert container["name"] == "pytorch"  # the operator sets its variables in this one
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(ranks)
    command = " ".join(container["command"] + container["args"])
    assert "-m pro_kernels train" in command
    assert f"--nnodes={nodes}" in command and f"--nproc-per-node={ranks}" in command
    for part in ("--rdzv-backend=c10d", "--rdzv-endpoint=$(MASTER_ADDR):$(MASTER_PORT)"):
        assert part in command
