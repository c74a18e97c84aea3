"""The whole model end to end: distillation by accelerate's loop, with checkpoints, evaluation and the best kept."""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from torch import Tensor

from moe2gguf.errors import HealError
from moe2gguf.experts.heal.evaluate import score_model
from moe2gguf.experts.heal.log import ScoreLine, StepLine
from moe2gguf.experts.heal.losses import kl_divergence, next_ids, next_token_loss, sum_terms
from moe2gguf.experts.heal.optimize import freeze, make_optimizer
from moe2gguf.experts.heal.settings import Windows, draw_batch, draw_used
from moe2gguf.experts.heal.student import add_lora, load_student, read_attention, read_layers, set_used
from moe2gguf.experts.heal.teacher import Teacher
from moe2gguf.experts.heal.work import ExpertWeights, HealRun, WorkFolder


def heal_model(
    student: Path, teacher: Path, run: HealRun, read_healed: Callable[[int], ExpertWeights] | None = None
) -> None:
    """Save the best weights in `run.work`; goes on after the last checkpoint.

    `student` and `teacher` are folders. `read_healed` gives the layers that replace the student's, if there are any.
    The log gets a line per step and per evaluation, from the main process only.

    Raises:
        HealError: the loss or a gradient is not finite; step and layer, or parameter, are named.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)  # or a continued run would differ in the last bits
    trainer = Trainer(student, teacher, run, read_healed)
    training, every = run.settings.training, run.settings.evaluation.every
    n_token = training.batch * run.ids.shape[1]
    first, best = load_checkpoint(trainer.accelerator, run.work)
    with run.progress("steps", training.steps * n_token) as advance:
        advance(first * n_token)
        if first == 0:
            best = trainer.evaluate(0, best)
        for step in range(first, training.steps):
            trainer.step(step)
            done = step + 1
            if done % every == 0 or done == training.steps:
                best = trainer.evaluate(done, best)
                save_checkpoint(trainer.accelerator, run.work, done, best)
            advance(n_token)


class Trainer:
    """The student, the teacher and the optimizer of one run; arguments as in `heal_model`."""

    def __init__(
        self, student: Path, teacher: Path, run: HealRun, read_healed: Callable[[int], ExpertWeights] | None
    ) -> None:
        self.run, settings = run, run.settings
        training, compute = settings.training, settings.compute
        self.accelerator = Accelerator(
            gradient_accumulation_steps=training.accumulate,
            mixed_precision=compute.precision,
            cpu=compute.device == "cpu",
            step_scheduler_with_optimizer=False,
        )
        self.teacher = Teacher(teacher, self.accelerator.device)
        model = load_student(student, read_healed, run.ids, checkpointing=compute.checkpointing)
        if "lora" in training.parts:
            model = add_lora(model, training.lora_rank, training.seed)
        freeze(model, training.parts)
        optimizer, schedule = make_optimizer(model, settings.optimizer, training.steps, settings.optimizer.lr)
        self.student, self.optimizer, self.schedule = self.accelerator.prepare(model, optimizer, schedule)

    @property
    def model(self) -> Any:
        """The student without accelerate's wrapping."""
        return self.accelerator.unwrap_model(self.student)

    def step(self, step: int) -> None:
        """One optimizer step; the count and the windows follow from the seed and the step's number."""
        training, start = self.run.settings.training, time.perf_counter()
        k = draw_used(training, step)
        set_used(self.model, k)
        self.student.train()
        torch.manual_seed(training.seed * 1_000_003 + step)
        batch = draw_batch(training, len(self.run.ids), step)
        own = batch[self.accelerator.process_index :: self.accelerator.num_processes]
        terms: dict[str, float] = {}
        norm = 0.0
        for part in np.array_split(own, training.accumulate):
            with self.accelerator.accumulate(self.student):
                values, part_norm = self._backward(self.run.ids[part], step)
                norm = norm if part_norm is None else part_norm
            for name, value in values.items():
                terms[name] = terms.get(name, 0.0) + value / training.accumulate
        self.schedule.step()
        speed = batch.size * self.run.ids.shape[1] / (time.perf_counter() - start)
        self._log(StepLine(step, k, norm, sum(terms.values()), terms["kl"], terms.get("next_token"), speed))

    def _backward(self, windows: Windows, step: int) -> tuple[dict[str, float], float | None]:
        """(the terms of the loss, the norm of the gradient where the optimizer makes its step on it)."""
        terms = self._loss(windows)
        loss = torch.stack(list(terms.values())).sum()
        if not bool(loss.isfinite()):
            raise HealError(f"step {step}: the loss is NaN or infinite; {self._first_bad(windows)}")
        self.accelerator.backward(loss)
        norm = self._clip(step) if self.accelerator.sync_gradients else None
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {name: float(value.detach()) for name, value in terms.items()}, norm

    def _loss(self, windows: Windows) -> dict[str, Tensor]:
        """The weighted terms of the loss that are on, each a mean over the tokens of `windows`."""
        settings, head = self.run.settings.loss, self.model.get_output_embeddings()
        ids = torch.from_numpy(windows).to(self.accelerator.device)
        last = self.student(ids, output_hidden_states=True, logits_to_keep=1).hidden_states[-1]
        following = next_ids(ids).flatten()
        n_token, n_following = len(following), int((following >= 0).sum())

        def terms(hidden: Tensor, part: slice) -> Tensor:
            logits = head(hidden)
            found = [kl_divergence(logits, self.teacher.logits(dense[part]), settings.top).sum() / n_token]
            if settings.next_token:
                found.append(settings.next_token * next_token_loss(logits, following[part]).sum() / n_following)
            return torch.stack(found)

        with self.accelerator.autocast():
            dense = self.teacher.last_states(windows).flatten(0, 1)
            return dict(zip(("kl", "next_token"), sum_terms(last.flatten(0, 1), terms), strict=False))

    def _clip(self, step: int) -> float:
        """Clip the gradient; its norm before that."""
        clip = self.run.settings.optimizer.clip
        norm = float(self.accelerator.clip_grad_norm_(self.student.parameters(), clip) or 0.0)
        if not math.isfinite(norm) and self.accelerator.scaler is None:  # fp16's scaler skips such a step by itself
            named = self.model.named_parameters()
            bad = next(name for name, p in named if p.grad is not None and not bool(p.grad.isfinite().all()))
            raise HealError(f"step {step}: the gradient of {bad} is NaN or infinite; lower --lr and --router-lr")
        return norm

    @torch.no_grad()  # type: ignore[untyped-decorator]  # torch is not followed
    def _first_bad(self, windows: Windows) -> str:
        """Which layer breaks first, and what to do."""
        ids = torch.from_numpy(windows).to(self.accelerator.device)
        states = self.model(ids, output_hidden_states=True).hidden_states
        bad = next((i for i, h in enumerate(states) if not bool(h.isfinite().all())), None)
        where = "the logits are the first" if bad is None else f"the output of layer {max(bad - 1, 0)} is the first"
        return f"{where} that is not finite. Lower --lr and --router-lr, or look for a broken weight"

    def evaluate(self, step: int, best: float) -> float:
        """Score the held-out text and save the weights if they are better than `best`; the best score now.

        The score is the KL divergence, plus the next-token loss times its weight, both averaged over the counts.
        """
        settings = self.run.settings
        line = score_model(self.model, self.teacher, self.run.held_out, settings.evaluation.used, step)
        score = line.kl_mean + settings.loss.next_token * sum(line.nll.values()) / len(line.nll)
        self._log(replace(line, best=score < best))
        if score < best and self.accelerator.is_main_process:
            self.run.work.save_best(step, read_layers(self.model), read_attention(self.model))
        self.accelerator.wait_for_everyone()
        return score if score < best else best

    def _log(self, line: StepLine | ScoreLine) -> None:
        if self.accelerator.is_main_process:
            self.run.log(line)


def save_checkpoint(accelerator: Accelerator, work: WorkFolder, step: int, best: float) -> None:
    """Save the state after `step` steps and the `best` score so far; older checkpoints go."""
    with work.save_checkpoint(step, best) as path:
        accelerator.wait_for_everyone()  # the main process has removed what a stopped run left there
        _save_state(accelerator, path)
        accelerator.wait_for_everyone()  # every process has written its part


def _save_state(accelerator: Accelerator, path: Path) -> None:
    """Write the state of every part. Raises OSError, also where torch or safetensors makes another error of it."""
    # it warns of a tied head, of which one copy is enough, at every checkpoint
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)
    try:
        accelerator.save_state(str(path))
    except (RuntimeError, SafetensorError) as error:
        raise OSError(f"no room, or an error of the disk: {error}") from error


def load_checkpoint(accelerator: Accelerator, work: WorkFolder) -> tuple[int, float]:
    """Restore the last checkpoint; the steps done and the best score, (0, infinity) if there is none."""
    name, best = broadcast_object_list([*work.find_checkpoint()])
    if name is None:
        return 0, best
    accelerator.load_state(str(work.path / name))
    return int(name.split("-")[1]), best
