"""Rows N13, S12 and C14 of the fault table: text and tokenizers that do not fit, and a run that nobody watches."""

import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import forked_ranks
import pytest
import tiny_models
import torch

from leangrid.cli.app import app
from leangrid.cli.progress_bar import Terminal
from leangrid.data.calibration import hash_windows, make_windows
from leangrid.errors import CalibrationError, ResumeError
from leangrid.evaluation import evaluate
from leangrid.progress import Event
from leangrid.recipe import Recipe
from leangrid.run.quantize import quantize
from leangrid.storage.manifest import list_differences

Tiny = Callable[..., Path]
ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.filterwarnings("ignore:leangrid runs without its C")


def recipe(file: Path, samples: int = 4, length: int = 32, seed: int = 0) -> Recipe:
    return Recipe(scheme="NU4", calibration=str(file), samples=samples, length=length, seed=seed)


def written(folder: Path, content: str | bytes, name: str = "text.txt") -> Path:
    file = folder / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


@pytest.mark.fault("N13")
def test_too_little_text_is_an_error_with_have_and_need(tmp_path: Path) -> None:
    tokenizer = tiny_models.tokenizer()
    have = len(tokenizer("too short")["input_ids"])
    with pytest.raises(CalibrationError, match=rf"{have} tokens, 128 needed \(4 x 32\)"):
        make_windows(recipe(written(tmp_path, "too short")), tokenizer)
    rows = written(tmp_path, '{"text": "too short"}\n' + '{"text": ""}\n' * 9, "rows.jsonl")
    with pytest.raises(
        CalibrationError, match=rf"{have} tokens, 128 needed \(4 x 32\); 9 of 10 rows left out \(hold no text\)"
    ):
        make_windows(recipe(rows), tokenizer)


@pytest.mark.fault("N13")
@pytest.mark.parametrize("content", ["", "   \n", "\u200b\ufeff\n" * 500])
def test_a_blank_text_is_refused(content: str, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="holds no text"):
        make_windows(recipe(written(tmp_path, content)), tiny_models.tokenizer())


@pytest.mark.fault("N13")
def test_text_for_fewer_windows_says_for_how_many(tmp_path: Path) -> None:
    tokenizer = tiny_models.tokenizer()
    file = written(tmp_path, "words and words " * 20)
    enough = len(tokenizer(file.read_text())["input_ids"]) // 32
    assert 0 < enough < 50
    with pytest.raises(CalibrationError, match=f"--samples {enough} "):
        make_windows(recipe(file, samples=50), tokenizer)
    assert make_windows(recipe(file, samples=enough), tokenizer).shape == (enough, 32)


@pytest.mark.fault("N13")
@pytest.mark.parametrize("name", ["text.txt", "text.jsonl"])
def test_a_text_that_is_not_utf8_is_refused_by_place(name: str, tmp_path: Path) -> None:
    file = written(tmp_path, b'{"text": "abc\xff\xfe"}\n', name)
    with pytest.raises(CalibrationError, match=rf"not UTF-8 at byte 13.*{name}"):
        make_windows(recipe(file), tiny_models.tokenizer())


@pytest.mark.fault("N13")
def test_no_padding_token_is_ever_used_and_the_seed_fixes_the_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = [f"document {index} " * (index % 7) for index in range(200)]  # some are empty, none as long as a window
    file = written(tmp_path, "".join(json.dumps({"text": each}) + "\n" for each in documents), "text.jsonl")
    tokenizer = tiny_models.tokenizer()
    found = make_windows(recipe(file, 16, 64), tokenizer)
    assert not (found == tokenizer.pad_token_id).any() and found.shape == (16, 64)
    monkeypatch.setattr("leangrid.data.corpora._embedded", lambda: tuple(documents))
    hashes = [
        hash_windows(make_windows(Recipe(calibration="embedded", samples=16, length=64, seed=seed), tokenizer))
        for seed in (0, 0, 1)
    ]
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.fault("N13")
def test_a_run_with_too_little_text_leaves_nothing(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="too little text"):
        quantize(tiny("llama3"), tmp_path / "out", recipe(written(tmp_path, "short")))
    assert [each.name for each in tmp_path.iterdir()] == ["text.txt"]


