"""The whole model end to end: distillation by accelerate's loop, with checkpoints, evaluation and the best kept."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from moe2gguf.errors import HealError
from moe2gguf.experts.heal import losses
from moe2gguf.experts.heal.evaluate import evaluate
from moe2gguf.experts.heal.layerwise import Log
from moe2gguf.experts.heal.moe_layer import Stored, save_arrays
from moe2gguf.experts.heal.optimize import freeze, optimizer_for
from moe2gguf.experts.heal.settings import HealSettings, Windows, batch_at, used_at
from moe2gguf.experts.heal.student import add_lora, attention, load_student, stored_layers, use
from moe2gguf.experts.heal.sum_terms import summed
from moe2gguf.experts.heal.teacher import Teacher


def heal_model(
    student_folder: Path,
    teacher_folder: Path,
    overlay: Callable[[int], Stored | None],
    ids: Windows,
    held_out: Windows,
    settings: HealSettings,
    work: Path,
    log: Log,
    advance: Callable[[int], None],
) -> None:
    """Write `best/layer-I.npz` of every layer and `best/attention.npz` into `work`; goes on after the last checkpoint.

    `overlay` has layers that replace the student's, if any. `log` receives a line per step and per evaluation (on
    the main process only), `advance` the tokens done.

    Raises:
        HealError: the loss or a gradient is not finite; step and layer, or parameter, are named.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)  # or a resumed run would differ in the last bits
    trainer = _Trainer(student_folder, teacher_folder, overlay, ids, held_out, settings, work, log)
    first = trainer.resume()
    advance(first * settings.batch * ids.shape[1])
    if first == 0:
        trainer.evaluate(0)
    for step in range(first, settings.steps):
        trainer.step(step)
        done = step + 1
        if done % settings.evaluate_every == 0 or done == settings.steps:
            trainer.evaluate(done)
        if done % settings.save_every == 0 or done == settings.steps:
            trainer.save(done)
        advance(settings.batch * ids.shape[1])


