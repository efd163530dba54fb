"""HAX on language: a pretrained Mamba-2 goes on training with each of the paper's attention patterns beside its layers.

One model is trained on short context without attention, once, on text made on the spot: prose whose facts come back and
solved tasks of the long-context suite. Then every row goes on from it for equally many steps on rows of 2,048 tokens:
as it is (``none``), for longer (``none-longer``: the time that attention costs, spent on more steps), and with 128
keys per query beside every layer in the patterns of arXiv 2507.00449, HAX also with queries, keys and values as
published, plus this library's own setting. All are asked at the length trained on and beyond.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from recollect.layers.mamba2 import Mamba2
from recollect.models.beside import PATTERNS, Beside
from recollect.text.made import MadeCorpus
from recollect.train.language import LanguageConfig, SuiteQuestions
from recollect.train.run import FaceOff, RunConfig, TrainConfig

ROWS: dict[str, Beside | None] = {
    "none": None,
    **{pattern: Beside(128, pattern, gate=1.0, dual=True) for pattern in PATTERNS},
    "HAX-follow": Beside(128, "HAX", gate=0.3, follow=8),
    "LSH-follow": Beside(128, "LSH", gate=0.3, follow=8),
    "HAX-published": Beside(128, "HAX", gate=1.0),
    "recommended": Beside(32, "recommended", gate=1.0, dual=True),
}
"""With open gates, as published: from closed ones they move by 0.02 in 250 steps, and every row stays the first.
Attention is made from the base's own C, B and dt u but in ``HAX-published``, which makes it as the paper does, and in
``-follow``, which reads what followed moments like the present one.
"""

ASKED = ("needle-noise", "needle-prose", "multi-key", "joint-recall", "joint-recall-dense")
"""Tasks of the suite ``words`` that all are asked."""
DRILLS = ("joint-recall-dense",)
"""Documents that answer many questions. On text that asks once a document the base learned to recall nothing; from
short ones, tables of two to four codes, it learns to within 500 steps.
"""
TASKS = (*ASKED, "joint-recall-spread", *DRILLS * 4)
"""What the rows go on with: half of it drills, as the others answer a few questions in a thousand tokens."""


@dataclass(frozen=True)
class Scale:
    """Model, text and training of one size."""

    d_model: int
    n_layers: int
    short: MadeCorpus
    """What the base is trained on."""
    corpus: MadeCorpus
    """What all go on with."""
    long: MadeCorpus
    """Documents to measure losses by position on."""
    base_length: int
    base_batch: int
    base_steps: int
    base_lr: float
    steps: int
    lr: float
    batch_size: int
    questions: SuiteQuestions
    lengths: tuple[int, ...]
    longer: float = 1.5
    """Steps of ``none-longer`` over those of the others: what a step with attention takes over one without."""
    row_length: int = 2048

    def faceoff(self, name: str, title: str, seeds: tuple[int, ...]) -> FaceOff:
        """Every row on the same base."""
        layers = (Mamba2.Config(self.d_model, d_state=64),) * self.n_layers
        pretrained = RunConfig(
            name,
            "base",
            "base",
            0,
            LanguageConfig(
                self.short,
                layers=layers,
                row_length=self.base_length,
                batch_size=self.base_batch,
                embedding_std=0.3,
                valid_rows=32,
            ),
            self._fitted(self.base_steps, self.base_lr),
        )
        problem = LanguageConfig(
            self.corpus,
            pretrained,
            row_length=self.row_length,
            batch_size=self.batch_size,
            valid_rows=16,
            lengths=self.lengths,
            long_data=self.long,
            questions=self.questions,
        )
        fitted = self._fitted(self.steps, self.lr)
        runs = [
            RunConfig(name, "language", row, 0, replace(problem, beside=beside), fitted) for row, beside in ROWS.items()
        ]
        longer = self._fitted(round(self.steps * self.longer), self.lr)
        runs.insert(1, replace(runs[0], row="none-longer", train=longer))
        return FaceOff(name, title, tuple(runs), seeds)

    def _fitted(self, steps: int, lr: float) -> TrainConfig:
        every = max(1, steps // 8)
        return TrainConfig(
            steps,
            lr,
            warmup_steps=max(1, steps // 20),
            min_lr_ratio=1 / 30,
            weight_decay=0.1,
            betas=(0.9, 0.95),
            log_every=max(1, min(20, every)),
            eval_every=every,
            checkpoint_every=every,
        )


def _drills(n_documents: int, lengths: tuple[int, int], prose: float) -> MadeCorpus:
    """What a base reads."""
    return MadeCorpus(n_documents, lengths, prose=prose, suite="words", tasks=DRILLS, n_restated=24, vocab_size=4096)


def _documents(n_documents: int, short: MadeCorpus) -> MadeCorpus:
    """What all rows go on with, in the pieces of words of ``short``."""
    return MadeCorpus(
        n_documents,
        (450, 8000),
        prose=0.1,
        suite="words",
        tasks=TASKS,
        n_restated=200,
        tokenizer_of=short,
        seed=1,
    )


def language_micro() -> FaceOff:
    """Two million parameters, two seeds: some hours on two cores."""
    short = _drills(40_000, (180, 480), prose=0.1)
    scale = Scale(
        d_model=256,
        n_layers=3,
        short=short,
        corpus=_documents(8000, short),
        long=MadeCorpus(80, (38_000, 40_000), prose=1.0, tokenizer_of=short, valid_share=0.5, seed=2),
        base_length=256,
        base_batch=16,
        base_steps=1400,
        base_lr=4e-3,
        steps=300,
        lr=2e-3,
        batch_size=2,
        questions=SuiteQuestions("words", ASKED, lengths=(2048, 4096, 8192), depths=(0.0, 0.5, 1.0), n=6),
        longer=1.2,
        lengths=(2048, 4096, 8192),
    )
    return scale.faceoff("language-micro", "HAX beside a pretrained Mamba-2", (0, 1))


def language_mini() -> FaceOff:
    """Twenty million parameters: a GPU's slices of some minutes a row, or days on two cores."""
    short = _drills(200_000, (180, 960), prose=0.2)
    scale = Scale(
        d_model=512,
        n_layers=10,
        short=short,
        corpus=_documents(30_000, short),
        long=MadeCorpus(160, (78_000, 82_000), prose=1.0, tokenizer_of=short, valid_share=0.5, seed=2),
        base_length=1024,
        base_batch=32,
        base_steps=4000,
        base_lr=2e-3,
        steps=1500,
        lr=6e-4,
        batch_size=16,
        questions=SuiteQuestions("words", ASKED, lengths=(2048, 4096, 8192, 16_384), depths=(0.0, 0.5, 1.0), n=20),
        lengths=(2048, 4096, 8192, 16_384),
    )
    return scale.faceoff("language-mini", "HAX beside a larger pretrained Mamba-2", (0, 1))


def language_smoke() -> FaceOff:
    """The same in a minute: that it runs, not what it finds."""
    tasks = ("needle-noise",)
    short = MadeCorpus(60, (300, 900), tasks=tasks, vocab_size=300, valid_share=0.2)
    scale = Scale(
        d_model=64,
        n_layers=1,
        short=short,
        corpus=MadeCorpus(60, (600, 3000), tasks=tasks, tokenizer_of=short, valid_share=0.2, seed=1),
        long=MadeCorpus(6, (1500, 2000), prose=1.0, tokenizer_of=short, valid_share=0.5, seed=2),
        base_length=128,
        base_batch=2,
        base_steps=4,
        base_lr=3e-3,
        steps=2,
        lr=1e-3,
        batch_size=2,
        questions=SuiteQuestions(tasks=tasks, lengths=(256,), depths=(0.5,), n=1),
        lengths=(256,),
        row_length=256,
    )
    return scale.faceoff("language-smoke", "Language, the code path", (0,))
