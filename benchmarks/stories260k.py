"""llama2.c's stories260K as a Hugging Face checkpoint: a trained model of 260,000 float32 weights.

It is small enough to measure quality within minutes.

    python benchmarks/stories260k.py stories260K.bin tok512.bin OUT [--text stories.txt]

The binary ("version 0", karpathy/llama2.c, export.py legacy_export): 7 int32 (dim, hidden_dim, layers, heads, kv_heads,
vocabulary, negative where the classifier is its own, sequence length), then float32 tensors, each for all layers at
once. Its RoPE rotates neighbouring pairs (2i, 2i+1) of a head; transformers rotates (i, i + half), so the rows of q and
k are permuted. The tokenizer is sentencepiece BPE with byte fallback. ``encode`` below is llama2.c's own loop, and the
converted tokenizer is compared with it on every story of a sample.

--text (stories with <|endoftext|> between them) also writes OUT/calibration.txt and OUT/evaluation.txt, the first and
second half of the stories, each opened by <s> as in training, and prints the model's perplexity on the second half and
a story that it generates.
"""

import argparse
import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS, FIRST_BYTE = 1, 2, 3
SEPARATOR = "<|endoftext|>"


@dataclass(frozen=True)
class Vocabulary:
    """The content of tok512.bin: pieces by id, with plain spaces, and the score by which pairs are merged (higher
    first)."""

    pieces: list[bytes]
    scores: list[float]

    @classmethod
    def read(cls, path: Path) -> "Vocabulary":
        raw, at = path.read_bytes(), 4  # the first int32 is the longest piece
        pieces, scores = [], []
        while at < len(raw):
            score, length = struct.unpack_from("<fi", raw, at)
            scores.append(score)
            pieces.append(raw[at + 8 : at + 8 + length])
            at += 8 + length
        if len(set(pieces)) != len(pieces):
            raise SystemExit(f"{path.name} holds a piece twice")
        return cls(pieces, scores)

    def encode(self, text: str) -> list[int]:
        """llama2.c's encode() without BOS and EOS, line by line: characters, byte fallback, then the best pair until
        none is left."""
        ids = {piece: index for index, piece in enumerate(self.pieces)}
        tokens = [ids[b" "]] if text else []
        for character in text:
            piece = character.encode()
            tokens += [ids[piece]] if piece in ids else [FIRST_BYTE + byte for byte in piece]
        while True:
            best, where, merged = -1e10, -1, -1
            for index in range(len(tokens) - 1):
                candidate = ids.get(self.pieces[tokens[index]] + self.pieces[tokens[index + 1]])
                if candidate is not None and self.scores[candidate] > best:
                    best, where, merged = self.scores[candidate], index, candidate
            if where < 0:
                return tokens
            tokens[where : where + 2] = [merged]

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The same tokenizer in ``tokenizers``' terms: merges are all splits of a piece into two others, in the order
        of the scores."""
        names = [piece.decode().replace(" ", "▁") for piece in self.pieces]
        names[0], names[BOS], names[EOS] = "<unk>", "<s>", "</s>"
        ids = {name: index for index, name in enumerate(names)}
        mergeable = range(FIRST_BYTE + 256, len(names))
        splits = [
            (-self.scores[i], cut, names[i][:cut], names[i][cut:]) for i in mergeable for cut in range(1, len(names[i]))
        ]
        merges = [(left, right) for _, _, left, right in sorted(splits) if left in ids and right in ids]
        bpe = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))  # noqa: S106
        bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        spaces = decoders.Replace("▁", " ")
        bpe.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
        bpe.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in ("<unk>", "<s>", "</s>")])
        bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
        return PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>")  # noqa: S106


def read_model(path: Path) -> tuple[LlamaConfig, dict[str, Tensor]]:
    """The config, and the state dict under the names of transformers."""
    raw = path.read_bytes()
    dim, hidden, layers, heads, kv_heads, vocabulary, positions = struct.unpack_from("<7i", raw)
    values, at = torch.from_numpy(np.frombuffer(raw, "<f4", offset=28).copy()), 0

    def take(*shape: int) -> Tensor:
        nonlocal at
        at += math.prod(shape)
        return values[at - math.prod(shape) : at].view(shape)

    half, kv_dim = dim // heads // 2, dim // heads * kv_heads
    tied, vocabulary = vocabulary > 0, abs(vocabulary)
    state = {"model.embed_tokens.weight": take(vocabulary, dim)}
    stacked = (
        ("input_layernorm", (dim,)),
        ("self_attn.q_proj", (dim, dim)),
        ("self_attn.k_proj", (kv_dim, dim)),
        ("self_attn.v_proj", (kv_dim, dim)),
        ("self_attn.o_proj", (dim, dim)),
        ("post_attention_layernorm", (dim,)),
        ("mlp.gate_proj", (hidden, dim)),
        ("mlp.down_proj", (dim, hidden)),
        ("mlp.up_proj", (hidden, dim)),
    )
    for name, shape in stacked:
        for layer, weight in enumerate(take(layers, *shape)):
            if name.endswith(("q_proj", "k_proj")):
                weight = weight.view(-1, half, 2, dim).transpose(1, 2).reshape(shape)
            state[f"model.layers.{layer}.{name}.weight"] = weight.contiguous()
    state["model.norm.weight"] = take(dim)
    take(2, positions, half)  # tables of the rotation's cosines and sines, computed anew by transformers
    state["lm_head.weight"] = state["model.embed_tokens.weight"] if tied else take(vocabulary, dim)
    if at != len(values):
        raise SystemExit(f"{path.name}: {len(values)} numbers, the header describes {at}")
    config = LlamaConfig(
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=positions,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings=tied,
        bos_token_id=BOS,
        eos_token_id=EOS,
        dtype=torch.float32,
    )
    return config, state


def convert(binary: Path, vocabulary: Path, out: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Write the checkpoint directory ``out`` and return what is in it."""
    config, state = read_model(binary)
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(state, strict=True)
    tokenizer = Vocabulary.read(vocabulary).tokenizer()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return model, tokenizer


