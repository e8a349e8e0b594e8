"""Model types without a table: bound by convention only where numbers agree, and never silently wrong."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conformance.cases import CASES
from huggingface_hub.errors import StrictDataclassClassValidationError
from image_batches import text_batch
from tiny import MadeUpConfig, tiny_llama
from torch import Tensor, nn
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_shrink import shrink
from hf_shrink.architectures.binding import bind, known_families
from hf_shrink.architectures.linears import is_matrix, matrix
from hf_shrink.architectures.probe import build, difference, find_inputs, outputs
from hf_shrink.architectures.tiny import rebuilt, shrunken
from hf_shrink.plan import BlockPlan, Plan, StackPlan

# Query, key and value apart, fused in each of three layouts; gated and plain; decoders, encoders, images, sound.
TYPES = {
    "granite": "GraniteForCausalLM",
    "gpt_bigcode": "GPTBigCodeForCausalLM",
    "persimmon": "PersimmonForCausalLM",
    "glm": "GlmForCausalLM",
    "starcoder2": "Starcoder2ForCausalLM",
    "electra": "ElectraForMaskedLM",
    "roc_bert": "RoCBertForMaskedLM",
    "pegasus": "PegasusForConditionalGeneration",
    "dinov2": "Dinov2Model",
    "siglip_vision_model": "SiglipVisionModel",
    "hubert": "HubertForCTC",
}
DEPTHS = ("num_hidden_layers", "n_layer", "encoder_layers", "decoder_layers")


def tiny_type(name: str) -> PreTrainedModel:
    """Four blocks of the type's default settings, narrow, with random weights."""
    config = CONFIG_MAPPING[name]()
    for key in DEPTHS:
        if key in vars(config):
            setattr(config, key, 4)
    for key, value in list(vars(config).items()):
        if isinstance(value, list | tuple) and len(value) > 4 and "layer" in key:
            setattr(config, key, value[:4])
    if "out_features" in vars(config) or "_out_features" in vars(config):
        config._out_features, config._out_indices, config.stage_names = ["stage4"], [4], ["stem", *STAGES]
    return build(getattr(transformers, TYPES[name]), rebuilt(shrunken(config)))


STAGES = [f"stage{number}" for number in range(1, 5)]


