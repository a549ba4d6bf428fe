"""Token-exact batches: the boundary, EOS, cutting, padding, layout, splitting."""

from __future__ import annotations

import pytest
import torch

from pro_trainer.collate import (
    IGNORE_INDEX,
    TokenizedList,
    batches,
    collate,
    num_batches,
    split_held_out,
    tokenize,
    tokenize_lists,
)
from pro_trainer.config import EvalConfig
from pro_trainer.data import DataError, DataReport, RankedList

EOS = 1


def ids(text: str) -> list[int]:
    return [byte + 3 for byte in text.encode()]


def test_tokenize_joins_ids_and_appends_eos(tiny):
    tokens, prompt_cut, cut = tokenize(RankedList("ab", ("c", "dé"), (1.0, 0.0)), tiny[1], 16, 8)
    assert tokens.prompt == ids("ab")  # no EOS after the prompt, though the tokenizer adds one
    assert tokens.completions == [[*ids("c"), EOS], [*ids("dé"), EOS]]
    assert (prompt_cut, cut) == (0, 0)


def test_tokenize_cuts_the_prompt_on_the_left_and_completions_on_the_right(tiny):
    ranked = RankedList("abcdef", ("12345", "123", "1234"), None)
    tokens, prompt_cut, cut = tokenize(ranked, tiny[1], 8, 4)
    assert tokens.prompt == ids("cdef")
    # 4 tokens are left: a completion that is cut has no EOS, not even where only EOS went.
    assert tokens.completions == [ids("1234"), [*ids("123"), EOS], ids("1234")]
    assert (prompt_cut, cut) == (1, 2)


def test_tokenize_starts_an_empty_prompt_with_eos(tiny):
    tokens, _, _ = tokenize(RankedList("", ("a", "b")), tiny[1], 8, 4)
    assert tokens.prompt == [EOS]


def test_tokenize_keeps_bos_when_the_prompt_is_cut(tiny):
    class WithBos:
        eos_token_id, bos_token_id = 1, 2

        def __call__(self, text, add_special_tokens=True):
            encoded = tiny[1](text, add_special_tokens=False)
            if add_special_tokens:
                encoded["input_ids"] = [2, *encoded["input_ids"]]
            return encoded

    tokens, _, _ = tokenize(RankedList("abcdef", ("x", "y")), WithBos(), 8, 4)
    assert tokens.prompt == [2, *ids("def")]


def test_tokenize_needs_eos(tiny):
    class NoEos:
        eos_token_id = bos_token_id = None

    with pytest.raises(ValueError, match="NoEos has no EOS token"):
        tokenize(RankedList("a", ("b", "c")), NoEos(), 8, 4)


def test_lists_that_do_not_fit_are_cut_or_dropped_and_counted(tiny):
    lists = [
        RankedList("ab", ("c", "d"), (1.0, 0.0)),
        RankedList("ab", ("same start, a", "same start, b"), (1.0, 0.0)),
        RankedList("ab", ("long enough", "d"), None),
    ]

    def run(**options) -> tuple[int, DataReport]:
        report = DataReport()
        for ranked in lists:
            report.count(ranked)
        config = EvalConfig(max_length=8, **options)
        return len(list(tokenize_lists(lists, tiny[1], config, report))), report

    kept, report = run()
    assert kept == report.lists == 2 and report.completions_cut == 1
    assert report.dropped == {"completions equal once cut to max_length": 1}
    kept, report = run(too_long="drop")
    assert kept == report.lists == 1 and report.candidates == {2: 1}
    assert report.dropped == {"longer than max_length=8": 2}


def test_collate_is_token_exact_for_ragged_lists():
    batch = collate(
        [
            TokenizedList([10, 11], [[20, 1], [21, 22, 1]], (0.5, 2.0)),
            TokenizedList([12], [[30, 1], [31], [32, 1]], (3.0, 2.0, 1.0)),
        ],
        pad_id=0,
    )
    assert batch.input_ids.tolist() == [
        [10, 11, 20, 1, 0],
        [10, 11, 21, 22, 1],
        [12, 30, 1, 0, 0],
        [12, 31, 0, 0, 0],
        [12, 32, 1, 0, 0],
    ]
    assert batch.attention_mask.sum(1).tolist() == [4, 5, 3, 2, 3]
    layout = batch.layout
    # Row t of a sequence predicts token t + 1: the last prompt token the first completion token.
    assert layout.rows.tolist() == [1, 2, 6, 7, 8, 10, 11, 15, 20, 21]
    assert layout.targets.tolist() == [20, 1, 21, 22, 1, 30, 1, 31, 32, 1]
    flat = batch.input_ids.flatten()
    assert flat[layout.rows + 1].equal(layout.targets)
    assert layout.lengths.tolist() == [2, 3, 2, 1, 2]
    assert layout.sequences.tolist() == [[0, 1, -1], [2, 3, 4]]
    assert batch.rewards.tolist() == [[0.5, 2.0, 0.0], [3.0, 2.0, 1.0]]
    assert batch.candidate_mask.tolist() == [[True, True, False], [True, True, True]]
    assert not batch.by_order and IGNORE_INDEX not in layout.targets


def test_collate_of_lists_without_rewards_descends():
    batch = collate([TokenizedList([5], [[6], [7], [8]], None)], pad_id=0)
    assert batch.by_order and batch.rewards.tolist() == [[2.0, 1.0, 0.0]]


def test_collate_refuses_nothing_and_mixed_kinds():
    by_order = TokenizedList([5], [[6], [7]], None)
    rewarded = TokenizedList([5], [[6], [7]], (1.0, 0.0))
    with pytest.raises(ValueError, match="got no lists"):
        collate([], pad_id=0)
    with pytest.raises(ValueError, match="got both"):
        collate([by_order, rewarded], pad_id=0)


def test_batches_hold_one_kind_each_and_lose_nothing():
    lists = [
        TokenizedList([i], [[100 + i], [50]], None if i % 3 else (1.0, 0.0)) for i in range(2, 13)
    ]
    config = EvalConfig(batch_size=3)
    got = list(batches(lists, config, pad_id=0, shuffle_seed=4))
    assert len(got) == num_batches(lists, 3) == 5
    seen = torch.cat([batch.input_ids[::2, 0] for batch in got]).tolist()
    assert sorted(seen) == list(range(2, 13)) and seen != sorted(seen)
    again = list(batches(lists, config, pad_id=0, shuffle_seed=4))
    assert all(a.input_ids.equal(b.input_ids) for a, b in zip(got, again, strict=True))
    in_order = torch.cat([b.input_ids[::2, 0] for b in batches(lists[1::3], config, 0)]).tolist()
    assert in_order == [3, 6, 9, 12]


def test_split_keeps_equal_prompts_together():
    lists = [TokenizedList([i % 10], [[20 + i], [50]], None) for i in range(40)]
    train, held_out = split_held_out(lists, 0.2, seed=0)
    assert len(train) == 32 and len(held_out) == 8
    assert not {t.prompt[0] for t in train} & {t.prompt[0] for t in held_out}
    assert split_held_out(lists, 0.0, seed=0) == (lists, [])
    with pytest.raises(DataError, match="at least 2 different prompts, got 1"):
        split_held_out(lists[:1], 0.2, seed=0)