@pytest.mark.fault("S12")
def test_a_token_beyond_the_embedding_is_another_models_tokenizer(tiny: Tiny, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny("llama3"), source)
    text = "these words come again and again " * 50
    used = tiny_models.tokenizer().convert_ids_to_tokens(tiny_models.tokenizer()(text)["input_ids"][40])
    swapped = json.loads((source / "tokenizer.json").read_text())
    swapped["model"]["vocab"][used] = 99_999
    (source / "tokenizer.json").write_text(json.dumps(swapped))
    with pytest.raises(CalibrationError, match=r"token 99999 has no row in an embedding of 512.*another model"):
        quantize(source, tmp_path / "out", recipe(written(tmp_path, text)))
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.fault("S12")
def test_a_tokenizer_that_may_be_another_models_is_doubted_aloud(tiny: Tiny, tmp_path: Path) -> None:
    file = written(tmp_path, "words of a corpus " * 100)
    heard: dict[str, list[str]] = {}
    for name in ("own", "other"):
        source = tmp_path / name
        shutil.copytree(tiny("llama3"), source)
        if name == "other":
            config = json.loads((source / "config.json").read_text())
            (source / "config.json").write_text(json.dumps({**config, "eos_token_id": [7, 9]}))
            swapped = json.loads((source / "tokenizer.json").read_text())
            swapped["model"]["vocab"]["neverseen"] = 512
            (source / "tokenizer.json").write_text(json.dumps(swapped))
        events: list[Event] = []
        quantize(source, tmp_path / f"{name}-out", recipe(file), progress=events.append)
        heard[name] = [event.message for event in events if "another model" in event.message]
    assert heard["own"] == []
    assert ["513 tokens" in heard["other"][0], "eos" in heard["other"][1], len(heard["other"])] == [True, True, 2]


@pytest.mark.fault("S12")
@pytest.mark.fault("C12")
def test_a_tokenizer_swapped_between_two_runs_is_another_run(tiny: Tiny, tmp_path: Path) -> None:
    source, file = tmp_path / "source", written(tmp_path, "words of a corpus " * 100)
    shutil.copytree(tiny("llama3"), source)

    def stop(event: Event) -> None:
        if event.stage == "block":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "out", recipe(file), progress=stop)
    text = (source / "tokenizer_config.json").read_text()
    (source / "tokenizer_config.json").write_text(text + " ")
    with pytest.raises(ResumeError, match=r"another source\.side_files\.tokenizer_config\.json"):
        quantize(source, tmp_path / "out", recipe(file))
    (source / "tokenizer_config.json").write_text(text)
    quantize(source, tmp_path / "out", recipe(file))
    assert list_differences(tmp_path / "out") == []


@pytest.mark.fault("S12")
def test_without_a_tokenizer_a_corpus_is_refused(tmp_path: Path) -> None:
    tiny_models.build("llama3").save_pretrained(tmp_path / "source")
    with pytest.raises(CalibrationError, match=r"no tokenizer.*self"):
        quantize(tmp_path / "source", tmp_path / "out", recipe(written(tmp_path, "text " * 200)))


@pytest.mark.fault("S12")
def test_the_first_window_is_shown(tiny: Tiny, tmp_path: Path) -> None:
    events: list[Event] = []
    file = written(tmp_path, "The very first words of the corpus. " * 50)
    quantize(tiny("llama3"), tmp_path / "out", recipe(file), progress=events.append)
    assert any("The very first words" in event.message for event in events)


def chat_source(tiny: Tiny, folder: Path) -> Path:
    """A model with a chat template of its own."""
    source = folder / "source"
    shutil.copytree(tiny("llama3"), source)
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    config = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    return source


def conversations(folder: Path) -> Path:
    said = [("user", "What are the words?"), ("assistant", "They are many, and these are some of them.")]
    rows = [
        {"id": "an-id", "messages": [{"role": role, "content": content} for role, content in said]} for _ in range(40)
    ]
    return written(folder, "\n".join(map(json.dumps, [*rows, {"messages": None}])), "rows.jsonl")