def uneven_plan(model: PreTrainedModel) -> Plan:
    """Block 1 out; of the others other channels in each, and a head or a KV group less where heads can go."""
    stacks = {}
    for stack in bind(model).stacks:
        assert stack.spec is not None
        removable = stack.spec.depth_fixed is None and len(stack.blocks) > 2
        kept = tuple(b.index for b in stack.blocks if b.index != 1 or not removable)
        blocks = {}
        for block in (stack.blocks[index] for index in kept):
            channels = heads = None
            if block.mlp is not None:
                channels = tuple(c for c in range(block.mlp.channels) if (c + block.index) % (5 + block.index) != 2)
            if block.attention is not None and block.index != 2:
                each, groups = block.attention.heads_per_group, block.attention.kv_heads
                whole = range(block.attention.heads)
                gone = block.index % (groups if groups > 1 else each)
                heads = tuple(h for h in whole if (h // each if groups > 1 else h % each) != gone)
            blocks[block.index] = BlockPlan(query_heads=heads, channels=channels)
        stacks[stack.name] = StackPlan(kept, blocks)
    return Plan(model.config.model_type, stacks, refit=False)


def masked(model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """A copy whose matrices read nothing of what the plan removes, and whose removed blocks do nothing."""
    model = copy.deepcopy(model)
    for stack in bind(model).stacks:
        wanted = plan.stacks[stack.name]
        for block in stack.blocks:
            kept = wanted.blocks.get(block.index, BlockPlan())
            for part, role, units in (
                (block.attention, "output", kept.query_heads),
                (block.mlp, "down", kept.channels),
            ):
                if part is not None and units is not None:
                    slot = part.slot(role)
                    lost = slot.positions([u for u in range(len(slot.index)) if u not in units])
                    matrix(block.module.get_submodule(slot.path.removeprefix(f"{block.path}.")))[:, lost] = 0
            if block.index not in wanted.kept:
                block.module.forward = skip(block.module.forward)
    return model


def skip(real: Any) -> Any:
    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        found = real(hidden_states, *args, **kwargs)
        return (hidden_states, *found[1:]) if isinstance(found, tuple) else hidden_states

    return forward


@pytest.mark.parametrize("name", TYPES)
def test_cut_equals_masked_and_loads_again(name: str, tmp_path: Path) -> None:
    assert name not in known_families()
    model = tiny_type(name)
    inputs = find_inputs(model)
    binding = bind(model)
    assert binding.source == "convention"
    assert any(b.mlp for b in binding.blocks) and any(b.attention for b in binding.blocks)
    plan = uneven_plan(model)
    dense, expected = outputs(model, inputs), outputs(masked(model, plan), inputs)
    shrink(model, plan, progress=False)
    found = outputs(model, inputs)
    assert difference(found, expected) < 1e-4 < 1e-2 < difference(found, dense)
    model.save_pretrained(tmp_path)
    assert difference(outputs(type(model).from_pretrained(tmp_path).eval(), inputs), found) < 1e-5


@pytest.mark.parametrize("name", ["granite", "electra"])
def test_uniform_sizes_go_into_stock_keys(name: str, tmp_path: Path) -> None:
    model = tiny_type(name)
    inputs = find_inputs(model)
    recipe = {"steps": [{"prune": {"what": "width", "method": "magnitude", "ratio": 0.2, "refit": False}}]}
    shrink(model, recipe, progress=False)
    assert model.shrink_report.portable and model.config.hf_shrink["shapes"] == {}
    assert model.config.intermediate_size < 96
    type(model).save_pretrained(model, tmp_path)
    stock = type(model)(type(model.config).from_pretrained(tmp_path)).eval()
    stock.load_state_dict(model.state_dict())
    assert difference(outputs(stock, inputs), outputs(model, inputs)) < 1e-5


class _Mixing(nn.Linear):
    """Reads every unit together with its neighbour, so that none can be taken out alone."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + x.roll(1, -1))


class _Mixed(LlamaForCausalLM):
    config_class = MadeUpConfig

    def __init__(self, config: MadeUpConfig) -> None:
        super().__init__(config)
        for block in self.model.layers:
            _mix(block.self_attn, "o_proj")
            _mix(block.mlp, "down_proj")


def _mix(owner: nn.Module, name: str) -> None:
    """Roll what the matrix reads by one position in front of it, with a module that is no matrix."""
    getattr(owner, name).register_forward_pre_hook(lambda _, args: (args[0].roll(1, -1),))


class _Numbered(LlamaForCausalLM):
    """Every block scales its attention by its number."""

    config_class = MadeUpConfig

    def __init__(self, config: MadeUpConfig) -> None:
        super().__init__(config)
        for number, block in enumerate(self.model.layers, start=1):
            block.self_attn.scaling /= number


class _Widening(LlamaForCausalLM):
    """A narrow model has a module that a wide one lacks."""

    config_class = MadeUpConfig

    def __init__(self, config: MadeUpConfig) -> None:
        super().__init__(config)
        if config.intermediate_size == 96:
            self.extra = nn.Identity()


def made_up(kind: type[LlamaForCausalLM], **changes: Any) -> PreTrainedModel:
    settings = {**tiny_llama().config.to_diff_dict(), "model_type": "made-up", **changes}
    return build(kind, MadeUpConfig(**settings))


def test_units_that_are_read_elsewhere_are_not_bound() -> None:
    binding = bind(made_up(_Mixed))
    assert binding.source == "convention"  # whole blocks can still go
    assert all(block.attention is None and block.mlp is None for block in binding.blocks)
    assert "cutting heads changes the outputs" in binding.missing[0]
    assert "cutting channels changes the outputs" in binding.missing[1]


def test_blocks_whose_attention_has_no_known_form_can_go() -> None:
    model = made_up(_Mixed)
    inputs = find_inputs(model)
    step = {"what": "depth", "method": "block_influence", "blocks": 1, "refit": False}
    dense = copy.deepcopy(model)
    shrink(model, {"steps": [{"prune": step}]}, calibration=[inputs], progress=False)
    assert len(model.model.layers) == model.config.num_hidden_layers == 3
    assert difference(outputs(model, inputs), outputs(masked(dense, model.shrink_record.plan), inputs)) < 1e-4


def test_blocks_that_know_their_number_stay() -> None:
    binding = bind(made_up(_Numbered))
    assert binding.stacks[0].spec.depth_fixed.startswith("removing block")
    assert all(block.attention is not None and block.mlp is not None for block in binding.blocks)


def test_a_small_copy_that_is_built_otherwise_proves_nothing() -> None:
    binding = bind(made_up(_Widening, intermediate_size=128))
    assert binding.source is None and "other modules" in binding.missing[0]
    assert bind(made_up(_Widening, intermediate_size=96)).source == "convention"


def test_verifying_leaves_the_random_state_alone() -> None:
    model = made_up(_Numbered, rms_norm_eps=1e-4)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    assert bind(model).source == "convention"
    assert torch.equal(torch.rand(3), expected)


def test_a_matrix_with_a_computation_of_its_own_is_none() -> None:
    assert not is_matrix(_Mixing(8, 8))
    assert is_matrix(type("Plain", (nn.Linear,), {"forward": lambda self, x: x @ self.weight.T + self.bias})(8, 8))


class _Strict(MadeUpConfig):
    """Refuses another number of blocks than it has layer types, as some of transformers' configs do."""

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        types = getattr(self, "layer_types", None)
        if types is not None and len(types) != self.num_hidden_layers:
            raise StrictDataclassClassValidationError("layer_types", ValueError("one type a block"))


class _Listed(LlamaForCausalLM):
    config_class = _Strict


def test_a_config_that_refuses_a_guess_is_only_a_wrong_guess() -> None:
    settings = {**tiny_llama().config.to_diff_dict(), "model_type": "made-up"}
    config = _Strict(**settings, layer_types=["full_attention"] * 4)
    spec = bind(build(_Listed, config)).stacks[0].spec
    assert spec is not None and spec.depth_fixed is None and spec.block_lists == ("layer_types",)


@pytest.mark.parametrize(("kind", "heads"), [("olmo2", False), ("phi", True)])
def test_llava_with_a_text_outside_the_table_is_bound_by_what_is_verified(kind: str, heads: bool) -> None:
    """OLMo 2 norms queries over all heads at once, so that none can go; Phi has an MLP without a gate."""
    config = CASES["llava"].build().config
    sizes = {key: getattr(config.text_config, key) for key in ("vocab_size", "hidden_size", "intermediate_size")}
    text = CONFIG_MAPPING[kind](**sizes, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=3)
    config.text_config, config.pad_token_id = text, 0
    dense = build(LlavaForConditionalGeneration, config)
    binding = bind(dense)
    assert binding.source == "convention" and (binding.stack("text").blocks[0].attention is not None) is heads
    quantize = {"method": "rtn", "scheme": "W8A16", "group_size": 16}
    small = shrink(copy.deepcopy(dense), {"steps": [{"quantize": quantize}]}, progress=False)
    assert difference(outputs(small, text_batch()), outputs(dense, text_batch())) < 0.1
    width = {"what": "width", "method": "magnitude", "ratio": 0.3, "refit": False}
    small = shrink(dense, {"steps": [{"prune": width}]}, progress=False)
    outputs(small, text_batch())
