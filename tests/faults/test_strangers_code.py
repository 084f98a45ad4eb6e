"""Code that a checkpoint brings is never run, in whichever file it is planted and whoever says yes on stdin."""

import ast
import io
import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny_models
import torch
from typer.testing import CliRunner

import leangrid
from leangrid.cli.app import app
from leangrid.errors import LeangridError

pytestmark = pytest.mark.fault("S6")
SRC = Path(leangrid.__file__).parent
YES = "y\n" * 50


def _json(path: Path, **fields: object) -> None:
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | fields))


def _config(source: Path) -> None:
    _json(source / "config.json", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})


def _tokenizer(kind: str | None) -> Callable[[Path], None]:
    def plant(source: Path) -> None:
        path = source / "tokenizer_config.json"
        fields = json.loads(path.read_text())
        fields.pop("tokenizer_class", None)
        path.write_text(
            json.dumps(
                fields
                | {"auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}}
                | ({"tokenizer_class": kind} if kind else {})
            )
        )

    return plant


def _processors(source: Path) -> None:
    names = {
        "processor_config.json": "AutoProcessor",
        "preprocessor_config.json": "AutoImageProcessor",
        "video_preprocessor_config.json": "AutoVideoProcessor",
    }
    for name, kind in names.items():
        _json(source / name, auto_map={kind: "evil.P"}, processor_class="EvilProcessor")


def _generation(source: Path) -> None:
    _json(source / "generation_config.json", custom_generate="evil", auto_map={"AutoGenerationConfig": "evil.G"})
    (source / "custom_generate").mkdir()
    (source / "custom_generate" / "generate.py").write_text(
        (source / "evil.py").read_text() + "def generate(**kwargs): ...\n"
    )


def _template(source: Path) -> None:
    code = (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}"
        "{% for m in messages %}{{ cycler.__init__.__globals__.os.system('touch CANARY') }}{% endfor %}"
    )
    (source / "chat_template.jinja").write_text(code.replace("CANARY", str(source.parent / "canary")))


# Planted together where all of them leave a sound checkpoint, alone where the tokenizer cannot be read without its
# code.
PLANTED = {"sound": (_config, _tokenizer("PreTrainedTokenizerFast"), _processors, _generation, _template),
         "unknown class": (_tokenizer("EvilTokenizer"),), "no class": (_tokenizer(None),)}  # fmt: skip


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = tiny_models.save("llama2", tmp_path / "source", torch.bfloat16)
    canary = f"open({str(tmp_path / 'canary')!r}, 'w').write('ran')\n"
    (directory / "evil.py").write_text(
        canary + "import transformers\nclass C(transformers.LlamaConfig): ...\nclass T: ...\n"
    )
    (directory / "modeling_llama.py").write_text(canary)
    return directory


def every_command(source: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Exit codes of quantize, eval, generate, plan and load, each told yes."""
    out, name = str(source.parent / "out"), str(source)
    text = source.parent / "text.txt"
    text.write_text("the river and the stone " * 400)
    codes = []
    for arguments in (
        ["quantize", name, out, "--scheme", "W8A16", "--calibration", str(text), "--samples", "2", "--length", "32"],
        ["eval", out, "--reference", name, "--text", str(text), "--length", "32", "--windows", "1"],
        ["generate", name, "the river", "--max-new-tokens", "2"],
        ["plan", name, "--scheme", "W8A16"],
    ):
        codes.append(CliRunner().invoke(app, arguments, input=YES).exit_code)
    monkeypatch.setattr("sys.stdin", io.StringIO(YES))
    try:
        leangrid.load(source)
    except LeangridError:
        codes.append(2)
    return codes


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("where", list(PLANTED))
def test_planted_code_is_not_run(where: str, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for plant in PLANTED[where]:
        plant(source)
    codes = every_command(source, monkeypatch)
    assert not (source.parent / "canary").exists()
    assert set(codes) <= {0, 2}, codes
    assert codes[0] == 0 or where != "sound", "only a tokenizer that nothing else can read is a reason to refuse"
    out = source.parent / "out"
    assert not out.exists() or not list(out.rglob("*.py"))


@pytest.mark.filterwarnings("ignore")
def test_code_beside_a_gguf_file_is_not_run(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for plant in (_config, _tokenizer("EvilTokenizer"), _processors, _generation):
        plant(source)
    writer = gguf.GGUFWriter(source / "model.gguf", "llama")
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", np.zeros((8, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert set(every_command(source / "model.gguf", monkeypatch)) == {2}
    assert not (source.parent / "canary").exists() and not (source / "canary").exists()


def test_every_call_that_could_run_code_says_no() -> None:
    """transformers asks on the terminal where nothing is said; False is the only answer that never asks."""
    said = 0
    for path in SRC.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if node.func.attr in ("from_pretrained", "get_class_from_dynamic_module", "from_config") and not _ours(
                node.func
            ):
                given = {word.arg: word.value for word in node.keywords}
                answer = given.get("trust_remote_code")
                if node.func.attr == "from_config":
                    answer = answer or ast.Constant(
                        False
                    )  # a class is already chosen; code is only looked for in from_pretrained
                assert isinstance(answer, ast.Constant) and answer.value is False, f"{path.name}:{node.lineno}"
                said += 1
    assert said >= 3


def _ours(function: ast.Attribute) -> bool:
    return isinstance(function.value, ast.Name) and function.value.id in ("cls", "self")
