"""What the keys of a config.json mean, one table for each kind of key.

The tables follow the configuration classes of transformers 5.24 (`models/*/configuration_*.py`,
`modeling_rope_utils.py`, `generation/configuration_utils.py`). A key that is in none of the tables
may change what the model computes, so it is an error.
"""

from typing import Any, NamedTuple

#: Types of dense checkpoints.
DENSE = ("llama", "mistral", "qwen2", "qwen3")
#: Type of the checkpoints of `save_pretrained` that transformers cannot express.
OWN = "fsa_jax"
#: Type of flash-linear-attention's checkpoints of native sparse attention.
FLA = "nsa"

#: Marks a key that every config.json must have.
REQUIRED: Any = object()


class Field(NamedTuple):
    """A key whose value is a field of `TransformerConfig`.

    Attributes:
      key: the key.
      field: the field.
      default: value where the key is absent, or `REQUIRED`.
      by_type: defaults of single model types.
    """

    key: str
    field: str
    default: Any = REQUIRED
    by_type: dict[str, Any] = {}  # noqa: RUF012


#: None for the two head sizes: as many key heads as query heads; hidden_size // query heads.
FIELDS = (
    Field("vocab_size", "vocab_size"),
    Field("hidden_size", "embed_dim"),
    Field("intermediate_size", "mlp_dim"),
    Field("num_hidden_layers", "num_layers"),
    Field("num_attention_heads", "num_heads"),
    Field("num_key_value_heads", "num_kv_heads", None, {"mistral": 8, "qwen2": 32, "qwen3": 32}),
    Field("head_dim", "head_dim", None, {"qwen3": 128}),
    Field("rms_norm_eps", "norm_eps", 1e-6),
    Field("tie_word_embeddings", "tie_embeddings", False),
)

#: The same for flash-linear-attention's model type "nsa". Its layers do not use the key
#: `head_dim`, and `intermediate_size` has a derived default: both are read from the tensors.
FLA_FIELDS = (
    Field("vocab_size", "vocab_size"),
    Field("hidden_size", "embed_dim"),
    Field("num_hidden_layers", "num_layers"),
    Field("num_heads", "num_heads"),
    Field("num_kv_heads", "num_kv_heads", None),
    Field("norm_eps", "norm_eps", 1e-6),
    Field("tie_word_embeddings", "tie_embeddings", False),
    Field("qkv_bias", "qkv_bias", False),
    Field("rope_theta", "rope_theta", 10000.0),
)

#: Sizes of native sparse attention in flash-linear-attention's words, with its defaults.
FLA_SIZES = {"block_size": 64, "block_counts": 16, "window_size": 512}

#: Keys that change the function unless they have one of these values. None stands for null.
ONLY = {
    "hidden_act": ("silu", "swish"),
    "attention_dropout": (0, None),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({}, None),
    "partial_rotary_factor": (1, None),
    "per_layer_config": (None, {}),
    "quantization_config": (None,),
    "use_mrope": (False,),
    "rope_interleaved": (False, None),
}

#: Keys that only flash-linear-attention has, likewise.
FLA_ONLY = {
    "hidden_act": ("swish", "silu"),
    "elementwise_affine": (True,),
    "qk_norm": (False,),
    "attn": (None,),
}

#: Keys without an effect on the function, by the reason.
HARMLESS = {
    "they say who wrote the file, for what and from where": (
        "model_type", "base_model_type", "architectures", "transformers_version", "_name_or_path",
        "name_or_path", "_commit_hash", "tokenizer_class", "unsloth_version", "unsloth_fixed",
        "is_llama_config", "transformers.js_config",
    ),
    "the tensors say their dtype themselves": ("dtype", "torch_dtype", "use_bfloat16"),
    "they number tokens, for generation and padding": (
        "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id",
    ),
    "they concern the initialisation": ("initializer_range", "_fast_init"),
    "they choose how the same function is computed": (
        "use_cache", "pretraining_tp", "attn_implementation", "_attn_implementation",
        "_attn_implementation_autoset", "_attn_implementation_internal", "experts_implementation",
        "_experts_implementation", "torchscript", "tf_legacy_loss", "chunk_size_feed_forward",
        "fuse_norm", "fuse_swiglu", "fuse_cross_entropy", "fuse_linear_cross_entropy",
    ),
    "they choose which results are returned": (
        "output_attentions", "output_hidden_states", "return_dict", "is_decoder",
    ),
    "it is the training length; RoPE scaling reads it where its own length is absent": (
        "max_position_embeddings", "model_max_length",
    ),
    "they concern other heads than that of a language model": (
        "id2label", "label2id", "num_labels", "problem_type", "finetuning_task",
        "task_specific_params", "prefix",
    ),
    "they are options of the generation of text": (
        "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups",
        "diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty",
        "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids",
        "num_return_sequences", "output_scores", "return_dict_in_generate", "forced_bos_token_id",
        "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty",
        "suppress_tokens", "begin_suppress_tokens", "max_new_tokens", "min_new_tokens",
    ),
    "it regularises the loss of a training run": ("use_l2warp",),
    "the tensors say the hidden width themselves": ("hidden_ratio",),
}  # fmt: skip

HARMLESS_KEYS = frozenset(key for group in HARMLESS.values() for key in group)

#: Types of RoPE scaling whose own training length is that of the model where it is not given.
ROPE_LENGTHS = ("llama3", "yarn")
ROPE_THETA = 10000.0

#: Fields of `TransformerConfig` that no file holds: they belong to a run, not to a function.
OF_A_RUN = frozenset(
    {"dtype", "param_dtype", "remat", "dropout_rate", "implementation", "sequence_axis"}
    | {"gate_bias_init"}
)
