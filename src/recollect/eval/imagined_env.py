"""A world model's imagination as a vector environment of gymnasium: what runs in an environment runs in a dream.

``reset`` observes contexts, frames of episodes that happened, all at once in parallel over time. Every ``step`` is one
step of imagination for all environments in one batch, and shows what the decoder sees in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import gymnasium
import numpy as np
import numpy.typing as npt
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor
from torch.nn import functional as F

from recollect.core.errors import ConfigError, nearest
from recollect.core.state import index_batch, leaves, map_state, where_reset
from recollect.data import EpisodeStore
from recollect.eval.contexts import Contexts, Ints, StoredContexts, together
from recollect.eval.imagination import picture
from recollect.models.dynamics import WorldState
from recollect.models.vision import Tiles
from recollect.models.world_model import WorldModel

Bytes: TypeAlias = npt.NDArray[np.uint8]
Flags: TypeAlias = npt.NDArray[np.bool_]
Step: TypeAlias = tuple[Bytes, npt.NDArray[np.float64], Flags, Flags, dict[str, Any]]

OPTIONS = ("episodes", "start", "context")


class ImaginedEnv(VectorEnv[Bytes, Ints, npt.NDArray[Any]]):
    """``num_envs`` dreams of one world model, each going on from a context of its own.

    *Contexts* are ``context`` frames from step 0 of episodes drawn from ``episodes`` (None: all of the store), by a
    store or a callable. ``reset(options={"episodes": e, "start": s, "context": c})``, each an integer or ``num_envs``
    of them, chooses the episodes, the first step and the number of frames; contexts of several lengths are observed
    together. Equal contexts are observed once: n times the same episode are n samples of one future.

    *Observations* are decoded frames (num_envs, ...) uint8, in the real environment's space; what ``reset`` returns is
    the last frame of the context, as it was. *Rewards* are the predicted probabilities of a reward, or with
    ``reward_above`` 1 where they exceed it, else 0. *Terminated* is where the model believes with less than
    ``terminate_below`` (None: never) that the episode has a future; *truncated* where ``horizon`` steps were imagined.

    Autoreset is gymnasium's next-step mode: the step after the end ignores the action and returns the first
    observation of a new dream, of the same context where ``options`` chose the episodes, else of another one.

    Latents are sampled, of contexts and dreams alike, by one generator that ``reset(seed=...)`` seeds:
    ``torch.Generator().manual_seed(seed)``, used as ``observe`` and ``imagine`` use it; with ``sample=False`` they are
    the most probable ones. The model is used as it is: put it in eval mode.

    Cost of a step: one step of the dynamics, the decoder and both heads, whatever the context's length. Raises
    ConfigError for sizes below 1, unknown options, and a memory that grows unless ``terminate_below`` is None;
    ResetNeeded and InvalidAction as gymnasium's environments do; and what the source of contexts raises.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012 (gymnasium's own form)
        "render_modes": ["rgb_array"],
        "render_fps": 10,
        "autoreset_mode": AutoresetMode.NEXT_STEP,
    }

    def __init__(
        self,
        model: WorldModel,
        contexts: EpisodeStore | Contexts,
        *,
        num_envs: int,
        context: int,
        horizon: int,
        episodes: Sequence[int] | None = None,
        reward_above: float | None = None,
        terminate_below: float | None = 0.5,
        sample: bool = True,
        render_mode: str | None = None,
    ) -> None:
        for name, value in (("num_envs", num_envs), ("context", context), ("horizon", horizon)):
            if value < 1:
                raise ConfigError(f"imagined env: {name} must be at least 1, got {value}")
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ConfigError(f"imagined env: render_mode is 'rgb_array' or None, got '{render_mode}'")
        if isinstance(contexts, EpisodeStore):
            episodes = range(contexts.n_episodes) if episodes is None else episodes
            contexts = StoredContexts(contexts)
        elif isinstance(contexts, StoredContexts) and episodes is None:
            episodes = range(contexts.store.n_episodes)
        self.model = model
        self.num_envs, self.context, self.horizon = num_envs, context, horizon
        self.reward_above, self.terminate_below = reward_above, terminate_below
        self.render_mode = render_mode
        self._contexts = contexts
        self._episodes = None if episodes is None else np.asarray(episodes, dtype=np.int64)
        parameter = next(model.parameters())
        self._device, self._dtype = parameter.device, parameter.dtype
        self._generator = torch.Generator(device=self._device)
        self._sampler = self._generator if sample else None
        self._seeded = False
        self._state: WorldState | None = None

        vision = model.config.vision
        self.single_action_space = spaces.Discrete(model.config.n_actions)
        self.single_observation_space = (
            spaces.MultiDiscrete(np.full(vision.shape, vision.n_codes), dtype=np.uint8)
            if isinstance(vision, Tiles)
            else spaces.Box(0, 255, vision.shape, np.uint8)
        )
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.observation_space = batch_space(self.single_observation_space, num_envs)

    @property
    def state(self) -> WorldState:
        """Where every dream is: ``state.h`` (num_envs, D) and ``state.z`` (num_envs, Z) are what a policy reads."""
        return self._known()

    @property
    def spans(self) -> Ints:
        """(num_envs, 3) episode, first step and number of frames of the context that every dream goes on from."""
        self._known()
        return self._spans.copy()

    @torch.no_grad()
    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Bytes, dict[str, Any]]:
        """Observe contexts, and begin a dream of each; see the class."""
        super().reset(seed=seed)
        if seed is not None:
            self._generator.manual_seed(int(seed))
        elif not self._seeded:
            self._generator.manual_seed(int(self.np_random.integers(2**63)))
        self._seeded = True
        chosen = dict(options or {})
        for name in chosen:
            if name not in OPTIONS:
                raise ConfigError(f"imagined env: unknown option '{name}'{nearest(name, OPTIONS)}")
        drawing = "episodes" not in chosen
        spans = np.stack(
            [
                self._drawn(self.num_envs) if drawing else self._each("episodes", chosen["episodes"]),
                self._each("start", chosen.get("start", 0)),
                self._each("context", chosen.get("context", self.context)),
            ],
            axis=1,
        )
        begin, frames = self._observed(spans)
        self._refuse_growth(begin)
        self._drawing, self._spans, self._begin, self._frames = drawing, spans, begin, frames
        self._state, self._seen = begin, frames.copy()
        self._over = np.zeros(self.num_envs, dtype=np.bool_)
        self._steps = np.zeros(self.num_envs, dtype=np.int64)
        return self._seen.copy(), {}

    @torch.no_grad()
    def step(self, actions: Ints) -> Step:
        """One step of every dream: ``actions`` (num_envs,) are numbers of actions. See the class."""
        state, again = self._known(), self._over
        state = self.model.imagine_step(state, self._one_hot(actions), generator=self._sampler)
        seen = self.model.reconstruct(state.h[:, None], state.z[:, None])[:, 0].cpu().numpy()
        rewards = self.model.reward(state.h, state.z).double().cpu().numpy()
        goes_on = self.model.goes_on(state.h, state.z).cpu().numpy()
        if self.reward_above is not None:
            rewards = (rewards > self.reward_above).astype(np.float64)
        self._steps += 1
        terminated = np.zeros_like(again) if self.terminate_below is None else goes_on < self.terminate_below
        truncated = ~terminated & (self._steps >= self.horizon)
        if again.any():
            state = self._begun_again(state, again)
            seen = np.where(again.reshape(-1, *(1,) * (seen.ndim - 1)), self._frames, seen)
            rewards, terminated, truncated = np.where(again, 0.0, rewards), terminated & ~again, truncated & ~again
            self._steps[again] = 0
        self._state, self._seen = state, seen
        self._over = terminated | truncated
        return seen.copy(), rewards, terminated, truncated, {}

    def render(self) -> tuple[Bytes, ...] | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """What is seen, as pictures (H, W, 3); None without a render mode."""
        self._known()
        return None if self.render_mode is None else tuple(picture(torch.from_numpy(self._seen)[:, None])[:, 0])

    def _known(self) -> WorldState:
        if self._state is None:
            raise gymnasium.error.ResetNeeded("imagined env: call reset() first")
        return self._state

    def _begun_again(self, state: WorldState, again: Flags) -> WorldState:
        """``state`` with new dreams where ``again``."""
        rows = np.flatnonzero(again)
        if self._drawing:
            self._spans[rows, 0] = self._drawn(len(rows))
            fresh, self._frames[rows] = self._observed(self._spans[rows])
            index = torch.from_numpy(rows).to(self._device)
            self._begin = (
                fresh if again.all() else map_state(lambda old, new: old.index_copy(0, index, new), self._begin, fresh)
            )
        return self._begin if again.all() else where_reset(torch.from_numpy(again).to(self._device), self._begin, state)

    def _observed(self, spans: Ints) -> tuple[WorldState, Bytes]:
        """The states after contexts ``spans`` (n, 3), and their last frames. Equal contexts are observed once."""
        places: dict[tuple[int, ...], int] = {}
        index = [places.setdefault(tuple(span), len(places)) for span in spans.tolist()]
        batch = together(self._contexts, np.array(list(places))).each(lambda part: part.to(self._device))
        batch = batch._replace(action=batch.action.to(self._dtype), reward=batch.reward.to(self._dtype))
        state = self.model.observe(batch, generator=self._sampler).state
        frames = batch.observation[:, -1].cpu().numpy()[index]
        return index_batch(state, torch.tensor(index, device=self._device)), frames

    def _drawn(self, n: int) -> Ints:
        if self._episodes is None:
            raise ConfigError("imagined env: say which episodes to draw from, or reset with options={'episodes': ...}")
        return self.np_random.choice(self._episodes, size=n)

    def _each(self, name: str, value: Any) -> Ints:
        """An option (num_envs,) of an integer, or as many."""
        array = np.asarray(value)
        if array.dtype.kind not in "iu" or array.shape not in ((), (self.num_envs,)):
            raise ConfigError(
                f"imagined env: option '{name}' is an integer or {self.num_envs}, got {array.dtype} {array.shape}"
            )
        return np.broadcast_to(array, self.num_envs).astype(np.int64)

    def _one_hot(self, actions: Ints) -> Tensor:
        array, n = np.asarray(actions), self.model.config.n_actions
        if array.shape != (self.num_envs,) or array.dtype.kind not in "iu":
            raise gymnasium.error.InvalidAction(
                f"imagined env: actions are {self.num_envs} integers, got {array.dtype} {array.shape}"
            )
        if array.min() < 0 or array.max() >= n:
            got = f"{array.min()}..{array.max()}"
            raise gymnasium.error.InvalidAction(f"imagined env: actions lie in 0..{n - 1}, got {got}")
        return F.one_hot(torch.from_numpy(array.astype(np.int64)), n).to(self._device, self._dtype)

    def _refuse_growth(self, state: WorldState) -> None:
        """Rows of a memory as long as what was seen cannot begin again one by one."""
        sizes = [[leaf.shape[1:] for _, leaf in leaves(each)] for each in (state, self.model.init_state(1))]
        if self.terminate_below is not None and sizes[0] != sizes[1]:
            raise ConfigError(
                "imagined env: this model's memory grows with every frame (attention without a window): "
                "its dreams must end together; use terminate_below=None"
            )
