"""transformers' own common tests of models and configs, on ours: ``make upstream``."""

from __future__ import annotations

import unittest
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
import transformers_tests
from torch.overrides import TorchFunctionMode

from recollect.core.config import to_dict
from recollect.core.layer import LayerConfig
from recollect.hf import RecollectConfig, RecollectForCausalLM, RecollectModel
from recollect.layers.hax import HAX
from recollect.layers.mamba import Mamba
from recollect.layers.mamba2 import Mamba2
from recollect.ops.patterns import KeySelection, Lsh

# What transformers warns of in tests of its own is not ours to mend.
pytestmark = [pytest.mark.upstream, pytest.mark.filterwarnings("default")]

PROBLEM = transformers_tests.problem()

WIDTH = 32
MAMBA = Mamba.Config(WIDTH, d_state=8)
MAMBA2 = Mamba2.Config(WIDTH, d_state=16, d_head=8, chunk_size=8)
HAXED = HAX.Config(WIDTH, mixer=MAMBA2, patterns=(Lsh(4, n_bits=2), KeySelection(3)), d_key=8)

NOT_APPLICABLE = {
    "test_generation_tester_mixin_inheritance": "asks for tests of generation, which source distributions leave out",
    "test_get_text_features": "for models with get_text_features; passes without a check on others",
    "test_get_image_features": "for models with get_image_features; passes without a check on others",
    "test_get_audio_features": "for models with get_audio_features; passes without a check on others",
    "test_get_video_features": "for models with get_video_features; passes without a check on others",
    "test_problem_types": "for classification heads; passes without a check on others",
    "test_load_with_mismatched_shapes": "for classification heads; passes without a check on others",
    "test_can_load_ignoring_mismatched_shapes": "for classification heads; passes without a check on others",
    "test_save_load_keys_to_ignore_on_save": "no weights are left out of a saved file: nothing to check",
    "test_format_of_can_record_outputs": "no outputs are recorded by hooks: nothing to check",
}
"""How the names of the tests begin that are left out here, and why. Others about what a model does not have (attention
maps, flash attention, rotary positions, experts, plans for several devices) skip themselves."""

DRAWN = ("test_can_init_all_missing_weights", "test_init_weights_can_init_buffers")
"""The tests that hold first values against those of a model that draws them in another order."""


class SameDraws(TorchFunctionMode):
    """What is drawn depends on shape and distribution alone, not on what was drawn before."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        torch.default_generator.manual_seed(0)
        return func(*args, **(kwargs or {}))


class ModelTester:
    """Small models on ``layers`` and inputs for them, as the common tests ask for."""

    batch_size = 7
    seq_length = 7
    vocab_size = 99
    hidden_size = WIDTH
    is_training = True
    base_model_class = RecollectModel
    causal_lm_class = RecollectForCausalLM

    def __init__(self, layers: tuple[LayerConfig, ...]) -> None:
        self.layers, self.num_hidden_layers = layers, len(layers)

    def get_config(self) -> RecollectConfig:
        return RecollectConfig.of(self.layers, self.vocab_size)

    def prepare_config_and_inputs_for_common(self) -> tuple[RecollectConfig, dict[str, Any]]:
        ids = torch.randint(self.vocab_size, (self.batch_size, self.seq_length))
        # Before row i there are i positions of padding.
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids).triu()}


if PROBLEM:

    def test_the_source_distribution_is_there() -> None:
        pytest.fail(PROBLEM, pytrace=False)

else:
    modeling = transformers_tests.load("test_modeling_common")
    training = transformers_tests.load("test_training_mixin")
    configuration = transformers_tests.load("test_configuration_common")

    class Common(modeling.ModelTesterMixin, training.TrainingTesterMixin):
        layers: tuple[LayerConfig, ...]
        model_tester: Any = None
        all_model_classes = (RecollectModel, RecollectForCausalLM)
        has_attentions = False
        test_can_init_all_missing_weights_before_2023 = True  # which stands for sources without a year on top

        def setUp(self) -> None:
            for name, reason in NOT_APPLICABLE.items():
                if self._testMethodName.startswith(name):
                    self.skipTest(reason)
            if self._testMethodName in DRAWN:
                self.enterContext(SameDraws())
            self.model_tester = ModelTester(self.layers)

        def test_config(self) -> None:
            layers = [to_dict(layer) for layer in self.layers]
            properties = ["hidden_size", "num_hidden_layers"]
            configuration.ConfigTester(
                self, RecollectConfig, common_properties=properties, layers=layers
            ).run_common_tests()

    class TestMamba(Common, unittest.TestCase):
        layers = (MAMBA, MAMBA)

    class TestMamba2(Common, unittest.TestCase):
        layers = (MAMBA2, MAMBA2)

    class TestHax(Common, unittest.TestCase):
        layers = (MAMBA2, HAXED)

    @pytest.fixture(autouse=True, scope="module")
    def _among_theirs() -> Iterator[None]:
        """The common tests tell base models from heads by tables of the models that transformers has."""
        with (
            patch.dict(modeling.MODEL_MAPPING_NAMES, {"recollect": "RecollectModel"}),
            patch.dict(modeling.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, {"recollect": "RecollectForCausalLM"}),
        ):
            yield

    def test_what_the_tables_name_is_there() -> None:
        for name in (*NOT_APPLICABLE, *DRAWN):
            assert any(test.startswith(name) for test in dir(Common)), name
