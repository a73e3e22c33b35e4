"""The door for transformers: `import hymba.hf`, then its Auto classes know the model.

    import hymba.hf
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained("folder or hub id")

In reading order: config (config.json), columns (padding and packing), cache, names (of tensors),
pretrained (files, initial values), generation, model. No other room imports transformers' models.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hymba.hf import names
from hymba.hf.cache import HymbaCache
from hymba.hf.columns import InputError
from hymba.hf.config import HymbaConfig
from hymba.hf.model import HymbaForCausalLM, HymbaModel

AutoConfig.register("hymba", HymbaConfig, exist_ok=True)
AutoModel.register(HymbaConfig, HymbaModel, exist_ok=True)
AutoModelForCausalLM.register(HymbaConfig, HymbaForCausalLM, exist_ok=True)
# By this list of names alone the Trainer knows that label smoothing must shift the labels.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["hymba"] = HymbaForCausalLM.__name__
names.register("hymba")

__all__ = ["HymbaCache", "HymbaConfig", "HymbaForCausalLM", "HymbaModel", "InputError"]
