"""Experts that a result holds one by one, in the tensors of all experts that plain transformers reads of such a model.

Where transformers merges experts that are stored one by one itself, a dense export leaves them so. Of models whose
checkpoints hold all experts of a block in one tensor (expert_forms.py) it reads nothing else."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from leangrid.models.expert_forms import FusedForm
from leangrid.models.result_reader import ResultReader


@dataclass(frozen=True)
class MergedExperts:
    """The experts of one mixture.

    Attributes:
        owner: the name of the mixture in the files, such as ``model.layers.0.mlp.experts``.
        form: how transformers' module holds them.
    """

    owner: str
    form: FusedForm

    def parts(self, kind: str) -> dict[str, list[str]]:
        """Name of each fused tensor -> the names of the linears' ``kind`` ("weight", "bias") that it holds."""
        leaves = [leaf for stage in self.form.stages for leaf in stage]
        found: dict[str, list[str]] = {}
        for leaf in leaves if kind == "weight" or self.form.biased else ():
            names = found.setdefault(f"{self.owner}.{self.form.fused_name(leaf, kind)}", [])
            names += [f"{self.owner}.{expert}.{leaf}" for expert in range(self.form.count)]
        return found

    def tensors(self, result: ResultReader) -> Iterator[tuple[str, Tensor]]:
        """The fused tensors, one after another."""
        for kind in ("weight", "bias"):
            for name, linears in self.parts(kind).items():
                yield name, self._merged(result, linears, kind)

    def _merged(self, result: ResultReader, linears: list[str], kind: str) -> Tensor:
        count = self.form.count
        pieces = [
            self.form.joined([_read(result, name, kind) for name in linears[expert::count]], kind)
            for expert in range(count)
        ]
        return torch.stack(pieces)


def find_merged_experts(result: ResultReader) -> list[MergedExperts]:
    """The mixtures of a result whose experts plain transformers does not read one by one."""
    found = []
    for path, form in result.expert_forms.items():
        last = f".0.{form.leaves[-1]}"
        name = result.name_of(path + last)
        if name is not None and result.renamed(name) == path + last:
            found.append(MergedExperts(name.removesuffix(last), form))
    return found


def _read(result: ResultReader, name: str, kind: str) -> Tensor:
    if kind == "weight" and name in result.layers:
        return result.weight_in_model_dtype(name)
    return result.checkpoint.read(f"{name}.{kind}")
