"""What a world model remembers when its eyes are closed: frames and rewards imagined after a context.

*Reconstruction*: the whole episode is observed, and every frame but the first is decoded from history and posterior.
*Inference*: likewise, and the reward of the last step is read. *Generation* or *imagination*: only the context is
observed; the query is imagined under the true actions, and the reward is read at its end.

*Expectation*: a dream is one guess, and one that knows nothing errs by twice what the mean picture does. So the mean of
all dreams of a context is judged too: what is guessed cancels, and knowing nothing it is the mean picture.

*Surprise*: the whole episode is observed, and every frame costs KL[posterior || prior] nats: what it tells beyond what
all before it foretold. Where a query shows again what the context showed, the share by which it surprises less is
memory, even if a dream, which has to live with its own guesses, is lost by then.

Rewards count as right when predicted on the true side of 1/2. Frame errors are squared errors summed over pixels and
channels in [0, 1]; tile codes are drawn first, so both observations compare.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from recollect.core.errors import DataError
from recollect.eval.pictures import render_on
from recollect.models.latent import kl_divergence
from recollect.models.world_model import Batch, WorldModel

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Scores:
    """Of n episodes of T frames, the last ``query`` of which were imagined too."""

    reconstruction: Floats
    """(n, T - 1) error of every reconstructed frame, from the second on."""
    generation: Floats
    """(n, query) error of every imagined frame."""
    reward_true: npt.NDArray[np.float32]
    """(n,) at the last step."""
    reward_inferred: npt.NDArray[np.float32]
    reward_imagined: npt.NDArray[np.float32]
    expectation: Floats
    """(n, query) error of the mean of all dreams, without bias though from two of them: the mean of their errors less
    half of how far they are apart; a single one may be below 0. (n, 0) if one alone was dreamed.
    """
    surprise: Floats
    """(n, T - 1) nats of every observed frame, from the second on."""

    @property
    def context(self) -> int:
        """Frames that were observed before the dream."""
        return self.reconstruction.shape[1] + 1 - self.generation.shape[1]

    def errors(self, n_values: int) -> dict[str, float]:
        """Mean frame errors and surprise, context and query apart, and the dream's peak signal-to-noise ratio in dB
        for frames of ``n_values`` numbers.
        """
        cut = self.context - 1
        generation = float(self.generation.mean())
        expected = {"expectation_mse": float(self.expectation.mean())} if self.expectation.size else {}
        return {
            **expected,
            "reconstruction_mse": float(self.reconstruction.mean()),
            "reconstruction_mse_context": float(self.reconstruction[:, :cut].mean()) if cut else 0.0,
            "reconstruction_mse_query": float(self.reconstruction[:, cut:].mean()),
            **self._surprises(cut),
            "generation_mse": generation,
            "generation_psnr": float(-10 * np.log10(max(generation / n_values, 1e-10))),
        }

    def _surprises(self, cut: int) -> dict[str, float]:
        """Mean nats a frame in context and query, and the share by which the query's are fewer."""
        query = float(self.surprise[:, cut:].mean())
        context = float(self.surprise[:, :cut].mean()) if cut else 0.0
        return {
            "surprise_context": context,
            "surprise_query": query,
            "recalled": 1 - query / context if context else 0.0,
        }

    def rewards(self) -> dict[str, float]:
        """How often the last reward is right, from the whole episode and from its context."""
        truth = self.reward_true > 0.5
        return {
            "inference_accuracy": float(((self.reward_inferred > 0.5) == truth).mean()),
            "imagination_accuracy": float(((self.reward_imagined > 0.5) == truth).mean()),
        }


@dataclass(frozen=True)
class Dream:
    """Scores of a batch of episodes, and what was imagined: the query of the truth and of the dream as the model sees
    (n, query, ...), and as pictures (n, query, H, W, 3).
    """

    scores: Scores
    imagined: Bytes
    truth_pictures: Bytes
    imagined_pictures: Bytes


@torch.no_grad()
def dream(
    model: WorldModel, batch: Batch, context: int, generator: torch.Generator, again: torch.Generator | None = None
) -> Dream:
    """Observe ``context`` frames of whole episodes, imagine the rest, and compare. ``generator`` samples latents;
    ``again`` those of a second dream from the same context, which ``Scores.expectation`` needs.

    Raises DataError for episodes without frames after the context.
    """
    length = batch.is_first.shape[1]
    if not 0 < context < length:
        raise DataError(f"episodes of {length} frames are too short to imagine what follows a context of {context}")
    seen = model.observe(batch, generator=generator)
    rebuilt = picture(model.reconstruct(seen.h[:, 1:], seen.z[:, 1:]))
    frames = picture(batch.observation)
    before = model.observe(batch.each(lambda part: part[:, :context]), generator=generator)
    ahead = model.imagine(before.state, batch.action[:, context:], generator=generator)
    imagined = picture(ahead.observation)
    truth = frames[:, context:]
    generation = squared_error(imagined, truth)
    expectation = generation[:, :0]
    if again is not None:
        other = picture(model.imagine(before.state, batch.action[:, context:], generator=again).observation)
        expectation = (generation + squared_error(other, truth) - squared_error(imagined, other)) / 2
    scores = Scores(
        reconstruction=squared_error(rebuilt, frames[:, 1:]),
        generation=generation,
        reward_true=batch.reward[:, -1].cpu().numpy(),
        reward_inferred=model.reward(seen.h[:, -1], seen.z[:, -1]).cpu().numpy(),
        reward_imagined=ahead.reward[:, -1].cpu().numpy(),
        expectation=expectation,
        surprise=kl_divergence(seen.log_q[:, 1:], seen.log_p[:, 1:]).double().cpu().numpy(),
    )
    return Dream(scores, ahead.observation.cpu().numpy(), truth, imagined)


