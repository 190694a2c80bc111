"""Token ids of the sentencepiece and tiktoken libraries.

    python -m tests.goldens.tokenizers --write     # rewrites tokenizers.json
    python -m tests.goldens.tokenizers             # compares with it

Holds two SentencePiece models and a tiktoken file, trained here on a few lines, with the ids of
`TEXTS`; and, for the real files in ../shared, a digest of the ids of some thousand lines.
"""

import base64
import gzip
import hashlib
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.data.conftest import CORPUS

FILE = Path(__file__).with_name("tokenizers.json")
SHARED = Path(__file__).resolve().parents[3] / "shared/data"

TEXTS = [
    "The cat sat on the mat.", " a space first", "  two  inside  and after  ",
    "né café 日本 😀👍🏽", "line\n\n\tand tab\r\n", "1234567 is 3.14", "don't we'll I'M",
    "▁ and <0x41>", "", " ", "aaaa", "def f(x):\n    return x  # code\n", "ﬁ ① ½ İ",
    "\u200bzero\u00a0width",
]  # fmt: skip
# Files of ../shared/data/tokenizers, with the name that a model's directory would give them.
SENTENCEPIECE = {
    "mistral/tokenizer.model.v1": "tokenizer.model",
    "mistral/mistral_instruct_tokenizer_240323.model.v3": "tokenizer.model.v3",
    "sp_test/test_ja_model.model": "tokenizer.model",
    "sp_test/test_model.model": "tokenizer.model",
    "t5/sentencepiece.model": "spiece.model",
    "tinystories_sp4096/tokenizer_4096.model": "tokenizer.model",
    "torchtune_tiny/m.model": "m.model",
}
TIKTOKEN = {"torchtune_tiny/tiktoken_small.model": "tokenizer.model"}
GPT2 = "gpt2"
# Llama 3's, from Meta's llama3/tokenizer.py.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def real_texts(shared: Path = SHARED) -> list[str]:
    """Lines of novels, plays, articles and web pages, and longer pieces of them."""
    names = ("botchan_gutenberg.txt.gz", "tinyshakespeare.txt.gz", "wikitext2_test.txt.gz")
    texts = list(TEXTS)
    for name in names:
        # <unk> in a text is an unknown token to transformers, and five characters to others.
        text = gzip.decompress((shared / "texts" / name).read_bytes()).decode()
        text = text.replace("<unk>", "unk")
        texts += text[:20_000].split("\n") + [text[i : i + 700] for i in range(0, 7_000, 700)]
    pages = gzip.decompress((shared / "texts/c4_demo.jsonl.gz").read_bytes()).splitlines()[:20]
    return texts + [json.loads(page)["text"] for page in pages]


def digest(ids: list[list[int]]) -> str:
    """A hash of lists of ids."""
    return hashlib.blake2b(json.dumps(ids).encode(), digest_size=16).hexdigest()


def _ranks(lines: bytes) -> dict[bytes, int]:
    pairs = (line.split() for line in lines.splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


def _tiktoken(ranks: dict[bytes, int], pattern: str = PATTERN) -> Callable[[str], list[int]]:
    import tiktoken

    return tiktoken.Encoding(
        "golden", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
    ).encode_ordinary


def _train_tiktoken() -> bytes:
    from tiktoken._educational import bpe_train

    ranks = bpe_train(" ".join(CORPUS), 300, PATTERN, visualise=None)
    return b"".join(base64.b64encode(token) + b" %d\n" % i for token, i in ranks.items())


def _train_sentencepiece(**options: Any) -> bytes:
    import sentencepiece

    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=file, num_threads=1, minloglevel=2,
        hard_vocab_limit=False, max_sentence_length=500, normalization_rule_name="identity",
        **options,
    )  # fmt: skip
    return file.getvalue()


def _sentencepiece(model: bytes) -> Callable[[str], list[int]]:
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_proto=model).encode


def compute() -> dict[str, Any]:
    """The models made here with the ids of TEXTS, and digests for the real files."""
    models = {
        "bpe.model": _train_sentencepiece(
            vocab_size=380, model_type="bpe", byte_fallback=True, remove_extra_whitespaces=False,
            user_defined_symbols=["<|x|>"],
        ),
        "unigram.model": _train_sentencepiece(vocab_size=120, model_type="unigram"),
        "tiktoken.model": _train_tiktoken(),
    }  # fmt: skip
    own = {}
    for name, model in models.items():
        encode = _tiktoken(_ranks(model)) if "tiktoken" in name else _sentencepiece(model)
        own[name] = {
            "model": base64.b64encode(model).decode(),
            "ids": [encode(text) for text in TEXTS],
        }
    texts, folder, real = real_texts(), SHARED / "tokenizers", {}
    for name in (*SENTENCEPIECE, *TIKTOKEN):
        model = (folder / name).read_bytes()
        encode = _tiktoken(_ranks(model)) if name in TIKTOKEN else _sentencepiece(model)
        real[name] = digest([encode(text) for text in texts])
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext.openai_public import r50k_pat_str

    files = [str(folder / GPT2 / name) for name in ("vocab.bpe", "encoder.json")]
    gpt2 = _tiktoken(data_gym_to_mergeable_bpe_ranks(*files), r50k_pat_str)
    real[GPT2] = digest([gpt2(text) for text in texts])
    return {"texts": TEXTS, "own": own, "real": real}


if __name__ == "__main__":
    values = compute()
    if "--write" in sys.argv:
        FILE.write_text(json.dumps(values, indent=1) + "\n")
    elif {**values, "own": None} != {**json.loads(FILE.read_text()), "own": None}:
        sys.exit("tokenizers.json is not what the libraries give")