class _Trainer:
    """The state of one run; arguments as in `heal_model`."""

    def __init__(
        self,
        student_folder: Path,
        teacher_folder: Path,
        overlay: Callable[[int], Stored | None],
        ids: Windows,
        held_out: Windows,
        settings: HealSettings,
        work: Path,
        log: Log,
    ) -> None:
        self.ids, self.held_out, self.settings, self.work = ids, held_out, settings, work
        self.accelerator = Accelerator(
            gradient_accumulation_steps=settings.accumulate,
            mixed_precision=settings.precision,
            cpu=settings.device == "cpu",
            step_scheduler_with_optimizer=False,
        )
        self.log: Log = log if self.accelerator.is_main_process else (lambda _: None)
        self.teacher = Teacher(teacher_folder, self.accelerator.device)
        model = load_student(student_folder, overlay, ids, settings)
        if "lora" in settings.train:
            model = add_lora(model, settings.lora_rank, settings.seed)
        freeze(model, settings.train)
        optimizer, schedule = optimizer_for(model, settings, settings.steps, settings.lr)
        self.student, self.optimizer, self.schedule = self.accelerator.prepare(model, optimizer, schedule)
        self.best = math.inf

    @property
    def model(self) -> Any:
        """The student without accelerate's wrapping."""
        return self.accelerator.unwrap_model(self.student)

    def step(self, step: int) -> None:
        """One optimizer step; the count and the windows follow from the seed and the step's number."""
        k, start = used_at(self.settings, step), time.perf_counter()
        use(self.model, k)
        self.student.train()
        torch.manual_seed(self.settings.seed * 1_000_003 + step)
        windows = batch_at(self.settings, len(self.ids), step)
        own = windows[self.accelerator.process_index :: self.accelerator.num_processes]
        terms: dict[str, float] = {}
        norm = 0.0
        for part in np.array_split(own, self.settings.accumulate):
            with self.accelerator.accumulate(self.student):
                parts = self._loss(self.ids[part])
                loss = torch.stack(list(parts.values())).sum()
                if not bool(loss.isfinite()):
                    raise HealError(f"step {step}: the loss is NaN or infinite; {self._first_bad(self.ids[part])}")
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    norm = self._clip(step)
                self.optimizer.step()
                self.optimizer.zero_grad()
            for name, value in parts.items():
                terms[name] = terms.get(name, 0.0) + float(value.detach()) / self.settings.accumulate
        self.schedule.step()
        speed = windows.size * self.ids.shape[1] / (time.perf_counter() - start)
        line = {"stage": "steps", "step": step, "used": k, "norm": norm, "loss": sum(terms.values()), **terms}
        self.log({**line, "tokens_per_second": speed})

    def _loss(self, windows: Windows) -> dict[str, Tensor]:
        """The weighted terms that are on."""
        ids = torch.from_numpy(windows).to(self.accelerator.device)
        ours = self.student(ids, output_hidden_states=True, logits_to_keep=1)
        with self.accelerator.autocast():
            return self._predictions(ours.hidden_states[-1], windows, ids)

    def _predictions(self, last: Tensor, windows: Windows, ids: Tensor) -> dict[str, Tensor]:
        """The terms of the next-token probabilities, from the last hidden states (n_window, n_context, d_model)."""
        s, head = self.settings, self.model.get_output_embeddings()
        dense, following = self.teacher.last(windows).flatten(0, 1), losses.following(ids).flatten()
        n_token, n_following = len(dense), int((following >= 0).sum())

        def measure(hidden: Tensor, part: slice) -> Tensor:
            logits = head(hidden)
            terms = [losses.kl(logits, self.teacher.head(dense[part]), s.top).sum() / n_token]
            if s.next_token:
                terms.append(s.next_token * losses.next_token(logits, following[part]).sum() / n_following)
            return torch.stack(terms)

        return dict(zip(("kl", "next_token"), summed(last.flatten(0, 1), measure), strict=False))

    def _clip(self, step: int) -> float:
        """Clip the gradient; its norm before that."""
        norm = float(self.accelerator.clip_grad_norm_(self.student.parameters(), self.settings.clip) or 0.0)
        if not math.isfinite(norm) and self.accelerator.scaler is None:  # fp16's scaler skips such a step by itself
            named = self.model.named_parameters()
            bad = next(name for name, p in named if p.grad is not None and not bool(p.grad.isfinite().all()))
            raise HealError(f"step {step}: the gradient of {bad} is NaN or infinite; lower --lr and --router-lr")
        return norm

    @torch.no_grad()  # type: ignore[untyped-decorator]  # torch is not followed
    def _first_bad(self, windows: Windows) -> str:
        """Which layer breaks first, with the way out."""
        ids = torch.from_numpy(windows).to(self.accelerator.device)
        states = self.model(ids, output_hidden_states=True).hidden_states
        bad = next((i for i, h in enumerate(states) if not bool(h.isfinite().all())), None)
        where = "the logits are the first" if bad is None else f"the output of layer {max(bad - 1, 0)} is the first"
        return f"{where} that is not finite. Lower --lr and --router-lr, or look for a broken weight"

    def evaluate(self, step: int) -> None:
        """Score the held-out text; the best so far is written down."""
        found = evaluate(self.model, self.teacher, self.held_out, self.settings)
        nll = found["nll"].values()
        score = found["kl_mean"] + self.settings.next_token * sum(nll) / len(nll)
        best = score < self.best
        self.log({"stage": "evaluation", "step": step, "best": best, **found})
        if best and self.accelerator.is_main_process:
            self.best = score
            (self.work / "best").mkdir(exist_ok=True)
            for i, stored in enumerate(stored_layers(self.model)):
                stored.save(self.work / "best" / f"layer-{i}.npz")
            save_arrays(self.work / "best" / "attention.npz", attention(self.model))
        self.accelerator.wait_for_everyone()

    def save(self, step: int) -> None:
        """A checkpoint, by rename; older ones go. The best score so far is part of its name."""
        target, unfinished = self.work / f"step-{step:07}", self.work / "step.partial"
        if self.accelerator.is_main_process:
            shutil.rmtree(unfinished, ignore_errors=True)
        self.accelerator.save_state(str(unfinished))
        if self.accelerator.is_main_process:
            (unfinished / "best.txt").write_text(repr(self.best))
            older = list(self.work.glob("step-*"))
            unfinished.rename(target)
            for folder in older:
                shutil.rmtree(folder)
        self.accelerator.wait_for_everyone()

    def resume(self) -> int:
        """Load the last checkpoint; the number of steps done."""
        found = sorted(self.work.glob("step-*"))
        if not found:
            return 0
        self.accelerator.load_state(str(found[-1]))
        self.best = float((found[-1] / "best.txt").read_text())
        return int(found[-1].name.split("-")[1])
