"""What a Teacher calls the divergence of a model from the dense one, against the models' own logits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from hf_shrink.progress import quiet
from hf_shrink.tuning.teacher import Teacher

SIZES = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIDE = {"layers": 2, "attention_heads": 4, "ffn_dim": 48}
MODELS = {
    "divided": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=8.0)),
    "multiplied": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25)),
    "with a bias": lambda: PhiForCausalLM(PhiConfig(**SIZES)),
    # So high that it does next to nothing: a lower one is left out, which is documented.
    "capped": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=300.0)),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_the_divergence_of_the_logits(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense: Any = MODELS[name]().eval()
    with torch.no_grad():
        for path, parameter in dense.named_parameters():
            if path.endswith("bias"):
                parameter.normal_()
    dense = dense.to(dtype)
    changed = copy.deepcopy(dense)
    with torch.no_grad():
        for parameter in changed.model.layers.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ids = torch.randint(3, 128, (3, 20))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    teacher = Teacher(dense, [batch], quiet)
    with torch.no_grad():
        with monkeypatch.context() as patch:
            patch.setattr(changed.get_output_embeddings(), "forward", pytest.fail)  # the product is what takes time
            found = teacher.loss(changed, 0)
        true, own = (m(**batch).logits[mask.bool()].double().log_softmax(-1) for m in (dense, changed))
    expected = F.kl_div(own, true, reduction="batchmean", log_target=True)
    assert expected > 0.01
    torch.testing.assert_close(found.double(), expected, rtol=0.1 if dtype == torch.bfloat16 else 2e-2, atol=0)


@pytest.mark.parametrize("vocabulary", [128, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_added_to_all_logits_counts(vocabulary: int, dtype: torch.dtype) -> None:
    """Also where the vocabulary is as wide as what the head reads, so that adding it there would go unnoticed."""
    sides = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in SIDE.items()}
    config = BartConfig(vocab_size=vocabulary, d_model=32, init_std=0.3, decoder_start_token_id=2, **sides)
    dense = BartForConditionalGeneration(config).eval()
    dense.final_logits_bias.normal_(std=3.0)
    dense = dense.to(dtype)
    changed = copy.deepcopy(dense)
    with torch.no_grad():
        for parameter in changed.model.decoder.layers.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, 5:] = 0
    batch = {"input_ids": torch.randint(3, vocabulary, (3, 12)), "decoder_attention_mask": mask}
    batch["decoder_input_ids"] = torch.randint(3, vocabulary, (3, 9))
    teacher = Teacher(dense, [batch], quiet)
    with torch.no_grad():
        found = teacher.loss(changed, 0)
        true, own = (m(**batch).logits[mask.bool()].double().log_softmax(-1) for m in (dense, changed))
    expected = F.kl_div(own, true, reduction="batchmean", log_target=True)
    assert expected > 0.01
    torch.testing.assert_close(found.double(), expected, rtol=0.1 if dtype == torch.bfloat16 else 2e-2, atol=0)


def test_of_several_classes_each_is_learnt_by_itself() -> None:
    sizes = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    head = {"num_labels": 5, "problem_type": "multi_label_classification", "initializer_range": 0.3}
    dense = BertForSequenceClassification(BertConfig(**sizes, **head, num_hidden_layers=1)).eval()
    changed = copy.deepcopy(dense)
    with torch.no_grad():
        changed.classifier.weight.mul_(0.5)
    batch = {"input_ids": torch.randint(3, 128, (3, 20))}
    teacher = Teacher(dense, [batch], quiet)
    with torch.no_grad():
        found = teacher.loss(changed, 0)
        true, own = (m(**batch).logits.double() for m in (dense, changed))
    chance = true.sigmoid()
    both = (F.binary_cross_entropy_with_logits(logits, chance) for logits in (own, true))
    expected = next(both) - next(both)
    assert teacher.unit == "KL divergence" and expected > 0.01
    torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=0)
