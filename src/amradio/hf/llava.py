"""LLaVA from parts: any tower, any language model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from amradio.errors import OptionError
from amradio.hf.tower import AmradioTower, AmradioTowerConfig

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedModel, PreTrainedTokenizerBase

IMAGE_TOKEN = "<image>"
_VOCABULARY_MULTIPLE = 64


def llava_processor(
    config: AmradioTowerConfig, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None
) -> LlavaProcessor:
    """A processor that counts the tokens of a tower.

    Args:
        config: The tower's.
        tokenizer: The language model's. It gets the token ``<image>``, if it has none.
        chat_template: In Jinja; default the tokenizer's.

    Returns:
        The processor: pictures are brought to the config's ``image_size``, and each ``<image>`` in a text becomes as
        many tokens as the tower makes.
    """
    from transformers import LlavaProcessor

    if tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) in (None, tokenizer.unk_token_id):
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    return LlavaProcessor(
        image_processor=config.image_processor(),
        tokenizer=tokenizer,
        patch_size=config.patch_size,
        num_additional_image_tokens=len(config.prefix_indices),
        vision_feature_select_strategy="full",
        chat_template=chat_template or tokenizer.chat_template,
        image_token=IMAGE_TOKEN,
    )


def assemble_llava(
    tower: AmradioTower, language_model: PreTrainedModel, image_token_id: int, feature_layer: int | list[int] = -1
) -> LlavaForConditionalGeneration:
    """Put a tower before a language model, with a new projector of two layers between them (LLaVA-1.5).

    Args:
        tower: Its weights are shared.
        language_model: A causal language model; its weights are shared. Its vocabulary grows if the image token is not
            in it.
        image_token_id: Of the token that stands for the tokens of an image.
        feature_layer: Which of the tower's hidden states is projected: -1, its output, -2, the block before, and so on;
            several are put side by side.

    Returns:
        The model, whose projector is untrained. All tokens of the tower go in (``vision_feature_select_strategy`` is
        ``full``), as the tower's config says which there are.

    Raises:
        OptionError: The language model has no output layer, or tower and language model differ in dtype.
    """
    from transformers import LlavaConfig, LlavaForConditionalGeneration
    from transformers.initialization import no_init_weights

    if tower.dtype != language_model.dtype:
        raise OptionError(
            f"The tower is in {tower.dtype} and the language model in {language_model.dtype}: bring one to the "
            "other's, as in tower.to(language_model.dtype)."
        )
    head = language_model.get_output_embeddings()
    if head is None:
        raise OptionError(
            f"A {type(language_model).__name__} predicts no words. Load it with AutoModelForCausalLM.from_pretrained."
        )
    if image_token_id >= language_model.get_input_embeddings().num_embeddings:
        language_model.resize_token_embeddings(image_token_id + 1, pad_to_multiple_of=_VOCABULARY_MULTIPLE)
        head = language_model.get_output_embeddings()
    side = tower.config.image_size
    size = (side, side) if isinstance(side, int) else side
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=language_model.config,
        image_token_index=image_token_id,
        image_seq_length=tower.config.num_tokens(*size),
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy="full",
        tie_word_embeddings=language_model.config.tie_word_embeddings,
        dtype=language_model.dtype,
    )
    with torch.device("meta"), no_init_weights():
        model: Any = LlavaForConditionalGeneration(config)
    model.model.vision_tower = tower
    model.model.language_model = language_model.base_model
    model.lm_head = head
    projector = model.model.multi_modal_projector.to(language_model.dtype).to_empty(device=language_model.device)
    spread = float(getattr(language_model.config, "initializer_range", 0.02))
    for layer in (projector.linear_1, projector.linear_2):
        torch.nn.init.normal_(layer.weight, std=spread)
        if layer.bias is not None:
            torch.nn.init.zeros_(layer.bias)
    model.generation_config = language_model.generation_config
    return model.train(language_model.training)
