"""Names and shapes of tensors that several members share."""

from typing import Any, Final

Shapes = dict[str, tuple[int, ...]]

VISION: Final[dict[str, Any]] = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_channels": 3,
    "image_size": 980,
    "patch_size": 14,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "attention_dropout": 0.0,
}
"""Numbers of the vision tower; the side of its position table is the released one, since rows of it are chosen."""


def linear(name: str, width_out: int, width_in: int) -> Shapes:
    """Return the two tensors of a linear layer with a bias."""
    return {f"{name}.weight": (width_out, width_in), f"{name}.bias": (width_out,)}


def norm(name: str, width: int) -> Shapes:
    """Return the two tensors of a layer norm."""
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def attention_shapes(name: str, width: int) -> Shapes:
    """Return the tensors of one attention of the vision tower."""
    shapes: Shapes = {}
    for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
        shapes |= linear(f"{name}.{projection}", width, width)
    return shapes


def tower_shapes(tower: str) -> Shapes:
    """Return the tensors of the vision tower, whose names begin with `tower`."""
    width, inner, patch = VISION["hidden_size"], VISION["intermediate_size"], VISION["patch_size"]
    shapes: Shapes = {
        f"{tower}.embeddings.patch_embedding.weight": (width, VISION["num_channels"], patch, patch),
        f"{tower}.embeddings.patch_embedding.bias": (width,),
        f"{tower}.embeddings.position_embedding.weight": ((VISION["image_size"] // patch) ** 2, width),
        **norm(f"{tower}.post_layernorm", width),
    }
    for index in range(VISION["num_hidden_layers"]):
        layer = f"{tower}.encoder.layers.{index}"
        shapes |= attention_shapes(f"{layer}.self_attn", width)
        shapes |= norm(f"{layer}.layer_norm1", width) | norm(f"{layer}.layer_norm2", width)
        shapes |= linear(f"{layer}.mlp.fc1", inner, width) | linear(f"{layer}.mlp.fc2", width, inner)
    return shapes


def gated_mlp_shapes(layer: str, width: int, inner: int) -> Shapes:
    """Return the tensors of a text layer that every backbone has: its gated network and its two norms."""
    return {
        f"{layer}.input_layernorm.weight": (width,),
        f"{layer}.post_attention_layernorm.weight": (width,),
        f"{layer}.mlp.gate_proj.weight": (inner, width),
        f"{layer}.mlp.up_proj.weight": (inner, width),
        f"{layer}.mlp.down_proj.weight": (width, inner),
    }
