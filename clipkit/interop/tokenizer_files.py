"""The tokenizer files in a folder of transformers', read without the package.

CLIP's own vocabulary and SigLIP's SentencePiece model run in our tokenizers, which clean texts as these models' authors
did; any other is a `tokenizer.json` of Hugging Face's `tokenizers`, and runs as it is.
"""

import gzip
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import normalizers

from clipkit.embedding.encoder import TextTokenizer
from clipkit.errors import UserError, one_line
from clipkit.storage.files import read_json, read_text, write_json
from clipkit.text.sentence_piece import SentencePiece
from clipkit.text.tokenizer import MERGES, MERGES_FILE, SPECIAL, Tokenizer

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
CLIP_FILES = ("vocab.json", "merges.txt")
# The classes, of those that a SigLIP 2 has, that pad on the left unless their file says otherwise.
PADDING_LEFT = ("Siglip2Tokenizer", "GemmaTokenizer", "GemmaTokenizerFast")


class FolderTokenizer:
    """A `tokenizer.json` behind the face of `TextTokenizer`: rows padded as transformers' `padding="max_length"`."""

    name = "tokenizer.json"

    def __init__(self, folder: Path, lower: bool) -> None:
        path = folder / "tokenizer.json"
        try:
            self.fast = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"can't read the tokenizer {path} ({one_line(error)[:120]}): copy it again") from error
        self.fast.no_padding()
        self.fast.no_truncation()
        self.lowered = lower and "Lowercase" not in repr(self.fast.normalizer)
        if self.lowered:
            first = [self.fast.normalizer] if self.fast.normalizer else []
            self.fast.normalizer = normalizers.Sequence([normalizers.Lowercase(), *first])
        plain, whole = (self.fast.encode("a", add_special_tokens=add).ids for add in (False, True))
        at = next(at for at in range(len(whole)) if whole[at : at + len(plain)] == plain)
        self.before, self.after = whole[:at], whole[at + len(plain) :]
        settings = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
        pad = settings.get("pad_token")
        self.pad = self.fast.token_to_id(pad["content"] if isinstance(pad, dict) else pad) if pad else None
        if self.pad is None:
            raise UserError(f"{folder}/tokenizer_config.json names no pad_token of the vocabulary: copy it too")
        default_side = "left" if settings.get("tokenizer_class") in PADDING_LEFT else "right"
        self.pads_left = settings.get("padding_side", default_side) == "left"

    @property
    def vocab_size(self) -> int:
        """How many ids there are."""
        return int(self.fast.get_vocab_size())

    @property
    def specials(self) -> int:
        """How many ids a text has beside its own."""
        return len(self.before) + len(self.after)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, without specials, not cut."""
        return [encoding.ids for encoding in self.fast.encode_batch(list(texts), add_special_tokens=False)]

    def rows(self, encoded: Sequence[list[int]], context_length: int) -> NDArray[np.int32]:
        """int32[B, context_length]: the same with specials, cut and padded."""
        ids_BT = np.full((len(encoded), context_length), self.pad, np.int32)
        for row, ids in zip(ids_BT, encoded, strict=True):
            kept = self.before + ids[: context_length - self.specials] + self.after
            row[len(row) - len(kept) if self.pads_left else 0 :][: len(kept)] = kept
        return ids_BT


def read_tokenizer(folder: Path, kind: str, vocab_size: int) -> tuple[TextTokenizer, tuple[str, ...]]:
    """The tokenizer of a CLIP or SigLIP, and what a user should know about it.

    Raises UserError where there is none, and for one with more ids than the model has.
    """
    notes: tuple[str, ...] = ()
    found: Tokenizer | SentencePiece | FolderTokenizer
    if kind == "clip" and is_clips(folder):
        found = Tokenizer()
    elif kind == "siglip" and (folder / "spiece.model").is_file():
        found = SentencePiece(folder / "spiece.model")
    elif (folder / "tokenizer.json").is_file():
        found = FolderTokenizer(folder, lower=kind == "siglip")
        if found.lowered:
            notes = (
                f"{folder}/tokenizer.json keeps capitals; SigLIP 2 was trained without, so texts are put in lower case",
            )
        if kind == "clip" and found.after[-1:] != [vocab_size - 1]:
            raise UserError(f"{folder}/tokenizer.json doesn't end texts with the id {vocab_size - 1}: copy it again")
    elif kind == "clip" and all((folder / name).is_file() for name in CLIP_FILES):
        raise UserError(f"vocab.json and merges.txt in {folder} aren't CLIP's own: copy its tokenizer.json too")
    else:
        wanted = (
            f"tokenizer.json, or {' and '.join(CLIP_FILES)}" if kind == "clip" else "spiece.model or tokenizer.json"
        )
        raise UserError(f"{folder} has no tokenizer: copy its {wanted} too")
    if found.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer in {folder} has {found.vocab_size:,} ids, the model {vocab_size:,}: copy both again"
        )
    return found, notes


def is_clips(folder: Path) -> bool:
    """Whether the folder's vocabulary and merges are those of CLIP's own tokenizer."""
    if all((folder / name).is_file() for name in CLIP_FILES):
        vocabulary = read_json(folder / "vocab.json")
        merges: list[Any] = read_text(folder / "merges.txt", "merges").split("\n")
    elif (folder / "tokenizer.json").is_file():
        model = read_json(folder / "tokenizer.json").get("model", {})
        vocabulary, merges = model.get("vocab"), model.get("merges", [])
    else:
        return False
    pairs = [" ".join(merge) if isinstance(merge, list) else merge for merge in merges]
    own_vocabulary, own_merges = clip_files()
    return (
        vocabulary == own_vocabulary
        and [pair for pair in pairs if pair and not pair.startswith("#version:")] == own_merges
    )


@cache
def clip_files() -> tuple[dict[str, int], list[str]]:
    """The `vocab.json` and the lines of the `merges.txt` that transformers has for CLIP's tokenizer."""
    merges = gzip.decompress(MERGES_FILE.read_bytes()).decode("utf-8").split("\n")[1 : MERGES + 1]
    pieces = Tokenizer().pieces
    words = [*pieces[: -len(SPECIAL)], BEGIN, END]
    return {word: number for number, word in enumerate(words)}, merges


def write_clip_files(folder: Path, context_length: int) -> None:
    """Write CLIP's tokenizer for transformers: `vocab.json`, `merges.txt` and `tokenizer_config.json`."""
    vocabulary, merges = clip_files()
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": context_length,
        "bos_token": BEGIN,
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
    }
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    write_json(folder / "tokenizer_config.json", settings)