@pytest.mark.fault("N13")
def test_conversations_go_through_the_model_s_template_and_the_manifest_says_so(tiny: Tiny, tmp_path: Path) -> None:
    source, file, events = chat_source(tiny, tmp_path), conversations(tmp_path), []
    quantize(source, tmp_path / "out", recipe(file), progress=events.append)
    told = json.loads((tmp_path / "out" / "manifest.json").read_text())["calibration"]
    assert (
        told["source"] == str(file)
        and told["fields"] == ["messages"]
        and told["template"] == "the chat template of the model"
    )
    assert len(told["template_sha256"]) == 64
    assert told["first"].startswith("[user] What are the words? [assistant] They are many")
    assert any(
        event.message.startswith("calibration: 4 x 32 tokens of column 'messages' in the chat template")
        for event in events
    )
    assert "an-id" not in told["first"] and list_differences(tmp_path / "out") == []


@pytest.mark.fault("N13")
@pytest.mark.fault("C12")
def test_a_resumed_run_says_the_same_of_its_text_and_another_column_is_another_run(tiny: Tiny, tmp_path: Path) -> None:
    source, chosen = chat_source(tiny, tmp_path), recipe(conversations(tmp_path))

    def stop(event: Event) -> None:
        if event.stage == "block":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "out", chosen, progress=stop)
    with pytest.raises(ResumeError, match=r"another recipe\.text_field"):
        quantize(source, tmp_path / "out", chosen.model_copy(update={"text_field": "messages"}))
    quantize(source, tmp_path / "out", chosen)
    quantize(source, tmp_path / "whole", chosen)
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("out", "whole")]
    assert manifests[0]["calibration"] == manifests[1]["calibration"] and manifests[0]["calibration"]["fields"] == [
        "messages"
    ]
    assert manifests[0]["files"]["model.safetensors"] == manifests[1]["files"]["model.safetensors"]


