"""Train the needle model: ``PYTHONPATH=examples python -m needle_model.train``.

Stages go from sequences of 64 tokens to 2048, each entered when the one before finds enough of its
answers.  In the first, most sequences are drills, random tokens and lists of facts said twice: they
form the induction heads that looking up a fact needs.  A run that is stopped resumes from its last
checkpoint; the curve is written beside the weights.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import math
import sys
import time
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from needle_model.batches import Batch, Sequences
from needle_model.tokenizer import build_tokenizer, save_tokenizer

HERE = Path(__file__).resolve().parent
CONTEXT = 40_960
STANDS_FOR = 36_000
"""Tokens of the longest text that a training sequence stands for."""
EVERY = 50
"""Steps between two lines of the curve."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """Sequences of one length.

    A stage ends when it finds ``enough`` of its answers, and after ``steps`` at the latest; the
    last one takes all of its steps, over which the learning rate falls to zero.
    """

    length: int
    rows: int
    drills: float
    far: float
    steps: int
    enough: float = 1.0


STAGES = (
    Stage(64, 64, drills=0.75, far=0.0, steps=8000, enough=0.97),
    Stage(128, 32, drills=0.3, far=0.3, steps=2500, enough=0.95),
    Stage(256, 16, drills=0.3, far=0.5, steps=1500, enough=0.95),
    Stage(512, 8, drills=0.25, far=0.6, steps=1000, enough=0.95),
    Stage(1024, 4, drills=0.0, far=0.7, steps=800, enough=0.97),
    Stage(2048, 4, drills=0.0, far=0.7, steps=600),
)
PEAK_RATE, WARMUP, WEIGHT_DECAY, CLIP = 2e-3, 100, 0.01, 1.0


def new_model(vocabulary: int) -> LlamaForCausalLM:
    """A Llama of 0.7 M parameters, whose large RoPE base leaves half of a head free of position."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e8},
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=4,
        pad_token_id=4,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def found(logits: torch.Tensor, batch: Batch, wanted: torch.Tensor) -> tuple[int, int]:
    """How many answers are right in every token, and how many there are.

    Args:
        logits: ``[targets, vocabulary]`` at the tokens before those in ``wanted``.
        wanted: ``[rows, length - 1]`` bool.
    """
    wrong = torch.zeros(wanted.shape, dtype=torch.bool)
    wrong[wanted] = logits.argmax(-1) != batch.tokens[:, 1:][wanted]
    starts = wanted & ~torch.nn.functional.pad(wanted, (1, 0))[:, :-1]
    number = starts.flatten().cumsum(0) - 1
    failed = torch.zeros(int(starts.sum()), dtype=torch.bool)
    failed[number[wrong.flatten()]] = True
    return int((~failed).sum()), len(failed)