def stories(text: str) -> list[str]:
    """The stories of a file, stripped."""
    return [story for story in (part.strip() for part in text.split(SEPARATOR)) if story]


def different(vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[str]:
    """Those of ``texts`` whose ids differ from llama2.c's."""
    return [text for text in texts if tokenizer.encode(text, add_special_tokens=False) != vocabulary.encode(text)]


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, ids: list[int], windows: int, length: int) -> float:
    """The perplexity on the first ``windows`` x ``length`` tokens, in windows that do not overlap."""
    tokens = torch.tensor(ids[: windows * length]).view(-1, length)
    logits = model(input_ids=tokens).logits[:, :-1]
    return math.exp(
        torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1)).item()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("binary", "vocabulary", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--text", type=Path)
    options = parser.parse_args()
    model, tokenizer = convert(options.binary, options.vocabulary, options.out)
    shown: dict[str, object] = {"out": options.out.name, "parameters": model.num_parameters()}
    if options.text is not None:
        every = stories(options.text.read_text(encoding="utf-8"))
        half = len(every) // 2
        for name, part in (("calibration", every[:half]), ("evaluation", every[half:])):
            # The tokenizer opens a file with <s> itself; the others stand between the stories.
            (options.out / f"{name}.txt").write_text("<s>".join(part), encoding="utf-8")
        sample = [*every[:: max(1, len(every) // 40)], "naïve café — 😀\n\n two  spaces\ttab", " leading", ""]
        wrong = different(Vocabulary.read(options.vocabulary), tokenizer, sample)
        if wrong:
            raise SystemExit(
                f"{len(wrong)} of {len(sample)} texts get other ids than in llama2.c, first: {wrong[0][:80]!r}"
            )
        ids = tokenizer.encode((options.out / "evaluation.txt").read_text(encoding="utf-8"))
        start = torch.tensor([tokenizer.encode("Once upon a time")])
        told = model.generate(start, max_new_tokens=100, do_sample=False, pad_token_id=EOS)[0]
        shown |= {
            "texts_compared": len(sample),
            "evaluation_tokens": len(ids),
            "perplexity": round(perplexity(model, ids, 32, 512), 4),
            "story": tokenizer.decode(told, skip_special_tokens=True),
        }
    print(json.dumps(shown, ensure_ascii=False))


if __name__ == "__main__":
    main()