@pytest.mark.fault("N13")
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.txt", "folder"])
def test_a_text_that_is_refused_leaves_nothing(
    name: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = {"rows.jsonl": '{"title": "a"}\n', "rows.csv": "id,title\n1,a\n", "rows.txt": "\n \n"}
    if name in contents:
        written(tmp_path, contents[name], name)
    else:
        (tmp_path / name).mkdir()
    # Before the model is even opened, for that may take long.
    monkeypatch.setattr("leangrid.run.inputs.open_checkpoint", lambda *_: pytest.fail("the model was opened"))
    with pytest.raises(CalibrationError):
        quantize(tiny("llama3"), tmp_path / "out", recipe(tmp_path / name))
    monkeypatch.setattr(
        sys.modules["leangrid.evaluation.measure"], "load_model", lambda *_: pytest.fail("the model was opened")
    )
    with pytest.raises(CalibrationError):
        evaluate(tiny("llama3"), None, str(tmp_path / name))
    assert [each.name for each in tmp_path.iterdir()] == [name]


def test_evaluation_takes_the_same_files(tiny: Tiny, tmp_path: Path) -> None:
    source, file, events = chat_source(tiny, tmp_path), conversations(tmp_path), []
    found = evaluate(source, None, str(file), length=16, windows=3, progress=events.append)
    text = "[user] What are the words?\n[assistant] They are many, and these are some of them.\n" * 40
    assert found.sha256_of_text == hashlib.sha256(text.encode()).hexdigest()
    assert [event.message for event in events if event.stage == "notice"] == [
        f"{file}: 1 of 41 rows left out (hold no text)",
        f"{file}: column 'messages' in the chat template of the model",
    ]
    body = written(tmp_path, '{"body": "words of a text "}\n' * 40, "body.jsonl")
    with pytest.raises(CalibrationError, match="there are: body"):
        evaluate(source, None, str(body), length=16, windows=3)
    assert evaluate(source, None, str(body), length=16, windows=3, text_field="body").tokens == 45


def test_the_column_is_part_of_the_recipe_only_where_it_is_given(tmp_path: Path) -> None:
    plain, named = Recipe(), Recipe(text_field="body")
    assert "text_field" not in plain.model_dump() and "text_field" not in json.loads(plain.model_dump_json())
    assert plain.fingerprint() != named.fingerprint() and Recipe(**named.model_dump()) == named
    # Recipes that were written before there were such fields keep their fingerprint.
    younger = ("text_field", "ignore", "only", "effort", "tune", "guide", "finish", "bits", "size")
    fields = {name: value for name, value in vars(plain).items() if name not in younger}
    assert (
        plain.fingerprint()
        == hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    )
    with pytest.raises(CalibrationError, match="--text-field"):
        make_windows(Recipe(calibration="self", text_field="body"), None)


def command(tiny: Tiny, folder: Path, **environment: str) -> tuple[list[str], dict[str, str]]:
    source = folder / "source"
    tiny_models.synthetic(source, blocks=3)
    file = written(folder, "Où sont les neiges d’antan? λ → ∞ 雪 " * 60)
    arguments = [sys.executable, "-m", "leangrid", "quantize", str(source), str(folder / "out"), "--scheme", "NU4",
                 "--calibration", str(file), "--samples", "4", "--length", "32"]  # fmt: skip
    return arguments, {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", **environment}


@pytest.mark.fault("C14")
def test_a_locale_without_the_characters_does_not_stop_the_run(tiny: Tiny, tmp_path: Path) -> None:
    arguments, environment = command(
        tiny, tmp_path, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", PYTHONIOENCODING="ascii:strict"
    )
    done = subprocess.run(arguments, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert b"block 3/3" in done.stderr and b"O\\xf9 sont" in done.stderr
    assert list_differences(tmp_path / "out") == []


@pytest.mark.fault("C14")
def test_readers_that_leave_do_not_stop_the_run(tiny: Tiny, tmp_path: Path) -> None:
    arguments, environment = command(tiny, tmp_path)
    process = subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    process.stderr.readline()
    process.stderr.close()
    assert process.wait(120) == 0
    assert list_differences(tmp_path / "out") == []


@pytest.mark.fault("C14")
def test_a_clock_that_jumps_does_not_stop_the_run(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jumps = itertools.cycle((1e9, -1e9, 0.0, 4e9))
    for name in ("time", "monotonic"):
        monkeypatch.setattr(time, name, lambda: next(jumps))
    with open(tmp_path / "progress", "w") as stream, Terminal(stream, interactive=True) as terminal:
        quantize(
            tiny("llama3"), tmp_path / "out", Recipe(scheme="NU4"), windows=tiny_models.tokens(2, 16), progress=terminal
        )
        assert terminal.alive
    assert list_differences(tmp_path / "out") == []


@pytest.mark.fault("C4")
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_stops_resumable_and_prints_the_command(number: signal.Signals, tiny: Tiny, tmp_path: Path) -> None:
    # It waits in its second block, so that the signal finds it there.
    arguments, environment = command(tiny, tmp_path, LEANGRID_FAILPOINT="journal.after_block:2:sleep:60")
    process = subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    seen = ""
    for line in process.stderr:
        seen += line
        if line.startswith("block 1/"):
            process.send_signal(number)
            break
    _, rest = process.communicate(timeout=120)
    assert process.returncode == 3, seen + rest
    assert (
        f"stopped by {number.name}" in rest
        and f"leangrid quantize {tmp_path / 'source'}" in rest
        and "Traceback" not in rest
    )
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").is_dir()
    (again,) = forked_ranks.run(1, lambda _: app(arguments[3:]))  # the same command
    assert again.status == 0, again.said
    assert "block 1/3" not in again.said and "block 3/3" in again.said
    assert list_differences(tmp_path / "out") == []


def test_self_calibration_needs_no_text_at_all(tiny: Tiny, tmp_path: Path) -> None:
    chosen = Recipe(scheme="NU4", calibration="self", samples=4, length=32)
    first, second = (quantize(tiny("llama3"), tmp_path / name, chosen).windows_sha256 for name in ("a", "b"))
    assert first == second
    with torch.no_grad():
        other = quantize(tiny("llama3"), tmp_path / "c", chosen.model_copy(update={"seed": 1})).windows_sha256
    assert other != first
