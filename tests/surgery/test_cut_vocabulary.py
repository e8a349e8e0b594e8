"""Models with fewer tokens: the same outputs for those that are left, and every number in the configs moved."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conformance.cases import CASES as DECODERS
from conformance.cases_encoders import CASES as OTHERS
from tiny import tiny_llama
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, PreTrainedModel

from hf_shrink.errors import ArchitectureError, RecipeError
from hf_shrink.plan import Plan, VocabularyPlan
from hf_shrink.surgery import is_uneven, settle_config
from hf_shrink.surgery.vocabulary import cut_vocabulary, special_ids, vocabulary_rows

CASES = {**DECODERS, **OTHERS}
WITH_TOKENS = [
    *("llama", "llama_tied", "llama_classifier", "gemma3", "llava_tied", "qwen2_vl", "gpt2", "opt", "falcon_alibi"),
    *("bert", "bert_masked_lm", "camembert_masked_lm", "modernbert_masked_lm", "xlm_roberta_tagger", "clip_text"),
    *("t5", "t5_encoder", "bart", "bart_classifier", "whisper"),
]
IDS = ("input_ids", "decoder_input_ids", "labels")


def kept_of(model: PreTrainedModel, inputs: dict[str, Any]) -> list[int]:
    """The tokens of the inputs and of the configs, and some more."""
    used = {index for name in IDS if name in inputs for index in inputs[name].flatten().tolist() if index >= 0}
    more = torch.randperm(vocabulary_rows(model))[:40].tolist()
    return sorted(used | special_ids(model) | set(more))


def renumbered(inputs: dict[str, Any], kept: list[int]) -> dict[str, Any]:
    new = {old: index for index, old in enumerate(kept)}
    found = dict(inputs)
    for name in IDS:
        if name in inputs:
            ids: Tensor = inputs[name]
            moved = [new.get(index, index) for index in ids.flatten().tolist()]
            found[name] = torch.tensor(moved).view(ids.shape)
    return found


def first(output: Any) -> Tensor:
    value: Tensor = output.logits if hasattr(output, "logits") else output[0]
    return value


@pytest.mark.parametrize("name", WITH_TOKENS)
@torch.no_grad()
def test_outputs_for_tokens_that_are_left_stay(name: str) -> None:
    model, inputs = CASES[name].build(), CASES[name].inputs()
    # Some families read positions from where padding is; a padding token in the middle must move with its number.
    kept, rows, parameters = kept_of(model, inputs), vocabulary_rows(model), model.num_parameters()
    before = first(model(**inputs))
    cut_vocabulary(model, kept)
    after = first(model(**renumbered(inputs, kept)))
    expected = before[..., kept] if before.shape[-1] == rows else before
    torch.testing.assert_close(after, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))
    assert vocabulary_rows(model) == len(kept)
    assert model.config.get_text_config().vocab_size == len(kept)
    assert model.num_parameters() < parameters
    settle_config(model)
    assert not is_uneven(model), "stock transformers builds it from the config"


def test_tied_weights_stay_one_and_untied_ones_two() -> None:
    for tied in (True, False):
        model = tiny_llama(tie_word_embeddings=tied)
        before = model.lm_head.weight.detach().clone()
        cut_vocabulary(model, [0, 1, 2, 7, 300])
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        assert torch.equal(model.lm_head.weight, before[[0, 1, 2, 7, 300]])
        assert model.lm_head.out_features == model.model.embed_tokens.num_embeddings == model.vocab_size == 5


def test_a_bias_of_the_head_goes_along() -> None:
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20)
    model = BertForMaskedLM(config).eval()
    with torch.no_grad():
        model.cls.predictions.bias.normal_()
    bias = model.cls.predictions.bias.detach().clone()
    kept = [0, 3, 9, 10, 49]
    cut_vocabulary(model, kept)
    assert torch.equal(model.cls.predictions.bias, bias[kept])
    assert model.cls.predictions.decoder.bias is model.cls.predictions.bias
    assert model.config.type_vocab_size == len(model.bert.embeddings.token_type_embeddings.weight) == 2


def test_every_id_in_the_configs_moves() -> None:
    model = tiny_llama(pad_token_id=10, bos_token_id=11, eos_token_id=[12, 20])
    model.config.image_token_index = 30
    generation = model.generation_config
    generation.pad_token_id, generation.eos_token_id, generation.decoder_start_token_id = 10, [12, 20], 11
    generation.suppress_tokens, generation.begin_suppress_tokens = [40, 41, -1], [42]
    generation.forced_decoder_ids, generation.bad_words_ids = [[1, 50], [2, None]], [[60, 61], [62]]
    generation.lang_to_id, generation.max_new_tokens = {"<|en|>": 70}, 99
    named = special_ids(model)
    assert named == {10, 11, 12, 20, 30, 40, 41, 42, 50, 60, 61, 62, 70}
    kept = sorted(named | {99})
    cut_vocabulary(model, kept)
    new = kept.index
    assert (model.config.pad_token_id, model.config.bos_token_id) == (new(10), new(11))
    assert model.config.eos_token_id == generation.eos_token_id == [new(12), new(20)]
    assert model.config.image_token_index == new(30)
    assert generation.decoder_start_token_id == new(11)
    assert generation.suppress_tokens == [new(40), new(41), -1] and generation.begin_suppress_tokens == [new(42)]
    assert generation.forced_decoder_ids == [[1, new(50)], [2, None]]
    assert generation.bad_words_ids == [[new(60), new(61)], [new(62)]]
    assert generation.lang_to_id == {"<|en|>": new(70)} and generation.max_new_tokens == 99
    assert model.model.padding_idx == model.model.embed_tokens.padding_idx == new(10)


def test_what_is_not_understood_is_refused() -> None:
    model = tiny_llama()
    with pytest.raises(ArchitectureError, match="names token 2"):
        cut_vocabulary(copy.deepcopy(model), [0, 1, 7])
    other = copy.deepcopy(model)
    other.second = nn.Embedding(320, 4)
    with pytest.raises(ArchitectureError, match=r"second.weight is as large as the vocabulary"):
        vocabulary_rows(other)
    model.config.audio_vocab_size = 7
    with pytest.raises(ArchitectureError, match="several vocabularies"):
        vocabulary_rows(model)
    with pytest.raises(ArchitectureError, match="no vocabulary to cut"):
        vocabulary_rows(OTHERS["vit"].build())


def test_a_plan_keeps_ids_in_few_letters() -> None:
    plan = Plan("llama", vocabulary=VocabularyPlan(320, "0-2,7,9-11", "abc"))
    assert plan.vocabulary is not None and plan.vocabulary.ids == (0, 1, 2, 7, 9, 10, 11)
    assert Plan.from_json(plan.to_json()) == plan
    assert "7 of 320 tokens kept" in plan.summary()
    assert Plan.from_json(Plan("llama").to_json()).vocabulary is None
    for broken, why in {"": "keeps no token", "3,1": "ascending", "a": "numbers and ranges", "5-": "ranges"}.items():
        with pytest.raises(RecipeError, match=why):
            _ = VocabularyPlan(9, broken, "").ids
