"""Hugging Face model families: name maps, and `config.json` to TransformerSpec and back.

Names and layouts are those that `transformers` 5 writes. A family is one entry
of FAMILIES; which of them a spec belongs to is found by translating it to a
config and back.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from nr.interchange.names import (
  CONV_FROM_HEADS,
  CONV_QKV,
  CONV_QKV_BIAS,
  FROM_HEADS,
  HEADS,
  HEADS_BIAS,
  TRANSPOSE,
  Row,
  Table,
)
from nr.models.transformer_spec import RotaryScaling, TransformerSpec

_ATTENTION = "blocks/attention/"
_QKV = tuple(_ATTENTION + name for name in ("query", "key", "value"))

GPT2 = (
  Row("transformer.wte.weight", "token_embedding"),
  Row("transformer.wpe.weight", "position_embedding"),
  Row("transformer.h.{layer}.ln_1.weight", "blocks/attention_norm/scale"),
  Row("transformer.h.{layer}.ln_1.bias", "blocks/attention_norm/bias"),
  Row("transformer.h.{layer}.attn.c_attn.weight", tuple(f"{p}/kernel" for p in _QKV), CONV_QKV),
  Row("transformer.h.{layer}.attn.c_attn.bias", tuple(f"{p}/bias" for p in _QKV), CONV_QKV_BIAS),
  Row("transformer.h.{layer}.attn.c_proj.weight", _ATTENTION + "output/kernel", CONV_FROM_HEADS),
  Row("transformer.h.{layer}.attn.c_proj.bias", _ATTENTION + "output/bias"),
  Row("transformer.h.{layer}.ln_2.weight", "blocks/mlp_norm/scale"),
  Row("transformer.h.{layer}.ln_2.bias", "blocks/mlp_norm/bias"),
  Row("transformer.h.{layer}.mlp.c_fc.weight", "blocks/mlp/up/kernel"),
  Row("transformer.h.{layer}.mlp.c_fc.bias", "blocks/mlp/up/bias"),
  Row("transformer.h.{layer}.mlp.c_proj.weight", "blocks/mlp/down/kernel"),
  Row("transformer.h.{layer}.mlp.c_proj.bias", "blocks/mlp/down/bias"),
  Row("transformer.ln_f.weight", "final_norm/scale"),
  Row("transformer.ln_f.bias", "final_norm/bias"),
)
LLAMA = (
  Row("model.embed_tokens.weight", "token_embedding"),
  Row("model.layers.{layer}.input_layernorm.weight", "blocks/attention_norm/scale"),
  Row("model.layers.{layer}.self_attn.q_proj.weight", _ATTENTION + "query/kernel", HEADS),
  Row("model.layers.{layer}.self_attn.k_proj.weight", _ATTENTION + "key/kernel", HEADS),
  Row("model.layers.{layer}.self_attn.v_proj.weight", _ATTENTION + "value/kernel", HEADS),
  Row("model.layers.{layer}.self_attn.o_proj.weight", _ATTENTION + "output/kernel", FROM_HEADS),
  Row("model.layers.{layer}.post_attention_layernorm.weight", "blocks/mlp_norm/scale"),
  Row("model.layers.{layer}.mlp.gate_proj.weight", "blocks/mlp/gate/kernel", TRANSPOSE),
  Row("model.layers.{layer}.mlp.up_proj.weight", "blocks/mlp/up/kernel", TRANSPOSE),
  Row("model.layers.{layer}.mlp.down_proj.weight", "blocks/mlp/down/kernel", TRANSPOSE),
  Row("model.norm.weight", "final_norm/scale"),
)
QKV_BIAS = (
  Row("model.layers.{layer}.self_attn.q_proj.bias", _ATTENTION + "query/bias", HEADS_BIAS),
  Row("model.layers.{layer}.self_attn.k_proj.bias", _ATTENTION + "key/bias", HEADS_BIAS),
  Row("model.layers.{layer}.self_attn.v_proj.bias", _ATTENTION + "value/bias", HEADS_BIAS),
)
OTHER_BIAS = (
  Row("model.layers.{layer}.self_attn.o_proj.bias", _ATTENTION + "output/bias"),
  Row("model.layers.{layer}.mlp.gate_proj.bias", "blocks/mlp/gate/bias"),
  Row("model.layers.{layer}.mlp.up_proj.bias", "blocks/mlp/up/bias"),
  Row("model.layers.{layer}.mlp.down_proj.bias", "blocks/mlp/down/bias"),
)
QK_NORM = (
  Row("model.layers.{layer}.self_attn.q_norm.weight", _ATTENTION + "query_norm/scale"),
  Row("model.layers.{layer}.self_attn.k_norm.weight", _ATTENTION + "key_norm/scale"),
)
HEAD = Row("lm_head.weight", "unembedding")


class Family(NamedTuple):
  """A Hugging Face model family.

  Attributes:
    model_type, architecture: as in `config.json`.
    prefix: what precedes every name except the head's; base models lack it.
    ignored: regular expression of buffers that are no parameters.
    table: spec -> name map.
    to_spec: config -> settings of TransformerSpec; raises ValueError on what
      the Transformer cannot do.
    to_config: spec -> config, without model_type and architectures.
  """

  model_type: str
  architecture: str
  prefix: str
  ignored: str
  table: Callable[[TransformerSpec], Table]
  to_spec: Callable[[Mapping[str, Any]], TransformerSpec]
  to_config: Callable[[TransformerSpec], dict]


# Settings that no checkpoint determines: how to compute and train, not what the function is.
_FREE = ("dropout", "init_std", "dtype", "param_dtype", "layers", "remat", "attention")


def family_of_config(config: Mapping[str, Any]) -> Family:
  """Returns the family that a `config.json` names.

  Raises:
    ValueError: the model_type is not supported.
  """
  model_type = config.get("model_type")
  if model_type not in FAMILIES:
    supported = ", ".join(FAMILIES)
    raise ValueError(f"config.json: model_type {model_type!r} is not supported; supported: {supported}")
  return FAMILIES[model_type]


def family_of_spec(spec: TransformerSpec) -> Family:
  """Returns the first family whose config can express the spec.

  Raises:
    ValueError: none can; the message names, for each, the settings that differ.
  """
  reasons = []
  for family in FAMILIES.values():
    try:
      back = family.to_spec(family.to_config(spec))
    except ValueError as error:
      reasons.append(f"{family.model_type}: {error}")
      continue
    # The base is not read, and not written, where positions are learned.
    free = _FREE if spec.positions == "rotary" else (*_FREE, "rotary_base")
    differing = [
      field.name
      for field in dataclasses.fields(spec)
      if field.name not in free and getattr(spec, field.name) != getattr(back, field.name)
    ]
    if not differing:
      return family
    reasons.append(f"{family.model_type}: cannot express {', '.join(differing)}")
  raise ValueError("no Hugging Face family computes what this spec does; " + "; ".join(reasons))


def _expect(config: Mapping[str, Any], field: str, allowed: tuple, default: Any) -> Any:
  """Returns config[field]; ValueError naming field and value when it is not among `allowed`."""
  value = config.get(field, default)
  if value not in allowed:
    supported = ", ".join(map(repr, allowed))
    raise ValueError(f"config.json: {field} {value!r} is not supported; supported: {supported}")
  return value


_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")


def _gpt2_to_spec(config: Mapping[str, Any]) -> TransformerSpec:
  _expect(config, "scale_attn_weights", (True,), True)
  _expect(config, "scale_attn_by_inverse_layer_idx", (False,), False)
  _expect(config, "add_cross_attention", (False,), False)
  activation = _expect(config, "activation_function", (*_TANH_GELU, "gelu"), "gelu_new")
  return TransformerSpec.gpt2(
    vocab_size=config["vocab_size"],
    num_layers=config["n_layer"],
    model_dim=config["n_embd"],
    num_heads=config["n_head"],
    mlp_dim=config.get("n_inner") or 4 * config["n_embd"],
    max_length=config["n_positions"],
    norm_epsilon=config.get("layer_norm_epsilon", 1e-5),
    mlp="gelu_exact" if activation == "gelu" else "gelu",
    tied_head=config.get("tie_word_embeddings", True),
  )


def _gpt2_to_config(spec: TransformerSpec) -> dict:
  return {
    "vocab_size": spec.vocab_size,
    "n_layer": spec.num_layers,
    "n_embd": spec.model_dim,
    "n_head": spec.num_heads,
    "n_inner": spec.mlp_dim,
    "n_positions": spec.max_length,
    "layer_norm_epsilon": spec.norm_epsilon,
    "activation_function": "gelu" if spec.mlp == "gelu_exact" else "gelu_new",
    "tie_word_embeddings": spec.tied_head,
    "initializer_range": spec.init_std,
    **{field: spec.dropout for field in ("embd_pdrop", "attn_pdrop", "resid_pdrop")},
  }


# Their name -> ours, for rope_type "llama3".
_SCALING = {
  "factor": "factor",
  "low_freq_factor": "low_frequency_factor",
  "high_freq_factor": "high_frequency_factor",
  "original_max_position_embeddings": "original_max_length",
}


def _rotary_to_spec(config: Mapping[str, Any]) -> dict:
  """Reads `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
  rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
  kind = rope.get("rope_type", rope.get("type", "default"))
  if kind not in ("default", "llama3"):
    raise ValueError(f"config.json: rope_type {kind!r} is not supported; supported: 'default', 'llama3'")
  if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
    raise ValueError("config.json: partial_rotary_factor below 1 is not supported")
  scaling = None
  if kind == "llama3":
    scaling = RotaryScaling(**{ours: rope[theirs] for theirs, ours in _SCALING.items()})
  base = rope.get("rope_theta", config.get("rope_theta", 10000.0))
  return {"positions": "rotary", "rotary_base": float(base), "rotary_scaling": scaling}


def _rotary_to_config(spec: TransformerSpec) -> dict:
  """Both spellings: transformers 5 reads the first, older versions and other programs the others."""
  scaling = {"rope_type": "default"}
  if spec.rotary_scaling is not None:
    scaling = {theirs: getattr(spec.rotary_scaling, ours) for theirs, ours in _SCALING.items()}
    scaling["rope_type"] = "llama3"
  config = {"rope_parameters": {**scaling, "rope_theta": spec.rotary_base}, "rope_theta": spec.rotary_base}
  return config if spec.rotary_scaling is None else {**config, "rope_scaling": scaling}


def _llama_like_to_spec(config: Mapping[str, Any], **settings) -> TransformerSpec:
  """The settings that the Llama, Qwen and Gemma configs have in common."""
  if config.get("use_sliding_window", config["model_type"] == "mistral") and config.get("sliding_window"):
    window = config["sliding_window"]
    raise ValueError(f"config.json: sliding_window {window} is not supported; only full attention is")
  defaults = {
    "vocab_size": config["vocab_size"],
    "num_layers": config["num_hidden_layers"],
    "model_dim": config["hidden_size"],
    "num_heads": config["num_attention_heads"],
    "num_kv_heads": config.get("num_key_value_heads") or config["num_attention_heads"],
    "head_dim": config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
    "mlp_dim": config["intermediate_size"],
    "max_length": config["max_position_embeddings"],
    "norm_epsilon": config.get("rms_norm_eps", 1e-6),
    **_rotary_to_spec(config),
    "norm": "rms_norm",
    "mlp": "swiglu",
    "use_bias": False,
    "use_qkv_bias": False,
    "tied_head": config.get("tie_word_embeddings", False),
  }
  return TransformerSpec(**{**defaults, **settings})


def _llama_to_spec(config: Mapping[str, Any]) -> TransformerSpec:
  _expect(config, "hidden_act", ("silu",), "silu")
  bias = bool(config.get("attention_bias", False))
  # transformers' Llama has one switch for all of attention and one for the MLP; ours is one for both.
  _expect(config, "mlp_bias", (bias,), False)
  return _llama_like_to_spec(config, use_bias=bias, use_qkv_bias=bias)


def _qwen2_to_spec(config: Mapping[str, Any]) -> TransformerSpec:
  _expect(config, "hidden_act", ("silu",), "silu")
  return _llama_like_to_spec(config, use_qkv_bias=True)


def _qwen3_to_spec(config: Mapping[str, Any]) -> TransformerSpec:
  _expect(config, "hidden_act", ("silu",), "silu")
  _expect(config, "attention_bias", (False,), False)
  return _llama_like_to_spec(config, use_qk_norm=True, head_dim=config.get("head_dim", 128))


def _gemma_to_spec(config: Mapping[str, Any]) -> TransformerSpec:
  # Files of before 2024-04 say "gelu" in hidden_act and mean the tanh form (transformers does, too).
  _expect(config, "hidden_activation", (None, "gelu_pytorch_tanh"), None)
  _expect(config, "hidden_act", ("gelu", "gelu_pytorch_tanh"), "gelu_pytorch_tanh")
  _expect(config, "attention_bias", (False,), False)
  return _llama_like_to_spec(
    config,
    mlp="geglu",
    scale_embedding=True,
    norm_offset=True,
    head_dim=config.get("head_dim", 256),
    tied_head=config.get("tie_word_embeddings", True),
  )


def _llama_like_to_config(spec: TransformerSpec, model_type: str) -> dict:
  config = {
    "model_type": model_type,
    "vocab_size": spec.vocab_size,
    "num_hidden_layers": spec.num_layers,
    "hidden_size": spec.model_dim,
    "num_attention_heads": spec.num_heads,
    "num_key_value_heads": spec.num_kv_heads,
    "head_dim": spec.head_dim,
    "intermediate_size": spec.mlp_dim,
    "max_position_embeddings": spec.max_length,
    "rms_norm_eps": spec.norm_epsilon,
    **_rotary_to_config(spec),
    "hidden_act": "gelu_pytorch_tanh" if model_type == "gemma" else "silu",
    "tie_word_embeddings": spec.tied_head,
    "initializer_range": spec.init_std,
    "attention_dropout": spec.dropout,
  }
  if model_type == "llama":
    config |= {"attention_bias": spec.use_bias, "mlp_bias": spec.use_bias}
  return config


def _llama_like_table(spec: TransformerSpec) -> Table:
  return (
    *LLAMA,
    *(QKV_BIAS if spec.use_bias or spec.use_qkv_bias else ()),
    *(OTHER_BIAS if spec.use_bias else ()),
    *(QK_NORM if spec.use_qk_norm else ()),
    *(() if spec.tied_head else (HEAD,)),
  )


def _gpt2_table(spec: TransformerSpec) -> Table:
  return GPT2 if spec.tied_head else (*GPT2, HEAD)


def _llama_like(model_type: str, architecture: str, to_spec: Callable) -> Family:
  return Family(
    model_type,
    architecture,
    prefix="model.",
    ignored=r".*\.rotary_emb\.inv_freq",
    table=_llama_like_table,
    to_spec=to_spec,
    to_config=lambda spec: _llama_like_to_config(spec, model_type),
  )


FAMILIES = {
  "gpt2": Family(
    "gpt2",
    "GPT2LMHeadModel",
    prefix="transformer.",
    ignored=r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",
    table=_gpt2_table,
    to_spec=_gpt2_to_spec,
    to_config=_gpt2_to_config,
  ),
  "llama": _llama_like("llama", "LlamaForCausalLM", _llama_to_spec),
  "mistral": _llama_like("mistral", "MistralForCausalLM", _llama_to_spec),
  "qwen2": _llama_like("qwen2", "Qwen2ForCausalLM", _qwen2_to_spec),
  "qwen3": _llama_like("qwen3", "Qwen3ForCausalLM", _qwen3_to_spec),
  "gemma": _llama_like("gemma", "GemmaForCausalLM", _gemma_to_spec),
}
