"""The networks of the family under the names of the released files; what transformers has is transformers' own.

They hold weights. Of their own forward passes only the text model's is used: see `operators.minicpmv.model`.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Final

from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MiniCPMOcrForConditionalGeneration,
    MiniCPMV4_6ForConditionalGeneration,
    MiniCPMV4_7ForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from operators.minicpmv.family import Connector, Family
from operators.minicpmv.resampler import Resampler

MERGER_CLASSES: Final[dict[str, type[PreTrainedModel]]] = {
    "minicpmv4_6": MiniCPMV4_6ForConditionalGeneration,
    "minicpmv4_7": MiniCPMV4_7ForConditionalGeneration,
    "minicpm_ocr": MiniCPMOcrForConditionalGeneration,
}

HEADS: Final[dict[Connector, str]] = {"merger": "lm_head", "resampler": "llm.lm_head"}
"""Name of the output layer."""

NOT_OF_THE_TEXT_MODEL: Final = (
    "architectures", "audio_config", "auto_map", "model_type", "quantization_config", "slice_config", "tts_config",
    "vision_config",
)  # fmt: skip
"""Keys of `config.json` that lie beside those of the text model."""


class ResamplerConfig(PreTrainedConfig):  # type: ignore[misc]
    """Configuration of a network with a resampler, whose file lists the text model's numbers at its top level."""

    model_type = "minicpmv"
    sub_configs: ClassVar[dict[str, Any]] = {"vision_config": SiglipVisionConfig}

    def __init__(self, text_config: Any = None, vision_config: Any = None, query_count: int = 64, **rest: Any) -> None:
        self.text_config = text_config
        self.vision_config = vision_config
        self.query_count = query_count
        super().__init__(**rest)

    def get_text_config(self, *_: Any, **__: Any) -> Any:
        """Return the configuration of the text model."""
        return self.text_config


class ResamplerNetwork(PreTrainedModel):  # type: ignore[misc]
    """Tower, resampler and text model of MiniCPM-V 2.6 to 4.5 and MiniCPM-o 2.6."""

    config_class = ResamplerConfig
    base_model_prefix = ""
    _supports_sdpa = True

    def __init__(self, config: ResamplerConfig) -> None:
        super().__init__(config)
        self.llm = MODEL_FOR_CAUSAL_LM_MAPPING[type(config.text_config)](config.text_config)
        self.vpm = SiglipVisionModel(config.vision_config)
        self.resampler = Resampler(config.text_config.hidden_size, config.vision_config.hidden_size, config.query_count)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Leave a tensor that no file holds as it is: it is refused after loading."""


@dataclass(frozen=True)
class Network:
    """The parts of a loaded network, whatever it calls them.

    Attributes:
        whole: all of it.
        tower: the vision tower.
        connector: mergers or a resampler.
        text: the text model, from embeddings to hidden states.
        embed: token ids to embeddings.
        head: hidden states to logits.
    """

    whole: Any
    tower: Any
    connector: Any
    text: Any
    embed: Any
    head: Any

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the scores of every token, (..., vocabulary)."""
        scores: Tensor = self.head(hidden)
        return scores


def network_class(family: Family) -> type[PreTrainedModel]:
    """Return the class that holds the weights of a member."""
    return MERGER_CLASSES[family.name] if family.connector == "merger" else ResamplerNetwork


def network_config(family: Family, settings: dict[str, Any]) -> PreTrainedConfig:
    """Return the configuration of a member's network.

    Args:
        family: the member.
        settings: its `config.json`.
    """
    if family.connector == "merger":
        config: PreTrainedConfig = CONFIG_MAPPING[family.name](**settings)
        return config
    text = {name: value for name, value in settings.items() if name not in NOT_OF_THE_TEXT_MODEL}
    vision = {name: value for name, value in settings["vision_config"].items() if name != "model_type"}
    kept = {name: settings[name] for name in ("quantization_config", "dtype", "torch_dtype") if name in settings}
    return ResamplerConfig(
        text_config=CONFIG_MAPPING[family.backbone](**text),
        vision_config=SiglipVisionConfig(**vision, vision_use_head=False),
        query_count=settings.get("query_num", 64),
        tie_word_embeddings=settings.get("tie_word_embeddings", False),
        **kept,
    )


def parts_of(network: Any, family: Family) -> Network:
    """Return the parts of a loaded network."""
    if family.connector == "resampler":
        return Network(
            whole=network,
            tower=network.vpm,
            connector=network.resampler,
            text=network.llm.model,
            embed=network.llm.model.embed_tokens,
            head=network.llm.lm_head,
        )
    inner = network.model
    return Network(
        whole=network,
        tower=inner.vision_tower,
        connector=inner.merger,
        text=inner.language_model,
        embed=inner.language_model.embed_tokens,
        head=network.lm_head,
    )
