"""The needle model's texts and training sequences say what they are meant to say."""

from __future__ import annotations

import csv
import itertools
import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from needle_model import text
from needle_model.batches import NEAR, Sequences
from needle_model.tokenizer import ASSISTANT, END, build_tokenizer, save_tokenizer
from needle_model.train import CONTEXT, STAGES, STANDS_FOR, found, new_model

LENGTHS = (64, 128, 512)
MODEL = Path(__file__).resolve().parents[2] / "examples/needle_model/model"


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(4096)


def test_words_are_one_token_and_codes_two(tokenizer):
    for word in text.words():
        assert len(tokenizer.encode(word)) == 1, word
    for code in ("0000", "4821", "9999"):
        assert len(tokenizer.encode(code)) == 2


def test_any_text_survives_the_tokenizer(tokenizer):
    said = "The code of the blue  door is 4821.\nÜber 12345 apples!"
    assert tokenizer.decode(tokenizer.encode(said)) == (
        " the code of the blue door is 4821. über 12345 apples!"
    )


def test_subjects_share_no_word():
    names = text.subjects(random.Random(0), text.MOST_SUBJECTS)
    for place in (0, 1):
        assert len({name.split()[place] for name in names}) == len(names)


@pytest.mark.parametrize("length", LENGTHS)
def test_every_answer_stands_in_the_text_before_its_question(tokenizer, length):
    batch = Sequences(tokenizer, STANDS_FOR, 0).batch(16, length, drills=0.0, far=0.5)
    end = tokenizer.convert_tokens_to_ids(END)
    for tokens, targets in zip(batch.tokens, batch.targets, strict=True):
        said = tokenizer.decode(tokens[~targets])
        answers = tokenizer.decode(tokens[targets]).split(END)[:-1]
        assert answers and said.count(ASSISTANT) == len(answers)
        assert int((tokens[targets] == end).sum()) == len(answers)
        for answer in answers:
            for sentence in answer.strip().split(". "):
                assert sentence.rstrip(".") in said


@pytest.mark.parametrize("length", LENGTHS)
def test_far_sequences_stand_for_longer_texts(tokenizer, length):
    batch = Sequences(tokenizer, STANDS_FOR, 1).batch(32, length, drills=0.0, far=1.0)
    steps = batch.positions.diff(dim=1)
    assert (steps >= 1).all() and (steps > 1).any()
    last = batch.positions[:, -1]
    assert last.max() < STANDS_FOR and last.float().log().std() > 0.5
    weighed = batch.weights.exp().sum(1)
    has_filler = batch.weights.max(1).values > 0
    assert has_filler.any()
    torch.testing.assert_close(
        weighed[has_filler], (last[has_filler] + 1).float(), rtol=1e-3, atol=0
    )


def test_the_mask_weighs_far_filler_and_hides_the_future(tokenizer):
    batch = Sequences(tokenizer, STANDS_FOR, 2).batch(4, 256, drills=0.0, far=1.0)
    mask = batch.mask(torch.float32)
    assert mask.shape == (4, 1, 256, 256)
    ahead = torch.arange(256)[:, None] - torch.arange(256)
    assert torch.isneginf(mask[:, 0][:, ahead < 0]).all()
    assert (mask[:, 0][:, (ahead >= 0) & (ahead < NEAR)] == 0).all()
    torch.testing.assert_close(mask[:, 0, -1, :100], batch.weights[:, :100])


def test_drills_say_everything_twice(tokenizer):
    batch = Sequences(tokenizer, STANDS_FOR, 3).batch(12, 64, drills=1.0, far=0.0)
    for tokens, targets in zip(batch.tokens.tolist(), batch.targets, strict=True):
        assert targets.any()
        first = int(targets.nonzero()[0])
        wanted = targets.nonzero().flatten().tolist()
        # Each with the token before it, so that a code stands with its own subject.
        pairs = set(itertools.pairwise(tokens[:first]))
        assert all((tokens[i - 1], tokens[i]) in pairs for i in wanted)


def test_an_answer_counts_when_all_of_it_is_right(tokenizer):
    batch = Sequences(tokenizer, STANDS_FOR, 4).batch(8, 128, drills=0.0, far=0.0)
    wanted = batch.targets[:, 1:]
    truth = torch.nn.functional.one_hot(batch.tokens[:, 1:][wanted], len(tokenizer)).float()
    right, asked = found(truth, batch, wanted)
    assert right == asked == sum(int((row[1:] & ~row[:-1]).sum()) for row in batch.targets)
    truth[0] = 0
    truth[0, 7] = 1
    assert found(truth, batch, wanted) == (asked - 1, asked)


def test_the_model_is_small_enough_to_commit(tokenizer):
    model = new_model(len(tokenizer))
    assert sum(weight.numel() for weight in model.parameters()) * 2 < 10 * 2**20


@pytest.fixture(scope="module")
def committed():
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


def test_the_committed_model_is_what_its_curve_ends_in(committed, tokenizer):
    assert (MODEL / "model.safetensors").stat().st_size < 10 * 2**20
    with (MODEL / "curve.csv").open(newline="") as file:
        curve = list(csv.DictReader(file))
    assert int(curve[-1]["length"]) == STAGES[-1].length and float(curve[-1]["found"]) > 0.98
    assert json.loads((MODEL / "recipe.json").read_text())["steps"] == int(curve[-1]["step"])
    batch = Sequences(tokenizer, STANDS_FOR, 99).batch(2, STAGES[-1].length, drills=0.0, far=0.5)
    with torch.no_grad():
        logits = committed(
            input_ids=batch.tokens,
            position_ids=batch.positions,
            attention_mask=batch.mask(torch.float32),
        ).logits[:, :-1]
    wanted = batch.targets[:, 1:]
    right, asked = found(logits[wanted], batch, wanted)
    assert asked > 20 and right >= 0.98 * asked


def test_the_committed_tokenizer_is_the_one_of_the_recipe(tmp_path):
    save_tokenizer(tmp_path, CONTEXT)
    for made in tmp_path.iterdir():
        assert (MODEL / made.name).read_text() == made.read_text(), made.name


def test_the_committed_model_answers_from_its_text(committed):
    """Facts of two kinds, asked in turn, in a text of 1,500 tokens."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    rng = random.Random(11)
    names = text.subjects(rng, 24)
    codes, links = text.codes(rng, names[:20]), text.path(names[20:])
    facts = [(rng.random(), fact.sentence) for fact in (*codes, *links)]
    told = text.Writer(tokenizer).context(rng, 1500, facts)
    for question, answer in [
        *((f"what is the code of the {code.subject}?", code.sentence) for code in codes[:6]),
        (f"who is the neighbour of the {links[0].subject}?", text.follow(links)),
    ]:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": f"{told} {question}"}],
            add_generation_prompt=True, return_tensors="pt", return_dict=True,
        )  # fmt: skip
        said = committed.generate(**prompt, max_new_tokens=64, do_sample=False)[0]
        new = tokenizer.decode(said[prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        assert new.strip() == answer
