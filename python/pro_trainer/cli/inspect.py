"""``pro-kernels inspect``: what the model will see of some data, before anything is trained."""

from __future__ import annotations

import json
import sys

from pro_trainer.cli.arguments import InspectArguments
from pro_trainer.data.lists import read_lists
from pro_trainer.data.report import DataReport
from pro_trainer.demo_data import BUNDLED_TRAIN
from pro_trainer.models import ends_of_folder, load_tokenizer, tiny_llama
from pro_trainer.text import show
from pro_trainer.text.encode import Encoder
from pro_trainer.train.config import PROConfig


def inspect(arguments: InspectArguments, config: PROConfig) -> None:
    """Print the first lists as the model will see them, and the report on all of the data.

    The model's weights are not loaded.

    Raises:
        ValueError: data or tokenizer that cannot be used.
    """
    if arguments.model:
        path = arguments.tokenizer or arguments.model
        tokenizer = load_tokenizer(path, arguments.trust_remote_code)
        said = ends_of_folder(arguments.model, tokenizer, arguments.trust_remote_code)
    else:
        tokenizer, said = tiny_llama()[1], None
    report = DataReport()
    lists = read_lists(arguments.data or [BUNDLED_TRAIN], report, config)
    for number, tokens in enumerate(Encoder(tokenizer, config, report).lists(lists), 1):
        if number > arguments.num:
            continue
        if arguments.json:
            print(json.dumps(show.as_json(tokens)))
        else:
            print(f"=== list {number}\n{show.as_text(tokens, tokenizer, sys.stdout.isatty())}\n")
    if said:
        report.say(said)
    said_to = sys.stderr if arguments.json else sys.stdout
    print(report.text(), file=said_to)
    if arguments.eval_data:
        held_out = DataReport()
        lists = read_lists(arguments.eval_data, held_out, config)
        for _ in Encoder(tokenizer, config, held_out).lists(lists):
            pass
        print(f"held out:\n{held_out.text()}", file=said_to)
