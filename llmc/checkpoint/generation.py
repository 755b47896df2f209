"""Settings of generation_config.json that no runtime of an artifact takes."""

from typing import Any

#: Settings that become part of an artifact, and those that say nothing about the text.
_TAKEN = {
    "cache_implementation",
    "bos_token_id",
    "do_sample",
    "eos_token_id",
    "max_length",
    "max_new_tokens",
    "output_attentions",
    "output_hidden_states",
    "output_logits",
    "output_scores",
    "pad_token_id",
    "repetition_penalty",
    "return_dict_in_generate",
    "temperature",
    "top_k",
    "top_p",
    "transformers_version",
    "use_cache",
}


def describe_unserved(generation_config: Any) -> str | None:
    """One sentence on the settings that are left out of an artifact; None where there are none.

    Args:
        generation_config: transformers `GenerationConfig`.
    """
    stated = generation_config.to_diff_dict()
    names = sorted(
        name for name, value in stated.items() if name not in _TAKEN and name[0] != "_" and value is not None
    )
    if not names:
        return None
    settings = ", ".join(f"{name} = {stated[name]}"[:60] for name in names)
    return f"settings of generation_config.json that an artifact does not take: {settings}"
