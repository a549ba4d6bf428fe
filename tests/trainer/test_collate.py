"""Batches: token-exact in every form, the same tokens read after the same context."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from accelerate.utils import send_to_device
from hypothesis import given, settings
from hypothesis import strategies as st

from pro_trainer.batch.collate import Preferences, PROCollator

PAD = 0
FORMS = ("padded", "lists")


def feature(
    prompts: list[list[int]],
    completions: list[list[int]],
    rewards: list[float] | None = None,
    sft_index: int | None = None,
) -> dict[str, Any]:
    names = ("prompts", "completions", "rewards", "sft_index")
    return dict(zip(names, (prompts, completions, rewards, sft_index), strict=True))


FIRST = feature([[10, 11]], [[20, 1], [21, 22, 1]], [0.5, 2.0])
SECOND = feature([[12]], [[30, 1], [31], [32, 1]], [3.0, 2.0, 1.0])
FEATURES = [FIRST, SECOND]


def sequences(features: list[dict[str, Any]]) -> list[tuple[list[int], list[int]]]:
    """Prompt and completion of each candidate present."""
    return [
        (one["prompts"][i if len(one["prompts"]) > 1 else 0], completion)
        for one in features
        for i, completion in enumerate(one["completions"])
    ]


def read(batch: dict[str, Any]) -> list[tuple[tuple[int, ...], int]]:
    """What each scored token is predicted from: the ids up to its row (what it sees: test_tree)."""
    ids, layout = batch["input_ids"], batch["layout"]
    if "tree" in batch:
        places = batch["tree"].places.split(batch["tree"].lengths.tolist())
    else:
        lengths = batch["attention_mask"].sum(1).tolist()
        places = [row * ids.shape[1] + torch.arange(n) for row, n in enumerate(lengths)]
    sight = {int(own[i]): own[: i + 1] for own in places for i in range(len(own))}
    return [
        (tuple(ids.flatten()[sight[row]].tolist()), target)
        for row, target in zip(layout.rows.tolist(), layout.targets.tolist(), strict=True)
    ]


token = st.integers(1, 3)  # so few that completions often begin alike, and prompts too
tokens = st.lists(token, min_size=1, max_size=5)


@st.composite
def features_(draw: st.DrawFn) -> list[dict[str, Any]]:
    made = []
    for _ in range(draw(st.integers(1, 3))):
        n = draw(st.integers(1, 4))
        prompts = draw(
            st.lists(tokens, min_size=n, max_size=n) | st.lists(tokens, min_size=1, max_size=1)
        )
        made.append(feature(prompts, draw(st.lists(tokens, min_size=n, max_size=n))))
    return made


@given(features_())
@settings(max_examples=100, deadline=None)
def test_every_form_reads_the_same_tokens_in_the_same_context(features):
    """The official code reads the position of a last token too, where that row is padded."""
    both, counts = sequences(features), [len(one["completions"]) for one in features]
    longest = max(len(prompt) + len(completion) for prompt, completion in both)
    for form, official in itertools.product(FORMS, (False, True)):
        ends = [
            completion + [PAD] * (official and len(prompt) + len(completion) < longest)
            for prompt, completion in both
        ]
        expected = [
            ((*prompt, *end[:j]), end[j])
            for (prompt, _), end in zip(both, ends, strict=True)
            for j in range(len(end))
        ]
        batch = PROCollator(PAD, form=form, official=official)(features)
        layout = batch["layout"]
        assert read(batch) == expected
        assert layout.num_rows == batch["input_ids"].numel()
        assert layout.lengths.tolist() == list(map(len, ends))
        assert (
            (layout.sequences >= 0).sum(1).tolist()
            == counts
            == list(map(len, layout.candidate_tokens))
        )
        assert layout.shared_rows or len(layout.rows.unique()) == len(layout.rows)


def test_padded_batch():
    batch = PROCollator(PAD)(FEATURES)
    assert batch.keys() == {"input_ids", "attention_mask", "layout", "preferences"}
    assert batch["input_ids"].tolist() == [
        [10, 11, 20, 1, 0],
        [10, 11, 21, 22, 1],
        [12, 30, 1, 0, 0],
        [12, 31, 0, 0, 0],
        [12, 32, 1, 0, 0],
    ]
    assert batch["attention_mask"].sum(1).tolist() == [4, 5, 3, 2, 3]
    layout = batch["layout"]
    # Row t of a sequence predicts token t + 1: the last prompt token the first completion token.
    assert layout.rows.tolist() == [1, 2, 6, 7, 8, 10, 11, 15, 20, 21]
    assert layout.targets.tolist() == [20, 1, 21, 22, 1, 30, 1, 31, 32, 1]
    assert layout.sequences.tolist() == [[0, 1, -1], [2, 3, 4]]
    preferences = batch["preferences"]
    assert preferences.rewards.tolist() == [[0.5, 2.0, 0.0], [3.0, 2.0, 1.0]]
    assert preferences.rewards.dtype == torch.float64
    assert preferences.mask.tolist() == [[True, True, False], [True, True, True]]
    assert not preferences.by_order and preferences.sft_index.tolist() == [1, 0]
    assert preferences.num_positions == 17 and preferences.num_prompts == 2


def test_batch_of_lists():
    long = [{**one, "prompts": [[*range(40, 50), *one["prompts"][0]]]} for one in FEATURES]
    batch = PROCollator(PAD, form="lists")(long)
    assert batch.keys() == {"input_ids", "position_ids", "tree", "layout", "preferences"}
    start = list(range(40, 50))  # of both lists; what is shorter than 8 tokens is not shared
    assert batch["input_ids"].tolist() == [[*start, 10, 11, 20, 1, 21, 22, 1, 12, 30, 1, 31, 32, 1]]
    assert batch["position_ids"].tolist() == [[*range(14), 12, 13, 14, 10, 11, 12, 11, 11, 12]]
    assert batch["tree"].as_mask().shape == (1, 1, 8, 4)
    # Both first completion tokens of a prompt are read from its last row.
    assert batch["layout"].rows.tolist() == [11, 12, 11, 14, 15, 17, 18, 17, 17, 21]
    assert batch["preferences"].num_positions == 23


def test_preferences_of_what_lists_say_and_leave_out():
    def preferences(*features: dict[str, Any]) -> Preferences:
        return PROCollator(PAD)(features)["preferences"]

    ordered = preferences(feature([[5]], [[6], [7], [8]]), feature([[5]], [[6], [7]]))
    assert ordered.by_order and ordered.rewards.tolist() == [[2.0, 1.0, 0.0], [1.0, 0.0, 0.0]]
    plain = preferences(FIRST, {**SECOND, "sft_index": 2})
    assert plain.sft_index.tolist() == [1, 2]  # the best where a list names none
    assert plain.weights is None and plain.desirable is None and plain.total_weight == 2
    marked = preferences(FIRST, {**SECOND, "desirable": [True] * 3, "weight": 0.5})
    assert marked.weights.tolist() == [1, 0.5] and marked.total_weight == 1.5
    # The best where a list marks none.
    assert marked.desirable.tolist() == [[False, True, False], [True] * 3]
    numbers = preferences({**FIRST, "desirable": [1, 0]}, {**SECOND, "desirable": [0, 1, 1]})
    assert numbers.desirable.dtype == torch.bool
    assert numbers.desirable.tolist() == [[True, False, False], [False, True, True]]


@pytest.mark.parametrize("form", FORMS)
def test_a_batch_of_none_runs_the_list_it_is_given_and_counts_nothing(form):
    collator = PROCollator(PAD, form=form, idle=SECOND)
    batch, same = collator([]), collator([SECOND])
    assert batch["input_ids"].equal(same["input_ids"])
    assert batch["layout"].targets.equal(same["layout"].targets)
    idle, counted = batch["preferences"], same["preferences"]
    assert (idle.idle, idle.num_prompts, idle.total_weight) == (True, 1, 0)
    assert (counted.idle, counted.total_weight) == (False, 1)


def test_a_batch_goes_to_a_device_and_its_preferences_stay_on_the_host():
    batch = PROCollator(PAD, form="lists")(FEATURES)
    moved = send_to_device(batch, "meta", non_blocking=True)  # as Trainer and Accelerate do
    assert moved["input_ids"].device.type == moved["layout"].device.type == "meta"
    assert moved["preferences"] is batch["preferences"]


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ([], "got no lists"),
        ([FIRST, feature([[5]], [[6], [7]])], "all have rewards or all have none, got both"),
        ([feature([[]], [[6], [7]])], "list 0 of the batch: a prompt must be one or more token id"),
        ([FIRST, {**SECOND, "completions": [[1], [], [2]]}], "list 1 .* a completion"),
        ([feature([[1]], [[1.5]])], "a completion must be one or more token ids, got .1.5."),
        ([feature([[1], [2]], [[3], [4], [5]])], "3 completions need 1 prompt or 3, got 2"),
        ([feature([[1]], [])], "at least 1 completion"),
        ([feature([[1]], [[3], [4]], [1.0])], "2 completions and 1 rewards"),
        ([FIRST, {**SECOND, "desirable": [True] * 2}], "list 1 .* 3 completions and 2 marks of"),
        ([{**FIRST, "sft_index": 2}], r"sft_index must lie in \[0, 2\), got 2"),
    ],
)
def test_bad_lists_are_named(features, message):
    with pytest.raises(ValueError, match=message):
        PROCollator(PAD)(features)


@pytest.mark.parametrize(
    ("pad_token_id", "form", "message"),
    [
        (PAD, "ragged", "form must be padded or lists, got 'ragged'"),
        (None, "lists", "pad_token_id must be a token id .* got None"),
        (-1, "padded", "got -1"),
    ],
)
def test_bad_options_are_named(pad_token_id, form, message):
    with pytest.raises(ValueError, match=message):
        PROCollator(pad_token_id, form=form)
