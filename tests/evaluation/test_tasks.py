"""Tasks with right answers: what each model answers, against asking it by hand, row by row."""

from __future__ import annotations

import copy
import json

import datasets
import numpy as np
import pytest
import torch
from perturbing import perturbed
from tiny import TEXT, VOCABULARY, tiny_llama, tiny_tokenizer
from tiny_readers import encoder_tokenizer, tiny_bert, tiny_t5
from transformers import (
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
)

from hf_shrink.errors import CalibrationError, RecipeError
from hf_shrink.evaluation import evaluate_model
from hf_shrink.evaluation.recipes import TaskRecipe, evaluation_spec

WORDS = tuple(TEXT.split()[:18])


def texts(count, seed=0, length=6):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, size=int(rng.integers(2, length)))) for _ in range(count)]


def bert(cls, **changes):
    torch.manual_seed(0)
    config = tiny_bert().config
    config.update({"initializer_range": 0.4, **changes})
    return cls(config).eval()


def value(result, name, side="model"):
    return result[side][name]["value"]


def test_classes_of_pairs_with_groups(tmp_path):
    labels = {"id2label": {0: "no", 1: "yes", 2: "maybe"}, "label2id": {"no": 0, "yes": 1, "maybe": 2}}
    dense, tokenizer = bert(BertForSequenceClassification, **labels), encoder_tokenizer()
    small = perturbed(dense, 0.2)
    first, second = texts(24), texts(24, 1)
    choices = {}
    for name, model in (("dense", dense), ("small", small)):
        with torch.no_grad():
            logits = [
                model(**tokenizer(a, b, return_tensors="pt")).logits[0] for a, b in zip(first, second, strict=True)
            ]
        choices[name] = torch.stack(logits).double()
    now, before = (choices[name].argmax(-1).tolist() for name in ("small", "dense"))
    right = [before[i] if i % 3 else (before[i] + 1) % 3 for i in range(24)]
    names = ["no", "yes", "maybe"]
    rows = [
        {"sentence1": a, "sentence2": b, "label": names[c], "group": "short" if i < 8 else "long"}
        for i, (a, b, c) in enumerate(zip(first, second, right, strict=True))
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    result = evaluate_model(small, path, baseline=dense, tokenizer=tokenizer)
    assert (result["task"], result["sequences"]) == ("classification", 24)
    hits = [a == b for a, b in zip(now, right, strict=True)]
    assert value(result, "accuracy") == pytest.approx(np.mean(hits))
    assert value(result, "accuracy", "baseline") == pytest.approx(
        np.mean([a == b for a, b in zip(before, right, strict=True)])
    )
    were = [a == b for a, b in zip(before, right, strict=True)]
    assert value(result, "flip_rate") == pytest.approx(np.mean(np.array(hits) != were))
    p, q = (choices[name].softmax(-1) for name in ("dense", "small"))
    assert value(result, "kl_divergence") == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-4)
    groups = result["groups"]["accuracy"]
    assert groups["by_group"]["short"]["model"]["value"] == pytest.approx(np.mean(hits[:8]))
    assert groups["by_group"]["long"]["rows"] == 16
    assert groups["worst"] == min(("short", hits[:8]), ("long", hits[8:]), key=lambda one: np.mean(one[1]))[0]
    json.dumps(result, allow_nan=False)


def test_labels_of_a_data_set_are_matched_by_name():
    labels = {"id2label": {0: "NEG", 1: "POS"}, "label2id": {"NEG": 0, "POS": 1}}
    model, tokenizer = bert(BertForSequenceClassification, **labels), encoder_tokenizer()
    with torch.no_grad():
        choices = [int(model(**tokenizer(t, return_tensors="pt")).logits.argmax()) for t in texts(12)]
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["pos", "neg"])})
    rows = datasets.Dataset.from_dict({"text": texts(12), "label": [1 - c for c in choices]}, features=features)
    assert value(evaluate_model(model, rows, tokenizer=tokenizer), "accuracy") == 1
    with pytest.raises(CalibrationError, match="label 'perhaps'"):
        evaluate_model(model, [{"text": "a", "label": "perhaps"}], tokenizer=tokenizer)


