"""Whether plain transformers opens a result, from names and schemes alone."""

from pathlib import Path

import pytest
import zoo_models

from leangrid.models.plain_readers import plain_reading
from leangrid.models.skeleton import Skeleton
from leangrid.planning.readers import opened_in
from leangrid.recipe import Recipe
from leangrid.schemes import Scheme
from leangrid.storage.source import open_source

SYMMETRIC, ASYMMETRIC = Scheme.parse("W4A16_SYM"), Scheme.parse("W4A16")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Skeleton:
    return Skeleton(open_source(zoo_models.save(zoo_models.build("qwen3_moe", "causal"), tmp_path_factory.mktemp("m"))))


def read(skeleton: Skeleton, experts: Scheme | None, others: Scheme):
    names = skeleton.stored.result_names
    assert names is not None
    schemes = {name: experts if ".experts." in name else others for name in skeleton.all_linear_names()}
    stated = {name: scheme for name, scheme in schemes.items() if scheme is not None}
    paths = {name: skeleton.path(name) for name in stated}
    mixtures = {path: form.linears for path, form in skeleton.expert_forms.items()}
    return plain_reading(names, paths, mixtures, stated)


@pytest.mark.parametrize("ignore", ["*.experts.*", "model.layers.1.*"])
def test_experts_that_stay_in_tensors_of_all_are_no_obstacle(ignore: str, tmp_path: Path) -> None:
    source = zoo_models.save(zoo_models.build("qwen3_moe", "causal"), tmp_path)
    recipe = Recipe(scheme="W4A16_SYM", ignore=(ignore,)).resolved("W4A16_SYM")
    skeleton = Skeleton(open_source(source))
    skeleton.select(recipe.ignore, recipe.only)
    assert opened_in(skeleton, recipe) == {"leangrid.load": "yes", "transformers": "yes"}


@pytest.mark.parametrize(
    ("experts", "others", "obstacle"),
    [
        (SYMMETRIC, SYMMETRIC, None),
        (SYMMETRIC, ASYMMETRIC, None),
        (ASYMMETRIC, ASYMMETRIC, "it takes no zero points of experts"),
        (None, SYMMETRIC, "it drops experts that stay as they are beside packed layers"),
    ],
)
def test_obstacles(mixture: Skeleton, experts: Scheme | None, others: Scheme, obstacle: str | None) -> None:
    found = read(mixture, experts, others)
    assert found.obstacle == obstacle and found.dequantize
    assert all(".experts." in name for name in found.merged) and bool(found.merged) == (experts is not None)


@pytest.mark.parametrize("kind", ["gpt_oss", "longcat_flash"])
def test_packed_experts_for_which_transformers_has_no_place(kind: str, tmp_path: Path) -> None:
    """It does not merge those of the first, and leaves the room of the second's experts that do nothing unfilled."""
    skeleton = Skeleton(open_source(zoo_models.save(zoo_models.build(kind, "causal"), tmp_path)))
    assert read(skeleton, SYMMETRIC, SYMMETRIC).obstacle == "it has no place for packed experts of this model"
