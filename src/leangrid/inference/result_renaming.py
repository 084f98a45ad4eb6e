"""transformers' names of the tensors of a result, given to its loader as one renaming."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from transformers.core_model_loading import WeightConverter, WeightRenaming


def leave_alone(conversion: WeightConverter, modules: Collection[str]) -> None:
    """Let a conversion of transformers leave the tensors of ``modules`` (paths in the model), which have their final
    names: codes are called ``weight`` in some containers, and no weight is made of them."""

    class Beside(type(conversion)):
        __slots__ = ()

        def rename_source_key(self, source_key: str) -> tuple[str, Any]:
            inside = source_key.rpartition(".")[0] in modules
            return (source_key, None) if inside else super().rename_source_key(source_key)

    conversion.__class__ = Beside


class ResultRenaming(WeightRenaming):
    """Gives the tensors of each linear the name of its module, and other tensors the names that ``others`` give them.

    Args:
        paths: name of a linear in the files -> its path in the model.
        others: transformers' own renamings for this model.
    """

    __slots__ = ("_others", "_paths")

    def __init__(self, paths: Mapping[str, str], others: Sequence[WeightRenaming]) -> None:
        super().__init__(r"^(.+)", r"\1")
        self._paths, self._others = dict(paths), list(others)

    def rename_source_key(self, source_key: str) -> tuple[str, Any]:
        """The tensor's name in the model, and a pattern where it is another."""
        owner, _, leaf = source_key.rpartition(".")
        if owner in self._paths:
            return f"{self._paths[owner]}.{leaf}", None
        for other in self._others:
            source_key = other.rename_source_key(source_key)[0]
        return source_key, None

    def __deepcopy__(self, memo: dict[int, Any]) -> "ResultRenaming":
        return self