class Trainer:
    """The model, where its training stands, and how it goes on.

    Args:
        state: folder of the checkpoint; made if missing.
    """

    def __init__(self, state: Path, seed: int) -> None:
        torch.manual_seed(seed)
        self.tokenizer = build_tokenizer(CONTEXT)
        self.model = new_model(len(self.tokenizer))
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=PEAK_RATE,
            weight_decay=WEIGHT_DECAY,
            betas=(0.9, 0.98),
            fused=True,
        )
        self.sequences = Sequences(self.tokenizer, STANDS_FOR, seed)
        self.stage = self.step = self.step_in_stage = 0
        self.seconds = self.drilled = 0.0
        self.curve: list[dict[str, float]] = []
        self._recipe = {"seed": seed, "stages": [dataclasses.astuple(stage) for stage in STAGES]}
        self._file = state / "checkpoint.pt"
        state.mkdir(parents=True, exist_ok=True)
        if self._file.exists():
            self._load()

    def run(self, steps: int) -> None:
        """Train from wherever the checkpoint stands to the end of the last stage, or to a step."""
        body = torch.compile(self.model.model)
        while self.stage < len(STAGES) and self.step < steps:
            stage = STAGES[self.stage]
            losses, right, asked, begin = 0.0, 0, 0, time.monotonic()
            for _ in range(EVERY):
                loss, hits, answers = self._one_step(body, stage)
                losses, right, asked = losses + loss, right + hits, asked + answers
            self.seconds += time.monotonic() - begin
            self._log(stage, losses / EVERY, right / max(1, asked))
            last = self.stage == len(STAGES) - 1
            if self.step_in_stage >= stage.steps or (right >= stage.enough * asked and not last):
                self.stage, self.step_in_stage = self.stage + 1, 0
            self._save()

    def _rate(self, stage: Stage) -> float:
        if self.stage == len(STAGES) - 1:
            return PEAK_RATE * 0.5 * (1 + math.cos(math.pi * self.step_in_stage / stage.steps))
        return PEAK_RATE * min(1.0, (self.step + 1) / WARMUP)

    def _one_step(self, body: torch.nn.Module, stage: Stage) -> tuple[float, int, int]:
        """One update; returns its loss, answers found and answers asked."""
        batch = self.sequences.batch(stage.rows, stage.length, stage.drills, stage.far)
        wanted = batch.targets[:, 1:]
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate(stage)
        with torch.autocast("cpu", torch.bfloat16):
            # The mask is explicit because transformers takes a jump in the positions for the
            # border between packed sequences and hides all that lies before it.
            hidden = body(
                input_ids=batch.tokens,
                position_ids=batch.positions,
                attention_mask=batch.mask(torch.bfloat16),
                use_cache=False,
            ).last_hidden_state
            logits = self.model.lm_head(hidden[:, :-1][wanted]).float()
        each = cross_entropy(logits, batch.tokens[:, 1:][wanted], reduction="none")
        each.mean().backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step, self.step_in_stage = self.step + 1, self.step_in_stage + 1
        chats = wanted.clone()
        chats[: math.ceil(stage.rows * stage.drills)] = False
        of_chats = chats[wanted]
        right, asked = found(logits[of_chats], batch, chats)
        self.drilled = each.detach()[~of_chats].mean().item() if stage.drills else 0.0
        return each.detach()[of_chats].mean().item(), right, asked

    def _log(self, stage: Stage, loss: float, share: float) -> None:
        self.curve.append(
            {
                "step": self.step,
                "seconds": round(self.seconds),
                "length": stage.length,
                "loss": round(loss, 4),
                "found": round(share, 4),
            }
        )
        print(
            f"step {self.step:6d}  {self.seconds / 60:5.1f} min  length {stage.length:5d}"
            f"  loss {loss:7.4f} {self.drilled:.4f}  answers found {share:6.1%}",
            flush=True,
        )

    def _save(self) -> None:
        state = {
            "recipe": self._recipe,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": self.sequences.rng.getstate(),
            "where": (self.stage, self.step, self.step_in_stage, self.seconds),
            "curve": self.curve,
        }
        part = self._file.with_suffix(".part")
        torch.save(state, part)
        part.replace(self._file)

    def _load(self) -> None:
        state = torch.load(self._file, weights_only=False)
        if state["recipe"] != self._recipe:
            raise SystemExit(
                f"error: {self._file} was trained with another seed or other stages; remove it to "
                "begin anew, or name another folder with --state."
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.sequences.rng.setstate(state["random"])
        self.stage, self.step, self.step_in_stage, self.seconds = state["where"]
        self.curve = state["curve"]
        done = self.stage == len(STAGES)
        print(
            f"{self._file} is finished; remove it to train again"
            if done
            else f"resuming at step {self.step}",
            flush=True,
        )

    def export(self, path: Path) -> None:
        """Write model, tokenizer and curve as SGLang loads them."""
        self.model.to(torch.bfloat16).save_pretrained(path)
        save_tokenizer(path, CONTEXT)
        (path / "recipe.json").write_text(
            json.dumps(
                {
                    "seed": self._recipe["seed"],
                    "steps": self.step,
                    "minutes": round(self.seconds / 60, 1),
                    "threads": torch.get_num_threads(),
                    "torch": torch.__version__,
                }
            )
            + "\n"
        )
        with (path / "curve.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(self.curve[0]))
            writer.writeheader()
            writer.writerows(self.curve)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--state", type=Path, default=HERE.parents[1] / "build/needle_training")
    parser.add_argument("--out", type=Path, default=HERE / "model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=sys.maxsize, help="stop once past this one")
    options = parser.parse_args()
    trainer = Trainer(options.state, options.seed)
    trainer.run(options.steps)
    trainer.export(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
