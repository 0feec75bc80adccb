"""A Hugging Face tokenizer with the ids of ours, and the proof that it has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minigpt4.common.errors import CheckpointError
from minigpt4.common.types import IMAGE_TAG
from minigpt4.conversation.tokenizer import LlamaTokenizer, Tokenizer, load_huggingface
from minigpt4.export.reading import library

PROBES = (
    "Hello world",
    " hello",
    "two  spaces and a trailing one ",
    "<s>[INST] <Img>",
    "</Img> What emotion is shown?  [/INST]",
    "a sad face</s>",
    "###Human: Why? ###Assistant: ",
    "line\nbreak\tand tab",
    "[vqa] {<10><20><30><40>} 12.5 % of $$ 3'000",
    "caf\u00e9 na\u00efve \u4f60\u597d \U0001f600",
)


def export_tokenizer(llama_model: str, ours: Tokenizer) -> Any:
    """The tokenizer to save beside exported weights. Raises CheckpointError when its ids are not ours."""
    if isinstance(ours, LlamaTokenizer):
        theirs = _fast_llama(Path(llama_model) / "tokenizer.model")
    else:
        theirs = load_huggingface(llama_model)
    check_tokenizer(theirs, ours, "the exported tokenizer")
    return theirs


def check_tokenizer(theirs: Any, ours: Tokenizer, what: str) -> None:
    """Raises CheckpointError that names the first text whose ids, or whose way back to text, differ."""
    for text in PROBES:
        wanted = ours.encode(text)
        found = list(theirs.encode(text, add_special_tokens=False))
        if found != wanted:
            raise CheckpointError(f"{what} gives {found} for {text!r}, the model was trained with {wanted}")
        back = theirs.decode(found, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if back != ours.decode(wanted):
            raise CheckpointError(f"{what} decodes {found} to {back!r}, the model's gives {ours.decode(wanted)!r}")


def add_image_token(tokenizer: Any) -> int:
    """Make IMAGE_TAG one token behind the vocabulary; returns its id. The text around it keeps its ids."""
    from tokenizers import AddedToken

    tokenizer.add_tokens([AddedToken(IMAGE_TAG, normalized=False, special=True)], special_tokens=True)
    return int(tokenizer.convert_tokens_to_ids(IMAGE_TAG))


def _fast_llama(model_file: Path) -> Any:
    """Llama's SentencePiece rule as a fast tokenizer: a space piece in front of every text, no stripping.

    transformers 5 builds another pipeline from the same file, with other ids for leading spaces and after ``<s>``.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
    from tokenizers.models import BPE

    vocab, merges = _bpe(model_file)
    pipeline: Any = Tokenizer(BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    pipeline.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    pipeline.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = [AddedToken(token, normalized=False, special=True) for token in ("<unk>", "<s>", "</s>")]
    pipeline.add_special_tokens(special)
    pipeline.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    # No padding token: naming '$$', the piece training pads with, would make it special in ordinary text.
    return library().PreTrainedTokenizerFast(
        tokenizer_object=pipeline, bos_token="<s>", eos_token="</s>", unk_token="<unk>", padding_side="left"
    )


def _bpe(model_file: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Pieces and merges of a SentencePiece BPE model; the piece with the higher score is merged first."""
    import sentencepiece

    model: Any = sentencepiece.SentencePieceProcessor()
    model.LoadFromSerializedProto(model_file.read_bytes())
    vocab = {str(model.id_to_piece(i)): i for i in range(int(model.get_piece_size()))}
    ranked: list[tuple[float, int, int, int, tuple[str, str]]] = []
    for piece, number in vocab.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab:
                ranked.append((-float(model.get_score(number)), number, vocab[left], vocab[right], (left, right)))
    return vocab, [pair for *_, pair in sorted(ranked)]