def test_tags_of_words():
    names = {0: "O", 1: "B-PER", 2: "I-PER"}
    model = bert(BertForTokenClassification, id2label=names, label2id={name: i for i, name in names.items()})
    tokenizer, rows = encoder_tokenizer(), []
    for text in texts(8):
        words = text.split()
        encoded = tokenizer(words, is_split_into_words=True, return_tensors="pt")
        ids = encoded.word_ids()
        with torch.no_grad():
            best = model(**encoded).logits[0].argmax(-1).tolist()
        rows.append({"tokens": words, "ner_tags": [best[ids.index(place)] for place in range(len(words))]})
    result = evaluate_model(model, rows, baseline=perturbed(model, 0.3), tokenizer=tokenizer)
    assert result["task"] == "token-classification" and value(result, "entity_f1") == 1
    assert value(result, "entity_f1", "baseline") < 1 and value(result, "top1_agreement") < 1


def test_stretches_of_long_contexts():
    model, tokenizer = bert(BertForQuestionAnswering), encoder_tokenizer()
    question, context = "where is it", " ".join(texts(4, 3, 12))
    row = {"question": question, "context": context, "answers": {"text": [context[:9]], "answer_start": [0]}}
    ids = tokenizer(question, context, return_tensors="pt")
    assert ids.input_ids.shape[1] < 64
    with torch.no_grad():
        outputs = model(**ids)
    parts = tokenizer(question, context, return_offsets_mapping=True)
    scores = {
        (s, e): (outputs.start_logits[0, s] + outputs.end_logits[0, e]).item()
        for s in range(len(parts.input_ids))
        for e in range(s, min(s + 30, len(parts.input_ids)))
        if parts.sequence_ids(0)[s] == parts.sequence_ids(0)[e] == 1
    }
    start, end = max(scores, key=scores.get)
    answer = context[parts.offset_mapping[start][0] : parts.offset_mapping[end][1]]
    result = evaluate_model(model, [row, {**row, "answers": [answer]}], tokenizer=tokenizer)
    assert result["task"] == "question-answering"
    expected = (answer.lower().split() == context[:9].lower().split()) + 1
    assert value(result, "exact_match") == expected / 2
    long = {**row, "context": " ".join(texts(30, 4, 12))}
    assert "answer_f1" in evaluate_model(model, [long], tokenizer=tokenizer)["model"]


@pytest.mark.parametrize("normalize", ["none", "bytes"])
def test_choices_by_likelihood(normalize):
    dense, tokenizer = tiny_llama(), tiny_tokenizer()
    rows, chosen = [], {}
    for i, question in enumerate(texts(10)):
        rows.append({"question": question, "choices": texts(3, 10 + i, 9), "answer": "B"})
    small = perturbed(dense, 0.1)
    for name, model in (("dense", dense), ("small", small)):
        chosen[name] = []
        for row in rows:
            scores = []
            prompt = f"Question: {row['question']}\nAnswer:"
            for choice in row["choices"]:
                ids = tokenizer(f"{prompt} {choice}", return_tensors="pt").input_ids[0]
                start = len(tokenizer(prompt).input_ids)
                with torch.no_grad():
                    logits = model(ids[None]).logits[0].double().log_softmax(-1)
                total = sum(logits[t - 1, ids[t]].item() for t in range(start, len(ids)))
                scores.append(total / len(choice) if normalize == "bytes" else total)
            chosen[name].append(int(np.argmax(scores)))
    recipe = TaskRecipe("mine", "multiple-choice", options={"normalize": normalize})
    result = evaluate_model(small, rows, baseline=dense, tokenizer=tokenizer, spec=recipe)
    now, before = np.array(chosen["small"]), np.array(chosen["dense"])
    assert value(result, "accuracy") == pytest.approx(np.mean(now == 1))
    assert value(result, "accuracy", "baseline") == pytest.approx(np.mean(before == 1))
    assert value(result, "flip_rate") == pytest.approx(np.mean((now == 1) != (before == 1)))
    assert value(result, "top1_agreement") == pytest.approx(np.mean(now == before))


def test_right_answers_by_number_letter_label_and_text():
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    choices = {"text": ["sand", "stones"], "label": ["1", "2"]}
    for answer, given in (
        (1, ["sand", "stones"]),
        ("B", ["sand", "stones"]),
        ("stones", ["sand", "stones"]),
        ("2", choices),
    ):
        data = [{"question": "what", "choices": given, "answer": answer}]
        result = evaluate_model(model, data, tokenizer=tokenizer, metrics=["accuracy"])
        assert value(result, "accuracy") in (0, 1)
    with pytest.raises(CalibrationError, match="none of its 2 choices"):
        evaluate_model(model, [{"question": "w", "choices": ["a", "b"], "answer": "c"}], tokenizer=tokenizer)


