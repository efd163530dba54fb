"""The border to Hugging Face: our layers as a causal language model of transformers, and public checkpoints into it.

Importing this package (extra ``lm``) registers ``RecollectConfig`` and ``RecollectForCausalLM`` with ``AutoConfig`` and
``AutoModelForCausalLM``.
"""

from __future__ import annotations

from recollect.core.errors import RecollectError

try:
    import transformers as _transformers
except ModuleNotFoundError as error:
    raise RecollectError(
        "language models in the form of transformers need it installed: pip install 'recollect[lm]'"
    ) from error

from recollect.hf.configuration import RecollectConfig
from recollect.hf.modeling import RecollectForCausalLM, RecollectModel

_transformers.AutoConfig.register(RecollectConfig.model_type, RecollectConfig, exist_ok=True)
_transformers.AutoModel.register(RecollectConfig, RecollectModel, exist_ok=True)
_transformers.AutoModelForCausalLM.register(RecollectConfig, RecollectForCausalLM, exist_ok=True)

__all__ = ["RecollectConfig", "RecollectForCausalLM", "RecollectModel"]
