"""GLM with experts: DeepSeek V3's way of choosing among them, Llama's attention with half of each head rotated."""

from argosy.workers.loading.names import NameTable
from argosy.workers.models.deepseek import SHARED_EXPERT_NAMES
from argosy.workers.models.general import GeneralDecoder
from argosy.workers.models.qwen_moe import EXPERT_NAMES


class Glm4MoeForCausalLM(GeneralDecoder):
    """GLM-4.5 and 4.6."""

    @property
    def NAMES(self) -> NameTable:  # type: ignore[override]  # says more than the class's table
        """Without the layer after the last, which predicts one token more and is not run."""
        return EXPERT_NAMES.extended({**SHARED_EXPERT_NAMES, f"model.layers.{self.spec.num_layers}.*": None})