@pytest.mark.parametrize("kind", ["seq2seq", "causal"])
def test_written_texts(kind):
    tokenizer = copy.deepcopy(tiny_tokenizer())  # others share that one, and calls leave their padding in it
    model = tiny_t5() if kind == "seq2seq" else tiny_llama()
    prompts, wanted = texts(5), []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0
        )
        wanted.append(
            tokenizer.decode(made[0, ids.shape[1] if kind == "causal" else 0 :], skip_special_tokens=True).strip()
        )
    rows = [{"document": prompt, "summary": text} for prompt, text in zip(prompts, wanted, strict=True)]
    recipe = TaskRecipe("mine", "generation", options={"new": 6}, batch_size=3)
    result = evaluate_model(model, rows, baseline=perturbed(model, 0.5), tokenizer=tokenizer, spec=recipe)
    assert value(result, "exact_match") == value(result, "rouge_l") == 1
    assert value(result, "exact_match", "baseline") < 1
    assert value(result, "flip_rate") == 1 - value(result, "exact_match", "baseline")


def pooled(model, tokenizer, text):
    with torch.no_grad():
        states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].double()
    return torch.nn.functional.normalize(states.mean(0), dim=0)


def test_embeddings_compare_and_find():
    dense, tokenizer = tiny_bert(), encoder_tokenizer()
    small = perturbed(dense, 0.02)
    first, second = texts(12), texts(12, 1)
    rows = [{"sentence1": a, "sentence2": b, "score": i} for i, (a, b) in enumerate(zip(first, second, strict=True))]
    result = evaluate_model(small, rows, baseline=dense, tokenizer=tokenizer)
    both = [[pooled(m, tokenizer, text) for text in (*first, *second)] for m in (small, dense)]
    expected = np.mean([(a @ b).item() for a, b in zip(*both, strict=True)])
    assert value(result, "cosine") == pytest.approx(expected, abs=1e-5)
    assert {"rank_correlation", "score_agreement"} <= set(result["model"]) and "rank_correlation" in result["baseline"]

    rows = [{"query": text, "document": text} for text in dict.fromkeys(first)]
    result = evaluate_model(dense, rows, tokenizer=tokenizer)
    assert result["task"] == "retrieval" and value(result, "ndcg_at10") == value(result, "recall_at10") == 1


def test_batches_with_labels_and_groups():
    dense = bert(BertForSequenceClassification, num_labels=3)
    ids = torch.randint(3, VOCABULARY, (8, 9))
    with torch.no_grad():
        best = dense(ids).logits.argmax(-1)
    data = [
        {"input_ids": ids[:5], "labels": best[:5], "group": ["a"] * 5},
        {"input_ids": ids[5:], "labels": best[5:], "group": ["b"] * 3},
    ]
    result = evaluate_model(perturbed(dense, 0.3), data, baseline=dense)
    assert value(result, "accuracy", "baseline") == 1 and value(result, "accuracy") == value(result, "top1_agreement")
    assert set(result["groups"]["kl_divergence"]["by_group"]) == {"a", "b"}
    with pytest.raises(CalibrationError, match="labels from 0 to 7"):
        evaluate_model(dense, [{"input_ids": ids, "labels": torch.arange(8)}])


def test_what_does_not_fit_is_said(tmp_path):
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    with pytest.raises(CalibrationError, match="no head for this task"):
        evaluate_model(model, [{"query": "a", "document": "b"}], tokenizer=tokenizer, spec=TaskRecipe("x", "retrieval"))
    with pytest.raises(CalibrationError, match="no column for 'choices' among question, answer"):
        rows = [{"question": "a", "answer": 0}]
        evaluate_model(model, rows, tokenizer=tokenizer, spec=TaskRecipe("x", "multiple-choice"))
    with pytest.raises(CalibrationError, match="has no rows"):
        evaluate_model(model, [], tokenizer=tokenizer, spec=TaskRecipe("x", "multiple-choice"))
    path = tmp_path / "mine.yaml"
    for text, message in (
        ("task: clasification", "did you mean 'classification'"),
        ("task: generation\noptions: {news: 3}", "did you mean 'new'"),
        ("task: generation\nmetrics: [rouge]", "did you mean 'rouge_l'"),
        ("task: generation\nsample: 3", "did you mean 'samples'"),
        ("task: multiple-choice\noptions: {normalize: words}", "none or bytes"),
    ):
        path.write_text(text)
        with pytest.raises(RecipeError, match=message):
            evaluation_spec(path)
