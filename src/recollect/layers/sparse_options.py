"""What sparse attention can be told: the options that ``sparse`` and ``hax`` share, and which of them go together."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from recollect.core.errors import ConfigError, nearest
from recollect.core.layer import LayerConfig
from recollect.ops.patterns import Full, KeySelection, Lsh, Pattern, check_patterns, find, with_self

Planes = Literal["fixed", "redrawn", "learned", "projected"]
QueryKey = Literal["separate", "shared", "sketch", "dual"]
Normalise = Literal["l2"]
Selection = Literal["ranking", "kl", "gate", "gate+ranking", "gate+kl"]
Target = Literal["mean", "sum"]


@dataclass(frozen=True)
class SparseOptions(LayerConfig):
    """Which keys are read, how queries and keys are made, and what teaches the choice.

    ``patterns``
        The union of key sets, each with its own budget (``ops.patterns``).
    ``d_key``, ``n_heads``
        Width N of a head's queries and keys, and how many heads; each head has its own planes and key scores. Narrow
        keys help the hash: in many dimensions a query and its key rarely point the same way early in training.
    ``init_std``
        Standard deviation of the query-key projection at first; None keeps PyTorch's.
    ``include_self``
        Every query may also read its own key: one key more in budget and state, unless ``Window`` or ``Full`` already
        give it. For unions that can be empty at a position, such as hashing alone.

    ``qk``
        "separate" projections, as in HAX; "shared", one for both (Reformer, arXiv 2001.04451): half the parameters, and
        a position that resembles another meets it in a bucket from the first step, though each resembles itself most.
        "sketch", shared and never trained, nor are the taps of ``span``: a random sketch, by which inputs that are near
        each other stay so. In a world model training wore this down, and dreams kept to the path for less long.
        "dual", within HAX alone: made from the mixer's own queries and keys, C and B of a selective state-space model,
        by a linear map that starts as the identity, with the mixer's own values, dt u, what it writes: attention beside
        a trained mixer begins where its C_i . B_j point, without the decay, and reads what the mixer thought worth
        keeping. Needs ``n_heads * d_key`` equal to their width; with ``normalise="l2"``, as lengths there are weights
        and not nearness.
    ``span``, ``follow``
        Queries and keys, and what they are hashed by, are made from the last ``span`` inputs through a convolution of
        each channel (``layers.moments``) instead of from the input alone; values are not. With ``follow`` a position's
        value stands under the key of the position before: a query that resembles an earlier moment reads what came
        after it, in one layer, where an induction head (arXiv 2209.11895) takes two. With ``qk="shared"`` it does so
        before any training, and the longer the span the more surely. Carries ``span - 1`` inputs on, and one.
    ``normalise``
        None; "l2" makes queries and keys unit vectors (query-key normalisation, arXiv 2010.04245), so that logits are
        bounded and nearness in attention is nearness in angle, which is what the hash sees. Costs O(L N).
    ``scale``, ``learn_scale``
        The factor on q . k: None is N^-1/2, or 10 between unit vectors. Learned, it starts there, one per head.

    ``planes``
        Hash planes (``Lsh`` only): "fixed", drawn once. "redrawn" at every training forward, as published, so that no
        model relies on one draw; evaluation and its states use the first. Costs a draw; a state carried from one
        training forward to the next was bucketed with the planes of its time, so its keys are then found by chance
        only; recomputing a forward in backward (activation checkpointing) would draw again and must not be combined.
        "learned": parameters, trained by ``ops.hashing.hash_loss`` (``aux["hash"]``, O(n L (N + bits)) in training).
        "projected": trained likewise, but queries and keys are hashed by two linear maps of the layer's own input, with
        an offset, instead of by planes through the origin of what attention compares: directions that all keys share
        no longer decide the bucket. Nothing but that loss reaches the maps, and it reaches nothing else.
    ``selection``
        What trains the scores of ``KeySelection``. "ranking": the published pairwise loss, with reference
        ``selection_target`` "mean" or, as published, "sum". "kl": towards each key's share of softmax attention, as
        DeepSeek-V3.2's indexer. Both are ``aux["selection"]``, O(n L N) in training only, and reach the scorer alone.
        "gate": the model's own loss, through log sigmoid(score) added to the logits of a key wherever it is read: one
        more key dimension and no loss of its own; nothing is detached, and a key that nobody reads gets no gradient,
        hence "gate+ranking" and "gate+kl" (which score every key twice in training). Ranking and kl are two answers to
        one question and exclude each other. The selection itself is always the hard top n_keys.
    ``samples``
        Positions n per sequence that these losses look at; None is max(32, 2 n_keys) of the pattern they train.
    ``explore``
        Queries per sequence, drawn anew at every training forward, that read every key of the call and not their own
        set alone; evaluation has none. Keys that are seldom read otherwise keep logits that mean nothing, and what the
        hash is taught drifts from what attention would want (``docs/log.md``). They are then the hash's teachers too.
        Costs O(n L (N + P)) in training.

    An option of a pattern that is absent must stay at its default.
    """

    d_key: int = 32
    n_heads: int = 1
    patterns: tuple[Pattern, ...] = (Lsh(32, n_bits=8), KeySelection(32))
    selection_target: Target = "mean"
    init_std: float | None = None
    include_self: bool = False
    qk: QueryKey = "separate"
    span: int = 1
    follow: bool = False
    normalise: Normalise | None = None
    scale: float | None = None
    learn_scale: bool = False
    planes: Planes = "fixed"
    selection: Selection = "ranking"
    samples: int | None = None
    explore: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_patterns(self.patterns)
        for name in ("d_key", "n_heads", "span"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{self.kind}: {name} must be at least 1, got {getattr(self, name)}")
        if self.samples is not None and self.samples < 1:
            raise ConfigError(f"{self.kind}: samples must be at least 1 or null, got {self.samples}")
        if self.explore < 0:
            raise ConfigError(f"{self.kind}: explore must not be negative, got {self.explore}")
        for name in ("init_std", "scale"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{self.kind}: {name} must be positive or null, got {value}")
        choices = {
            "selection_target": get_args(Target),
            "qk": get_args(QueryKey),
            "normalise": (*get_args(Normalise), None),
            "planes": get_args(Planes),
            "selection": get_args(Selection),
        }
        for name, known in choices.items():
            value = getattr(self, name)
            if value not in known:
                raise ConfigError(f"{self.kind}: {name} {value!r} is unknown{nearest(str(value), map(str, known))}")
        self._check_combination()

    def _check_combination(self) -> None:
        if self.qk == "dual" and (self.span > 1 or self.follow):
            raise ConfigError(
                f"{self.kind}: qk=dual takes queries and keys as the mixer made them; leave out span and follow"
            )
        if self.planes != "fixed" and find(self.patterns, Lsh) is None:
            raise ConfigError(
                f"{self.kind}: planes={self.planes} needs Lsh among the patterns; add it or leave planes out"
            )
        if self.explore and find(self.patterns, Full):
            raise ConfigError(f"{self.kind}: explore={self.explore} changes nothing where Full is among the patterns")
        if find(self.patterns, KeySelection) is None:
            for name, default in (("selection", "ranking"), ("selection_target", "mean")):
                if getattr(self, name) != default:
                    raise ConfigError(
                        f"{self.kind}: {name}={getattr(self, name)} needs KeySelection among the patterns; "
                        f"add it or leave {name} out"
                    )
        if self.selection_target != "mean" and self.selection_loss != "ranking":
            raise ConfigError(
                f"{self.kind}: selection_target={self.selection_target} is for selection=ranking or gate+ranking, "
                f"not {self.selection}"
            )

    def options(self) -> dict[str, Any]:
        """The options alone, by name: what another config of this kind takes over."""
        return {f.name: getattr(self, f.name) for f in fields(SparseOptions) if f.name != "d_model"}

    @property
    def union(self) -> tuple[Pattern, ...]:
        """The patterns, with the query's own key where ``include_self`` adds it."""
        return with_self(self.patterns) if self.include_self else self.patterns

    @property
    def one_map(self) -> bool:
        """Whether queries and keys are made by the same map."""
        return self.qk in ("shared", "sketch")

    @property
    def gated(self) -> bool:
        """Whether scores enter the attention logits."""
        return self.selection.startswith("gate")

    @property
    def selection_loss(self) -> Literal["ranking", "kl"] | None:
        """The loss that trains the scores beside the model's own, if any."""
        if self.selection.endswith("ranking"):
            return "ranking"
        return "kl" if self.selection.endswith("kl") else None

    @property
    def start_scale(self) -> float:
        """The factor on q . k, before any learning."""
        if self.scale is not None:
            return self.scale
        return self.d_key**-0.5 if self.normalise is None else 10.0

    @property
    def key_width(self) -> int:
        """Width of a remembered key: N, and the gate's logit beside it."""
        return self.d_key + self.gated
