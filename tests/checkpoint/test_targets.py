"""Regexes that match the modules meant and no other, as compressed-tensors matches them."""

from __future__ import annotations

import pytest
from checkpoint.rows import W4, W8, channel, inner_linears
from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, apply_quantization_config
from tiny import tiny_llama

from hf_shrink.checkpoint.format import quantization_config
from hf_shrink.checkpoint.packed import arguments_of, scheme_of
from hf_shrink.checkpoint.skeleton import targeted
from hf_shrink.checkpoint.targets import matches, targets_by_group
from hf_shrink.errors import CheckpointError
from hf_shrink.plan import BITS, Scheme


def blocks(count: int, *names: str) -> list[str]:
    return [f"model.layers.{i}.{name}" for i in range(count) for name in names]


def test_one_regex_where_every_block_is_meant() -> None:
    groups = [blocks(14, "mlp.up_proj", "mlp.down_proj")]
    assert targets_by_group(groups, ["lm_head", *blocks(14, "mlp")], "model") == [
        [r"re:(?:.*\.)?layers\.\d+\.mlp\.(?:up_proj|down_proj)$"]
    ]


def test_layer_3_is_not_layer_13() -> None:
    everything = blocks(14, "mlp.up_proj")
    one, rest = [everything[3]], [path for path in everything if path != everything[3]]
    (first, second) = targets_by_group([one, rest], [], "model")
    assert [path for path in everything if matches(path, first)] == one
    assert [path for path in everything if matches(path, second)] == rest
    assert len(second) == 1
    assert matches("layers.3.mlp.up_proj", first)  # the bare model
    assert matches("outer.model.layers.3.mlp.up_proj", first)  # inside a larger one
    assert not matches("model.sublayers.3.mlp.up_proj", first)


def test_what_ends_alike_is_told_apart() -> None:
    """A top-level `layers` and one inside `vision.`: an open start would match both."""
    groups = [["layers.0.fc", "layers.1.fc"], ["vision.layers.0.fc"]]
    first, second = targets_by_group(groups, ["vision.layers.1.fc"], "")
    assert [matches(path, first) for path in ("layers.0.fc", "layers.1.fc", "vision.layers.0.fc")] == [
        True,
        True,
        False,
    ]
    assert [matches(path, second) for path in ("layers.0.fc", "vision.layers.0.fc", "vision.layers.1.fc")] == [
        False,
        True,
        False,
    ]


def test_names_are_taken_literally() -> None:
    (targets,) = targets_by_group([["h.0.a-b+c"]], ["h.0.a-bbc"], "")
    assert matches("h.0.a-b+c", targets)
    assert not matches("h.0.a-bbc", targets)
    assert not matches("h.0.a-b+c.inner", targets)


def test_experts_of_some_blocks() -> None:
    every = [f"layers.{i}.experts.{j}.w1" for i in range(3) for j in range(4)]
    group = [path for path in every if path != "layers.1.experts.2.w1"]
    (targets,) = targets_by_group([group], [path for path in every if path not in group], "")
    assert [path for path in every if matches(path, targets)] == group


def test_paths_that_only_the_prefix_tells_apart_are_an_error() -> None:
    with pytest.raises(CheckpointError, match="told apart"):
        targets_by_group([["model.head"]], ["head"], "model")


def test_compressed_tensors_gives_every_module_its_scheme() -> None:
    model = tiny_llama()
    schemes = {path: (W8, W4, channel(3))[i % 3] for i, path in enumerate(inner_linears(model))}
    block = quantization_config(model, schemes)
    config = QuantizationConfig.model_validate(block)
    assert config.quantization_status == QuantizationStatus.COMPRESSED
    assert targeted(model, config) == schemes
    apply_quantization_config(model, config, show_progress=False)
    found = {
        n: scheme_of(m.quantization_scheme.weights)
        for n, m in model.named_modules()
        if hasattr(m, "quantization_scheme")
    }
    assert found == schemes
    for path in schemes:
        hits = [name for name, group in config.config_groups.items() if matches(path, group.targets)]
        assert len(hits) == 1


def test_linears_that_stay_are_listed_for_vllm() -> None:
    model = tiny_llama()
    left = {"model.layers.0.mlp.up_proj", "model.layers.2.mlp.up_proj"}
    block = quantization_config(model, {path: W8 for path in inner_linears(model) if path not in left})
    assert block["ignore"] == ["lm_head", r"re:(?:.*\.)?layers\.(?:0|2)\.mlp\.up_proj$"]
    assert block["format"] == "pack-quantized"
    assert len(block["config_groups"]) == 1


def test_a_path_that_is_not_there_is_an_error() -> None:
    with pytest.raises(CheckpointError, match=r"no module 'model\.nothing'"):
        quantization_config(tiny_llama(), {"model.nothing": W8})


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("strategy", "group_size"), [("group", 32), ("channel", None), ("tensor", None)])
def test_schemes_survive_the_translation(bits: int, symmetric: bool, strategy, group_size: int | None) -> None:
    scheme = Scheme(bits, symmetric, strategy, group_size)
    assert scheme_of(arguments_of(scheme)) == scheme
