"""Mixtures of experts over several ranks: each expert is solved by one of them, with the tokens of all; and models in
which more than hidden states flows, of which no states are saved."""

import json
from pathlib import Path

import forked_ranks
import pytest
import tiny_models
import torch
import zoo_models
from ranks_run import KILLED, TOLERANCE, contents, losses, records, sentences, together

from leangrid.run.ranks import join_ranks
from leangrid.solve.hessian import HessianSum
from leangrid.storage.manifest import list_differences

MORE = ("--scheme", "W4A16_G32", "--max-rescued", "1")  # some experts see no token


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save("qwen3_moe", tmp_path_factory.mktemp("mixture") / "model")


@pytest.fixture(scope="module")
def alone(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of one rank."""
    out = tmp_path_factory.mktemp("alone") / "out"
    assert [one.status for one in together(source, out, 1, *MORE)] == [0]
    return out


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of two ranks that nothing happened to."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    ended = together(source, out, 2, *MORE)
    assert [one.status for one in ended] == [0, 0], ended
    return out


def beside(alone: Path, several: Path) -> None:
    """Each layer of ``several`` ranks has the loss, and the same tokens, as that of one rank within the tolerance."""
    one, other = losses(alone), losses(several)
    assert other == {name: pytest.approx(loss, rel=TOLERANCE) for name, loss in one.items()}
    tokens = {name: line["tokens"] for name, line in records(alone).items()}
    for name, line in records(several).items():
        assert line["tokens"] == pytest.approx(tokens[name], rel=0.1, abs=4), name


def sums_of(rank: int) -> list[HessianSum]:
    """Of three experts, over tokens of one rank; the second is wider than what is sent at once, and has a token that
    is not finite on rank 2."""
    sums = [HessianSum(cols) for cols in (8, 1100, 8)]
    for expert, total in enumerate(sums):
        x = torch.randn(3 + rank, total.cols, generator=torch.Generator().manual_seed(10 * rank + expert))
        if (rank, expert) == (2, 1):
            x[0, 0] = torch.nan
        total.add(x)
    return sums


def test_the_sums_of_an_expert_come_to_the_rank_that_solves_it(tmp_path: Path) -> None:
    """Three experts of four ranks: the last rank has none of its own and sends all it has."""

    def job(rank: int) -> None:
        with join_ranks("cpu") as (ranks, _):
            own = ranks.sum_for_owners(sums_of(rank))
            found = None if own is None else (own.parts()[0], own.tokens, own.dropped)
            torch.save(found, tmp_path / str(rank))

    assert [one.status for one in forked_ranks.run(4, job)] == [0] * 4
    everyone = [sums_of(rank) for rank in range(4)]
    for expert in range(3):
        matrix, tokens, dropped = torch.load(tmp_path / str(expert))
        before = [everyone[(expert - step) % 4][expert] for step in range(4)]
        total = before[0].parts()[0].clone()
        for other in before[1:]:
            total += other.parts()[0]
        assert torch.equal(matrix.triu(), total.triu()), "in the order of the ranks before it"
        assert tokens == sum(one.tokens for one in before) and dropped == (1 if expert == 1 else 0)
    assert torch.load(tmp_path / "3") is None


def test_experts_over_two_ranks_are_those_of_one(alone: Path, expected: Path) -> None:
    beside(alone, expected)
    assert sum(".experts." in name for name in losses(expected)) == 24
    assert json.loads((expected / "manifest.json").read_text())["determinism"]["scope"]["ranks"] == ["2"]


def test_two_ranks_give_the_same_bytes_twice(source: Path, expected: Path, tmp_path: Path) -> None:
    assert [one.status for one in together(source, tmp_path / "out", 2, *MORE)] == [0, 0]
    assert contents(tmp_path / "out") == contents(expected)


@pytest.mark.parametrize("count", [3, pytest.param(5, marks=pytest.mark.slow)])
def test_ranks_without_an_expert_in_the_last_round_wait(source: Path, alone: Path, tmp_path: Path, count: int) -> None:
    """Four experts: of three ranks two have none in the second round, of five one never has one."""
    ended = together(source, tmp_path / "out", count, *MORE, "--samples", "6")
    assert [one.status for one in ended] == [0] * count, ended
    assert losses(tmp_path / "out").keys() == losses(alone).keys()


# Which rank dies where: of two blocks with four rounds each "ranks.owners:6" is in the second.
DEATHS = {"a follower": (1, "ranks.owners:6"), "rank 0": (0, "ranks.owners:6")}


@pytest.mark.fault("R4")
@pytest.mark.parametrize("death", ["a follower", pytest.param("rank 0", marks=pytest.mark.slow)])
def test_a_rank_that_dies_among_experts_is_named_and_the_same_command_goes_on(
    source: Path, expected: Path, tmp_path: Path, death: str
) -> None:
    out, (lost, failpoint) = tmp_path / expected.name, DEATHS[death]
    ended = together(source, out, 2, *MORE, failing={lost: failpoint})
    other = ended[1 - lost]
    assert ended[lost].status == KILLED and other.status == 3, ended
    assert len(sentences(other.said)) == 1 and f"error: rank {lost} is lost" in other.said, other.said
    assert "Traceback" not in other.said and not out.exists()
    assert (tmp_path / "out.partial" / "blocks" / "0000.json").exists()
    assert [one.status for one in together(source, out, 2, *MORE)] == [0, 0]
    assert not list_differences(out) and contents(out) == contents(expected)


@pytest.mark.slow
@pytest.mark.fault("R4")
def test_of_four_ranks_the_one_that_died_among_experts_is_named_by_all(source: Path, tmp_path: Path) -> None:
    ended = together(source, tmp_path / "out", 4, *MORE, failing={2: "ranks.owners:3"})
    assert [one.status for one in ended] == [3, 3, KILLED, 3], ended
    assert all("rank 2 is lost" in ended[rank].said and len(sentences(ended[rank].said)) == 1 for rank in (0, 1, 3)), (
        ended
    )


# gemma3n shares keys and values between blocks; glm_moe_dsa is a mixture whose blocks share indices; hrm_text calls its
# blocks more than once, so every rank reads what rank 0 has just committed.
@pytest.mark.parametrize(
    "name", ["gemma3n_text", *(pytest.param(name, marks=pytest.mark.slow) for name in ("glm_moe_dsa", "hrm_text"))]
)
def test_a_model_whose_states_are_not_saved_resumes_on_ranks(tmp_path: Path, name: str) -> None:
    source = zoo_models.save(zoo_models.build(name, "causal"), tmp_path / "model")
    undisturbed, killed = tmp_path / "undisturbed" / "out", tmp_path / "killed" / "out"
    for out in (undisturbed, killed):
        out.parent.mkdir()
    ended = together(source, undisturbed, 2, *MORE, within=300)
    assert [one.status for one in ended] == [0, 0], ended
    ended = together(source, killed, 2, *MORE, failing={0: "journal.after_block:2"}, within=300)
    assert [one.status for one in ended] == [KILLED, 3], ended
    ended = together(source, killed, 2, *MORE, within=300)
    assert [one.status for one in ended] == [0, 0], ended
    assert "resuming after block" in ended[0].said
    assert contents(killed) == contents(undisturbed)
