"""
What a checkpoint's config.json says of its architecture. What the forward pass would not compute
exactly is refused by the field's name: nothing is guessed from a model's name or its size.
"""
import functools
from dataclasses import dataclass

from files import InputError, check_fields

# model_type → (q/k/v bias, o bias, q/k norm); None: the config's attention_bias says
FAMILIES = {
    "llama": (None, None, False),
    "mistral": (False, False, False),
    "qwen2": (True, False, False),
    "qwen3": (None, None, True),
}
# types and ranges of the fields; far beyond any model there is, so that nonsense is told before it
# is tried
SIZE = ((int,), 1, 1 << 20)
OBJECT = ((dict, None), None, None)
FIELDS = {
    "model_type": tuple(FAMILIES),
    "vocab_size": ((int,), 1, 1 << 24),
    "hidden_size": SIZE,
    "intermediate_size": SIZE,
    "num_hidden_layers": ((int,), 1, 1 << 12),
    "num_attention_heads": SIZE,
    "num_key_value_heads": ((int, None), 1, 1 << 20),
    "head_dim": ((int, None), 1, 1 << 16),
    "rope_parameters": OBJECT,
    "rope_scaling": OBJECT,
    "layer_types": ((list, None), None, None),
}
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass(frozen=True)
class Config:
    """What the forward pass needs, under the field names of the checkpoint's own config.json."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_llama3: tuple = None            # the four numbers of LLAMA3
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    @classmethod
    def from_dict(cls, c, where="config.json"):
        """
        From config.json as transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters) writes
        it. Raises InputError naming the field for anything that would not be computed exactly.
        """
        check_fields(where, c, FIELDS)
        refuse = functools.partial(refuse_field, where, c)
        refuse_other_layers(c, refuse)
        theta, llama3 = rope(c, refuse)
        heads = c["num_attention_heads"]
        kv_heads = c.get("num_key_value_heads") or heads
        if heads % kv_heads:
            refuse("num_key_value_heads", f"does not divide num_attention_heads = {heads}")
        family = c["model_type"]
        qkv_bias, o_bias, qk_norm = FAMILIES[family]
        bias = bool(c.get("attention_bias", False))
        return cls(
            vocab_size=c["vocab_size"],
            hidden_size=c["hidden_size"],
            intermediate_size=c["intermediate_size"],
            num_hidden_layers=c["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=c.get("head_dim") or c["hidden_size"] // heads,
            rms_norm_eps=c.get("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_llama3=llama3,
            tie_word_embeddings=bool(c.get("tie_word_embeddings", False)),
            qkv_bias=bias if qkv_bias is None else qkv_bias,
            o_bias=bias if o_bias is None else o_bias,
            mlp_bias=family == "llama" and bool(c.get("mlp_bias")),
            qk_norm=qk_norm)


def refuse_field(where, c, field, why):
    """Raises InputError about a field of the object `c`, which `where` holds."""
    raise InputError(f"{where}: {field} = {c.get(field)!r} {why}")


def is_number(value):
    return type(value) in (int, float)


def refuse_other_layers(c, refuse):
    """Layers that are more than full attention and SwiGLU in plain weights are refused."""
    for field in ("rms_norm_eps", "rope_theta"):
        value = c.get(field, 1.0)
        if not is_number(value) or not 0 < value < 1e30:
            refuse(field, "is not a positive number; the file is damaged")
    if c.get("hidden_act", "silu") not in ("silu", "swish"):
        refuse("hidden_act", "is not silu; other activations are not implemented")
    if c.get("quantization_config"):
        refuse("quantization_config",
               "means quantised weights; use the checkpoint in bf16, fp16 or fp32")
    if any(kind != "full_attention" for kind in c.get("layer_types") or ()):
        refuse("layer_types", "has layers without full attention, which are not implemented")
    if slides(c):
        refuse("sliding_window", "is in use; only full attention is implemented")


def slides(c):
    """Whether some layer attends within a window: Mistral's all, Qwen's where it says so."""
    if not c.get("sliding_window"):
        return False
    listed = c.get("layer_types")                            # all full attention, or refused by now
    return c["model_type"] == "mistral" or bool(c.get("use_sliding_window") and not listed)


def rope(c, refuse):
    """(θ, the four numbers of Llama 3's scaling or None) of rotary position embedding."""
    usual = c.get("rope_theta", 10000.0)
    field = "rope_parameters" if c.get("rope_parameters") else "rope_scaling"
    found = {"rope_theta": usual, **(c.get("rope_scaling") or {})}
    found = c.get("rope_parameters") or found
    if any(isinstance(value, dict) for value in found.values()):
        refuse(field, "differs from layer to layer, which is not implemented")
    kind = found.get("rope_type", found.get("type", "default"))
    if kind not in ("default", "llama3"):
        refuse(field, "is a rope type other than default and llama3")
    if found.get("partial_rotary_factor", c.get("partial_rotary_factor", 1.0)) != 1.0:
        refuse("partial_rotary_factor", "rotates part of a head only, which is not implemented")
    for name in LLAMA3:
        if kind == "llama3" and name not in found:
            refuse(field, f"lacks {name}, which llama3 scaling needs")
    for name in (*LLAMA3, "rope_theta"):
        if not is_number(found.get(name, 1.0)):
            refuse(field, f"has no number for {name}; the file is damaged")
    llama3 = tuple(float(found[name]) for name in LLAMA3) if kind == "llama3" else None
    return float(found.get("rope_theta", usual)), llama3
