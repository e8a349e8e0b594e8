"""What the quality benchmark measures, and what of it is still to be run."""

from __future__ import annotations

from typing import Any

import pytest
from bench_figures import bench

from hf_shrink.pipeline.recipes import load_recipe

variants = bench("variants")
SETTINGS = variants.settings([4, 2, 4], 64, [2])
OURS = [variants.DENSE, *variants.our_variants(["balanced", "best"], ["rtn"], SETTINGS)]


def test_settings_by_bits_and_their_names() -> None:
    assert [s.label for s in SETTINGS] == ["W4g64", "W2g64-asymmetric"]
    assert variants.Setting(4, 64, kind="nf4").label == "W4g64-nf4"
    assert variants.Setting(8, None).label == "W8"
    assert [v.id for v in OURS[:4]] == ["dense", "balanced:W4g64", "best:W4g64", "rtn:W4g64"]


def test_autoround_says_its_steps_where_they_are_not_its_default() -> None:
    setting = SETTINGS[0]
    assert variants.Variant("autoround", "peer", setting, 200).id == "autoround:W4g64"
    assert variants.Variant("autoround", "peer", setting, 50).id == "autoround-50:W4g64"


@pytest.mark.parametrize("variant", OURS[1:], ids=lambda v: v.id)
def test_recipes_of_ours_are_valid_and_say_the_setting(variant: Any) -> None:
    recipe = load_recipe(variant.recipe(8, 32))
    assert recipe.quantize is not None
    scheme = recipe.quantize.base_scheme()
    assert (scheme.bits, scheme.group_size, scheme.symmetric) == (
        variant.setting.bits,
        variant.setting.group,
        variant.setting.symmetric,
    )
    assert variant.name in (recipe.quantize.effort, recipe.quantize.method)
    assert (recipe.calibration.samples, recipe.calibration.length) == (8, 32)


def test_the_dense_model_has_no_recipe() -> None:
    assert variants.DENSE.recipe(8, 32) is None


@pytest.mark.parametrize(
    ("name", "count"), [("best:W4g64", 1), ("best", 2), ("W2g64-asymmetric", 3), ("b*:W4*", 2), ("*", 7), ("dense", 1)]
)
def test_names_are_ids_parts_of_ids_or_globs(name: str, count: int) -> None:
    assert len(variants.matching([name], OURS)) == count


def test_a_name_that_means_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="'bets' names no variant; there are: dense, balanced:W4g64"):
        variants.matching(["best", "bets"], OURS)


def ids(found: list[Any]) -> list[str]:
    return [v.id for v in found]


def test_only_what_is_missing_runs() -> None:
    assert ids(variants.to_run(OURS, {}, None, [])) == ids(OURS)
    done = {v.id: {} for v in OURS}
    assert variants.to_run(OURS, done, None, []) == []
    del done["rtn:W4g64"]
    assert ids(variants.to_run(OURS, done, None, [])) == ["rtn:W4g64"]


def test_only_narrows_and_rerun_adds() -> None:
    done = {"dense": {}, "best:W4g64": {}}
    assert ids(variants.to_run(OURS, done, ["best"], [])) == ["best:W2g64-asymmetric"]
    assert ids(variants.to_run(OURS, done, ["best"], ["best:W4g64"])) == ["best:W4g64", "best:W2g64-asymmetric"]
    assert ids(variants.to_run(OURS, done, [], ["dense"])) == ["dense"]


def test_the_dense_model_comes_along_where_it_is_missing() -> None:
    assert ids(variants.to_run(OURS, {}, ["rtn:W4g64"], [])) == ["dense", "rtn:W4g64"]
