"""Runs that are broken on purpose: what is left, what is said, and how it goes on."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from trainer_runs import QUICK, held, records, trained, trainer_for

from pro_trainer.cli import commands as cli
from pro_trainer.cli import inspect as inspecting
from pro_trainer.cli import train as training
from pro_trainer.train import checkpoints
from pro_trainer.train.checkpoints import find, last_whole, run_identity

ROOT = Path(__file__).resolve().parents[2]
SAVING = {"save_strategy": "steps", "save_steps": 2}


def last_line(capsys) -> str:
    return capsys.readouterr().err.splitlines()[-1]


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_second_run_is_refused_while_one_writes_the_folder(train, tmp_path, capsys):
    output = tmp_path / "out"
    with held(output / ".lock") as holder:
        assert train() == 2
        assert last_line(capsys) == (
            f"error: output_dir {output} is being written by another run (process {holder.pid} on "
            f"{os.uname().nodename}): wait for its end, or give another output_dir"
        )
        assert [p.name for p in output.iterdir()] == [".lock"]
    assert train() == 0  # its holder was killed
    assert not (output / ".lock").exists()


def test_what_a_run_reads_is_never_written_over(tiny_folder, train, tmp_path, capsys):
    base, link, checkpoint = (tmp_path / x for x in ("base", "link", "out/checkpoint-5"))
    for copy in (base, checkpoint):
        shutil.copytree(tiny_folder, copy)
    link.symlink_to(base)
    before = bytes_of(tmp_path)
    for output, source, more in (
        (base, base, ["--model", str(base)]),
        (link, base, ["--model", str(base)]),
        (link, base, ["--model", "x", "--tokenizer", str(base)]),
        (checkpoint.parent, checkpoint, ["--model", str(checkpoint)]),
    ):
        assert train("--overwrite", *more, output=output) == 2
        message = f"error: output_dir {output}: writing there would change {source}, which this run"
        assert last_line(capsys).startswith(message)
    with pytest.raises(ValueError, match="would change .*base, which this run reads"):
        trained(link, model=str(base))
    assert bytes_of(tmp_path) == before


def test_every_list_and_what_orders_them_make_two_runs_the_same(tmp_path):
    def identity(data, **options):
        trainer = trainer_for(tmp_path, data=data, **options)
        return run_identity(trainer.args, trainer.model, trainer.train_dataset)

    data = records(130)
    first = identity(data)
    assert identity(data, learning_rate=0.5) == first
    data[1] = data[1] | {"completions": ["another", *data[1]["completions"][1:]]}
    other = identity(data, dataloader_drop_last=True)
    assert {n for n in first if first[n] != other[n]} == {"train_dataset", "dataloader_drop_last"}


@pytest.fixture(scope="module")
def run_of_two_checkpoints(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    trained(folder, **SAVING)
    return folder


DAMAGES = {  # file of checkpoint-4: (what becomes of it, what is said)
    "scheduler.pt": (Path.unlink, "scheduler.pt is missing"),
    "rng_state.pth": (Path.unlink, "rng_state.pth is missing"),
    "optimizer.pt": (
        lambda p: p.write_bytes(p.read_bytes()[1:]),
        r"optimizer.pt has \d+ bytes, \d+ were written",
    ),
    "model.safetensors": (
        lambda p: p.write_bytes(p.read_bytes()[::-1]),
        "model.safetensors is not what was written",
    ),
    "pro_run.json": (lambda p: p.write_text("[]"), r"pro_run.json has 2 bytes, \d+ were written"),
    "manifest.json": (Path.unlink, "it has no manifest.json, so it was cut off while"),
    " manifest.json": (lambda p: p.write_text("[]"), "its manifest.json cannot be read"),
    "": (shutil.rmtree, "there is no such checkpoint"),
    " ": (lambda p: checkpoints.seal(p, True), "it was saved with save_only_model, without the op"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_checkpoint_is_whole_or_none(name, run_of_two_checkpoints, tmp_path):
    damage, why = DAMAGES[name]
    shutil.copytree(run_of_two_checkpoints, tmp_path, dirs_exist_ok=True)
    last = tmp_path / "checkpoint-4"
    assert last_whole(tmp_path) == last
    damage(last / name.strip())
    said: list[str] = []
    whole = tmp_path / "checkpoint-2"
    assert last_whole(tmp_path, said.append) == whole
    assert len(said) == last.exists()
    assert all(line.startswith(f"{last} is passed") for line in said)
    message = rf"resume_from_checkpoint {last}: {why}.*; resume from {whole}$"
    with pytest.raises(ValueError, match=message):
        find(tmp_path, last)
    if name == "scheduler.pt":  # what used to start the schedule again
        trainer = trained(tmp_path, resume=True)
        assert trainer.state.global_step == 4
        rates = [e["learning_rate"] for e in trainer.state.log_history if "loss" in e]
        assert rates == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    shutil.rmtree(whole)
    with pytest.raises(ValueError, match="none in .* is whole$"):
        find(tmp_path, last)


def test_a_run_cut_off_in_its_first_save_starts_afresh(run_of_two_checkpoints, tmp_path):
    first = tmp_path / "checkpoint-2"
    shutil.copytree(run_of_two_checkpoints / first.name, first)
    with pytest.raises(ValueError, match="holds another run .checkpoint-2."):
        checkpoints.check_free(tmp_path, False)
    (first / "manifest.json").unlink()
    checkpoints.check_free(tmp_path, False)
    options = first / "pro_run.json"
    options.unlink()  # of another program then
    with pytest.raises(ValueError, match="holds another run .checkpoint-2."):
        checkpoints.check_free(tmp_path, False)
    options.write_text("[]")
    checkpoints.seal(first, False)
    with pytest.raises(ValueError, match="pro_run.json must be a JSON object with the options"):
        trained(tmp_path, resume=True)


def test_the_older_checkpoint_goes_once_the_newer_is_whole(tmp_path, monkeypatch):
    seal, seen = checkpoints.seal, []

    def watched(folder, only_model):
        seen.append([c.name for c in checkpoints.checkpoints(tmp_path) if checkpoints.sealed(c)])
        if len(seen) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        seal(folder, only_model)

    monkeypatch.setattr(checkpoints, "seal", watched)
    trainer = trainer_for(tmp_path, save_total_limit=1, max_steps=6, **SAVING)
    with pytest.raises(OSError, match="No space"):
        trainer.train()
    assert seen == [[], ["checkpoint-2"], ["checkpoint-4"]]
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-4"]
    assert trainer.args.save_total_limit == 1


@pytest.mark.parametrize(("sizes", "strategy"), [(0.5, "steps"), (1.5, "steps"), (0.5, "no")])
def test_a_full_disk_is_one_line_and_leaves_what_is_whole(
    train, tiny, tmp_path, capsys, sizes, strategy
):
    """Under a largest file size: weights fit (1.5) or not, the optimizer (2) does not."""
    size = 4 * sum(p.numel() for p in tiny[0].parameters())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sizes * size), before[1]))
    try:
        code = train("--save_strategy", strategy, "--save_steps", "1")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    step = 1 if strategy == "steps" else 2
    error = last_line(capsys)
    assert code == 1 and error.startswith("error: no space is left (")
    assert error.endswith(f"; stopped at step {step}; nothing was saved to go on from")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


RUN = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from pro_kernels.__main__ import main; sys.exit(main(sys.argv[1:]))"
)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_with_one_line_and_nothing_left(number, code, tmp_path):
    """The signal reaches the data loader's processes too, as Ctrl-C and a scheduler's do."""
    options = "--eval_fraction 0 --save_strategy steps --save_steps 2 --disable_tqdm true"
    options += " --max_steps 100000 --save_total_limit 1 --dataloader_num_workers 1"
    argv = ["train", "--demo", "--output_dir", str(tmp_path / "out"), *QUICK, *options.split()]
    # Sockets there need names that Unix takes (107 bytes); pytest's own folder is too long.
    with tempfile.TemporaryDirectory(prefix="s") as short:
        process = subprocess.Popen(
            [sys.executable, "-c", RUN, *argv],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            cwd=ROOT,
            env=os.environ | {"TMPDIR": short},
        )
        try:
            while not process.stdout.readline().startswith("step 3/"):
                assert process.poll() is None
            os.killpg(process.pid, number)
            _, error = process.communicate(timeout=60)
        finally:
            process.kill()
        assert {p.name.partition("_")[0] for p in Path(short).iterdir()} <= {"torchinductor"}
    assert process.returncode == code, error
    assert "Traceback" not in error
    said = error.splitlines()[-1]
    (kept,) = (tmp_path / "out").iterdir()
    assert said.startswith("interrupted at step ")
    assert said.endswith(f"; --resume_from_checkpoint auto goes on from {kept.name}")
    assert last_whole(tmp_path / "out") == kept


def test_ctrl_c_elsewhere_is_one_line_too(data_file, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(inspecting, "read_lists", interrupted)
    assert cli.inspect(["--demo", "--data", data_file]) == 130
    assert last_line(capsys) == "interrupted before anything was written; start it again"
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_output_that_cannot_be_written_is_refused_first(train, tmp_path, monkeypatch, capsys):
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "gone")
    assert train(output=link) == 2
    assert f"output_dir {link} is a link to {tmp_path / 'gone'}, which is not" in last_line(capsys)

    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("pro_trainer.files.os.open", refuse)
    assert train(output=tmp_path / "a" / "b") == 2
    assert "a/b cannot be written (Permission denied): give another out" in last_line(capsys)
    assert not (tmp_path / "a").exists() and not (tmp_path / "gone").exists()


def test_a_package_to_report_with_is_missed_before_the_model_is_loaded(
    train, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(training, "tiny_llama", None)
    integrations = "transformers.integrations.integration_utils"
    monkeypatch.setattr(f"{integrations}.is_wandb_available", lambda: False)
    assert train("--report_to", "wandb") == 2
    error = last_line(capsys)
    assert error.startswith("error: report_to wandb: ") and "pip install wandb" in error
    assert train("--report_to", "wandbb") == 2
    assert "report_to wandbb: wandbb is not supported, only" in last_line(capsys)
    assert not (tmp_path / "out").exists()