def joined(parts: list[Scores]) -> Scores:
    """The scores of all episodes, in order."""
    return Scores(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Scores)))


def squared_error(a: Bytes, b: Bytes) -> Floats:
    """Squared error on [0, 1] summed over pixels and channels: (n, T) for pictures (n, T, H, W, 3)."""
    total = np.empty(a.shape[:2])
    for i in range(len(a)):
        # Differences of bytes squared and summed are whole numbers below 2^31 for frames up to 100 x 100.
        apart = a[i].astype(np.int32) - b[i]
        total[i] = np.einsum("thwc,thwc->t", apart, apart, dtype=np.int64) / 255.0**2
    return total


class MeanPicture:
    """The error of answering every frame with the mean of all of them: what a dream without any memory can reach.

    Of frames (n, T, H, W, 3) that pass by a part at a time; memory is that of one picture.
    """

    def __init__(self) -> None:
        self.n = 0
        self.sums: Floats = np.zeros(())
        self.squares = 0.0

    def add(self, frames: Bytes) -> None:
        """Count these frames too."""
        self.n += frames.shape[0] * frames.shape[1]
        self.sums = self.sums + frames.sum((0, 1), dtype=np.int64).astype(np.float64)
        for episode in frames:
            values = episode.astype(np.int32)
            self.squares += float(np.einsum("thwc,thwc->", values, values, dtype=np.int64))

    def error(self) -> float:
        """Squared error on [0, 1] summed over pixels and channels, the mean over all frames."""
        return float(self.squares - (self.sums**2).sum() / self.n) / self.n / 255.0**2


def picture(observation: Tensor) -> Bytes:
    """Pictures (n, T, H, W, 3) of tile codes (n, T, h, w), or the pictures themselves."""
    return (render_on(observation) if observation.ndim == 4 else observation).cpu().numpy()


class Gallery:
    """Pictures of a few episodes out of many that pass by: the first, and those imagined best and worst.

    ``frames`` evenly spaced steps of the query are kept of each; memory is that of ``n`` episodes of each kind. Of the
    first ``films`` episodes as many steps are kept as ``FILM_BYTES`` allow, all of them if they do.
    """

    KINDS = ("first", "best", "worst")

    FILM_BYTES = 2_000_000
    """Of the truth and the dream of all films together, before they are compressed."""

    def __init__(self, n: int = 4, frames: int = 10, films: int = 2) -> None:
        self.n, self.frames, self.films = n, frames, films
        self._films: list[tuple[Bytes, Bytes]] = []
        self._film_steps: npt.NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._kept: list[dict[str, Any]] = []
        self._seen = 0
        self._steps: npt.NDArray[np.int64] = np.zeros(0, dtype=np.int64)

    def show(self, result: Dream) -> None:
        """Look at one more batch."""
        scores = result.scores
        query = result.truth_pictures.shape[1]
        at = _spread(query, self.frames)
        self._steps = scores.context + at
        self._film(result)
        for i, error in enumerate(scores.generation.mean(1).tolist()):
            self._kept.append(
                {
                    "number": self._seen + i,
                    "error": error,
                    "truth": result.truth_pictures[i, at],
                    "imagined": result.imagined_pictures[i, at],
                    "reward_true": scores.reward_true[i],
                    "reward_imagined": scores.reward_imagined[i],
                }
            )
        self._seen += len(scores.reward_true)
        chosen = {id(entry) for kind in self.KINDS for entry in self._of(kind)}
        self._kept = [entry for entry in self._kept if id(entry) in chosen]

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """What there is to draw or store: ``strip_*`` of the first, ``best_*``, ``worst_*``, ``film_*``; or nothing."""
        if not self._kept:
            return {}
        found = {"strip": self._of("first"), "best": self._of("best"), "worst": self._of("worst")}
        arrays = {
            f"{kind}_{key}": np.stack([entry[key] for entry in entries])
            for kind, entries in found.items()
            for key in self._kept[0]
        }
        arrays["strip_step"] = self._steps
        if self._films:
            arrays["film_truth"], arrays["film_imagined"] = (np.stack(part) for part in zip(*self._films, strict=True))
            arrays["film_step"] = self._film_steps
        return arrays

    def _film(self, result: Dream) -> None:
        """Take the film of every episode of a batch that is still among the first."""
        wanted = min(self.films - len(self._films), len(result.truth_pictures))
        if wanted <= 0:
            return
        query, *frame = result.truth_pictures.shape[1:]
        at = _spread(query, max(self.FILM_BYTES // (2 * self.films * int(np.prod(frame))), 2))
        self._film_steps = result.scores.context + at
        self._films += [(result.truth_pictures[i, at], result.imagined_pictures[i, at]) for i in range(wanted)]

    def _of(self, kind: str) -> list[dict[str, Any]]:
        if kind == "first":
            return [entry for entry in self._kept if entry["number"] < self.n]
        return sorted(self._kept, key=lambda e: (e["error"] if kind == "best" else -e["error"], e["number"]))[: self.n]


def _spread(n: int, most: int) -> npt.NDArray[np.int64]:
    """At most ``most`` of the indices below ``n``, evenly spaced, the first and the last among them."""
    return np.unique(np.linspace(0, n - 1, min(most, n)).round().astype(np.int64))
